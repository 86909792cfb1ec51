"""The adapters with MMEngine's `init_cfg`; Pretrained takes a classification checkpoint, see `PretrainedInit`."""

from mmengine.model import BaseModule

from openmmlab import InitCfg
from vision_rwkv import backbones


class VRWKVAdapter(InitCfg, backbones.VRWKVAdapter, BaseModule):
    """`vision_rwkv.backbones.VRWKVAdapter` with `init_cfg`; same arguments, same tensor names."""


class VRWKV6Adapter(InitCfg, backbones.VRWKV6Adapter, BaseModule):
    """`vision_rwkv.backbones.VRWKV6Adapter` with `init_cfg`; same arguments, same tensor names."""
