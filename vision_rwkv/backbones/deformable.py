"""Deformable attention as the adapter uses it: mmcv's, and where it looks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


class Sampling(NamedTuple):
    """Where deformable attention looks.

    points: the reference point of each query in the unit square, (1, queries, 1, 2), x before y.
    sizes: height and width of each map looked at.
    shapes, starts: the same as a tensor, (levels, 2), and where each map starts, (levels,), int64; None in an export.
    """

    points: Tensor
    sizes: Sequence[Size]
    shapes: Tensor | None
    starts: Tensor | None


def sampling(queries: Sequence[Size], values: Sequence[Size], device: torch.device) -> Sampling:
    """How the tokens of the maps ``queries`` look at the maps ``values``: each from the place of its own centre."""
    points = []
    for h, w in queries:
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        points.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
    reference = torch.cat(points)[None, :, None]
    if torch.compiler.is_compiling():
        return Sampling(reference, values, None, None)
    ends = torch.tensor([h * w for h, w in values]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return Sampling(reference, values, torch.tensor(values).to(device), starts.to(device))


def make_attention(dim: int, levels: int, points: int, heads: int, ratio: float) -> Any:
    """mmcv's deformable attention for tokens (B, T, dim). Raises ImportError where its operators are missing."""
    try:
        from mmcv.ops import MultiScaleDeformableAttention
    except ImportError as error:
        raise ImportError(
            f'the adapter takes deformable attention from mmcv.ops, which does not import here ({error}); '
            f'install mmcv with its operators: tools/install_mmcv.sh PYTHON with-ops'
        ) from error
    return MultiScaleDeformableAttention(
        dim, heads, levels, points, dropout=0.0, batch_first=True, value_proj_ratio=ratio
    )


def attend(attention: Any, query: Tensor, value: Tensor, identity: Tensor, where: Sampling) -> Tensor:
    """``identity`` + attention of query (B, Tq, C) on value (B, Tv, C): (B, Tq, C).

    In the dtype of the weights even under autocast: mmcv's kernel has no bfloat16.
    """
    if where.shapes is None or where.starts is None:
        return identity + _attend_by_grid_sample(attention, query, value, where)
    attention.im2col_step = math.gcd(len(query), 64)  # images at a time; the kernel wants a divisor of the batch
    dtype = attention.value_proj.weight.dtype
    with torch.autocast(query.device.type, enabled=False):
        return attention(
            query=query.to(dtype),
            value=value.to(dtype),
            identity=identity,
            reference_points=where.points.to(dtype),
            spatial_shapes=where.shapes,
            level_start_index=where.starts,
        )


def _attend_by_grid_sample(attention: Any, query: Tensor, value: Tensor, where: Sampling) -> Tensor:
    """What mmcv's ``attention`` adds to the identity, of operators that can be exported, for any size."""
    heads, levels, points = attention.num_heads, attention.num_levels, attention.num_points
    batch, queries, _ = query.shape
    offsets = attention.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
    weights = attention.attention_weights(query).view(batch, queries, heads, levels * points).softmax(-1)
    values = attention.value_proj(value).transpose(1, 2).split([h * w for h, w in where.sizes], 2)
    sampled = []
    for level, ((h, w), tokens) in enumerate(zip(where.sizes, values, strict=True)):
        size = torch.stack([offsets.new_full((), w), offsets.new_full((), h)])
        places = where.points + offsets[:, :, :, level].flatten(2, 3) / size  # (B, queries, heads * points, 2)
        places = places.unflatten(2, (heads, points)).transpose(1, 2).flatten(0, 1)  # (B * heads, queries, points, 2)
        maps = tokens.unflatten(2, (h, w)).unflatten(1, (heads, -1)).flatten(0, 1)
        sampled.append(F.grid_sample(maps, 2 * places - 1, align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B * heads, 1, queries, levels * points)
    taken = (torch.cat(sampled, -1) * weights).sum(-1)  # (B * heads, channels of a head, queries)
    return attention.output_proj(taken.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2))
