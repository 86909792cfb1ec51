"""Layers of the models whose inputs are recomputed in the backward pass instead of being kept.

Each is one operator to autograd and to torch.compile, made of the operators of q_shift.py and pointwise.py and of
matrix products. What it saves are its arguments: a linear map after Q-Shift keeps the tokens before it, one after an
activation keeps what the activation was applied to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_rwkv.ops import _checks, _native, pointwise  # noqa: F401 (registers the operators)
from vision_rwkv.ops.q_shift import _WHERE, Norm, check_tokens

_MIX = f'{_native.NAMESPACE}::mix_linear'
_GATED = f'{_native.NAMESPACE}::gated_linear'
_SQUARED = f'{_native.NAMESPACE}::squared_relu_linear'
_MLP = f'{_native.NAMESPACE}::squared_relu_mlp'
_ARGUMENTS = 'Tensor x, Tensor[] mixes, Tensor[] maps, Tensor? weight, Tensor? bias, Tensor? stats, float eps'
_ARGUMENTS += f', {_WHERE}, ScalarType dtype'

torch.library.define(_MIX, f'({_ARGUMENTS}) -> Tensor[]')
torch.library.define(f'{_MIX}_backward', f'(Tensor[] g, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor[], Tensor, Tensor)')
torch.library.define(_GATED, '(Tensor r, Tensor y, Tensor map) -> Tensor')
torch.library.define(f'{_GATED}_backward', '(Tensor g, Tensor r, Tensor y, Tensor map) -> (Tensor, Tensor, Tensor)')
torch.library.define(_SQUARED, '(Tensor x, Tensor map) -> Tensor')
torch.library.define(f'{_SQUARED}_backward', '(Tensor g, Tensor x, Tensor map) -> (Tensor, Tensor)')
torch.library.define(_MLP, '(Tensor x, Tensor key, Tensor value) -> Tensor')


# Products into given tensors, which autocast leaves alone: dtypes are settled before.


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) @ weight (D, C)^T."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    torch.mm(_rows(x), weight.to(x.dtype).t(), out=_rows(out))
    return out


def _input_gradient(g: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """g (..., D) @ weight (D, C), into out (..., C), which must be contiguous: of another tensor, rows are a copy."""
    torch.mm(_rows(g), weight.to(g.dtype), out=out.view(-1, out.shape[-1]))
    return out


def _weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g (..., D)^T @ x (..., C)."""
    out = x.new_empty(g.shape[-1], x.shape[-1])
    torch.mm(_rows(g).t(), _rows(x), out=out)
    return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.impl(_MIX, 'CompositeExplicitAutograd')
def _mix_linear(x, mixes, maps, weight, bias, stats, eps, *where):
    mixed = _mixed(x, mixes, weight, bias, stats, eps, where)[0]
    return [_linear(part, m) for part, m in zip(mixed.unbind(), maps, strict=True)]


def _mixed(x, mixes, weight, bias, stats, eps, where) -> tuple[Tensor, Tensor | None]:
    """The inputs of the maps, and the statistics of x."""
    if weight is not None and stats is None:
        stats = torch.ops.vision_rwkv.norm_stats(x, eps)
    return torch.ops.vision_rwkv.q_shift(x, mixes, None, weight, bias, stats, *where), stats


@torch.library.impl(f'{_MIX}_backward', 'CompositeExplicitAutograd')
def _mix_linear_backward(g, x, mixes, maps, weight, bias, stats, eps, *where):
    mixed, stats = _mixed(x, mixes, weight, bias, stats, eps, where)
    gmaps = []
    for part, grad, m in zip(mixed.unbind(), g, maps, strict=True):
        gmaps.append(_weight_gradient(grad, part).to(m.dtype))
        _input_gradient(grad, m, out=part)  # in place of the input, which is no longer needed
    gx, gmixes, _, gweight, gbias = torch.ops.vision_rwkv.q_shift_backward(
        mixed, x, mixes, None, weight, bias, stats, *where[:-1]
    )
    return gx, gmixes, gmaps, gweight, gbias


@torch.library.register_fake(_MIX)
def _mix_linear_fake(x, mixes, maps, *others):
    return [x.new_empty((*x.shape[:2], m.shape[0]), dtype=others[-1]) for m in maps]


@torch.library.register_fake(f'{_MIX}_backward')
def _mix_linear_backward_fake(g, x, mixes, maps, weight, bias, *_):
    gmixes = mixes[0].new_empty(len(mixes), x.shape[2])
    others = [x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)]
    return x.new_empty(x.shape), gmixes, [m.new_empty(m.shape) for m in maps], *others


def _save_mix_linear(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, mixes, maps, weight, bias, stats, *ctx.how = inputs
    ctx.count = len(mixes)
    ctx.save_for_backward(x, weight, bias, stats, *mixes, *maps)


def _mix_linear_grad(ctx, g: list[Tensor]) -> tuple:
    x, weight, bias, stats, *others = ctx.saved_tensors
    mixes, maps = others[: ctx.count], others[ctx.count :]
    gx, gmixes, gmaps, gweight, gbias = torch.ops.vision_rwkv.mix_linear_backward(
        g, x, mixes, maps, weight, bias, stats, *ctx.how
    )
    gmixes = [grad.view(mix.shape) for grad, mix in zip(gmixes.unbind(), mixes, strict=True)]
    if weight is None:
        gweight = gbias = None
    return gx, gmixes, gmaps, gweight, gbias, *[None] * 8


@torch.library.impl(_GATED, 'CompositeExplicitAutograd')
def _gated_linear(r: Tensor, y: Tensor, map: Tensor) -> Tensor:
    return _linear(torch.ops.vision_rwkv.gate(r, y), map)


@torch.library.impl(f'{_GATED}_backward', 'CompositeExplicitAutograd')
def _gated_linear_backward(g: Tensor, r: Tensor, y: Tensor, map: Tensor) -> tuple[Tensor, ...]:
    x = torch.ops.vision_rwkv.gate(r, y).contiguous()
    gmap = _weight_gradient(g, x).to(map.dtype)
    return *torch.ops.vision_rwkv.gate_backward(_input_gradient(g, map, out=x), r, y), gmap


@torch.library.register_fake(_GATED)
def _gated_linear_fake(r: Tensor, y: Tensor, map: Tensor) -> Tensor:
    return y.new_empty((*y.shape[:-1], map.shape[0]))


@torch.library.register_fake(f'{_GATED}_backward')
def _gated_linear_backward_fake(g: Tensor, r: Tensor, y: Tensor, map: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (r, y, map))


@torch.library.impl(_SQUARED, 'CompositeExplicitAutograd')
def _squared_relu_linear(x: Tensor, map: Tensor) -> Tensor:
    return _linear(torch.ops.vision_rwkv.squared_relu(x), map)


@torch.library.impl(f'{_SQUARED}_backward', 'CompositeExplicitAutograd')
def _squared_relu_linear_backward(g: Tensor, x: Tensor, map: Tensor) -> tuple[Tensor, Tensor]:
    squared = torch.ops.vision_rwkv.squared_relu(x).contiguous()
    gmap = _weight_gradient(g, squared).to(map.dtype)
    gsquared = _input_gradient(g, map, out=squared)
    return torch.ops.vision_rwkv.squared_relu_backward(gsquared, x), gmap


@torch.library.register_fake(_SQUARED)
def _squared_relu_linear_fake(x: Tensor, map: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], map.shape[0]))


@torch.library.register_fake(f'{_SQUARED}_backward')
def _squared_relu_linear_backward_fake(g: Tensor, x: Tensor, map: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), map.new_empty(map.shape)


@torch.library.impl(_MLP, 'CompositeExplicitAutograd')
def _squared_relu_mlp(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.vision_rwkv.squared_relu_linear(_linear(x, key), value)


@torch.library.register_fake(_MLP)
def _squared_relu_mlp_fake(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], value.shape[0]))


def _save_inputs(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gated_linear_grad(ctx, g: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.vision_rwkv.gated_linear_backward(g, *ctx.saved_tensors)


def _squared_relu_linear_grad(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vision_rwkv.squared_relu_linear_backward(g, *ctx.saved_tensors)


_native.register_autograd('mix_linear', _mix_linear_grad, _save_mix_linear)
_native.register_autograd('gated_linear', _gated_linear_grad, _save_inputs)
_native.register_autograd('squared_relu_linear', _squared_relu_linear_grad, _save_inputs)


def mix_linear(
    x: Tensor,
    mixes: Sequence[Tensor],
    maps: Sequence[Tensor],
    hw: tuple[int, int],
    pixels: int = 1,
    gamma: float = 1 / 4,
    heads: int = 1,
    *,
    norm: Norm | None = None,
) -> list[Tensor]:
    """``q_shift(x, mixes, ...)``, each result through the linear map of its number: (B, T, C) -> (B, T, D_i).

    maps: weights (D_i, C), without bias, used in autocast's dtype under autocast, else in that of x. The shifted and
    mixed tokens are recomputed in the backward pass. Everything else as q_shift, also what is raised.
    """
    check_tokens('mix_linear', x, mixes, hw, heads)
    weight, bias, eps, stats = norm or (None, None, 0.0, None)
    return torch.ops.vision_rwkv.mix_linear(
        x, mixes, maps, weight, bias, stats, eps, *hw, pixels, gamma, heads, _checks.autocast_dtype(x)
    )


def gate(r: Tensor, y: Tensor) -> Tensor:
    """sigmoid(r) * y, of one shape; in the dtype of y."""
    return torch.ops.vision_rwkv.gate(r, y)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x) ** 2; in float16, where that would become infinite, it saturates."""
    return torch.ops.vision_rwkv.squared_relu(x)


def gated_linear(r: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The linear map ``weight`` (D, C) of sigmoid(r) * y, r and y (B, T, C); in autocast's dtype under autocast.

    The product is recomputed in the backward pass.
    """
    dtype = _checks.autocast_dtype(y)
    return torch.ops.vision_rwkv.gated_linear(r.to(dtype), y.to(dtype), weight)


def squared_relu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The linear map ``weight`` (D, C) of relu(x) ** 2, x (B, T, C); in autocast's dtype under autocast.

    The square (see squared_relu) is recomputed in the backward pass.
    """
    dtype = _checks.autocast_dtype(x)
    return torch.ops.vision_rwkv.squared_relu_linear(x.to(dtype), weight)


def squared_relu_mlp(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The linear map ``value`` (E, D) of relu(y) ** 2, y that of x (B, T, C) by ``key`` (D, C); for inference.

    In autocast's dtype under autocast. On CUDA the square is taken in place.

    Raises:
        RuntimeError: gradients are asked for; see squared_relu_linear.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, key, value)):
        raise RuntimeError('squared_relu_mlp has no gradient: use squared_relu_linear, or torch.no_grad()')
    return torch.ops.vision_rwkv.squared_relu_mlp(x.to(_checks.autocast_dtype(x)), key, value)


def residual(
    x: Tensor,
    z: Tensor,
    *,
    gate: Tensor | None = None,
    norm: Norm | None = None,
    gamma: Tensor | None = None,
    scale: Tensor | None = None,
    stats_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """x + scale * gamma * norm(sigmoid(gate) * z), each factor where given; x, z, gate (B, T, C).

    Args:
        norm: a layer norm of the branch.
        gamma: layer scale, (C,).
        scale: a factor of each sample, B values, not differentiated: drop path.
        stats_eps: with it, the second result is mean and 1 / deviation of the sum's tokens, (B, T, 2).

    Returns:
        The sum in the dtype of x, or the wider one of x and z, and its statistics.
    """
    x = x.to(torch.promote_types(x.dtype, z.dtype))
    weight, bias, eps = (None, None, 0.0) if norm is None else norm[:3]
    return torch.ops.vision_rwkv.residual(x, z, gate, weight, bias, gamma, scale, eps, stats_eps)


def norm_tokens(
    z: Tensor, norm: Norm, position: Tensor | None = None, stats_eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """A layer norm of z + position, z (B, T, C), position (1, T, C); without gradients, as in inference.

    norm: its statistics are not used. stats_eps: as in `residual`, of the result.

    Returns:
        The result in float32 at least under autocast, as PyTorch's layer norm, else in the dtype of z; its statistics.

    Raises:
        RuntimeError: gradients are asked for.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, position, *norm[:2])):
        raise RuntimeError('norm_tokens has no gradient: use torch.nn.functional.layer_norm, or torch.no_grad()')
    wide = z.device.type != 'meta' and torch.is_autocast_enabled(z.device.type)
    dtype = _checks.compute_dtype(z) if wide else z.dtype
    return torch.ops.vision_rwkv.norm_tokens(z, position, norm.weight, norm.bias, norm.eps, stats_eps, dtype)


def patches(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> the patches of a grid, row by row, (B, H / side * W / side, C * side * side), without gradients.

    In autocast's dtype under autocast, else in that of x.

    Raises:
        RuntimeError: gradients are asked for.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError('patches has no gradient: order the pixels by unflatten and permute, or use torch.no_grad()')
    return torch.ops.vision_rwkv.patches(x, side, _checks.autocast_dtype(x))


def log_decay(raw: Tensor, base: Tensor) -> Tensor:
    """-exp(base + raw), raw (B, T, C), base of C values; in float32 at least: rounding would add up over the tokens."""
    return torch.ops.vision_rwkv.log_decay(raw, base)


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """A group norm of each token's heads times silu(gate); y, gate (B, T, C), weight, bias (C,); gate's dtype."""
    return torch.ops.vision_rwkv.norm_gate(y, gate, weight, bias, heads, eps, gate.dtype)
