"""What hypothesis draws to attack Bi-WKV and WKV6 with: small descriptions, from which tensors follow.

Kinds of case that are counted: long (T > 256), odd (an odd C or H), strided (tokens not contiguous), extreme (w or k
far outside of what a model has: `EXTREME`).
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ('long', 'odd', 'strided', 'extreme')
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ('contiguous', 'misaligned', 'transposed', 'sliced', 'window', 'expanded')
W = {
    'bi_wkv': ('model', 'zero', 'denormal', 'steep', 'rising', 'any', 'limit'),
    'wkv6': ('model', 'slow', 'zero', 'denormal', 'fast', 'mixed', 'any', 'reset', 'limit'),
}
K = ('normal', 'equal', 'denormal', 'large', 'huge', 'spikes', 'groups', 'limit')
U = ('normal', 'low', 'high', 'limit')
V = ('normal', 'equal', 'denormal', 'large', 'one')
EXTREME = {
    'w': ('steep', 'rising', 'any', 'limit', 'fast', 'mixed', 'reset'),
    'k': ('large', 'huge', 'spikes', 'groups', 'limit'),
}
PAIRS = 250_000  # of tokens, over all channels: what the definition takes at a time, but in the wide cases


class Case(NamedTuple):
    """One attack. ``shape``: (B, T, C), or (B, T, H, N); ``spoilt``: the tensor that gets a NaN or an infinity."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: torch.dtype  # of w and u; of u alone for WKV6
    layout: str
    w: str
    k: str
    u: str
    v: str
    spoilt: str
    spoil: float
    seed: int


@st.composite
def cases(draw: st.DrawFn, name: str, wide: int) -> Case:
    """Up to half are long, and those are narrow, but for ``wide`` of 100: the definition takes T^2 of everything."""
    pick = lambda *xs: draw(st.sampled_from(xs))  # noqa: E731
    batch = draw(st.integers(1, 3))
    length = pick('short', 'short', 'middle', 'long', 'long', 'long')
    dtype = pick(*DTYPES)
    if length == 'short':
        tokens = draw(st.integers(1, 40))
    elif length == 'middle':
        tokens = draw(st.integers(41, 160))
    else:
        tokens, batch = draw(st.integers(257, 420 if name == 'bi_wkv' else 330)), pick(1, 1, 2)
    most = max(1, PAIRS // (batch * tokens**2))
    is_wide = pick(*(100 - wide) * [False], *wide * [True])
    if name == 'bi_wkv':
        shape = batch, tokens, draw(st.integers(1, 40 if is_wide else min(most, 70)))
    else:  # 64 channels: for which CUDA has kernels
        width = 64 if is_wide else min(pick(1, 2, 7, 16, 33, 64, 64), most)
        shape = batch, tokens, draw(st.integers(1, max(1, min(most // width, 5)))), width
    parameters = dtype if dtype == torch.float64 else pick(torch.float32, torch.float32, dtype)
    spoilt = pick('k', 'v', 'gy') if name == 'bi_wkv' else pick('r', 'k', 'v', 'w', 'gy')
    return Case(
        name, shape, dtype, parameters, pick(*LAYOUTS), pick(*W[name]), pick(*K), pick(*U), pick(*V), spoilt,
        pick(torch.nan, torch.inf, -torch.inf), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


class _Values:
    """Random numbers of one case, float64."""

    def __init__(self, case: Case):
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        # The largest key. float64's largest number leaves no room for u + k or w T, and WKV6 multiplies by keys.
        most = {'bi_wkv': 1e300, 'wkv6': 1e30}[case.name]
        self.largest = min(most, torch.finfo(case.dtype).max)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def signs(self, *shape: int) -> Tensor:
        return 2 * torch.randint(0, 2, shape, generator=self.generator).double() - 1

    def some(self, share: float, *shape: int) -> Tensor:
        return self.uniform(0, 1, *shape) < share

    def small(self, *shape: int) -> Tensor:
        """Below float32's smallest normal number, and above."""
        return 10 ** self.uniform(-45, -15, *shape)

    def decay(self, channels: int) -> Tensor:
        """w of Bi-WKV: any sign, any size."""
        tokens, kind = self.case.shape[1], self.case.w
        if kind == 'rising':
            return self.signs(1) * torch.linspace(0, 200, channels, dtype=torch.float64) / tokens
        if kind == 'limit':
            return torch.where(self.some(0.5, channels), self.signs(channels) * 3e38, self.normal(channels) / tokens)
        scale = {'model': 20.0, 'zero': 0.0, 'denormal': 1e-40, 'steep': 2e3}.get(kind)
        if kind == 'any':
            return self.signs(channels) * 10 ** self.uniform(-8, 8, channels)
        return self.uniform(-1, 1, channels) * scale / tokens

    def log_decay(self, *shape: int) -> Tensor:
        """w of WKV6: at most 0."""
        kind = self.case.w
        if kind == 'mixed':
            return -torch.where(self.some(0.3, *shape), self.uniform(10, 100, *shape), 1e-4)
        if kind in ('reset', 'limit'):
            model, bound = -self.uniform(-6, 1, *shape).exp(), torch.inf if kind == 'reset' else self.largest
            return torch.where(self.some(0.05, *shape), -bound, model)
        if kind == 'any':
            return -(10 ** self.uniform(-8, 4.5, *shape))
        low, high = {'model': (-6, 1), 'slow': (-12, -9), 'fast': (2.5, 5), 'zero': (-1, 0), 'denormal': (-92, -90)}[
            kind
        ]
        return -self.uniform(low, high, *shape).exp() * (kind != 'zero')

    def keys(self, *shape: int) -> Tensor:
        kind, k = self.case.k, self.normal(*shape)
        if kind == 'spikes':
            return torch.where(self.some(0.02, *shape), self.signs(*shape) * 10 ** self.uniform(1, 4, *shape), k)
        if kind == 'groups':
            start, end = (int(x * shape[1]) for x in self.uniform(0, 1, 2).sort().values)
            k[:, start:end] -= self.uniform(20, 300, 1)
            return k
        if kind == 'limit':
            return torch.where(self.some(0.1, *shape), self.signs(*shape) * self.largest, k)
        if kind == 'denormal':
            return k * self.small(*shape)
        scale = {'normal': 1.0, 'equal': 0.0, 'large': 40.0, 'huge': 1e4}[kind]
        return k * scale + (kind == 'equal') * self.normal(1)

    def bonus(self, *shape: int) -> Tensor:
        kind, u = self.case.u, self.normal(*shape)
        if kind == 'limit':
            return torch.where(
                self.some(0.3, *shape), self.signs(*shape) * (3e38 if self.case.name == 'bi_wkv' else 1e3), u
            )
        return u + {'normal': 0.0, 'low': -60.0, 'high': 60.0}[kind]

    def values(self, *shape: int) -> Tensor:
        kind, v = self.case.v, self.normal(*shape)
        if kind == 'one':
            return v * self.some(1 / shape[1], *shape)
        if kind == 'equal':
            return v[:, :1].expand(shape).clone()
        if kind == 'denormal':
            return v * self.small(*shape)
        return v * {'normal': 1.0, 'large': 1e3}[kind]


def tensors(case: Case, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The operator's inputs in its order, and the gradient of y, in the case's dtypes and layout."""
    some, (_, _, *inner) = _Values(case), case.shape
    if case.name == 'bi_wkv':
        found = {'w': some.decay(*inner), 'u': some.bonus(*inner), 'k': some.keys(*case.shape)}
        found['v'] = some.values(*case.shape)
    else:
        found = {'r': some.normal(*case.shape), 'k': some.keys(*case.shape), 'v': some.values(*case.shape)}
        found |= {'w': some.log_decay(*case.shape), 'u': some.bonus(*inner)}
    found['gy'] = some.normal(*case.shape)
    for name, x in found.items():
        dtype = case.dtype if x.shape == case.shape else case.parameters
        dtype = torch.float32 if case.name == 'wkv6' and name == 'w' and dtype != torch.float64 else dtype
        limit = torch.finfo(dtype).max
        x = torch.where(x == -torch.inf, x, x.clamp(-limit, limit))
        found[name] = laid_out(x.to(device, dtype), case.layout)
    gy = found.pop('gy')
    return found, gy


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (those of the first sample for 'expanded') in other strides; around them lies NaN."""
    if layout == 'transposed':
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'expanded':
        return x[:1].expand(x.shape) if x.dim() > 2 else x[..., :1].expand(x.shape)
    if layout == 'sliced':
        return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., 1::2].copy_(x)
    if layout == 'window':
        around = x.new_full([size + 3 for size in x.shape], torch.nan)
        return around[(slice(1, -2),) * x.dim()].copy_(x)
    if layout == 'misaligned':
        return x.new_full((x.numel() + 2,), torch.nan)[1:-1].view(x.shape).copy_(x)
    return x


def kinds(case: Case, given: dict[str, Tensor]) -> list[str]:
    """Which of KINDS the case is of."""
    is_kind = {
        'long': case.shape[1] > 256,
        'odd': case.shape[2] % 2 == 1,
        'strided': not given['k'].is_contiguous(),
        'extreme': case.w in EXTREME['w'] or case.k in EXTREME['k'],
    }
    return [kind for kind in KINDS if is_kind[kind]]
