"""What VRWKV and VRWKV6 share below the model: patch embedding, position embedding, channel mix, block."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_rwkv.backbones.initial import depth_ratios, mix_parameter, ramp
from vision_rwkv.backbones.shift import Shift, shift_and_mix

FLOAT16_SQUARE_MAX = 255.0  # 256 ** 2 is past float16's largest number, 65504


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens; the image is padded with zeros at the bottom and right to whole patches."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, in_channels, H, W) -> tokens (B, h * w, C), row by row, and (h, w)."""
        height, width = x.shape[2:]
        h, w = ceil_div(height, self.patch_size), ceil_div(width, self.patch_size)
        x = self.projection(F.pad(x, (0, w * self.patch_size - width, 0, h * self.patch_size - height)))
        return x.flatten(2).transpose(1, 2), (h, w)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], hw: tuple[int, int], mode: str) -> Tensor:
    """A position embedding (1, grid[0] * grid[1], C) interpolated to hw: (1, h * w, C); itself where nothing differs.

    mode: one of `torch.nn.functional.interpolate`.
    """
    if grid == hw:
        return pos_embed
    maps = pos_embed.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=hw, mode=mode).flatten(2).transpose(1, 2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x) ** 2; in float16, where that would become infinite, it saturates."""
    x = torch.relu(x)
    if x.dtype == torch.float16:
        x = x.clamp(max=FLOAT16_SQUARE_MAX)
    return x.square()


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

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_k, x_r = shift_and_mix(x, hw, (self.spatial_mix_k, self.spatial_mix_r), self.shift)
        k = squared_relu(self.key(x_k))
        if self.key_norm is not None:
            k = self.key_norm(k)
        return torch.sigmoid(self.receptance(x_r)) * self.value(k)


class Block(nn.Module):
    """Spatial mix and channel mix, each with norm, layer scale, drop path and residual (released models).

    Args:
        att, ffn: the two mixes, called as mix(tokens, hw).
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
        x = x + self._branch(x, hw, self.att, self.ln1, self.gamma1)
        return x + self._branch(x, hw, self.ffn, self.ln2, self.gamma2)

    def _branch(self, x: Tensor, hw: tuple[int, int], mix: nn.Module, norm: nn.Module, gamma: Tensor | None) -> Tensor:
        x = norm(mix(x, hw)) if self.post_norm else mix(norm(x), hw)
        return self.drop_path(x if gamma is None else gamma * x)
