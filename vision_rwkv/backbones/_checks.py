"""Checks of what people pass to a backbone: every error names the thing, what was expected and what came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: Any, minimum: int = 1) -> None:
    """Raises TypeError unless ``value`` is an int, ValueError if it is below ``minimum``."""
    if not _is_int(value):
        raise TypeError(f'{name} must be an int, got {value!r}')
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')


def check_range(name: str, value: Any, low: float, high: float, with_high: bool = False) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless low <= value < high (<= high if with_high)."""
    if not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not (low <= value < high or (with_high and value == high)):
        raise ValueError(f'{name} must be in [{low}, {high}{"]" if with_high else ")"}, got {value!r}')


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f'{name} must be {" or ".join(map(repr, choices))}, got {value!r}')


def to_pair(name: str, value: Any) -> tuple[int, int]:
    """``value``, a positive int or a pair of them, as a pair; raises TypeError or ValueError."""
    pair = (value, value) if _is_int(value) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f'{name} must be an int or a pair of ints, got {value!r}')
    for item in pair:
        check_int(name, item)
    return pair[0], pair[1]


def to_layers(out_indices: Any, depth: int) -> tuple[int, ...]:
    """``out_indices``, an int or a sequence, as layer numbers in ascending order; negative ones count from the end.

    Raises TypeError (not ints) or ValueError (no layer of that number, none at all, or the same one twice).
    """
    indices = [out_indices] if _is_int(out_indices) else out_indices
    if not isinstance(indices, Sequence) or not all(_is_int(index) for index in indices):
        raise TypeError(f'out_indices must be an int or a sequence of ints, got {out_indices!r}')
    for index in indices:
        if not -depth <= index < depth:
            raise ValueError(f'out_indices must be in [{-depth}, {depth - 1}] for a depth of {depth}, got {index}')
    layers = tuple(sorted({index % depth for index in indices}))
    if not layers or len(layers) != len(indices):
        raise ValueError(f'out_indices must name at least one layer, and each layer once, got {out_indices!r}')
    return layers


def check_image(x: Any, in_channels: int) -> None:
    """Raises TypeError or ValueError unless ``x`` is a batch of images (B, in_channels, H, W) in a float dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f'the image batch must be a torch.Tensor, got {type(x).__name__}')
    if not torch.is_floating_point(x):
        raise TypeError(f'the image batch must have a floating-point dtype, got {x.dtype}')
    if x.ndim != 4 or x.shape[1] != in_channels or 0 in x.shape[2:]:
        raise ValueError(f'the image batch must have shape (B, {in_channels}, H, W), got {tuple(x.shape)}')
