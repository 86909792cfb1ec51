"""The backbones, registered in MMPretrain, and the head of VRWKV-L."""

from mmengine.model import BaseModule
from mmpretrain.models import VisionTransformerClsHead
from mmpretrain.registry import MODELS

from openmmlab import InitCfg
from vision_rwkv import backbones


@MODELS.register_module()
class VRWKV(InitCfg, backbones.VRWKV, BaseModule):
    """`vision_rwkv.backbones.VRWKV` with MMEngine's `init_cfg`; same arguments, same tensor names."""


@MODELS.register_module()
class VRWKV6(InitCfg, backbones.VRWKV6, BaseModule):
    """`vision_rwkv.backbones.VRWKV6` with MMEngine's `init_cfg`; same arguments, same tensor names."""


@MODELS.register_module()
class HiddenLayerClsHead(VisionTransformerClsHead):
    """MMPretrain's `VisionTransformerClsHead`, initialised by its `init_cfg` alone.

    The original redraws the hidden layer afterwards with a larger standard deviation.
    """

    init_weights = BaseModule.init_weights
