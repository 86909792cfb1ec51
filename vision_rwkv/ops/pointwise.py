"""What the models compute value by value or token by token between the other operators, a pass over memory each.

In PyTorch here, which serves the CPU, natively for CUDA in kernels/pointwise. All of them compute in float32 at least
and round once. There are no second derivatives.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vision_rwkv.ops import _checks, _native
from vision_rwkv.ops.q_shift import norm_backward

FLOAT16_SQUARE_MAX = 255.0  # 256 ** 2 is past float16's largest number, 65504


def _register(name: str, schema: str, forward: Callable, fake: Callable) -> None:
    """Define the operator and its PyTorch implementation for every device."""
    full = f'{_native.NAMESPACE}::{name}'
    torch.library.define(full, schema)
    torch.library.impl(full, 'CompositeExplicitAutograd', forward)
    torch.library.register_fake(full, fake)


def _wide(*xs: Tensor) -> list[Tensor]:
    dtype = _checks.compute_dtype(*xs)
    return [x.to(dtype) for x in xs]


def _like(first: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """An empty tensor like each; of no size for None."""
    return tuple(first.new_empty(0) if x is None else x.new_empty(x.shape) for x in (first, *others))


# gate: sigmoid(r) * y, in the dtype of y ------------------------------------------------------------------------------


def _gate(r: Tensor, y: Tensor) -> Tensor:
    out = torch.sigmoid(r)  # of one dtype these two are as exact as a pass in float32, or nearly so
    return out.mul_(y) if out.dtype == y.dtype else (out * y).to(y.dtype)


def _gate_backward(g: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide_g, wide_r, wide_y = _wide(g, r, y)
    s = torch.sigmoid(wide_r)
    gy = wide_g * s
    return (gy * wide_y * (1 - s)).to(r.dtype), gy.to(y.dtype)


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_register('gate', '(Tensor r, Tensor y) -> Tensor', _gate, lambda r, y: y.new_empty(y.shape))
_register(
    'gate_backward', '(Tensor g, Tensor r, Tensor y) -> (Tensor, Tensor)', _gate_backward, lambda g, r, y: _like(r, y)
)
_native.register_autograd(
    'gate', lambda ctx, g: torch.ops.vision_rwkv.gate_backward(g, *ctx.saved_tensors), _save_inputs
)


# squared_relu: relu(x) ** 2 -------------------------------------------------------------------------------------------


def _clipped(x: Tensor) -> Tensor:
    return torch.clamp(x, 0, FLOAT16_SQUARE_MAX) if x.dtype == torch.float16 else torch.relu(x)


def _squared_relu(x: Tensor) -> Tensor:
    x = _clipped(x)
    return x.mul_(x)


def _squared_relu_backward(g: Tensor, x: Tensor) -> Tensor:
    grad = 2 * g * _clipped(x)
    return grad.masked_fill(x > FLOAT16_SQUARE_MAX, 0) if x.dtype == torch.float16 else grad


torch.library.define(f'{_native.NAMESPACE}::squared_relu_', '(Tensor(a!) x) -> Tensor(a!)')  # for native code alone
_register('squared_relu', '(Tensor x) -> Tensor', _squared_relu, lambda x: x.new_empty(x.shape))
_register(
    'squared_relu_backward', '(Tensor g, Tensor x) -> Tensor', _squared_relu_backward, lambda g, x: x.new_empty(x.shape)
)
_native.register_autograd(
    'squared_relu', lambda ctx, g: torch.ops.vision_rwkv.squared_relu_backward(g, *ctx.saved_tensors), _save_inputs
)


# residual: x + scale * gamma * norm(sigmoid(gate) * z), and the statistics of the sum for the norm after it -----------


def _branch(z: Tensor, gate: Tensor | None) -> Tensor:
    (z,) = _wide(z)
    return z if gate is None else torch.sigmoid(gate.to(z.dtype)) * z


def _per_sample(scale: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if scale is None else scale.to(dtype).view(-1, 1, 1)


def _residual(x, z, gate, weight, bias, gamma, scale, eps, stats_eps):
    if gate is None and weight is None and gamma is None and scale is None:
        out = x + z  # all that inference does with a plain residual
    else:
        n = _branch(z, gate)
        if weight is not None:
            n = torch.native_layer_norm(n, n.shape[-1:], weight.to(n.dtype), bias.to(n.dtype), eps)[0]
        n = n if gamma is None else n * gamma.to(n.dtype)
        out = (x + n * _per_sample(scale, n.dtype)).to(x.dtype)
    return out, x.new_empty(0) if stats_eps is None else torch.ops.vision_rwkv.norm_stats(out, stats_eps)


def _residual_backward(g, z, gate, weight, bias, gamma, scale, eps):
    n = branch = _branch(z, gate)
    gn = g.to(n.dtype) * _per_sample(scale, n.dtype)
    grads = dict.fromkeys(('gate', 'weight', 'bias', 'gamma'), z.new_empty(0))
    if weight is not None:
        variance, mean = torch.var_mean(n, -1, correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
        unit = (n - mean) * rstd
        n = unit * weight.to(n.dtype) + bias.to(n.dtype)
    if gamma is not None:
        grads['gamma'] = (gn * n).sum((0, 1)).to(gamma.dtype)
        gn = gn * gamma.to(n.dtype)
    if weight is not None:
        grads['weight'], grads['bias'] = (gn * unit).sum((0, 1)).to(weight.dtype), gn.sum((0, 1)).to(bias.dtype)
        gn = norm_backward(gn * weight.to(n.dtype), unit, rstd)
    if gate is not None:
        s = torch.sigmoid(gate.to(n.dtype))
        grads['gate'] = (gn * branch * (1 - s)).to(gate.dtype)
        gn = gn * s
    return gn.to(z.dtype), *grads.values()


def _residual_fake(x, z, gate, weight, bias, gamma, scale, eps, stats_eps):
    stats = x.new_empty(0) if stats_eps is None else x.new_empty((*x.shape[:-1], 2), dtype=_checks.compute_dtype(x))
    return x.new_empty(x.shape), stats


def _save_residual(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, z, gate, weight, bias, gamma, scale, ctx.eps, _ = inputs
    ctx.plain = gate is None and weight is None and gamma is None
    ctx.dtype = z.dtype
    ctx.save_for_backward(*((scale,) if ctx.plain else (z, gate, weight, bias, gamma, scale)))
    ctx.set_materialize_grads(False)


def _residual_grad(ctx, g: Tensor | None, _) -> tuple:
    if g is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    if ctx.plain:
        gz = g if saved[0] is None else g * _per_sample(saved[0], g.dtype)
        return g, gz.to(ctx.dtype), *[None] * 7
    grads = torch.ops.vision_rwkv.residual_backward(g, *saved, ctx.eps)
    return g, *(None if x is None else grad for x, grad in zip(saved, grads, strict=False)), None, None, None


_PARTS = 'Tensor z, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? scale, float eps'
_register('residual', f'(Tensor x, {_PARTS}, float? stats_eps) -> (Tensor, Tensor)', _residual, _residual_fake)
_register(
    'residual_backward',
    f'(Tensor g, {_PARTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _residual_backward,
    lambda g, z, gate, weight, bias, gamma, scale, eps: _like(z, gate, weight, bias, gamma),
)
_native.register_autograd('residual', _residual_grad, _save_residual)


# log_decay: -exp(base + raw), in float32 at least ---------------------------------------------------------------------


def _log_decay(raw: Tensor, base: Tensor) -> Tensor:
    raw, base = _wide(raw, base)
    return (raw + base.view(-1)).exp_().neg_()


def _log_decay_backward(g: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    graw = g * w
    return graw.to(dtype), graw.sum((0, 1))


def _save_log_decay(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.dtype, ctx.base = inputs[0].dtype, (inputs[1].shape, inputs[1].dtype)
    ctx.save_for_backward(output)


def _log_decay_grad(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
    graw, gbase = torch.ops.vision_rwkv.log_decay_backward(g, *ctx.saved_tensors, ctx.dtype)
    shape, dtype = ctx.base
    return graw, gbase.view(shape).to(dtype)


_register(
    'log_decay',
    '(Tensor raw, Tensor base) -> Tensor',
    _log_decay,
    lambda raw, base: raw.new_empty(raw.shape, dtype=_checks.compute_dtype(raw, base)),
)
_register(
    'log_decay_backward',
    '(Tensor g, Tensor w, ScalarType dtype) -> (Tensor, Tensor)',
    _log_decay_backward,
    lambda g, w, dtype: (w.new_empty(w.shape, dtype=dtype), w.new_empty(w.shape[-1])),
)
_native.register_autograd('log_decay', _log_decay_grad, _save_log_decay)


# norm_gate: GroupNorm(y) * silu(gate), the groups being heads of the channels -----------------------------------------


def _head_unit(y: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised heads (B, T, H, N), and 1 / deviation (B, T, H, 1)."""
    (y,) = _wide(y.unflatten(-1, (heads, -1)))
    variance, mean = torch.var_mean(y, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return (y - mean) * rstd, rstd


def _norm_gate(y, gate, weight, bias, heads, eps, dtype):
    n = _head_unit(y, heads, eps)[0].flatten(2) * weight + bias
    return (n * torch.nn.functional.silu(gate.to(n.dtype))).to(dtype)


def _norm_gate_backward(g, y, gate, weight, bias, heads, eps):
    unit, rstd = _head_unit(y, heads, eps)
    flat, g, wide_gate = unit.flatten(2), g.to(unit.dtype), gate.to(unit.dtype)
    s = torch.sigmoid(wide_gate)
    gn = g * wide_gate * s
    ggate = g * (flat * weight + bias) * s * (1 + wide_gate * (1 - s))
    gy = norm_backward((gn * weight).view_as(unit), unit, rstd).flatten(2)
    gweight, gbias = (gn * flat).sum((0, 1)).to(weight.dtype), gn.sum((0, 1)).to(bias.dtype)
    return gy.to(y.dtype), ggate.to(gate.dtype), gweight, gbias


def _save_norm_gate(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:6]


def _norm_gate_grad(ctx, g: Tensor) -> tuple:
    return *torch.ops.vision_rwkv.norm_gate_backward(g, *ctx.saved_tensors, *ctx.how), None, None, None


_NORM_GATE = 'Tensor y, Tensor gate, Tensor weight, Tensor bias, int heads, float eps'
_register(
    'norm_gate',
    f'({_NORM_GATE}, ScalarType dtype) -> Tensor',
    _norm_gate,
    lambda y, gate, weight, bias, heads, eps, dtype: y.new_empty(y.shape, dtype=dtype),
)
_register(
    'norm_gate_backward',
    f'(Tensor g, {_NORM_GATE}) -> (Tensor, Tensor, Tensor, Tensor)',
    _norm_gate_backward,
    lambda g, y, gate, weight, bias, heads, eps: _like(y, gate, weight, bias),
)
_native.register_autograd('norm_gate', _norm_gate_grad, _save_norm_gate)


# norm_tokens: a layer norm of z + position, and the statistics of the result; for inference ---------------------------


def _norm_tokens(z, position, weight, bias, eps, stats_eps, dtype):
    (x,) = _wide(z)
    x = x if position is None else x + position.to(x.dtype)
    out = torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)[0].to(dtype)
    return out, out.new_empty(0) if stats_eps is None else torch.ops.vision_rwkv.norm_stats(out, stats_eps)


def _norm_tokens_fake(z, position, weight, bias, eps, stats_eps, dtype):
    out = z.new_empty(z.shape, dtype=dtype)
    return _residual_fake(out, out, None, None, None, None, None, eps, stats_eps)


_register(
    'norm_tokens',
    '(Tensor z, Tensor? position, Tensor weight, Tensor bias, float eps, float? stats_eps, ScalarType dtype) '
    '-> (Tensor, Tensor)',
    _norm_tokens,
    _norm_tokens_fake,
)


# patches: images in the order in which a linear map takes their patches, in another dtype; no gradient ----------------


def order_patches(x: Tensor, side: int, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What `patches` does, in PyTorch, with a gradient; an export for any size says how many patches there are."""
    h, w = grid
    x = x.unflatten(3, (w, side)).unflatten(2, (h, side)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, channels, side, side)
    return x.to(dtype, memory_format=torch.contiguous_format).flatten(3).flatten(1, 2)


def _patches(x: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    return order_patches(x, side, (x.shape[2] // side, x.shape[3] // side), dtype)


def _patches_fake(x: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, (height // side) * (width // side), channels * side * side), dtype=dtype)


_register('patches', '(Tensor x, int side, ScalarType dtype) -> Tensor', _patches, _patches_fake)
