"""What VRWKV and VRWKV6 share below the model: patch embedding, position embedding, channel mix, block."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_rwkv.backbones.initial import depth_ratios, mix_parameter, ramp
from vision_rwkv.backbones.shift import (
    SEQUENCE,
    PlainParts,
    Shift,
    Stats,
    folded,
    is_plain,
    is_watched,
    plain_parts,
    shifted_linears,
)
from vision_rwkv.ops import (
    Norm,
    gate,
    norm_tokens,
    patches,
    q_shift,
    residual,
    squared_relu,
    squared_relu_linear,
    squared_relu_mlp,
)
from vision_rwkv.ops._checks import autocast_dtype, is_exporting
from vision_rwkv.ops._native import has_block
from vision_rwkv.ops.pointwise import order_patches


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


def is_fixed(*sizes: int | torch.SymInt) -> bool:
    """Whether these are numbers, and not symbols of an export for any size, which no branch may depend on."""
    return not any(isinstance(size, torch.SymInt) for size in sizes)


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens; the image is padded with zeros at the bottom and right to whole patches."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, in_channels, H, W) -> tokens (B, h * w, C), row by row, and (h, w)."""
        p, (height, width) = self.patch_size, x.shape[2:]
        h, w = ceil_div(height, p), ceil_div(width, p)
        if not is_fixed(h, w) or (height, width) != (h * p, w * p):
            x = F.pad(x, (0, w * p - width, 0, h * p - height))
        # As a linear map of each patch, which is faster than a GPU's convolution. One copy orders and casts the pixels.
        if x.is_cuda and not (x.requires_grad and torch.is_grad_enabled()) and not is_exporting():
            ordered = patches(x, p)
        else:
            ordered = order_patches(x, p, (h, w), autocast_dtype(x))
        return F.linear(ordered, self.projection.weight.flatten(1), self.projection.bias), (h, w)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], hw: tuple[int, int], mode: str) -> Tensor:
    """A position embedding (1, grid[0] * grid[1], C) interpolated to hw: (1, h * w, C); itself where nothing differs.

    mode: one of `torch.nn.functional.interpolate`.
    """
    if is_fixed(*hw) and grid == hw:
        return pos_embed
    maps = pos_embed.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=hw, mode=mode).flatten(2).transpose(1, 2)


def normalised(
    norm: nn.LayerNorm, x: Tensor, position: Tensor | None = None, stats_eps: float | None = None
) -> tuple[Tensor, Stats | None]:
    """``norm`` of x + position, and on a GPU, where gradients are off, its statistics for a norm with this eps."""
    quiet = x.is_cuda and not torch.is_grad_enabled() and not is_exporting()
    if not quiet or type(norm) is not nn.LayerNorm or is_watched(norm):
        return norm(x if position is None else x + position), None
    x, stats = norm_tokens(x, folded(norm), position, stats_eps)
    return x, None if stats_eps is None else Stats(stats, stats_eps)


class ChannelMix(nn.Module):
    """The feed-forward half of a block (arXiv 2403.02308, equation 6; key_norm: released models), of both versions."""

    def __init__(
        self, dim: int, layer: int, depth: int, shift: Shift, init_mode: str, hidden_rate: float, key_norm: bool
    ):
        super().__init__()
        self.shift = shift
        q = depth_ratios(layer, depth)[1]
        self.spatial_mix_k = mix_parameter(init_mode, ramp(dim, q)) if shift.pixels else None
        self.spatial_mix_r = mix_parameter(init_mode, ramp(dim, q)) if shift.pixels else None
        hidden = int(dim * hidden_rate)
        self.key = nn.Linear(dim, hidden, bias=False)
        self.key_norm = nn.LayerNorm(hidden) if key_norm else None
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden, dim, bias=False)

    def plain_parts(self) -> PlainParts | None:
        """What `forward` computes with, unless something in it is out of the ordinary."""
        mixes, linears = (self.spatial_mix_k, self.spatial_mix_r), (self.key, self.receptance, self.value)
        return None if self.key_norm is not None else plain_parts(self.shift, mixes, linears)

    def forward(
        self,
        x: Tensor,
        hw: tuple[int, int],
        norm: Norm | None = None,
        finish: Callable[[Tensor, Tensor], Any] = gate,
    ) -> Any:
        """(B, T, C) -> (B, T, C), or what ``finish`` makes of it.

        norm: a layer norm of x to apply first. finish: what becomes of the receptance and the values.
        """
        mixes = (self.spatial_mix_k, self.spatial_mix_r)
        quiet = x.is_cuda and not torch.is_grad_enabled() and hw != SEQUENCE
        if quiet and (parts := self.plain_parts()) is not None:
            k, r = q_shift(x, parts.mixes, hw, *self.shift, norm=norm)
            return finish(self.receptance(r), squared_relu_mlp(k, self.key.weight, self.value.weight))
        k, r = shifted_linears(x, hw, self.shift, norm, mixes, (self.key, self.receptance))
        if self.key_norm is None and is_plain(self.value):
            return finish(r, squared_relu_linear(k, self.value.weight))
        k = squared_relu(k)
        return finish(r, self.value(k if self.key_norm is None else self.key_norm(k)))


class Carry:
    """What a block finds out about its tokens for the one after it, if nothing happens to them in between."""

    stats: Stats | None = None  # their statistics
    normalised = False  # whether layer 0 finds its input normalised


class Block(nn.Module):
    """Spatial mix and channel mix, each with norm, layer scale, drop path and residual (released models).

    Args:
        att, ffn: the two mixes, called as mix(tokens, hw, norm to apply first), ffn with what finishes it.
        dim: channels C.
        first: whether this is layer 0, which normalises its input.
        post_norm: normalise what a mix returns instead of what it takes.
        init_values: initial layer scale; None for no layer scale.
        drop_path: the rate of stochastic depth.
        with_cp: recompute the block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        att: Any,
        ffn: ChannelMix,
        dim: int,
        first: bool,
        post_norm: bool,
        init_values: float | None,
        drop_path: float,
        with_cp: bool,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.with_cp = with_cp
        self.ln0 = nn.LayerNorm(dim) if first else None
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.att: Any = att
        self.ffn: Any = ffn
        self.drop_path = DropPath(drop_path)
        self.gamma1 = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))
        self.gamma2 = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor, hw: tuple[int, int], carry: Carry | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); the first h * w tokens form the map.

        carry: one for all blocks that follow each other.
        """
        # Not with post_norm, where no norm comes first.
        next_eps = None if carry is None or self.post_norm else self.ln1.eps
        known, raw = (None, True) if carry is None else (carry.stats, not carry.normalised)
        arguments = x, hw, known, next_eps, raw
        if self.with_cp and torch.is_grad_enabled():  # inference and export see plain blocks
            x, stats = checkpoint(self._forward, *arguments, use_reentrant=False)
        else:
            x, stats = self._forward(*arguments)
        if carry is not None:
            carry.stats = None if next_eps is None else Stats(stats, next_eps)
        return x

    def _forward(
        self, x: Tensor, hw: tuple[int, int], stats: Stats | None, next_eps: float | None, raw: bool
    ) -> tuple[Tensor, Tensor]:
        """The tokens, and their statistics if a next norm's eps is given. raw: layer 0 has to normalise its input."""
        if self.ln0 is not None and raw:
            x, stats = normalised(self.ln0, x, stats_eps=None if self.post_norm else self.ln1.eps)
        if (parts := self._whole_parts(hw)) is not None:
            return self._whole(x, hw, stats, next_eps, *parts)
        if self.post_norm:
            x = self._add(x, self.gamma1, None, self.att(x, hw), folded(self.ln1))[0]
            return self.ffn(x, hw, None, lambda r, z: self._add(x, self.gamma2, r, z, folded(self.ln2)))
        z = self.att(x, hw, folded(self.ln1, stats))
        x, middle = self._add(x, self.gamma1, None, z, stats_eps=self.ln2.eps)
        norm = folded(self.ln2, Stats(middle, self.ln2.eps))
        return self.ffn(x, hw, norm, lambda r, z: self._add(x, self.gamma2, r, z, stats_eps=next_eps))

    def _whole_parts(self, hw: tuple[int, int]) -> tuple[PlainParts, PlainParts] | None:
        """The parts of both mixes for `vrwkv_block`, unless something in this block is out of the ordinary, or watched.

        An export has the operators that a block is made of, for which other programs have translations.
        """
        if is_exporting() or not has_block() or hw == SEQUENCE:
            return None
        if is_watched(self.att, self.ffn, self.ln1, self.ln2):
            return None
        att, ffn = self.att.plain_parts(), self.ffn.plain_parts()
        return None if att is None or ffn is None else (att, ffn)

    def _whole(
        self,
        x: Tensor,
        hw: tuple[int, int],
        stats: Stats | None,
        next_eps: float | None,
        att: PlainParts,
        ffn: PlainParts,
    ) -> tuple[Tensor, Tensor]:
        """All of the block by one call."""
        ln1, ln2 = self.ln1, self.ln2
        return getattr(torch.ops.vision_rwkv, att.block)(
            x,
            folded(ln1, stats).stats,
            [ln1.weight, ln1.bias, ln2.weight, ln2.bias],
            ln1.eps,
            ln2.eps,
            next_eps,
            self.post_norm,
            [*att.mixes, *ffn.mixes],
            [*att.maps, *ffn.maps],
            *att.others,
            self.gamma1,
            self.gamma2,
            self._scale(x),
            self._scale(x),
            *hw,
            self.ffn.shift.pixels,
            self.ffn.shift.gamma,
            autocast_dtype(x),
        )

    def _scale(self, x: Tensor) -> Tensor | None:
        """What drop path multiplies each sample's branch by, if it drops any."""
        drops = self.training and self.drop_path.drop_prob > 0
        return self.drop_path(x.new_ones(len(x), 1, 1)) if drops else None

    def _add(
        self,
        x: Tensor,
        gamma: Tensor | None,
        gate: Tensor | None,
        z: Tensor,
        norm: Norm | None = None,
        stats_eps: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`residual` with this block's drop path."""
        return residual(x, z, gate=gate, norm=norm, gamma=gamma, scale=self._scale(x), stats_eps=stats_eps)
