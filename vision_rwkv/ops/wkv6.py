"""WKV6 in both directions, the operator of VRWKV6: checks, registration, autograd, shapes."""

import torch
from torch import Tensor

from vision_rwkv.ops import _checks, _native, fallback

_NAME = f'{_native.NAMESPACE}::wkv6'
_GATED = f'{_native.NAMESPACE}::gated_wkv6'

torch.library.define(_NAME, '(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> Tensor')
torch.library.define(
    f'{_NAME}_backward',
    '(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor gy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)
torch.library.define(
    _GATED,
    '(Tensor r, Tensor k, Tensor v, Tensor raw, Tensor base, Tensor u, Tensor gate, Tensor weight, Tensor bias, '
    'float eps) -> Tensor',
)


@torch.library.impl(_NAME, 'CompositeExplicitAutograd')
def _forward_pytorch(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    _native.warn_fallback(r.device)
    with torch.autocast(r.device.type, enabled=False):
        return fallback.wkv6(r, k, v, w, u)


@torch.library.impl(f'{_NAME}_backward', 'CompositeExplicitAutograd')
def _backward_pytorch(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast(r.device.type, enabled=False):
        return fallback.wkv6_backward(r, k, v, w, u, gy)


@torch.library.register_fake(_NAME)
def _forward_fake(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    return r.new_empty(r.shape)


@torch.library.register_fake(f'{_NAME}_backward')
def _backward_fake(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (r, k, v, w, u))


@torch.library.impl(_GATED, 'CompositeExplicitAutograd')
def _gated(r, k, v, raw, base, u, gate, weight, bias, eps):
    ops, heads = torch.ops.vision_rwkv, u.shape[0]
    # The sum over the tokens is not bounded, and float16 ends at 65504; the norm that follows takes any size.
    inner = torch.float32 if r.dtype == torch.float16 else r.dtype
    r, k, v, w = (x.unflatten(-1, (heads, -1)) for x in (*(x.to(inner) for x in (r, k, v)), ops.log_decay(raw, base)))
    return ops.norm_gate(ops.wkv6(r, k, v, w, u).flatten(2), gate, weight, bias, heads, eps, gate.dtype)


@torch.library.register_fake(_GATED)
def _gated_fake(r, k, v, raw, base, u, gate, weight, bias, eps):
    return gate.new_empty(gate.shape)


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gy: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.vision_rwkv.wkv6_backward(*ctx.saved_tensors, gy)


_native.register_autograd('wkv6', _backward, _save)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """WKV6 in both directions: linear attention with a decay of each token and channel (arXiv 2403.02308, VRWKV6).

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t) + r_t S'_{t+1}, with S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t from the
    first token on and S'_t = diag(exp(w_t)) S'_{t+1} + k_t^T v_t from the last one back.

    Args:
        r, k, v: receptance, keys and values, (B, T, H, N), of one dtype; any strides, T >= 0, B >= 0.
        w: log decay, (B, T, H, N), at most 0; any supported dtype. The models pass -exp(raw).
        u: bonus for the token itself, (H, N), any supported dtype.

    Returns:
        y, (B, T, H, N), in the dtype of r. float32, bfloat16, float16 and float64 are taken; sums are kept in
        float32, in float64 for float64. Gradients come in their inputs' dtypes. Under autocast r, k and v are cast to
        autocast's dtype, w and u are not. There is no second derivative.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected and what came.
    """
    _checks.check(
        'wkv6',
        {'r': 'BTHN', 'k': 'BTHN', 'v': 'BTHN', 'w': 'BTHN', 'u': 'HN'},
        {'r': r, 'k': k, 'v': v, 'w': w, 'u': u},
    )
    r, k, v = _checks.autocast(r, k, v)
    _checks.check_dtypes('wkv6', r=r, k=k, v=v)
    return torch.ops.vision_rwkv.wkv6(r, k, v, w, u)


def gated_wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    raw: Tensor,
    base: Tensor,
    u: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """norm_gate(wkv6(r, k, v, log_decay(raw, base), u), gate, weight, bias, heads, eps), for inference.

    r, k, v, raw, gate and the result (B, T, C), of one dtype; base, weight, bias of C values; u (H, N), C = H N.

    Raises:
        RuntimeError: gradients are asked for; see `wkv6`, `log_decay` and `norm_gate`.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (r, k, v, raw, base, u, gate, weight, bias)):
        raise RuntimeError('gated_wkv6 has no gradient: use wkv6, log_decay and norm_gate, or torch.no_grad()')
    return torch.ops.vision_rwkv.gated_wkv6(r, k, v, raw, base, u, gate, weight, bias, eps)
