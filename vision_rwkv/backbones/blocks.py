"""What VRWKV and VRWKV6 share below the model: patch embedding, position embedding, channel mix, block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_rwkv.backbones.initial import depth_ratios, mix_parameter, ramp
from vision_rwkv.backbones.shift import Shift, folded, is_plain, shifted_linears
from vision_rwkv.ops import Norm, gate, residual, squared_relu, squared_relu_linear
from vision_rwkv.ops._checks import autocast_dtype


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
        patches = x.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, in_channels, p, p)
        patches = patches.to(autocast_dtype(x), memory_format=torch.contiguous_format).flatten(3).flatten(1, 2)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias), (h, w)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], hw: tuple[int, int], mode: str) -> Tensor:
    """A position embedding (1, grid[0] * grid[1], C) interpolated to hw: (1, h * w, C); itself where nothing differs.

    mode: one of `torch.nn.functional.interpolate`.
    """
    if is_fixed(*hw) and grid == hw:
        return pos_embed
    maps = pos_embed.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=hw, mode=mode).flatten(2).transpose(1, 2)


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

    def forward(
        self,
        x: Tensor,
        hw: tuple[int, int],
        norm: Norm | None = None,
        finish: Callable[[Tensor, Tensor], Tensor] = gate,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        norm: a layer norm of x to apply first. finish: what becomes of the receptance and the values.
        """
        mixes = (self.spatial_mix_k, self.spatial_mix_r)
        k, r = shifted_linears(x, hw, self.shift, norm, mixes, (self.key, self.receptance))
        if self.key_norm is None and is_plain(self.value):
            return finish(r, squared_relu_linear(k, self.value.weight))
        k = squared_relu(k)
        return finish(r, self.value(k if self.key_norm is None else self.key_norm(k)))


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
        att: nn.Module,
        ffn: nn.Module,
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
        self.att = att
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)
        self.gamma1 = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))
        self.gamma2 = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, T, C) -> (B, T, C); the first h * w tokens form the map."""
        if self.with_cp and torch.is_grad_enabled():  # inference and export see plain blocks
            return checkpoint(self._forward, x, hw, use_reentrant=False)
        return self._forward(x, hw)

    def _forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.ln0 is not None:
            x = self.ln0(x)
        if self.post_norm:
            x = self._add(x, self.gamma1, None, self.att(x, hw), folded(self.ln1))[0]
            return self.ffn(x, hw, None, lambda r, z: self._add(x, self.gamma2, r, z, folded(self.ln2))[0])
        z = self.att(x, hw, folded(self.ln1))
        x, stats = self._add(x, self.gamma1, None, z, stats_eps=self.ln2.eps)
        return self.ffn(x, hw, folded(self.ln2, stats), lambda r, z: self._add(x, self.gamma2, r, z)[0])

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
        drops = self.training and self.drop_path.drop_prob > 0
        scale = self.drop_path(x.new_ones(len(x), 1, 1)) if drops else None
        return residual(x, z, gate=gate, norm=norm, gamma=gamma, scale=scale, stats_eps=stats_eps)
