"""The operators: bidirectional WKV, Q-Shift with its mixes, and what the models fuse around them. PyTorch alone."""

from vision_rwkv.ops import block as _block  # noqa: F401 (registers the operators)
from vision_rwkv.ops._native import implementation
from vision_rwkv.ops.bi_wkv import bi_wkv, gated_bi_wkv
from vision_rwkv.ops.dynamic_mix import dynamic_linear
from vision_rwkv.ops.fused import (
    gate,
    gated_linear,
    log_decay,
    mix_linear,
    norm_gate,
    norm_tokens,
    patches,
    residual,
    squared_relu,
    squared_relu_linear,
    squared_relu_mlp,
)
from vision_rwkv.ops.q_shift import Norm, q_shift
from vision_rwkv.ops.wkv6 import gated_wkv6, wkv6

__all__ = [
    'Norm',
    'bi_wkv',
    'dynamic_linear',
    'gate',
    'gated_bi_wkv',
    'gated_linear',
    'gated_wkv6',
    'implementation',
    'log_decay',
    'mix_linear',
    'norm_gate',
    'norm_tokens',
    'patches',
    'q_shift',
    'residual',
    'squared_relu',
    'squared_relu_linear',
    'squared_relu_mlp',
    'wkv6',
]
