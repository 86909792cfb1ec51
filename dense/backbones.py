"""The adapters with MMEngine's `init_cfg`."""

from copy import deepcopy
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule

from vision_rwkv import backbones
from vision_rwkv.backbones.pretrained import load_backbone


class InitCfg:
    """`init_cfg` for a backbone: Pretrained takes a classification checkpoint, and says what does not match."""

    def __init__(self, *args: Any, init_cfg: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.init_cfg = deepcopy(init_cfg)

    def init_weights(self) -> None:
        """Load the checkpoint of a Pretrained `init_cfg`; any other is MMEngine's. Raises ValueError if none fits."""
        if not isinstance(self.init_cfg, dict) or self.init_cfg.get('type') != 'Pretrained':
            BaseModule.init_weights(self)
            return
        path = self.init_cfg['checkpoint']
        loaded = load_backbone(self, path)
        print_log(f'{type(self).__name__} starts from {path}; what does not match keeps its initial value', 'current')
        names = {'not in the file': loaded.missing, 'not in the model': loaded.unexpected}
        for what, which in {**names, 'of another shape': loaded.misshapen}.items():
            if which:
                print_log(f'{len(which)} tensors {what}: {", ".join(which)}', 'current')
        self._is_init = True


class VRWKVAdapter(InitCfg, backbones.VRWKVAdapter, BaseModule):
    """`vision_rwkv.backbones.VRWKVAdapter` with `init_cfg`; same arguments, same tensor names."""


class VRWKV6Adapter(InitCfg, backbones.VRWKV6Adapter, BaseModule):
    """`vision_rwkv.backbones.VRWKV6Adapter` with `init_cfg`; same arguments, same tensor names."""
