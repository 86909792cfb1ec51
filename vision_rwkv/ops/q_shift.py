"""Q-Shift with its mixes, and a layer norm in front: one pass over the tokens for all inputs of a layer.

In PyTorch here, natively in kernels/q_shift; `vision_rwkv.ops.fused` builds layers on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_rwkv.ops import _checks, _native

_NAME = f'{_native.NAMESPACE}::q_shift'
_STATS = f'{_native.NAMESPACE}::norm_stats'
_WHERE = 'SymInt height, SymInt width, int pixels, float gamma, int heads'
_WHAT = f'Tensor x, Tensor[] mixes, Tensor? delta, Tensor? weight, Tensor? bias, Tensor? stats, {_WHERE}'

torch.library.define(_NAME, f'({_WHAT}, ScalarType dtype) -> Tensor')
torch.library.define(
    f'{_NAME}_backward',
    f'(Tensor g, {_WHAT}) -> (Tensor gx, Tensor gmixes, Tensor gdelta, Tensor gweight, Tensor gbias)',
)
torch.library.define(_STATS, '(Tensor x, float eps) -> Tensor')


class Place(NamedTuple):
    """Which neighbour each channel takes; see `q_shift`."""

    height: int
    width: int
    pixels: int
    gamma: float
    heads: int


def _moved(x: Tensor, at: Place, back: bool = False) -> Tensor:
    """x (B, T, C) with every channel from its neighbour, zero beyond the border; ``back``: the transposed map."""
    batch, tokens, channels = x.shape
    dim = channels // at.heads
    borders = [int(dim * at.gamma * j) for j in range(5)]
    sizes = [end - start for start, end in zip(borders, [*borders[1:], dim], strict=True)]
    token_map, others = x.split([at.height * at.width, tokens - at.height * at.width], 1)
    parts = token_map.reshape(batch, at.height, at.width, at.heads, dim).split(sizes, -1)
    dx, dy = min(at.pixels, at.width), min(at.pixels, at.height)
    if back:
        dx, dy = -dx, -dy
    # F.pad counts the axes from the last one; a negative amount crops.
    pads = [(dx, -dx, 0, 0), (-dx, dx, 0, 0), (0, 0, dy, -dy), (0, 0, -dy, dy)]
    moved = [F.pad(part, (0, 0, 0, 0, *pad)) for part, pad in zip(parts[:4], pads, strict=True)]
    shifted = torch.cat([*moved, parts[4]], -1).reshape(batch, at.height * at.width, channels)
    return torch.cat([shifted, others], 1)


def _normalised(x: Tensor, stats: Tensor | None) -> Tensor:
    """(x - mean) / deviation, in at least float32; x itself without stats."""
    x = x.to(_checks.compute_dtype(x))
    return x if stats is None else (x - stats[..., :1]) * stats[..., 1:]


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return x if weight is None or bias is None else x * weight.to(x.dtype) + bias.to(x.dtype)


def _mix(mixes: list[Tensor], delta: Tensor | None, i: int, dtype: torch.dtype) -> Tensor:
    mix = mixes[i].to(dtype).view(-1)
    return mix if delta is None else mix - delta[i].to(dtype)


@torch.library.impl(_STATS, 'CompositeExplicitAutograd')
def _stats_pytorch(x: Tensor, eps: float) -> Tensor:
    x = x.to(_checks.compute_dtype(x))
    variance, mean = torch.var_mean(x, -1, correction=0)
    return torch.stack([mean, (variance + eps).rsqrt()], -1)


@torch.library.register_fake(_STATS)
def _stats_fake(x: Tensor, eps: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], 2), dtype=_checks.compute_dtype(x))


@torch.library.impl(_NAME, 'CompositeExplicitAutograd')
def _forward_pytorch(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads, dtype):
    _native.warn_fallback(x.device)
    x = _affine(_normalised(x, stats), weight, bias)
    xx = _moved(x, Place(height, width, pixels, gamma, heads))
    out = x.new_empty((len(mixes), *x.shape), dtype=dtype)
    for i in range(len(mixes)):
        mix = _mix(mixes, delta, i, x.dtype)
        out[i] = x * mix + xx * (1 - mix)
    return out


@torch.library.impl(f'{_NAME}_backward', 'CompositeExplicitAutograd')
def _backward_pytorch(g, x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads):
    at = Place(height, width, pixels, gamma, heads)
    unit = _normalised(x, stats)
    n = _affine(unit, weight, bias)
    apart = n - _moved(n, at)  # what a mix scales
    own, far = torch.zeros_like(n), torch.zeros_like(n)
    gmixes, gdelta = mixes[0].new_empty(len(mixes), x.shape[2]), _nothing(x) if delta is None else torch.empty_like(g)
    for i in range(len(mixes)):
        mix, gi = _mix(mixes, delta, i, n.dtype), g[i].to(n.dtype)
        own += gi * mix
        far += gi * (1 - mix)
        gmixes[i] = (gi * apart).sum((0, 1))
        if delta is not None:
            gdelta[i] = -gi * apart
    gn = own + _moved(far, at, back=True)
    if weight is None or bias is None or stats is None:
        return gn.to(x.dtype), gmixes, gdelta, _nothing(x), _nothing(x)
    gweight, gbias = (gn * unit).sum((0, 1)).to(weight.dtype), gn.sum((0, 1)).to(bias.dtype)
    return norm_backward(gn * weight.to(gn.dtype), unit, stats[..., 1:]).to(x.dtype), gmixes, gdelta, gweight, gbias


def norm_backward(g: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """The gradient that ``g``, that of the normalised ``unit`` = (x - mean) * scale, gives x; over the last axis."""
    return scale * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))


def _nothing(x: Tensor) -> Tensor:
    """In place of a gradient that is not asked for."""
    return x.new_empty(0)


@torch.library.register_fake(_NAME)
def _forward_fake(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads, dtype):
    return x.new_empty((len(mixes), *x.shape), dtype=dtype)


@torch.library.register_fake(f'{_NAME}_backward')
def _backward_fake(g, x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads):
    gdelta = _nothing(x) if delta is None else g.new_empty(g.shape)
    gmixes = mixes[0].new_empty(len(mixes), x.shape[2])
    others = [_nothing(x) if p is None else p.new_empty(p.shape) for p in (weight, bias)]
    return x.new_empty(x.shape), gmixes, gdelta, *others


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, mixes, delta, weight, bias, stats, *ctx.where, _ = inputs
    ctx.save_for_backward(x, delta, weight, bias, stats, *mixes)


def _backward(ctx, g: Tensor) -> tuple:
    x, delta, weight, bias, stats, *mixes = ctx.saved_tensors
    gx, gmixes, gdelta, gweight, gbias = torch.ops.vision_rwkv.q_shift_backward(
        g, x, mixes, delta, weight, bias, stats, *ctx.where
    )
    gmixes = [grad.view(mix.shape) for grad, mix in zip(gmixes.unbind(), mixes, strict=True)]
    if weight is None:
        gweight = gbias = None
    return gx, gmixes, None if delta is None else gdelta, gweight, gbias, None, *[None] * 6


_native.register_autograd('q_shift', _backward, _save)


class Norm(NamedTuple):
    """A layer norm over the channels, folded into the operator after it: parameters (C,), and statistics if known."""

    weight: Tensor
    bias: Tensor
    eps: float
    stats: Tensor | None = None

    def measured(self, x: Tensor) -> 'Norm':
        """With the statistics of the tokens x (B, T, C): mean and 1 / deviation, (B, T, 2)."""
        if self.stats is not None:
            return self
        with torch.no_grad():  # the gradient through them is part of the operator's
            return self._replace(stats=torch.ops.vision_rwkv.norm_stats(x.detach(), self.eps))


def norm_arguments(norm: Norm | None, x: Tensor) -> tuple[Tensor | None, ...]:
    """Weight, bias and statistics, as the operators take them."""
    if norm is None:
        return None, None, None
    norm = norm.measured(x)
    return norm.weight, norm.bias, norm.stats


def check_tokens(op: str, x: Tensor, mixes: Sequence[Tensor], hw: tuple[int, int], heads: int) -> None:
    """Raises TypeError or ValueError unless x (B, T, C) has the h * w tokens, the heads and the mixes of C channels."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in _checks.DTYPES:
        _checks.check(op, {'x': 'BTC'}, {'x': x})
    if x.shape[1] < hw[0] * hw[1]:
        raise ValueError(f'{op}: x must have at least {hw[0]} * {hw[1]} tokens, got {x.shape[1]}')
    if x.shape[2] % heads:
        raise ValueError(f'{op}: the {x.shape[2]} channels of x must be a multiple of the {heads} heads')
    for mix in mixes:
        if mix.numel() != x.shape[2]:
            raise ValueError(f'{op}: a mix must have {x.shape[2]} values, one a channel, got {tuple(mix.shape)}')


def q_shift(
    x: Tensor,
    mixes: Sequence[Tensor],
    hw: tuple[int, int],
    pixels: int = 1,
    gamma: float = 1 / 4,
    heads: int = 1,
    *,
    norm: Norm | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """Q-Shift (arXiv 2403.02308, section 3.2) and its mixes: n * mix + shifted(n) * (1 - mix), where n = norm(x) or x.

    Args:
        x: tokens, (B, T, C). The first h * w form the map; those after it (a class token) are not shifted.
        mixes: at least one, each of C values.
        hw: the size of the map. Channels 0 to int(D gamma) of each of the ``heads`` groups of D = C / heads take the
            left neighbour, the next ones the right, the upper, the lower one, zero beyond the border; channels past
            int(4 D gamma) stay.
        pixels: the distance in tokens.
        norm: a layer norm to apply first.
        delta: what to take off the mixes, of each mix, token and channel: (len(mixes), B, T, C).

    Returns:
        (len(mixes), B, T, C) in autocast's dtype under autocast, else in the dtype of x; computed in float32 at least.
        Gradients come in their inputs' dtypes. There is no second derivative.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected and what came.
    """
    check_tokens('q_shift', x, mixes, hw, heads)
    dtype = _checks.autocast_dtype(x)
    if delta is not None:
        delta = delta.to(dtype)
        if delta.shape != (len(mixes), *x.shape):
            raise ValueError(f'q_shift: delta must have shape {(len(mixes), *x.shape)}, got {tuple(delta.shape)}')
    parameters = norm_arguments(norm, x)
    return torch.ops.vision_rwkv.q_shift(x, list(mixes), delta, *parameters, *hw, pixels, gamma, heads, dtype)
