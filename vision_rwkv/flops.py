"""Counts multiply-adds as the paper's table does: linear and convolution layers, layer norms, and the WKV operators.

Layers are seen as they run, on tensors without data: the largest model at any size takes little time and memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_rwkv.backbones.blocks import Block, PatchEmbed
from vision_rwkv.backbones.vrwkv import SpatialMix
from vision_rwkv.backbones.vrwkv6 import DECAY_RANK, HEAD_SIZE, MIX_RANK, SpatialMix6

NORM = 2  # an element of a layer norm
BI_WKV = 29  # a token and channel
MIXES = 5


def _linear(layer: nn.Linear, x: Tensor, y: Tensor) -> int:
    return y.numel() * layer.in_features


def _conv(layer: nn.Conv2d, x: Tensor, y: Tensor) -> int:
    return y.numel() * layer.weight[0].numel()


def _conv_transpose(layer: nn.ConvTranspose2d, x: Tensor, y: Tensor) -> int:
    return x.numel() * layer.weight[0].numel()


def _layer_norm(layer: nn.LayerNorm, x: Tensor, y: Tensor) -> int:
    return NORM * y.numel()


def _block(block: Block, x: Tensor, y: Tensor) -> int:
    """Of a block of ours, from what it is made of: how it calls its layers, and fuses them, is its own affair."""
    tokens, total = x.numel() // x.shape[-1], 0
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features
        elif isinstance(layer, nn.LayerNorm):
            total += NORM * layer.normalized_shape[0]
        elif isinstance(layer, SpatialMix):
            total += BI_WKV * x.shape[-1]
        elif isinstance(layer, SpatialMix6):
            total += x.shape[-1] * (2 * MIXES * MIX_RANK + 2 * DECAY_RANK + 7 * HEAD_SIZE + 17)
            total += MIXES * MIX_RANK + DECAY_RANK
    return tokens * total


def _patch_embed(layer: PatchEmbed, x: Tensor, y: tuple[Tensor, tuple[int, int]]) -> int:
    return y[0].numel() * layer.projection.weight[0].numel()


COSTS: dict[type[nn.Module], Callable[[Any, Tensor, Any], int]] = {
    Block: _block,
    PatchEmbed: _patch_embed,
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv_transpose,
    nn.LayerNorm: _layer_norm,
}


def _skip_sampling(attention: Any) -> None:
    """Let mmcv's deformable attention run its linear layers alone: its sampling reads numbers, and counts nothing."""

    def forward(query: Tensor, value: Tensor, **_: Any) -> Tensor:
        attention.sampling_offsets(query)
        attention.attention_weights(query)
        sampled = attention.value_proj(value)[:, :1].expand(-1, query.shape[1], -1)
        return attention.output_proj(sampled)

    attention.forward = forward


class Cost(NamedTuple):
    """params: parameters. flops: multiply-adds for one image, without batch norm and element-wise work."""

    params: int
    flops: int


def measure(
    build: Callable[[], nn.Module],
    height: int,
    width: int,
    run: Callable[[nn.Module, Tensor], Any] | None = None,
) -> Cost:
    """What the model that ``build`` makes costs for an image (1, 3, height, width).

    run: how the model is called, where not as model(images).
    """
    flops = 0
    kinds: dict[nn.Module, type[nn.Module]] = {}

    def hook(layer: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal flops
        flops += COSTS[kinds[layer]](layer, inputs[0], output)

    with FakeTensorMode(), torch.no_grad():
        model = build().eval()
        blocks = [layer for layer in model.modules() if isinstance(layer, Block)]
        within = {part for block in blocks for part in block.modules() if part is not block}
        for layer in model.modules():
            if type(layer).__name__ == 'MultiScaleDeformableAttention':
                _skip_sampling(layer)
            for kind in COSTS:
                if isinstance(layer, kind) and layer not in within:
                    kinds[layer] = kind
                    layer.register_forward_hook(hook)
        images = torch.empty(1, 3, height, width)
        run(model, images) if run else model(images)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), flops)
