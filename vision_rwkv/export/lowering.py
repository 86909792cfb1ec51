"""Operators of vision_rwkv.ops in standard ones, and what else runtimes do without: the table for an export."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_rwkv import ops  # noqa: F401 (registers the operators)
from vision_rwkv.ops.pointwise import FLOAT16_SQUARE_MAX
from vision_rwkv.ops.q_shift import Place, _moved

_OPS = torch.ops.vision_rwkv


def _moved_and_mixed(x: Tensor, mixes: Sequence[Tensor], delta: Tensor | None, at: Place, dtype: Any) -> list[Tensor]:
    xx = _moved(x, at)
    flat = [mix.view(-1) if delta is None else mix.view(-1) - delta[i] for i, mix in enumerate(mixes)]
    return [(x * mix + xx * (1 - mix)).to(dtype) for mix in flat]


def _norm_stats(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return torch.cat([mean, ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()], -1)


def _q_shift(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads, dtype):
    if stats is not None:
        x = (x - stats[..., :1]) * stats[..., 1:]
    if weight is not None:
        x = x * weight + bias
    return torch.stack(_moved_and_mixed(x, mixes, delta, Place(height, width, pixels, gamma, heads), dtype))


def _mix_linear(x, mixes, maps, weight, bias, stats, eps, height, width, pixels, gamma, heads, dtype):
    if weight is not None:  # with its own statistics, which are those given: runtimes know the whole norm
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    mixed = _moved_and_mixed(x, mixes, None, Place(height, width, pixels, gamma, heads), dtype)
    return [F.linear(part, weights) for part, weights in zip(mixed, maps, strict=True)]


def _dynamic_linear(x, mixes, ranks, maps, weight, bias, stats, eps, height, width, pixels, gamma, heads, dtype):
    if weight is not None:
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    first, *others = (mix.view(-1) for mix in mixes)
    apart = _moved(x, Place(height, width, pixels, gamma, heads)) - x
    z = torch.tanh((x + apart * first) @ ranks[0]).chunk(len(others), -1)
    deltas = [part @ up for part, up in zip(z, ranks[1].unbind(), strict=True)]
    x_w, *inputs = [(x + apart * (mix + delta)).to(dtype) for mix, delta in zip(others, deltas, strict=True)]
    outputs = [F.linear(part, weights) for part, weights in zip(inputs, maps, strict=True)]
    return [*outputs, torch.tanh(x_w @ ranks[2]) @ ranks[3]]


def _gate(r: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(r) * y


def _squared_relu(x: Tensor) -> Tensor:
    x = torch.clamp(x, 0, FLOAT16_SQUARE_MAX) if x.dtype == torch.float16 else torch.relu(x)
    return x * x


def _residual(x, z, gate, weight, bias, gamma, scale, eps, stats_eps):
    if gate is not None:
        z = _gate(gate, z)
    if weight is not None:
        z = F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    if gamma is not None:
        z = z * gamma
    if scale is not None:
        z = z * scale.view(-1, 1, 1)
    out = x + z
    return out, x.new_empty(0) if stats_eps is None else _norm_stats(out, stats_eps)


def _log_decay(raw: Tensor, base: Tensor) -> Tensor:
    return -(raw + base.view(-1)).exp()


def _norm_gate(y, gate, weight, bias, heads, eps, dtype):
    parts = y.unflatten(-1, (heads, -1))
    unit = F.layer_norm(parts, parts.shape[-1:], eps=eps).flatten(2)
    return ((unit * weight + bias) * F.silu(gate)).to(dtype)


def _averages(size: int, parts: int, like: Tensor) -> Tensor:
    """(parts, size): what adaptive pooling of ``size`` values to ``parts`` averages."""
    part, place = torch.arange(parts, device=like.device)[:, None], torch.arange(size, device=like.device)
    start, end = part * size // parts, -(-(part + 1) * size // parts)
    return ((start <= place) & (place < end)).to(like.dtype) / (end - start)


def _adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    rows, columns = (_averages(length, parts, x) for length, parts in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.T


# For any dtype but float16 and bfloat16: what is kept in float32 there is kept in the dtype of the model here.
POINTWISE: dict[Any, Callable] = {
    _OPS.norm_stats.default: _norm_stats,
    _OPS.q_shift.default: _q_shift,
    _OPS.mix_linear.default: _mix_linear,
    _OPS.dynamic_linear.default: _dynamic_linear,
    _OPS.gate.default: _gate,
    _OPS.gated_linear.default: lambda r, y, map: F.linear(_gate(r, y), map),
    _OPS.squared_relu.default: _squared_relu,
    _OPS.squared_relu_linear.default: lambda x, map: F.linear(_squared_relu(x), map),
    _OPS.residual.default: _residual,
    _OPS.log_decay.default: _log_decay,
    _OPS.norm_gate.default: _norm_gate,
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
}
