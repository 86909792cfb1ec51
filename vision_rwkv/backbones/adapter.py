"""The ViT-Adapter (arXiv 2205.08534) around VRWKV and VRWKV6: maps of strides 4, 8, 16 and 32 for dense tasks.

A convolutional pyramid, the spatial prior, exchanges information with the tokens of the backbone four times:
injectors bring it to the tokens, extractors bring it back. Deformable attention is mmcv's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_rwkv.backbones._checks import check_choice, check_image, check_int, check_range
from vision_rwkv.backbones.base import Backbone
from vision_rwkv.backbones.blocks import Carry, ceil_div
from vision_rwkv.backbones.deformable import Sampling, Size, attend, make_attention, sampling
from vision_rwkv.backbones.initial import init_linear
from vision_rwkv.backbones.vrwkv import VRWKV
from vision_rwkv.backbones.vrwkv6 import VRWKV6

STRIDES = (4, 8, 16, 32)
NORM_EPS = 1e-6
TOKEN_MAPS = ('final', 'stages')


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes on GPUs; over those of this process on a CPU.

    PyTorch's own refuses to train on a CPU, and so does DistributedDataParallel with it: hence not a kind of it, but
    one that does what it does. The tensors are the same either way.
    """

    process_group = None  # all processes
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return nn.SyncBatchNorm.forward(self, x) if x.is_cuda else super().forward(x)  # type: ignore[arg-type]


class SpatialPrior(nn.Module):
    """Convolutions from the image to maps of ``dim`` channels at the four strides."""

    def __init__(self, in_channels: int, width: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(
            *self._convolution(in_channels, width, 2),
            *self._convolution(width, width, 1),
            *self._convolution(width, width, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*self._convolution(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*self._convolution(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*self._convolution(4 * width, 4 * width, 2))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    @staticmethod
    def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), SyncBatchNorm(outputs), nn.ReLU()]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W), sides divisible by 32 -> four maps (B, dim, H / stride, W / stride)."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))]


class Injector(nn.Module):
    """Tokens take from the pyramid, with a weight that starts at 0."""

    def __init__(self, dim: int, points: int, heads: int, ratio: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = make_attention(dim, 3, points, heads, ratio)

    def forward(self, x: Tensor, c: Tensor, where: Sampling) -> Tensor:
        """Tokens x (B, T, C), pyramid c (B, Tc, C) -> tokens (B, T, C)."""
        taken = attend(self.attn, self.query_norm(x), self.feat_norm(c), x.new_zeros(()), where)
        return x + self.gamma * taken


class DepthwiseConv(nn.Module):
    """One 3x3 depth-wise convolution for each map of the pyramid."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Tokens (B, T, C) of the maps ``sizes``, one after the other -> the same."""
        maps = (part.transpose(1, 2).unflatten(2, hw) for part, hw in zip(split(x, sizes), sizes, strict=True))
        return torch.cat([self.dwconv(m).flatten(2).transpose(1, 2) for m in maps], 1)


class ConvFeedForward(nn.Module):
    """Linear, depth-wise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, sizes: Sequence[Size]) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), sizes)))


class Extractor(nn.Module):
    """The pyramid takes from the tokens."""

    def __init__(self, dim: int, points: int, heads: int, ratio: float, hidden: int, drop_path: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = make_attention(dim, 1, points, heads, ratio)
        self.ffn = ConvFeedForward(dim, hidden)
        self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, x: Tensor, where: Sampling, sizes: Sequence[Size]) -> Tensor:
        """Pyramid c (B, Tc, C) of the maps ``sizes``, tokens x (B, T, C) -> pyramid (B, Tc, C)."""
        c = attend(self.attn, self.query_norm(c), self.feat_norm(x), c, where)
        return c + self.drop_path(self.ffn(self.ffn_norm(c), sizes))


class Interaction(nn.Module):
    """An injector before some layers of the backbone, an extractor after them; the last one has two more."""

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]):
        super().__init__()
        self.injector = injector
        self.extractor, *extra = extractors
        self.extra_extractors = nn.ModuleList(extra) if extra else None

    def extract(self, c: Tensor, x: Tensor, where: Sampling, sizes: Sequence[Size]) -> Tensor:
        """As Extractor, with all of them."""
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            c = extractor(c, x, where, sizes)
        return c


def split(c: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
    """The tokens (B, T, C) of each of the maps ``sizes``."""
    return c.split([h * w for h, w in sizes], 1)


def to_map(tokens: Tensor, hw: Size) -> Tensor:
    """(B, h * w, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, hw)


def init_adapter(module: nn.Module) -> None:
    """Initial values of a layer of the adapter, deformable attention aside; for `apply`."""
    init_linear(module)
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_stages(interaction_indexes: Any, depth: int) -> list[Size]:
    """``interaction_indexes`` as the first and last layer of each interaction; None for quarters of ``depth``.

    Raises ValueError unless there are four, which together are all layers in their order.
    """
    if interaction_indexes is None and depth % 4 == 0:
        interaction_indexes = [[depth * i // 4, depth * (i + 1) // 4 - 1] for i in range(4)]
    try:
        stages = [(first, last) for first, last in interaction_indexes]
        layers = [layer for first, last in stages for layer in range(first, last + 1)]
    except TypeError:
        stages, layers = [], []
    if len(stages) != 4 or layers != list(range(depth)) or any(first > last for first, last in stages):
        raise ValueError(
            f'interaction_indexes must be four pairs [first layer, last layer] that cover layers 0 to {depth - 1} '
            f'in their order (None: quarters of a depth divisible by 4), got {interaction_indexes!r}'
        )
    return stages


class Adapter(Backbone):
    """What VRWKVAdapter and VRWKV6Adapter add to their backbone."""

    def __init__(
        self,
        *,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 6,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        token_maps: str = 'final',
        **backbone: Any,
    ):
        for name in ('out_indices', 'final_norm', 'with_cls_token', 'output_cls_token'):
            if name in backbone:
                raise TypeError(f'the adapter has no argument {name!r}: it always returns maps of four strides')
        super().__init__(final_norm=False, **backbone)
        dim, depth = self.embed_dims, len(self.layers)
        if self.patch_embed.patch_size != 16:
            raise ValueError(f'patch_size must be 16 with the adapter, got {self.patch_embed.patch_size}')
        for name, value in {'conv_inplane': conv_inplane, 'n_points': n_points}.items():
            check_int(name, value)
        check_int('deform_num_heads', deform_num_heads)
        check_range('cffn_ratio', cffn_ratio, 1 / dim, float('inf'))
        check_range('deform_ratio', deform_ratio, 1 / dim, float('inf'))
        check_choice('token_maps', token_maps, TOKEN_MAPS)
        if dim % deform_num_heads or int(dim * deform_ratio) % deform_num_heads:
            raise ValueError(
                f'embed_dims={dim} and {deform_ratio} of it must be divisible by deform_num_heads={deform_num_heads}'
            )
        self.token_maps = token_maps
        self.stages = to_stages(interaction_indexes, depth)
        self.with_cp = bool(backbone.get('with_cp'))

        attention = (dim, n_points, deform_num_heads, deform_ratio)
        hidden, drop_path = int(dim * cffn_ratio), backbone.get('drop_path_rate', 0.0)
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPrior(self.in_channels, conv_inplane, dim)
        self.interactions = nn.ModuleList(
            Interaction(Injector(*attention), [Extractor(*attention, hidden, drop_path) for _ in range(count)])
            for count in (1, 1, 1, 3)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1 = SyncBatchNorm(dim)
        self.norm2 = SyncBatchNorm(dim)
        self.norm3 = SyncBatchNorm(dim)
        self.norm4 = SyncBatchNorm(dim)
        self._init_adapter()

    def _init_adapter(self) -> None:
        nn.init.normal_(self.level_embed)
        for part in (self.spm, self.interactions, self.up):
            part.apply(init_adapter)
        for name, module in self.interactions.named_modules():
            if name.endswith('.attn'):
                module.init_weights()  # mmcv's own: no offsets learned yet, points on a ring

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> maps (B, C, h, w) of strides 4, 8, 16, 32; h and w rounded up.

        Any size: the image is padded with zeros at the bottom and right to whole strides of 32, and the maps are cut
        again. Raises TypeError or ValueError for anything but such images in a float dtype.
        """
        check_image(x, self.in_channels)
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))
        c1, *maps = self.spm(x)
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        c = torch.cat(
            [m.flatten(2).transpose(1, 2) + level for m, level in zip(maps, self.level_embed, strict=True)], 1
        )
        tokens, hw = self.embed(x)
        c, token_maps = self._interact(tokens, hw, c, sizes)

        c2, c3, c4 = (to_map(part, size) for part, size in zip(split(c, sizes), sizes, strict=True))
        outputs = []
        for i, level in enumerate((c1 + self.up(c2), c2, c3, c4)):
            y = level + F.interpolate(token_maps[i], size=level.shape[2:], mode='bilinear')
            y = y[:, :, : ceil_div(height, STRIDES[i]), : ceil_div(width, STRIDES[i])]
            outputs.append(getattr(self, f'norm{i + 1}')(y))
        return tuple(outputs)

    def _interact(self, x: Tensor, hw: Size, c: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Tensor]]:
        """The pyramid after all interactions, and the token map that each of the four outputs is to get."""
        injection = sampling([hw], sizes, x.device)
        extraction = sampling(sizes, [hw], x.device)
        token_maps = []
        for interaction, (first, last) in zip(self.interactions, self.stages, strict=True):
            x = self._call(interaction.injector, x, c, injection)
            carry = Carry()
            for layer in self.layers[first : last + 1]:
                x = layer(x, hw, carry)
            c = self._call(interaction.extract, c, x, extraction, sizes)
            token_maps.append(to_map(x, hw))
        return c, token_maps if self.token_maps == 'stages' else [token_maps[-1]] * 4

    def _call(self, function: Any, *inputs: Any) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


class VRWKVAdapter(Adapter, VRWKV):
    """VRWKV in a ViT-Adapter: images (B, in_channels, H, W) to maps (B, embed_dims, h, w) of strides 4, 8, 16, 32.

    Takes the arguments of VRWKV too, but for out_indices and final_norm; patch_size is 16.

    Args:
        conv_inplane: channels of the first convolutions of the spatial prior.
        n_points: points that each query of deformable attention looks at in each map.
        deform_num_heads: heads of deformable attention.
        cffn_ratio: hidden channels of the extractors' feed-forward part, as a multiple of embed_dims.
        deform_ratio: channels of the values of deformable attention, as a multiple of embed_dims.
        interaction_indexes: first and last layer of each of the four interactions; None for quarters.
        token_maps: which token map each output gets: the last one ('final'), or the one after the interaction of
            its number ('stages').
        with_cp: gradient checkpointing of each block, injector and group of extractors.

    Batch norm is over the images of all processes on GPUs, over those of one process on a CPU.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        ImportError: where mmcv or its operators are missing.
    """


class VRWKV6Adapter(Adapter, VRWKV6):
    """VRWKV6 in a ViT-Adapter. Arguments of VRWKV6 (no class token) and VRWKVAdapter."""
