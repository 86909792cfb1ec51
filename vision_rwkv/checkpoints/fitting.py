"""Fits the tensors of a checkpoint to a model: each has its place, or nothing is loaded and all that fails is named."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision_rwkv.backbones.blocks import resize_pos_embed
from vision_rwkv.checkpoints._errors import CheckpointError, about
from vision_rwkv.checkpoints.layouts import BACKBONE, IMAGENET_1K, IMAGENET_22K, rows_of_1k, to_our_names
from vision_rwkv.checkpoints.reading import read

# The tensors of a plain backbone; an adapter has more, and lacks the final norm.
PLAIN = re.compile(r'backbone\.(pos_embed$|cls_token$|patch_embed\.|layers\.|ln1\.)')
LAYER_SCALE = re.compile(r'backbone\.layers\.\d+\.gamma[12]$')


class Fitted(NamedTuple):
    """What to load, and what stays out of it.

    tensors: for `load_state_dict(tensors, strict=False)`, under the model's own names.
    new: the model's tensors that keep their initial values.
    left_over: the checkpoint's tensors without a place in the model.
    """

    tensors: dict[str, Tensor]
    new: list[str]
    left_over: list[str]


def _part(name: str) -> str:
    return name.partition('.')[0]


def _resized(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``tensors`` with the position embedding on the model's grid and a 22K head on the 1K classes, where asked."""
    tensors = dict(tensors)
    for name, tensor in tensors.items():
        other = wanted.get(name)
        if other is None or other.shape == tensor.shape:
            continue
        if name == f'{BACKBONE}pos_embed' and tensor.shape[::2] == other.shape[::2]:
            backbone: Any = getattr(model, 'backbone', model)
            side = math.isqrt(tensor.shape[1])
            if side**2 != tensor.shape[1]:
                raise CheckpointError(f'{name}: expected a square grid to resize, got {tensor.shape[1]} positions')
            stored = tensor.untyped_storage().nbytes()
            if tensor.nbytes > stored:  # a few bytes can stand for any number of positions, all alike
                raise CheckpointError(f'{name}: {tensor.nbytes} bytes to resize, of which the file holds {stored}')
            resized = resize_pos_embed(tensor.float(), (side, side), backbone.grid, backbone.interpolate_mode)
            tensors[name] = resized.to(tensor.dtype)
        elif (*tensor.shape[:1], *other.shape) == (IMAGENET_22K, IMAGENET_1K, *tensor.shape[1:]):
            tensors[name] = tensor[rows_of_1k().to(tensor.device)]
    return tensors


def _excused(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """To start from a checkpoint: the names that may be new in the model, and those that may be left over.

    Whole parts that only one side has, or of which they share no name (a new neck, another kind of head); the last
    layers of a part where only the number of classes differs; an adapter around a plain backbone, which has a final
    norm that the adapter lacks; layer scales of 1 for a backbone without (VRWKV-T, in an adapter).
    """
    shared = {_part(name) for name in tensors.keys() & wanted.keys()}
    new = {name for name in wanted if _part(name) not in shared}
    left_over = {name for name in tensors if _part(name) not in shared}
    for name in tensors.keys() & wanted.keys():
        here, there = wanted[name].shape, tensors[name].shape
        if here != there and here[1:] == there[1:] and not name.startswith(BACKBONE):
            new.add(name)
            left_over.add(name)
    adapter = {name for name in wanted if name.startswith(BACKBONE) and not PLAIN.match(name)}
    if adapter and not adapter & tensors.keys():
        new |= adapter
    final_norm = {f'{BACKBONE}ln1.weight', f'{BACKBONE}ln1.bias'}
    if not final_norm & wanted.keys():
        left_over |= final_norm
    if any(name.startswith(BACKBONE) for name in wanted):  # without it there is nothing to start from
        new -= {name for name in wanted if PLAIN.match(name)}
    if not any(LAYER_SCALE.match(name) for name in tensors):
        new |= {name for name, tensor in wanted.items() if LAYER_SCALE.match(name) and tensor.eq(1).all()}
    return new, left_over


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], new: set[str], left_over: set[str]) -> None:
    """Raises CheckpointError, naming everything, unless all tensors fit but those that may be new or left over."""
    missing = [name for name in wanted if name not in tensors and name not in new]
    unexpected = [name for name in tensors if name not in wanted and name not in left_over]
    problems = []
    if missing:
        problems.append(f'missing from the file: {", ".join(missing)}')
    if unexpected:
        problems.append(f'unexpected in the file: {", ".join(unexpected)}')
    for name in wanted:
        if name in tensors and name not in new and tensors[name].shape != wanted[name].shape:
            there, here = tuple(tensors[name].shape), tuple(wanted[name].shape)
            problems.append(f'{name} has the shape {there} in the file, {here} in the model')
    if problems:
        raise CheckpointError(f'it does not fit the model: {"; ".join(problems)}')


def not_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers are not finite, of the tensors where some are not."""
    sums = {name: tensor.sum(dtype=torch.float32) for name, tensor in tensors.items() if tensor.is_floating_point()}
    suspects = [name for name, total in sums.items() if not math.isfinite(total)]  # it may just be large
    counts = {name: int((~tensors[name].isfinite()).sum()) for name in suspects}
    return {name: count for name, count in counts.items() if count}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming everything, unless all numbers are finite: bytes in the wrong order seldom are."""
    spoilt = [f'{name} ({count} of {tensors[name].numel()})' for name, count in not_finite(tensors).items()]
    if spoilt:
        raise CheckpointError(
            'it holds numbers that are not finite, from a run gone wrong or bytes in the wrong order: '
            + ', '.join(spoilt)
        )


def fit(contents: Mapping[str, Any], model: nn.Module, start: bool = False) -> Fitted:
    """Fit the contents of a checkpoint to ``model``, a backbone or a model with one, without changing the model.

    The position embedding is resized where its grid differs; of a 22K head, a 1K head takes its classes' rows. For a
    backbone by itself, the rest of a model in the file is left over.

    Args:
        contents: as from `read`, in any layout of `to_our_names`.
        model: takes what comes out by `load_state_dict`.
        start: not to use the model as it is in the file but to train from there: parts that only one side has, last
            layers with another number of classes, and an adapter may be left over or new. The backbone never is.

    Raises:
        CheckpointError: naming every tensor that is missing, unexpected or of the wrong shape.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    bare = 'patch_embed.projection.weight' in wanted  # the model is the backbone itself
    if bare:
        wanted = {BACKBONE + name: tensor for name, tensor in wanted.items()}
    tensors = _resized(to_our_names(contents), wanted, model)
    may_be_new, may_be_left = _excused(tensors, wanted) if start else (set(), set())
    if bare:
        may_be_left |= {name for name in tensors if not name.startswith(BACKBONE)}
    _check(tensors, wanted, may_be_new, may_be_left)

    loaded = {name: tensors[name] for name in wanted if name in tensors and name not in may_be_new}
    if not loaded:
        raise CheckpointError('it does not fit the model: they have no tensor in common')
    new = [name for name in wanted if name not in loaded]
    left_over = [name for name in tensors if name not in loaded]
    if bare:
        loaded = {name.removeprefix(BACKBONE): tensor for name, tensor in loaded.items()}
        new = [name.removeprefix(BACKBONE) for name in new]
    return Fitted(loaded, new, left_over)


def load(model: nn.Module, source: str | Path, start: bool = False) -> Fitted:
    """Load a checkpoint file or URL into ``model``, wholly or, with a CheckpointError, not at all: `read`, `fit`."""
    contents = read(source)
    with about(source):
        fitted = fit(contents, model, start)
        check_finite(fitted.tensors)
    model.load_state_dict(fitted.tensors, strict=False)
    return fitted
