"""The data-dependent mixes and decay of VRWKV6, and the linear maps after them, recomputed in the backward pass.

In PyTorch here, natively in kernels/dynamic_mix. With n = norm(x) or x, s the difference of its shifted tokens from it
(see q_shift) and z_i the i-th fifth of tanh((n + s * mixes[0]) @ w1), the inputs of decay, key, value, receptance and
gate are n + s * (mixes[1 + i] + z_i @ w2[i]), and the decay is raw = tanh(its input @ w3) @ w4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_rwkv.ops import _checks, _native
from vision_rwkv.ops.fused import _input_gradient, _linear, _rows, _weight_gradient
from vision_rwkv.ops.q_shift import _WHERE, Norm, check_tokens

MIXES = 5  # that depend on the tokens
_NAME = f'{_native.NAMESPACE}::dynamic_mix'
_LINEAR = f'{_native.NAMESPACE}::dynamic_linear'
_NORM = 'Tensor? weight, Tensor? bias, Tensor? stats'
_ARGUMENTS = f'Tensor x, Tensor[] mixes, Tensor[] ranks, Tensor[] maps, {_NORM}, float eps, {_WHERE}, ScalarType dtype'

torch.library.define(
    _NAME, f'(Tensor x, Tensor[] mixes, Tensor[] ranks, {_NORM}, {_WHERE}, ScalarType dtype) -> (Tensor, Tensor)'
)
torch.library.define(_LINEAR, f'({_ARGUMENTS}) -> Tensor[]')
torch.library.define(
    f'{_LINEAR}_backward',
    f'(Tensor[] g, {_ARGUMENTS}) -> (Tensor gx, Tensor gmixes, Tensor[] granks, Tensor[] gmaps, Tensor gweight, '
    'Tensor gbias)',
)


def _by_mix(z: Tensor) -> Tensor:
    """(M, 5 R) as (5, M, R)."""
    return z.view(len(z), MIXES, z.shape[1] // MIXES).transpose(0, 1)


class _Steps:
    """One call's steps: the inputs ``mixed`` (5, B, T, C), and what lies before and after them."""

    def __init__(self, x, mixes, ranks, weight, bias, stats, *where):
        self.mixes = [1 - mix.reshape(-1) for mix in mixes]  # how much of a token stays
        self.ranks = [rank.to(where[-1]) for rank in ranks]
        self.arguments = weight, bias, stats, *where[:-1]
        q_shift, arguments = torch.ops.vision_rwkv.q_shift, (*self.arguments, where[-1])
        self.base = q_shift(x, self.mixes[:1], None, *arguments)
        self.low = _rows(self.base) @ self.ranks[0]
        self.z = torch.tanh(self.low)
        self.delta = torch.bmm(_by_mix(self.z), self.ranks[1]).view(MIXES, *x.shape)
        self.mixed = q_shift(x, self.mixes[1:], self.delta, *arguments)
        self.low_decay = _rows(self.mixed[0]) @ self.ranks[2]
        self.decay = torch.tanh(self.low_decay)


@torch.library.impl(_NAME, 'CompositeExplicitAutograd')
def _dynamic_mix(x, mixes, ranks, weight, bias, stats, *where):
    steps = _Steps(x, mixes, ranks, weight, bias, stats, *where)
    return steps.mixed[1:].clone(), (steps.decay @ steps.ranks[3]).view(x.shape)


@torch.library.register_fake(_NAME)
def _dynamic_mix_fake(x, mixes, ranks, weight, bias, stats, *where):
    out = x.new_empty((MIXES - 1, *x.shape), dtype=where[-1])
    return out, out.new_empty(x.shape)


def _measured(x: Tensor, weight: Tensor | None, stats: Tensor | None, eps: float) -> Tensor | None:
    return torch.ops.vision_rwkv.norm_stats(x, eps) if weight is not None and stats is None else stats


@torch.library.impl(_LINEAR, 'CompositeExplicitAutograd')
def _dynamic_linear(x, mixes, ranks, maps, weight, bias, stats, eps, *where):
    stats = _measured(x, weight, stats, eps)
    mixed, raw = torch.ops.vision_rwkv.dynamic_mix(x, mixes, ranks, weight, bias, stats, *where)
    return [*(_linear(part, m) for part, m in zip(mixed.unbind(), maps, strict=True)), raw]


@torch.library.impl(f'{_LINEAR}_backward', 'CompositeExplicitAutograd')
def _dynamic_linear_backward(g, x, mixes, ranks, maps, weight, bias, stats, eps, *where):
    steps = _Steps(x, mixes, ranks, weight, bias, _measured(x, weight, stats, eps), *where)
    q_shift_backward, graw = torch.ops.vision_rwkv.q_shift_backward, _rows(g[-1])
    gmaps = []
    for part, grad, m in zip(steps.mixed[1:].unbind(), g[:-1], maps, strict=True):
        gmaps.append(_weight_gradient(grad, part).to(m.dtype))
        _input_gradient(grad, m, out=part)  # in place of the input, which is no longer needed
    inner = _tanh_gradient(graw @ steps.ranks[3].t(), steps.low_decay)
    granks = [_weight_gradient(_rows(steps.mixed[0]), inner), _weight_gradient(steps.decay, graw)]
    torch.mm(inner, steps.ranks[2].t(), out=_rows(steps.mixed[0]))
    gx, gmixes, gdelta, gweight, gbias = q_shift_backward(
        steps.mixed, x, steps.mixes[1:], steps.delta, *steps.arguments
    )
    gdelta = gdelta.flatten(1, 2)
    gz = torch.bmm(gdelta, steps.ranks[1].transpose(1, 2)).transpose(0, 1).flatten(1)
    inner = _tanh_gradient(gz, steps.low)
    granks = [
        _weight_gradient(_rows(steps.base), inner),
        torch.bmm(_by_mix(steps.z).transpose(1, 2), gdelta),
        *granks,
    ]
    torch.mm(inner, steps.ranks[0].t(), out=_rows(steps.base))
    first = q_shift_backward(steps.base, x, steps.mixes[:1], None, *steps.arguments)
    granks = [grad.to(rank.dtype) for grad, rank in zip(granks, ranks, strict=True)]
    return gx + first[0], -torch.cat([first[1], gmixes]), granks, gmaps, gweight + first[3], gbias + first[4]


def _tanh_gradient(g: Tensor, x: Tensor) -> Tensor:
    # From x: 1 - tanh(x)^2 of a tanh in half precision would have few digits left near 1.
    wide = torch.promote_types(x.dtype, torch.float32)
    return (g.to(wide) * (1 - torch.tanh(x.to(wide)).square())).to(x.dtype)


@torch.library.register_fake(_LINEAR)
def _dynamic_linear_fake(x, mixes, ranks, maps, *others):
    sizes = [*(m.shape[0] for m in maps), x.shape[2]]
    return [x.new_empty((*x.shape[:2], size), dtype=others[-1]) for size in sizes]


@torch.library.register_fake(f'{_LINEAR}_backward')
def _dynamic_linear_backward_fake(g, x, mixes, ranks, maps, weight, bias, *_):
    gmixes = mixes[0].new_empty(len(mixes), x.shape[2])
    granks, gmaps = ([p.new_empty(p.shape) for p in parameters] for parameters in (ranks, maps))
    return (
        x.new_empty(x.shape),
        gmixes,
        granks,
        gmaps,
        *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)),
    )


def _save(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, mixes, ranks, maps, weight, bias, stats, *ctx.how = inputs
    ctx.counts = len(mixes), len(ranks), len(maps)
    ctx.save_for_backward(x, weight, bias, stats, *mixes, *ranks, *maps)


def _gradient(ctx, g: list[Tensor]) -> tuple:
    x, weight, bias, stats, *others = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(others[:count])
        others = others[count:]
    gx, gmixes, granks, gmaps, gweight, gbias = torch.ops.vision_rwkv.dynamic_linear_backward(
        g, x, *lists, weight, bias, stats, *ctx.how
    )
    gmixes = [grad.view(mix.shape) for grad, mix in zip(gmixes.unbind(), lists[0], strict=True)]
    if weight is None:
        gweight = gbias = None
    return gx, gmixes, granks, gmaps, gweight, gbias, *[None] * 8


_native.register_autograd('dynamic_linear', _gradient, _save)


def dynamic_linear(
    x: Tensor,
    mixes: Sequence[Tensor],
    ranks: Sequence[Tensor],
    maps: Sequence[Tensor],
    hw: tuple[int, int],
    pixels: int = 1,
    gamma: float = 1 / 4,
    heads: int = 1,
    *,
    norm: Norm | None = None,
) -> list[Tensor]:
    """Keys, values, receptances and gates of VRWKV6, (B, T, D_i), and its decay ``raw``, (B, T, C).

    Args:
        x: tokens, (B, T, C), shifted as in `q_shift`.
        mixes: how much of the shift enters what the mixes depend on, decay, key, value, receptance and gate, C values
            each.
        ranks: the low-rank factors w1 (C, 5 R), w2 (5, R, C), w3 (C, D), w4 (D, C).
        maps: weights (D_i, C), without bias.
        norm: a layer norm to apply first.

    Everything is computed in autocast's dtype under autocast, else in that of x; see `q_shift` for the other arguments
    and for what is raised. Only the arguments are kept for the backward pass.
    """
    check_tokens('dynamic_linear', x, mixes, hw, heads)
    check_factors(x, mixes, ranks, maps)
    weight, bias, eps, stats = norm or (None, None, 0.0, None)
    return torch.ops.vision_rwkv.dynamic_linear(
        x, mixes, ranks, maps, weight, bias, stats, eps, *hw, pixels, gamma, heads, _checks.autocast_dtype(x)
    )


def check_factors(x: Tensor, mixes: Sequence[Tensor], ranks: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
    """Raises ValueError unless there are as many as `dynamic_linear` takes, and the factors fit the channels of x."""
    for what, given, count in (('mixes', mixes, 1 + MIXES), ('ranks', ranks, 4), ('maps', maps, MIXES - 1)):
        if len(given) != count:
            raise ValueError(f'dynamic_linear: expected {count} {what}, got {len(given)}')
    c, rank, decay_rank = x.shape[2], ranks[0].shape[-1] // MIXES, ranks[2].shape[-1]
    want = [(c, MIXES * rank), (MIXES, rank, c), (c, decay_rank), (decay_rank, c)]
    for i in range(len(ranks)):
        if ranks[i].shape != want[i]:
            raise ValueError(f'dynamic_linear: ranks[{i}] must have shape {want[i]}, got {tuple(ranks[i].shape)}')
