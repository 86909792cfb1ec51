"""Masked pre-training (MAE, arXiv 2111.06377) of VRWKV, on MMPretrain's: an encoder of kept patches, and a decoder."""

import torch
from mmengine.model import BaseModule
from mmpretrain.models.utils import build_2d_sincos_position_embedding
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from vision_rwkv import backbones
from vision_rwkv.backbones._checks import check_range
from vision_rwkv.backbones.blocks import Carry
from vision_rwkv.backbones.initial import init_linear
from vision_rwkv.backbones.shift import SEQUENCE

from .models import VRWKV


def draw_mask(images: int, tokens: int, ratio: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches are kept, at random, (1 - ratio) of them in each image.

    Returns the kept ones' numbers (B, K) in raster order; where each patch is in the sequence of the kept ones followed
    by the masked ones (B, T); and the mask (B, T) in float, 1 where masked.
    """
    order = torch.rand(images, tokens, device=device).argsort(1)
    count = int(tokens * (1 - ratio))
    kept, masked = order[:, :count].sort(1).values, order[:, count:].sort(1).values
    places = torch.cat([kept, masked], 1).argsort(1)
    return kept, places, torch.ones(images, tokens, device=device).scatter_(1, kept, 0)


def pick(x: Tensor, numbers: Tensor) -> Tensor:
    """The tokens (B, N, C) of x (B, T, C) with these numbers (B, N)."""
    return x.gather(1, numbers[..., None].expand(-1, -1, x.shape[2]))


def fix_position(embedding: nn.Parameter, grid: tuple[int, int]) -> None:
    """Make a position embedding (1, h * w, C) of sines and cosines, which does not learn."""
    embedding.requires_grad_(False).copy_(build_2d_sincos_position_embedding(grid, embedding.shape[2]))


@MODELS.register_module()
class MaskedVRWKV(VRWKV):
    """VRWKV on a random part of the patches; the position embedding is fixed, sines and cosines.

    The kept patches are no map, so each is shifted from the one kept before it. Arguments of VRWKV, and mask_ratio,
    the part of the patches that is left out.
    """

    def __init__(self, *args, mask_ratio: float = 0.75, **kwargs):
        super().__init__(*args, **kwargs)
        check_range('mask_ratio', mask_ratio, 0, 1)
        self.mask_ratio = mask_ratio
        fix_position(self.pos_embed, self.grid)

    def forward(self, x: Tensor, mask: bool | None = True):
        """Images (B, 3, H, W) -> tokens (B, K, C) of kept patches, the mask (B, T) and the patches' places (B, T).

        See `draw_mask`. Without ``mask``, the maps of VRWKV.
        """
        if not mask:
            return super().forward(x)
        x, _ = self.embed(x)
        kept, places, mask = draw_mask(*x.shape[:2], self.mask_ratio, x.device)
        x = pick(x, kept)
        carry = Carry()
        for layer in self.layers:
            x = layer(x, SEQUENCE, carry)
        return self.ln1(x), mask, places


@MODELS.register_module()
class VRWKVDecoder(BaseModule):
    """VRWKV blocks that draw all patches from the kept ones.

    Args:
        embed_dims: channels of the encoder.
        decoder_dims, depth: channels and layers of the decoder; pre-norm, without layer scale.
        img_size, patch_size, in_channels: as of the encoder.
    """

    def __init__(
        self,
        embed_dims: int,
        decoder_dims: int = 512,
        depth: int = 8,
        img_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        blocks = backbones.VRWKV(img_size, patch_size, in_channels, embed_dims=decoder_dims, depth=depth)
        self.grid = blocks.grid
        self.decoder_embed = nn.Linear(embed_dims, decoder_dims)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dims).normal_(std=0.02))
        self.pos_embed = blocks.pos_embed
        fix_position(self.pos_embed, self.grid)
        self.layers, self.ln1 = blocks.layers, blocks.ln1
        self.decoder_pred = nn.Linear(decoder_dims, patch_size**2 * in_channels)
        for layer in (self.decoder_embed, self.decoder_pred):
            init_linear(layer)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Kept tokens (B, K, C) and all patches' places (B, T) -> pixels (B, T, patch_size ** 2 * in_channels)."""
        x = self.decoder_embed(x)
        masked = self.mask_token.expand(len(x), places.shape[1] - x.shape[1], -1)
        x = pick(torch.cat([x, masked], 1), places) + self.pos_embed
        carry = Carry()
        for layer in self.layers:
            x = layer(x, self.grid, carry)
        return self.decoder_pred(self.ln1(x))
