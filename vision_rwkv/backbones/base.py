"""The model around the blocks, the same for VRWKV and VRWKV6."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vision_rwkv.backbones._checks import check_choice, check_image, check_int, check_range, to_layers, to_pair
from vision_rwkv.backbones.blocks import (
    Block,
    Carry,
    ChannelMix,
    PatchEmbed,
    ceil_div,
    normalised,
    resize_pos_embed,
)
from vision_rwkv.backbones.initial import init_linear
from vision_rwkv.backbones.shift import Shift, is_watched

INTERPOLATE_MODES = ('bicubic', 'bilinear', 'nearest')

Feature = Tensor | list[Tensor]


class Backbone(nn.Module):
    """Patch embedding, position embedding, blocks, final norm, and maps out. Arguments: see VRWKV and VRWKV6.

    spatial_mix: makes the spatial mix of a layer from its number.
    """

    def __init__(
        self,
        spatial_mix: Callable[[int], nn.Module],
        shift: Shift,
        *,
        img_size: int | Sequence[int],
        patch_size: int,
        in_channels: int,
        out_indices: int | Sequence[int],
        drop_rate: float,
        embed_dims: int,
        depth: int,
        drop_path_rate: float,
        init_mode: str,
        post_norm: bool,
        key_norm: bool,
        init_values: float | None,
        hidden_rate: float,
        final_norm: bool,
        interpolate_mode: str,
        with_cp: bool,
        frozen_stages: int,
        with_cls_token: bool = False,
        output_cls_token: bool = False,
    ):
        super().__init__()
        sizes = {'patch_size': patch_size, 'in_channels': in_channels, 'embed_dims': embed_dims, 'depth': depth}
        for name, size in sizes.items():
            check_int(name, size)
        check_int('shift_pixel', shift.pixels, minimum=0)
        check_int('frozen_stages', frozen_stages, minimum=-1)
        if frozen_stages > depth:
            raise ValueError(f'frozen_stages must be at most the depth, {depth}, got {frozen_stages}')
        check_range('drop_rate', drop_rate, 0, 1)
        check_range('drop_path_rate', drop_path_rate, 0, 1)
        check_range('hidden_rate', hidden_rate, 1 / embed_dims, float('inf'))  # one hidden channel at least
        if init_values is not None:
            check_range('init_values', init_values, -float('inf'), float('inf'))
        check_choice('interpolate_mode', interpolate_mode, INTERPOLATE_MODES)
        if output_cls_token and not with_cls_token:
            raise ValueError('output_cls_token=True needs with_cls_token=True, got with_cls_token=False')

        self.embed_dims = embed_dims
        self.in_channels = in_channels
        self.out_indices = to_layers(out_indices, depth)
        self.interpolate_mode = interpolate_mode
        self.output_cls_token = output_cls_token
        height, width = to_pair('img_size', img_size)
        self.grid = (ceil_div(height, patch_size), ceil_div(width, patch_size))  # of the position embedding

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dims))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims)) if with_cls_token else None
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            Block(
                spatial_mix(layer),
                ChannelMix(embed_dims, layer, depth, shift, init_mode, hidden_rate, key_norm),
                embed_dims,
                first=layer == 0,
                post_norm=post_norm,
                init_values=init_values,
                drop_path=drop_path_rate * layer / max(depth - 1, 1),
                with_cp=with_cp,
            )
            for layer in range(depth)
        )
        self.ln1 = nn.LayerNorm(embed_dims) if final_norm else None
        self.apply(init_linear)
        self.frozen_stages = frozen_stages
        self._freeze()

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        parts = [self.patch_embed, self.drop_after_pos, *self.layers[: self.frozen_stages]]
        return [*parts, self.ln1] if self.ln1 is not None and self.frozen_stages == len(self.layers) else parts

    def _freeze(self) -> None:
        for part in self._frozen_parts():
            part.requires_grad_(False)
        for embedding in (self.pos_embed, self.cls_token):
            if embedding is not None and self.frozen_stages >= 0:
                embedding.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Backbone':
        """As PyTorch's, but what is frozen stays in evaluation mode, without dropout and drop path."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, in_channels, H, W) -> what the first layer takes: tokens (B, T, C) and the size of their map.

        T is h * w, and one more with a class token, which comes last. Raises TypeError or ValueError for anything
        but such images in a float dtype.
        """
        check_image(x, self.in_channels)
        x, hw = self.patch_embed(x)
        x = x + resize_pos_embed(self.pos_embed, self.grid, hw, self.interpolate_mode)
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1)
        return self.drop_after_pos(x), hw

    def _embed_normalised(self, x: Tensor, carry: Carry) -> tuple[Tensor, tuple[int, int]] | None:
        """`embed` and the first norm in one pass, where a GPU computes without gradients and nothing lies between."""
        first, dropout = self.layers[0], self.drop_after_pos
        drops = dropout.training and dropout.p > 0
        if torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.is_cuda or self.cls_token is not None:
            return None
        if drops or type(first) is not Block or first.ln0 is None or is_watched(first, first.ln0, dropout):
            return None
        check_image(x, self.in_channels)
        x, hw = self.patch_embed(x)
        position = resize_pos_embed(self.pos_embed, self.grid, hw, self.interpolate_mode)
        x, carry.stats = normalised(first.ln0, x, position, None if first.post_norm else first.ln1.eps)
        carry.normalised = True
        return x, hw

    def forward(self, x: Tensor) -> tuple[Feature, ...]:
        """Images (B, in_channels, H, W) -> a map (B, C, h, w) for each of ``out_indices``, in the order of the layers.

        With ``output_cls_token`` each is a pair [map, class token (B, C)]. Any size of image: h and w are H and W
        over the patch size, rounded up. The final norm applies to the last layer's map alone. Raises as `embed`.
        """
        carry = Carry()
        x, hw = self._embed_normalised(x, carry) or self.embed(x)
        features: list[Feature] = []
        for number, layer in enumerate(self.layers):
            x = layer(x, hw, carry)
            if self.ln1 is not None and number == len(self.layers) - 1:
                x = normalised(self.ln1, x)[0]
            if number in self.out_indices:
                features.append(self._to_feature(x, hw))
            if number == self.out_indices[-1]:  # nobody sees the layers after it
                break
        return tuple(features)

    def _to_feature(self, x: Tensor, hw: tuple[int, int]) -> Feature:
        h, w = hw
        token_map = x[:, : h * w].transpose(1, 2).reshape(x.shape[0], self.embed_dims, h, w)
        return [token_map, x[:, -1]] if self.output_cls_token else token_map
