"""Token shift and token mixing: each layer does both in one place, through the functions here."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SEQUENCE = (0, 0)  # in place of (h, w): the tokens are no map (some are masked) but a sequence


class Shift(NamedTuple):
    """How a layer shifts its tokens.

    pixels: distance in tokens; 0 switches shift and mixing off.
    gamma: the fraction of the channels that moves in each of the four directions, 1/4 at most.
    heads: the channels form this many groups, each of which is divided among the directions by itself.
    """

    pixels: int
    gamma: float
    heads: int


def q_shift(x: Tensor, hw: tuple[int, int], shift: Shift) -> Tensor:
    """Q-Shift (arXiv 2403.02308, section 3.2): each quarter of the channels takes another neighbour's values.

    x (B, T, C) -> (B, T, C), any dtype. The first h * w tokens form the map; quarters 1 to 4 take the left, right,
    upper and lower neighbour, zero beyond the border. Channels past the fourth border stay, and so do tokens past
    the map (a class token). In a `SEQUENCE` each token takes all of the previous one's values, the first one zeros.
    """
    if hw == SEQUENCE:
        return F.pad(x, (0, 0, 1, -1))
    batch, tokens, channels = x.shape
    h, w = hw
    dim = channels // shift.heads
    borders = [int(dim * shift.gamma * j) for j in range(5)]
    sizes = [end - start for start, end in zip(borders, [*borders[1:], dim], strict=True)]
    token_map, others = x.split([h * w, tokens - h * w], 1)
    parts = token_map.reshape(batch, h, w, shift.heads, dim).split(sizes, -1)
    dx, dy = min(shift.pixels, w), min(shift.pixels, h)
    # F.pad counts the axes from the last one; a negative amount crops.
    pads = [(dx, -dx, 0, 0), (-dx, dx, 0, 0), (0, 0, dy, -dy), (0, 0, -dy, dy)]
    moved = [F.pad(part, (0, 0, 0, 0, *pad)) for part, pad in zip(parts[:4], pads, strict=True)]
    shifted = torch.cat([*moved, parts[4]], -1).reshape(batch, h * w, channels)
    return torch.cat([shifted, others], 1) if tokens > h * w else shifted


def shift_and_mix(x: Tensor, hw: tuple[int, int], mixes: Sequence[Tensor | None], shift: Shift) -> list[Tensor]:
    """One blend of the tokens and their shifted neighbours for each mix: x * mix + q_shift(x) * (1 - mix).

    x (B, T, C), mixes (1, 1, C) -> tensors (B, T, C). With ``shift.pixels`` 0 every blend is x itself.
    """
    if not shift.pixels:
        return [x for _ in mixes]
    xx = q_shift(x, hw, shift)
    return [x * mix + xx * (1 - mix) for mix in mixes if mix is not None]
