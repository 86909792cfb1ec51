"""Bi-WKV, the bidirectional WKV operator of VRWKV: checks, registration, autograd, shapes."""

import torch
from torch import Tensor

from vision_rwkv.ops import _checks, _native, fallback

_NAME = f'{_native.NAMESPACE}::bi_wkv'
_GATED = f'{_native.NAMESPACE}::gated_bi_wkv'

torch.library.define(_NAME, '(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor')
torch.library.define(
    f'{_NAME}_backward', '(Tensor w, Tensor u, Tensor k, Tensor v, Tensor gy) -> (Tensor, Tensor, Tensor, Tensor)'
)
torch.library.define(_GATED, '(Tensor w, Tensor u, Tensor k, Tensor v, Tensor r) -> Tensor')


@torch.library.impl(_NAME, 'CompositeExplicitAutograd')
def _forward_pytorch(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _native.warn_fallback(k.device)
    with torch.autocast(k.device.type, enabled=False):
        return fallback.bi_wkv(w, u, k, v)


@torch.library.impl(f'{_NAME}_backward', 'CompositeExplicitAutograd')
def _backward_pytorch(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast(k.device.type, enabled=False):
        return fallback.bi_wkv_backward(w, u, k, v, gy)


@torch.library.register_fake(_NAME)
def _forward_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(k.shape)


@torch.library.register_fake(f'{_NAME}_backward')
def _backward_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (w, u, k, v))


@torch.library.impl(_GATED, 'CompositeExplicitAutograd')
def _gated(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    tokens = k.shape[1]
    return torch.ops.vision_rwkv.gate(r, torch.ops.vision_rwkv.bi_wkv(w / tokens, u / tokens, k, v))


@torch.library.register_fake(_GATED)
def _gated_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return k.new_empty(k.shape)


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gy: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.vision_rwkv.bi_wkv_backward(*ctx.saved_tensors, gy)


_native.register_autograd('bi_wkv', _backward, _save)


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bidirectional WKV, arXiv 2403.02308 equation 5: y_t is a softmax-weighted mean of v over all tokens.

    The weight of token i at token t is exp(-(|t-i|-1) w + k_i), and exp(u + k_t) for t itself.

    Args:
        w: decay of each channel and token, (C,), any sign. The models pass spatial_decay / T.
        u: bonus of each channel for the token itself, (C,). The models pass spatial_first / T.
        k, v: keys and values, (B, T, C), of one dtype; any strides, T >= 0, B >= 0.

    Returns:
        y, (B, T, C), in the dtype of k and v. float32, bfloat16, float16 and float64 are taken; sums are kept in
        float32, in float64 for float64. Gradients come in their inputs' dtypes. Under autocast k and v are cast to
        autocast's dtype, w and u are not. There is no second derivative.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected and what came.
    """
    _checks.check('bi_wkv', {'k': 'BTC', 'v': 'BTC', 'w': 'C', 'u': 'C'}, {'k': k, 'v': v, 'w': w, 'u': u})
    k, v = _checks.autocast(k, v)
    _checks.check_dtypes('bi_wkv', k=k, v=v)
    return torch.ops.vision_rwkv.bi_wkv(w, u, k, v)


def gated_bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """sigmoid(r) * bi_wkv(w / T, u / T, k, v), r, k, v and the result (B, T, C) of one dtype, for inference.

    Raises:
        RuntimeError: gradients are asked for; see `bi_wkv` and `gate`.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (w, u, k, v, r)):
        raise RuntimeError('gated_bi_wkv has no gradient: use bi_wkv and gate, or torch.no_grad()')
    return torch.ops.vision_rwkv.gated_bi_wkv(w, u, k, v, r)
