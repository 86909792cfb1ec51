"""Q-Shift as the layers use it: how tokens are shifted, and linear maps of the shifted and mixed tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_rwkv import ops

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
    return ops.q_shift(x, [torch.zeros_like(x[0, 0])], hw, *shift)[0]


def shift_and_mix(x: Tensor, hw: tuple[int, int], mixes: Sequence[Tensor | None], shift: Shift) -> Sequence[Tensor]:
    """One blend of the tokens and their shifted neighbours for each mix: x * mix + q_shift(x) * (1 - mix).

    x (B, T, C), mixes (1, 1, C) -> tensors (B, T, C). With ``shift.pixels`` 0 every blend is x itself.
    """
    if not shift.pixels:
        return [x for _ in mixes]
    if hw == SEQUENCE:
        xx = q_shift(x, hw, shift)
        return [x * mix + xx * (1 - mix) for mix in mixes if mix is not None]
    return ops.q_shift(x, [mix for mix in mixes if mix is not None], hw, *shift).unbind()


class Stats(NamedTuple):
    """Mean and 1 / deviation of tokens, (B, T, 2), the deviation being that of a norm with this eps."""

    values: Tensor
    eps: float


def folded(norm: nn.LayerNorm, stats: Stats | None = None) -> ops.Norm:
    """``norm`` for an operator that applies it, with the statistics of what it will see if they are known."""
    known = stats.values if stats is not None and stats.eps == norm.eps else None
    return ops.Norm(norm.weight, norm.bias, norm.eps, known)


def apply_norm(norm: ops.Norm | None, x: Tensor) -> Tensor:
    """``norm`` alone."""
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def is_plain(*linears: nn.Module) -> bool:
    """Whether an operator may use the weights in place of the layers: without hooks, and of no other class (LoRA)."""
    return all(type(x) is nn.Linear for x in linears) and not is_watched(*linears)


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody wants to see a module called: it has hooks, or a forward of its own."""
    return any(x._forward_hooks or x._forward_pre_hooks or 'forward' in x.__dict__ for x in modules)


class PlainParts(NamedTuple):
    """Mixes (1, 1, C) and weights of linear layers (D, C) of a mix without anything out of the ordinary.

    block, others: of a spatial mix, the operator for a block with it, and what that takes after the weights.
    """

    mixes: list[Tensor]
    maps: list[Tensor]
    block: str = ''
    others: tuple = ()


def plain_parts(shift: Shift, mixes: Sequence[Tensor | None], linears: Sequence[nn.Linear]) -> PlainParts | None:
    """The parts, if tokens are shifted and the layers are plain."""
    if not shift.pixels or not is_plain(*linears):
        return None
    return PlainParts([mix for mix in mixes if mix is not None], [linear.weight for linear in linears])


def shifted_linears(
    x: Tensor,
    hw: tuple[int, int],
    shift: Shift,
    norm: ops.Norm | None,
    mixes: Sequence[Tensor | None],
    linears: Sequence[nn.Linear],
) -> list[Tensor]:
    """Every linear layer (without bias) of its blend of the normalised tokens x (B, T, C), see `shift_and_mix`."""
    if not shift.pixels or hw == SEQUENCE or not is_plain(*linears):
        blends = shift_and_mix(apply_norm(norm, x), hw, mixes, shift)
        return [linear(blend) for linear, blend in zip(linears, blends, strict=True)]
    weights = [linear.weight for linear in linears]
    return ops.mix_linear(x, [mix for mix in mixes if mix is not None], weights, hw, *shift, norm=norm)
