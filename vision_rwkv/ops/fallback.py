"""The operators in PyTorch, for every device and dtype, in memory linear in T: what runs without native code.

Bi-WKV takes log2(T) doubling steps over whole tensors. WKV6 walks over chunks of tokens and carries one N x N state.
Both are stable for any finite input: sums are kept relative to their largest term, decays only ever shrink.
"""

import torch
from torch import Tensor

from vision_rwkv.ops._checks import compute_dtype

CHUNK = 16  # tokens of a WKV6 chunk; its pairwise decays take CHUNK times the memory of the chunk


def _scan(w: Tensor, key: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Sums over the tokens before t: S_t = sum_{i<t} exp(-(t-1-i) w + key_i) values_i, as (m, S exp(-m), ...).

    w (C,), key and values (B, T, C). m is -inf where there is no token before t.
    """
    pad = torch.full_like(key[:, :1], -torch.inf)
    m = torch.cat([pad, key[:, :-1]], 1)
    sums = [torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) for x in values]
    step = 1
    while step < key.shape[1]:
        # Row t holds the last `step` tokens before t; add the `step` before those, which row t - step holds.
        far = torch.cat([pad.expand(-1, step, -1), m[:, :-step] - step * w], 1)
        top = torch.maximum(m, far)
        base = torch.where(top == -torch.inf, 0, top)  # -inf - -inf would be NaN
        near_scale, far_scale = (m - base).exp(), (far - base).exp()
        sums = [near_scale * x + far_scale * torch.cat([torch.zeros_like(x[:, :step]), x[:, :-step]], 1) for x in sums]
        m, step = top, 2 * step
    return m, *sums


def _both_ways(w: Tensor, key: Tensor, *values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`_scan` over the tokens before t, and over those after t."""
    after = _scan(w, key.flip(1), *(x.flip(1) for x in values))
    return _scan(w, key, *values), tuple(x.flip(1) for x in after)


def _bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple, tuple]:
    """y, the logarithm of its denominator, and the sums over the tokens before and after."""
    before, after = _both_ways(w, k, v, torch.ones_like(v))
    top = torch.maximum(torch.maximum(before[0], after[0]), u + k)
    scales = [(m - top).exp() for m in (before[0], after[0], u + k)]
    numerator = scales[0] * before[1] + scales[1] * after[1] + scales[2] * v
    denominator = scales[0] * before[2] + scales[1] * after[2] + scales[2]
    return numerator / denominator, top + denominator.log(), before, after


def _share(exponent: Tensor) -> Tensor:
    """exp of at most 0, a token's share of a denominator: of exponents past 1e15 (in float32 1e7) digits past the point
    are missing, and what does not cancel then must not become more than the whole."""
    return exponent.clamp(max=0).exp()


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV forward; shapes and dtypes as vision_rwkv.ops.bi_wkv."""
    if k.numel() == 0:
        return torch.empty_like(k)
    dtype = compute_dtype(w, u, k, v)
    return _bi_wkv(*(x.to(dtype) for x in (w, u, k, v)))[0].to(k.dtype)


def bi_wkv_backward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of w, u, k, v; formulas in kernels/bi_wkv/README.md."""
    dtypes = [x.dtype for x in (w, u, k, v)]
    if k.numel() == 0:
        return torch.zeros_like(w), torch.zeros_like(u), torch.empty_like(k), torch.empty_like(v)
    dtype = compute_dtype(w, u, k, v)
    w, u, k, v, gy = (x.to(dtype) for x in (w, u, k, v, gy))
    y, log_sum, before, after = _bi_wkv(w, u, k, v)
    # Transposed, the weight of token i at token t is exp(k_i) times a scan over t with the keys -log_sum_t.
    left, right = _both_ways(w, -log_sum, gy, -gy * y)
    own = _share(u + k - log_sum)
    scales = [_share(k + m) for m in (left[0], right[0])]
    gv = scales[0] * left[1] + scales[1] * right[1] + own * gy
    gk = scales[0] * (left[1] * v + left[2]) + scales[1] * (right[1] * v + right[2]) + own * gy * (v - y)
    gu = (own * gy * (v - y)).sum((0, 1))
    # A pair (i, s) has |s-i|-1 tokens between, and so many times its weight enters the sum over t of these products.
    gw = torch.zeros_like(w)
    for one, other in ((before, right), (after, left)):
        gw -= (_share(one[0] + other[0] - w) * (one[1] * other[1] + one[2] * other[2])).sum((0, 1))
    return tuple(x.to(t) for x, t in zip((gw, gu, gk, gv), dtypes, strict=True))


def _sum_before(x: Tensor, dim: int) -> Tensor:
    """Exclusive running sum. A running sum less the own term would lose the digits of small sums after a large term."""
    length = x.shape[dim]
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, length - 1)], dim).cumsum(dim)


def _sum_after(x: Tensor, dim: int) -> Tensor:
    return _sum_before(x.flip(dim), dim).flip(dim)


class _Chunk:
    """Tokens s of one causal pass with the decays between them; tensors (B, H, L, N), state (B, H, N, N)."""

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor):
        self.v = v
        length = w.shape[2]
        past = torch.ones(length, length, dtype=torch.bool, device=w.device).tril(-1)  # i < t, at (t, i)
        apart = past.tril(-2)[..., None]
        # The sum of w over i < j < t is made of just these terms: a difference of longer sums would lose digits.
        last = torch.where(apart, w.roll(1, 2)[:, :, :, None], 0)  # (B, H, t, i, N): w_{t-1} if t-1 > i
        self.decay = torch.where(past[..., None], last.cumsum(2), -torch.inf).exp()
        self.r, self.k = r, k
        self.r_decay, self.k_decay = _sum_before(w, 2).exp(), _sum_after(w, 2).exp()
        self.state_decay = w.sum(2)[..., None].exp()  # (B, H, N, 1)
        self.score = torch.einsum('bhtn,bhin,bhtin->bhti', r, k, self.decay)

    def output(self, state: Tensor) -> Tensor:
        return self.score @ self.v + (self.r * self.r_decay) @ state

    def next_state(self, state: Tensor) -> Tensor:
        return self.state_decay * state + (self.k * self.k_decay).transpose(-1, -2) @ self.v

    def backward(self, state: Tensor, gstate: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of r, k, v, w and of the state before, from those of the state after and of the output."""
        gscore = gy @ self.v.transpose(-1, -2)
        gr_state = self.r_decay * (gy @ state.transpose(-1, -2))
        gk_state = self.k_decay * (self.v @ gstate.transpose(-1, -2))
        gr = gr_state + torch.einsum('bhti,bhin,bhtin->bhtn', gscore, self.k, self.decay)
        gk = gk_state + torch.einsum('bhti,bhtn,bhtin->bhin', gscore, self.r, self.decay)
        gv = self.score.transpose(-1, -2) @ gy + (self.k * self.k_decay) @ gstate
        before = self.state_decay * gstate + (self.r * self.r_decay).transpose(-1, -2) @ gy
        # w_j decays what passes over token j: pairs i < j < t, the state to t > j, i < j to the state, state to state.
        pairs = torch.einsum('bhti,bhtn,bhin,bhtin->bhtin', gscore, self.r, self.k, self.decay)
        passed = _sum_after(_sum_before(pairs, 3), 2)  # at (t, i): over t' > t and i' < i
        gw = torch.diagonal(passed, dim1=2, dim2=3).transpose(-1, -2)
        to_state, from_state = self.k * gk_state, self.r * gr_state
        gw = gw + _sum_before(to_state, 2) + _sum_after(from_state, 2)
        gw = gw + (self.state_decay * state * gstate).sum(-1)[:, :, None]
        return gr, gk, gv, gw, before


def _bthn(*xs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(B, T, H, N) to (B, H, T, N) in ``dtype``, or back."""
    return [x.to(dtype).transpose(1, 2) for x in xs]


def _new_state(r: Tensor) -> Tensor:
    return r.new_zeros(*r.shape[:2], r.shape[-1], r.shape[-1])


def _causal(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """r_t S_{t-1} over all t; tensors (B, H, T, N)."""
    state, outputs = _new_state(r), []
    for parts in zip(*(x.split(CHUNK, 2) for x in (r, k, v, w)), strict=True):
        chunk = _Chunk(*parts)
        outputs.append(chunk.output(state))
        state = chunk.next_state(state)
    return torch.cat(outputs, 2)


def _causal_backward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, gy: Tensor) -> list[Tensor]:
    """Gradients of r, k, v, w of `_causal`; keeps one state for each chunk."""
    parts = list(zip(*(x.split(CHUNK, 2) for x in (r, k, v, w, gy)), strict=True))
    states = [_new_state(r)]
    for *inputs, _ in parts[:-1]:
        states.append(_Chunk(*inputs).next_state(states[-1]))
    gstate, grads = _new_state(r), []
    for (*inputs, g), state in zip(reversed(parts), reversed(states), strict=True):
        *chunk_grads, gstate = _Chunk(*inputs).backward(state, gstate, g)
        grads.append(chunk_grads)
    return [torch.cat(x[::-1], 2) for x in zip(*grads, strict=True)]


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """WKV6 forward; shapes and dtypes as vision_rwkv.ops.wkv6."""
    if r.numel() == 0:
        return torch.empty_like(r)
    dtype = compute_dtype(r, k, v, w, u)
    out = r.dtype
    r, k, v, w = _bthn(r, k, v, w, dtype=dtype)
    y = (r * k * u.to(dtype)[:, None]).sum(-1, keepdim=True) * v
    y = y + _causal(r, k, v, w) + _causal(*(x.flip(2) for x in (r, k, v, w))).flip(2)
    return _bthn(y, dtype=out)[0].contiguous()


def wkv6_backward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of r, k, v, w, u; formulas in kernels/wkv6/README.md."""
    dtypes = [x.dtype for x in (r, k, v, w, u)]
    if r.numel() == 0:
        return *(torch.empty_like(x) for x in (r, k, v, w)), torch.zeros_like(u)
    dtype = compute_dtype(r, k, v, w, u)
    r, k, v, w, gy = _bthn(r, k, v, w, gy, dtype=dtype)
    bonus = u.to(dtype)[:, None]
    gv_dot = (gy * v).sum(-1, keepdim=True)
    own = (r * k * bonus).sum(-1, keepdim=True)
    grads = [gv_dot * bonus * k, gv_dot * bonus * r, own * gy, torch.zeros_like(w)]
    forth = _causal_backward(r, k, v, w, gy)
    back = _causal_backward(*(x.flip(2) for x in (r, k, v, w, gy)))
    grads = [g + a + b.flip(2) for g, a, b in zip(grads, forth, back, strict=True)]
    gu = (gv_dot * r * k).sum((0, 2))
    grads = [_bthn(g, dtype=t)[0].contiguous() for g, t in zip(grads, dtypes, strict=False)]
    return *grads, gu.to(dtypes[4])
