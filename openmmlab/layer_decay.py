"""Layer-wise learning-rate decay: the nearer a layer is to the image, the slower it learns."""

import re
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

STEM = re.compile(r'backbone\.(patch_embed\.|pos_embed$|cls_token$)')
LAYER = re.compile(r'backbone\.layers\.(\d+)\.')


def layer_groups(model: nn.Module) -> tuple[dict[str, int], int]:
    """({parameter name: its group}, number of groups) of a model with one of our backbones as ``model.backbone``.

    Group 0: patch and position embedding. Group i + 1: layer i. The last group: everything else.
    """
    last = len(model.backbone.layers) + 1
    groups = {}
    for name, _ in model.named_parameters():
        layer = LAYER.match(name)
        groups[name] = int(layer[1]) + 1 if layer else 0 if STEM.match(name) else last
    return groups, last + 1


class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimiser groups with the learning rate lr * rate ** (last group - group); frozen parameters are left out.

    Biases and other 1-D tensors have no weight decay; position and level embedding and mixes have. The config gives
    the rate: paramwise_cfg=dict(layer_decay_rate=0.85).
    """

    def _validate_cfg(self) -> None:
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if set(self.paramwise_cfg) != {'layer_decay_rate'} or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg must be dict(layer_decay_rate=RATE), 0 < RATE <= 1, got {self.paramwise_cfg}'
            )
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(f'the optimizer needs lr and weight_decay, got {self.optimizer_cfg}')

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append to ``params`` one group for each learning rate and weight decay."""
        groups, count = layer_groups(module)
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            group, decayed = groups[name], parameter.ndim > 1 and not name.endswith('.bias')
            scale = self.paramwise_cfg['layer_decay_rate'] ** (count - 1 - group)
            settings = {
                'params': [],
                'lr': self.base_lr * scale,
                'weight_decay': self.base_wd if decayed else 0.0,
                'name': f'layer_{group}_{"decay" if decayed else "no_decay"}',
            }
            found.setdefault((group, decayed), settings)['params'].append(parameter)
        params.extend(found.values())
