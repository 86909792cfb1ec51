"""The operators by definition: O(T^2), any device and dtype, differentiable. Every test compares with these.

| symbol | meaning | shape |
|---|---|---|
| B, T, C | batch, tokens, channels | |
| H, N | heads, channels of a head (C = H N) | |
| k, v | keys and values of Bi-WKV | (B, T, C) |
| w, u | its decay and its bonus for the token itself | (C,) |
| r, k, v, w | receptance, keys, values, log decay of WKV6 | (B, T, H, N) |
| u | WKV6's bonus for the token itself | (H, N) |
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV, arXiv 2403.02308 equation 5: w, u (C,), k, v (B, T, C) -> y (B, T, C).

    y_t is the mean of v weighted by exp(-(|t-i|-1) w + k_i) for i != t and by exp(u + k_t) for t itself.
    """
    index = torch.arange(k.shape[1], device=k.device)
    distance = (index[:, None] - index).abs()[..., None]  # (T, T, 1)
    exponent = torch.where(distance == 0, u, -(distance - 1) * w)  # (T, T, C)
    weight = torch.softmax(exponent + k[:, None], dim=2)  # (B, T, T, C)
    return (weight * v[:, None]).sum(2)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """WKV6 in both directions: r, k, v, w (B, T, H, N), u (H, N) -> y (B, T, H, N).

    y_t = sum_i (sum_n r_t[n] k_i[n] d_ti[n]) v_i, where d_ti is exp of the sum of w over the tokens strictly
    between t and i for i != t, and u for i = t.
    """
    index = torch.arange(w.shape[1], device=w.device)
    apart = (index[:, None] - index)[None, :, :, None, None]  # t - i
    # Row t has w_{t-1} for every i < t - 1, so that running down the rows adds up what lies between i and t and nothing
    # else: a difference of two longer sums would lose it beside a large w.
    between = torch.where(apart > 1, w.roll(1, 1)[:, :, None], 0).cumsum(1)
    decay = torch.where(apart > 0, between, between.transpose(1, 2)).exp()  # (B, T, T, H, N)
    decay = torch.where(apart == 0, u, decay)
    score = torch.einsum('bthn,bihn,btihn->btih', r, k, decay)
    return torch.einsum('btih,bihm->bthm', score, v)


def q_shift(x: Tensor, hw: tuple[int, int], pixels: int, gamma: float, heads: int) -> Tensor:
    """Every channel of x (B, T, C) from the neighbour that its place in its head chooses; zero beyond the border."""
    h, w = hw
    out, dim = x.clone(), x.shape[2] // heads
    places = torch.arange(x.shape[2], device=x.device) % dim
    padded = F.pad(x, (0, 0, 0, 1))  # the last token is zero
    for j, (dy, dx) in enumerate([(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)]):
        mine = (int(dim * gamma * j) <= places) & (places < int(dim * gamma * (j + 1)))
        found = [(token // w + dy, token % w + dx) for token in range(h * w)]
        sources = [row * w + column if 0 <= row < h and 0 <= column < w else -1 for row, column in found]
        out[:, : h * w] = torch.where(mine, padded[:, sources], out[:, : h * w])
    return out
