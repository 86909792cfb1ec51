"""The backbones, registered in MMPretrain, and the head of VRWKV-L."""

from copy import deepcopy

from mmengine.model import BaseModule
from mmpretrain.models import VisionTransformerClsHead
from mmpretrain.registry import MODELS

from vision_rwkv import backbones


@MODELS.register_module()
class VRWKV(backbones.VRWKV, BaseModule):
    """`vision_rwkv.backbones.VRWKV` with MMEngine's `init_cfg`; same arguments, same tensor names."""

    def __init__(self, *args, init_cfg=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_cfg = deepcopy(init_cfg)

    init_weights = BaseModule.init_weights


@MODELS.register_module()
class VRWKV6(backbones.VRWKV6, BaseModule):
    """`vision_rwkv.backbones.VRWKV6` with MMEngine's `init_cfg`; same arguments, same tensor names."""

    def __init__(self, *args, init_cfg=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_cfg = deepcopy(init_cfg)

    init_weights = BaseModule.init_weights


@MODELS.register_module()
class HiddenLayerClsHead(VisionTransformerClsHead):
    """MMPretrain's `VisionTransformerClsHead`, initialised by its `init_cfg` alone.

    The original redraws the hidden layer afterwards with a larger standard deviation.
    """

    init_weights = BaseModule.init_weights
