"""The backbones as plain PyTorch modules, with the tensor names of the released checkpoints."""

from vision_rwkv.backbones.adapter import VRWKV6Adapter, VRWKVAdapter
from vision_rwkv.backbones.vrwkv import VRWKV
from vision_rwkv.backbones.vrwkv6 import VRWKV6

__all__ = ['VRWKV', 'VRWKV6', 'VRWKV6Adapter', 'VRWKVAdapter']
