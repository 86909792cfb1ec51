"""What Bi-WKV and WKV6 must do for every attack, and by how much they may miss it.

How far a result may be from the definition (in float64, of the same rounded inputs) is derived number by number. Every
result is a sum of terms; each term may be off by a share of its size, so a result by this share of the sum of absolute
terms, and by half a unit in the last place of the dtype that it is rounded to. The share is a few roundings and

- for Bi-WKV one rounding of the exponent E = |k| + |u| + |w| T whose exp a weight is: in the vectors' own precision as
  long as E is moderate, in double beyond. Where double does not hold E to 1 either, y still is a mean of v.
- for WKV6 one rounding for each token that a decay passes over; on CUDA, that of the matrix units (kernels/wkv6).
"""

import math
from collections.abc import Callable

import torch
from attack_cases import Case
from op_cases import DEFINITIONS, OPERATORS, gradients
from torch import Tensor

from vision_rwkv.ops import implementation

ROUNDING = {x: torch.finfo(x).eps / 2 for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
# What underflows: a weight of Bi-WKV where a small denominator and growth (w < 0) meet, within the ranges of the fast
# paths in kernels/bi_wkv, exp(-87 + 36 + 16) and 2^(-126 + 60 + 30); a decay of WKV6.
LOST_WEIGHT = {'cpu': 1e-15, 'cuda': 2.0**-36}
LOST_DECAY = {torch.float32: 2.0**-120, torch.float64: 2.0**-1016}
# A product that underflows, 2^-149, is amplified likewise, and added up over pairs of tokens.
FLOOR = {'cpu': 1e-20, 'cuda': 1e-14, 'double': 1e-290}
SPLIT = 2.0**-16  # a product of float32 numbers as WKV6 takes it on CUDA: two bfloat16 numbers each


class Findings:
    """By how much each property was missed, as a share of what it may be missed by: at most 1, and not NaN."""

    def __init__(self) -> None:
        self.shares: dict[str, Tensor] = {}

    def within(self, name: str, got: Tensor, want: Tensor, bound: Tensor | float) -> None:
        """|got - want| <= bound everywhere. What the dtype cannot hold may be its largest number, or infinite."""
        limit = torch.finfo(got.dtype).max
        off = got.double().clamp(-limit, limit) - want.double().clamp(-limit, limit)
        self.shares[name] = (off.abs() / bound).max()

    def same(self, name: str, got: Tensor, want: Tensor, but: Tensor | None = None) -> None:
        """Bits alike, except where ``but``; one NaN is like another."""
        alike = (got == want) | (got.isnan() & want.isnan())
        self.true(name, alike if but is None else alike | but)

    def true(self, name: str, condition: Tensor) -> None:
        self.shares[name] = torch.where(condition.all(), 0.0, torch.inf).double()

    def settle(self, case: Case, worst: dict[str, float]) -> None:
        """One look at the device: raise what is missed, remember the largest shares."""
        shares = dict(zip(self.shares, torch.stack(list(self.shares.values())).tolist(), strict=True))
        missed = {name: share for name, share in shares.items() if not share <= 1}
        assert not missed, f'{case} misses {missed} (as shares of what it may)'
        for name, share in shares.items():
            worst[name] = max(worst.get(name, 0.0), share)


def compute_dtype(case: Case) -> torch.dtype:
    return torch.float64 if torch.float64 in (case.dtype, case.parameters) else torch.float32


def has_kernels(case: Case) -> bool:
    """Whether the case runs in kernels on CUDA, not in PyTorch."""
    return case.name == 'bi_wkv' or (case.shape[-1] == 64 and compute_dtype(case) == torch.float32)


def bi_wkv_bounds(case: Case, w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> list[Tensor]:
    """What y and the gradients of w, u, k, v may be off by before they are rounded to their dtypes."""
    compute = compute_dtype(case)
    index = torch.arange(k.shape[1], device=k.device)
    apart = (index[:, None] - index).abs()[..., None]
    weight = torch.softmax(torch.where(apart == 0, u, -(apart - 1) * w) + k[:, None], 2)  # (B, t, i, C)
    size = k.abs().amax(1) + u.abs() + w.abs() * k.shape[1]
    share = (
        ROUNDING[compute] * ((200 if k.is_cuda else 100) + size.clamp(max=200))
        + ROUNDING[torch.float64] * k.shape[1] * size
    )
    share = share[:, None, None]
    lost = LOST_WEIGHT[k.device.type] if compute == torch.float32 else FLOOR['double']
    off = torch.where(share < 1, share * weight, 1.0) + lost
    v, g = v.abs()[:, None], gy.abs()[:, :, None]
    mean, y = (weight * v).sum(2, keepdim=True), (off * v).sum(2, keepdim=True)
    pairs = g * (off * (v + mean + y) + weight * y)
    # A term of gw counts once for each token in between. CUDA splits that number into parts of up to 32, which a few
    # roundings leave as much as one more token: off is 200 of them.
    between = (apart - 1).clamp(min=0) + (1 if k.is_cuda else 0)
    gw = (between * pairs).sum((0, 1, 2))
    return [y[:, :, 0], gw, torch.diagonal(pairs, dim1=1, dim2=2).sum((0, 2)), pairs.sum(1), (off * g).sum(1)]


def wkv6_bounds(case: Case, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor) -> list[Tensor]:
    """What y and the gradients of r, k, v, w, u may be off by before they are rounded to their dtypes."""
    compute, tokens = compute_dtype(case), r.shape[1]
    exponents = {x: -math.log(torch.finfo(x).tiny) for x in LOST_DECAY}  # exp of what is below is 0
    share = 2 * ROUNDING[compute] * (tokens + exponents[compute])
    # The definition's own, whose exponents are sums over the tokens, rounded at each.
    share += max(8, tokens) * ROUNDING[torch.float64] * exponents[torch.float64]
    if r.is_cuda and r.shape[-1] == 64 and compute == torch.float32:
        share += 8 * ROUNDING[torch.bfloat16] if case.dtype == torch.bfloat16 else 4 * SPLIT
    r, k, v, u, g = (x.abs() for x in (r, k, v, u, gy))
    y, sizes = gradients(DEFINITIONS['wkv6'], {'r': r, 'k': k, 'v': v, 'w': w, 'u': u}, g)
    # Everything, as if nothing decayed; what a product of two small numbers loses, the third factor may make large.
    # So may r k the product v g in the gradient of u, over which nothing decays.
    least = torch.finfo(compute).smallest_normal * torch.finfo(compute).eps
    underflow = r.shape[-1] * least * (r * k).sum((0, 1))
    r, k, v, g = (x + 2.0**-14 for x in (r, k, v, g))
    kv, rg = (torch.einsum('bthn,bthm->bhnm', *x) for x in ((k, v), (r, g)))
    over = 'bthn,bhnm->bthm'
    back = kv.transpose(-1, -2), rg.transpose(-1, -2)
    gr, gk = torch.einsum(over, g, back[0]), torch.einsum(over, v, back[1])
    gv, gw = torch.einsum(over, k, rg), (r * gr).sum(1, keepdim=True)
    lost = [torch.einsum(over, r, kv), gr, gk, gv, gw, torch.zeros_like(u)]
    *bounds, gu = [share * x + LOST_DECAY[compute] * tokens * z for x, z in zip([y, *sizes], lost, strict=True)]
    return [*bounds, gu + underflow]


BOUNDS = {'bi_wkv': bi_wkv_bounds, 'wkv6': wkv6_bounds}


class Attack:
    """One case: its tensors, what the operator makes of them, what is right, and how far off that may be."""

    def __init__(self, case: Case, given: dict[str, Tensor], gy: Tensor):
        self.case, self.given, self.gy = case, given, gy
        self.labels = ['y', *given]
        self.native = implementation(gy.device) == 'native' and (has_kernels(case) or not gy.is_cuda)
        self.results = self.run(given, gy)
        exact, g = {x: t.double() for x, t in given.items()}, gy.double()
        y, grads = gradients(DEFINITIONS[case.name], exact, g)
        self.want = [y, *grads]
        self.bounds = BOUNDS[case.name](case, *exact.values(), g)
        floor = self.floor = FLOOR[gy.device.type if compute_dtype(case) == torch.float32 else 'double']
        for i, (want, result) in enumerate(zip(self.want, self.results, strict=True)):
            last_place = ROUNDING[result.dtype] * (want.abs() + torch.finfo(result.dtype).smallest_normal)
            self.bounds[i] = self.bounds[i] + last_place + floor

    def run(self, given: dict[str, Tensor], gy: Tensor) -> list[Tensor]:
        """y and the gradients of all inputs."""
        y, grads = gradients(OPERATORS[self.case.name], given, gy)
        return [y, *grads]

    def y(self, given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return OPERATORS[self.case.name](*given.values()).double()

    def of_tokens(self, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`run` with ``change`` applied to everything that has tokens."""
        given = {x: change(t) if self.has_tokens(t) else t for x, t in self.given.items()}
        return self.run(given, change(self.gy))

    def has_tokens(self, x: Tensor) -> bool:
        return x.dim() == len(self.case.shape)

    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.case.seed + 1)


def attack(case: Case, given: dict[str, Tensor], gy: Tensor, worst: dict[str, float]) -> None:
    """Check every property of one case; raises AssertionError with the case and the properties that it misses."""
    found, it = Findings(), Attack(case, given, gy)
    for check in (definition, bits, flip, order, samples, linear, bad_numbers):
        check(it, found)
    if case.name == 'bi_wkv':
        mean_of_values(it, found)
    if case.dtype == torch.float64:
        finite_differences(it, found)
    found.settle(case, worst)


def definition(it: Attack, found: Findings) -> None:
    """y and all gradients, their shapes and dtypes."""
    likes = [it.gy, *it.given.values()]
    for name, got, want, bound, like in zip(it.labels, it.results, it.want, it.bounds, likes, strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape, (it.case, name, got.dtype, got.shape)
        found.within(f'definition {name}', got, want, bound)


def mean_of_values(it: Attack, found: Findings) -> None:
    """min v <= y <= max v, but for the last bits of float32 and float64; what is rounded further never leaves.

    Numerator and denominator decay side by side, each with a rounding a token within a chunk, and one a chunk.
    """
    v, y = it.given['v'].double(), it.results[0].double()
    low, high = v.amin(1, keepdim=True), v.amax(1, keepdim=True)
    last_bits = (
        (16 + min(v.shape[1], 64) + v.shape[1] / 8) * ROUNDING[it.case.dtype] if it.case.dtype.itemsize >= 4 else 0
    )
    slack = last_bits * torch.maximum(low.abs(), high.abs()) + it.floor
    found.within('mean', y, y.clamp(low, high), slack)


def bits(it: Attack, found: Findings) -> None:
    """Once more: the same bits. From contiguous tensors: the same again, but of PyTorch's matrix products."""
    plain = it.run({x: t.clone(memory_format=torch.contiguous_format) for x, t in it.given.items()}, it.gy.contiguous())
    again = it.run(it.given, it.gy)
    for name, once, other, want, bound in zip(it.labels, again, plain, it.results, it.bounds, strict=True):
        found.same(f'bits {name}', once, want)
        if it.native:
            found.same(f'strides {name}', other, want)
        else:
            found.within(f'strides {name}', other, want, 2 * bound)


def flip(it: Attack, found: Findings) -> None:
    """The tokens in reverse."""
    results = it.of_tokens(lambda x: x.flip(1))
    for name, got, want, bound in zip(it.labels, results, it.results, it.bounds, strict=True):
        found.within(f'flip {name}', got.flip(1) if it.has_tokens(got) else got, want, 2 * bound)


def order(it: Attack, found: Findings) -> None:
    """Channels (WKV6: heads) in another order."""
    turned = lambda x: x.roll(1, 2 if it.has_tokens(x) else 0)  # noqa: E731
    results = it.run({x: turned(t) for x, t in it.given.items()}, turned(it.gy))
    for name, got, want, bound in zip(it.labels, results, it.results, it.bounds, strict=True):
        found.within(f'order {name}', got, turned(want), 2 * turned(bound))


def samples(it: Attack, found: Findings) -> None:
    """Samples in another order: the same bits, but of PyTorch's matrix products on CUDA, which look at the layout. One
    alone: the same on the CPU; CUDA cuts its work by the amount.
    """
    if it.case.shape[0] == 1:
        return
    moved, alone = it.of_tokens(lambda x: x.roll(1, 0)), it.of_tokens(lambda x: x[-1:])
    for name, got, one, want, bound in zip(it.labels, moved, alone, it.results, it.bounds, strict=True):
        if not it.has_tokens(got):  # added up over the samples
            found.within(f'samples {name}', got, want, 2 * bound)
            continue
        if it.native or not got.is_cuda:
            found.same(f'samples {name}', got, want.roll(1, 0))
        else:
            found.within(f'samples {name}', got, want.roll(1, 0), 2 * bound.roll(1, 0))
        if one.is_cuda:
            found.within(f'alone {name}', one, want[-1:], 2 * bound[-1:])
        else:
            found.same(f'alone {name}', one, want[-1:])


def linear(it: Attack, found: Findings) -> None:
    """What y makes of v is what it makes of two parts of v, as far as the dtype holds the results of the parts."""
    v = it.given['v']
    mine = torch.rand(v.shape, generator=it.random()).to(v.device) < 0.5
    one, other = (it.y(it.given | {'v': v.masked_fill(mask, 0)}) for mask in (mine, ~mine))
    total = torch.where(one.isfinite() & other.isfinite(), one + other, it.results[0].double())
    rounding = ROUNDING[it.case.dtype] * (one.abs() + other.abs())
    found.within('linear', it.results[0], total, 2 * it.bounds[0] + rounding)


def bad_numbers(it: Attack, found: Findings) -> None:
    """A NaN or an infinity in one channel (WKV6: head) of one sample leaves every bit of the others alone.

    In that channel an infinity may give anything; a NaN in k or v gives NaN.
    """
    case = it.case
    where = [int(x * size) for x, size in zip(torch.rand(4, generator=it.random()).tolist(), case.shape, strict=False)]
    spoilt = {x: t.clone() for x, t in it.given.items()} | {'gy': it.gy.clone()}
    spoilt[case.spoilt][tuple(where)] = case.spoil
    touched = torch.zeros(case.shape, dtype=torch.bool, device=it.gy.device)
    touched[where[0], :, where[2]] = True
    results = it.run({x: spoilt[x] for x in it.given}, spoilt['gy'])
    for name, got, want, bound in zip(it.labels, results, it.results, it.bounds, strict=True):
        mine = touched if it.has_tokens(got) else touched.any(0).any(0)
        if it.native or not got.is_cuda:
            found.same(f'bad number {name}', got, want, mine)
        else:  # PyTorch's products look at the layout
            found.within(f'bad number {name}', torch.where(mine, want, got), want, 2 * bound)
    if case.spoil != case.spoil and case.spoilt in 'kv':
        column = where[3:] if case.spoilt == 'v' else []
        found.true('bad number shows', results[0][(where[0], slice(None), where[2], *column)].isnan())


def finite_differences(it: Attack, found: Findings) -> None:
    """The gradients along a random direction, summed up in each channel (WKV6: head), in float64.

    Twice what y may be off by (at least 1e-14 of its terms, and what an input's own last place changes), over the
    step h, is more than the error of the difference; the rest of it, h^2 of the terms, is much less.
    """
    step, random, tokens = 1e-5, it.random(), it.case.shape[1]
    directions = {}
    for name, x in it.given.items():
        d = torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device)
        # Exponents change by about 1, factors by a share of themselves.
        scale = {'w': 1 / tokens, 'r': x.abs(), 'v': x.abs()}.get(name, 1.0 if it.case.name == 'bi_wkv' else x.abs())
        directions[name] = d * scale
    total = lambda x: x.transpose(0, 2 if it.has_tokens(x) else 0).flatten(1).sum(1) if x.dim() > 1 else x  # noqa: E731
    ends = [it.y({x: t + sign * step * directions[x] for x, t in it.given.items()}) for sign in (1, -1)]
    difference = total(it.gy * (ends[0] - ends[1])) / (2 * step)
    slope = sum(total(grad * directions[x]) for x, grad in zip(it.given, it.results[1:], strict=True))
    slack = sum(total(bound * directions[x].abs()) for x, bound in zip(it.given, it.bounds[1:], strict=True))
    found.within('differences', slope, difference, slack + total(it.gy.abs() * it.bounds[0]) * 2 / step)
