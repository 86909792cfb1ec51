"""VRWKV, the backbone of "Vision-RWKV" (arXiv 2403.02308): linear-cost attention in both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_rwkv.backbones._checks import check_choice, check_range
from vision_rwkv.backbones.base import Backbone
from vision_rwkv.backbones.initial import INIT_MODES, constant, depth_ratios, full_ramp, mix_parameter, ramp, zigzag
from vision_rwkv.backbones.shift import PlainParts, Shift, is_plain, plain_parts, shifted_linears
from vision_rwkv.ops import Norm, bi_wkv, gate, gated_bi_wkv, gated_linear


class SpatialMix(nn.Module):
    """The attention half of a VRWKV block (arXiv 2403.02308, equations 3 to 5; key_norm: released models)."""

    def __init__(self, dim: int, layer: int, depth: int, shift: Shift, init_mode: str, key_norm: bool):
        super().__init__()
        self.shift = shift
        p, q = depth_ratios(layer, depth)
        self.spatial_decay = constant(init_mode, -5 + 8 * full_ramp(dim, 0.7 + 1.3 * p))
        self.spatial_first = constant(init_mode, torch.tensor(0.3).double().log() + 0.5 * zigzag(dim))
        self.spatial_mix_k = mix_parameter(init_mode, ramp(dim, q)) if shift.pixels else None
        self.spatial_mix_v = mix_parameter(init_mode, ramp(dim, q) + 0.3 * p) if shift.pixels else None
        self.spatial_mix_r = mix_parameter(init_mode, ramp(dim, q / 2)) if shift.pixels else None
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim) if key_norm else None
        self.output = nn.Linear(dim, dim, bias=False)

    def plain_parts(self) -> PlainParts | None:
        """What `forward` computes with, unless something in it is out of the ordinary."""
        mixes = (self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r)
        linears = (self.key, self.value, self.receptance, self.output)
        parts = None if self.key_norm is not None else plain_parts(self.shift, mixes, linears)
        return parts and parts._replace(block='vrwkv_block', others=(self.spatial_decay, self.spatial_first))

    def forward(self, x: Tensor, hw: tuple[int, int], norm: Norm | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); ``norm``: a layer norm of x to apply first."""
        mixes = (self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r)
        linears = (self.key, self.value, self.receptance)
        k, v, r = shifted_linears(x, hw, self.shift, norm, mixes, linears)
        if k.is_cuda and not torch.is_grad_enabled() and self.key_norm is None:
            return self.output(gated_bi_wkv(self.spatial_decay, self.spatial_first, k, v, r))
        tokens = x.shape[1]
        y = bi_wkv(self.spatial_decay / tokens, self.spatial_first / tokens, k, v)
        if self.key_norm is not None:
            y = self.key_norm(y)
        return gated_linear(r, y, self.output.weight) if is_plain(self.output) else self.output(gate(r, y))


class VRWKV(Backbone):
    """VRWKV: images (B, in_channels, H, W) to a tuple of maps (B, embed_dims, H / patch_size, W / patch_size).

    Args:
        img_size: side or (height, width) of the training images: the grid of the position embedding. Images of
            any size are taken; the position embedding is resized where the grid differs.
        patch_size: side of a patch.
        in_channels: channels of the images.
        out_indices: the layer, or layers, whose maps are returned; negative ones count from the end.
        drop_rate: dropout after the position embedding.
        embed_dims: channels C.
        depth: number of layers.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        channel_gamma: the fraction of the channels that Q-Shift moves in each direction, 1/4 at most.
        shift_pixel: distance of Q-Shift in tokens; 0 for neither shift nor mixing (the layers then have no mixes).
        init_mode: initial decay, bonus and mixes: 'fancy' (of channel and depth), 'local' or 'global'.
        post_norm: normalise what the mixes return instead of what they take.
        key_norm: normalise the Bi-WKV output and the squared keys of the channel mix.
        init_values: initial layer scale; None for no layer scale.
        hidden_rate: hidden channels of the channel mix, as a multiple of embed_dims.
        final_norm: normalise the last layer's map.
        interpolate_mode: how the position embedding is resized: 'bicubic', 'bilinear' or 'nearest'.
        with_cp: gradient checkpointing of each block: less memory, more time, the same values.
        frozen_stages: what does not train: -1 nothing, 0 the patch and position embedding, n the first n layers too;
            all of them, and the final norm as well.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        embed_dims: int = 256,
        depth: int = 12,
        drop_path_rate: float = 0.0,
        channel_gamma: float = 1 / 4,
        shift_pixel: int = 1,
        init_mode: str = 'fancy',
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        hidden_rate: float = 4,
        final_norm: bool = True,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
        frozen_stages: int = -1,
    ):
        check_choice('init_mode', init_mode, INIT_MODES)
        check_range('channel_gamma', channel_gamma, 0, 1 / 4, with_high=True)
        shift = Shift(shift_pixel, channel_gamma, heads=1)
        super().__init__(
            lambda layer: SpatialMix(embed_dims, layer, depth, shift, init_mode, key_norm),
            shift,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_indices=out_indices,
            drop_rate=drop_rate,
            embed_dims=embed_dims,
            depth=depth,
            drop_path_rate=drop_path_rate,
            init_mode=init_mode,
            post_norm=post_norm,
            key_norm=key_norm,
            init_values=init_values,
            hidden_rate=hidden_rate,
            final_norm=final_norm,
            interpolate_mode=interpolate_mode,
            with_cp=with_cp,
            frozen_stages=frozen_stages,
        )
