"""The bidirectional WKV operators. Needs PyTorch alone."""

from vision_rwkv.ops._native import implementation
from vision_rwkv.ops.bi_wkv import bi_wkv
from vision_rwkv.ops.wkv6 import wkv6

__all__ = ['bi_wkv', 'implementation', 'wkv6']
