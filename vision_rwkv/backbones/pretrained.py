"""Starts a backbone, or an adapter around it, from a classification checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONTAINERS = ('state_dict', 'model', 'module')


class Loaded(NamedTuple):
    """Names of tensors: of the model, not in the file; of the file, not in the model; and those of other shapes."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def backbone_tensors(contents: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's tensors under the backbone's own names; those of other parts keep theirs (`head.fc.weight`)."""
    tensors = next((contents[key] for key in CONTAINERS if isinstance(contents.get(key), Mapping)), contents)
    return {name.removeprefix('module.').removeprefix('backbone.'): value for name, value in tensors.items()}


def read_checkpoint(path: str | Path) -> Any:
    """What a checkpoint file holds; one at a URL is downloaded into torch.hub's cache, once."""
    if '://' in str(path):
        return torch.hub.load_state_dict_from_url(str(path), map_location='cpu', weights_only=False)
    return torch.load(path, map_location='cpu', weights_only=False)


def load_backbone(model: nn.Module, path: str | Path) -> Loaded:
    """Copy into ``model``, a backbone or an adapter, the tensors of a checkpoint that it has by name and shape.

    path: a file or a URL.

    Raises FileNotFoundError, or ValueError where nothing fits: the model is then unchanged.
    """
    contents = read_checkpoint(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f'{path}: expected a dict of tensors, got {type(contents).__name__}')
    tensors = backbone_tensors(contents)
    own = model.state_dict()
    shared = [name for name in own if isinstance(tensors.get(name), Tensor)]
    fitting = {name: tensors[name] for name in shared if tensors[name].shape == own[name].shape}
    misshapen = [
        f'{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model'
        for name in shared
        if name not in fitting
    ]
    if not fitting:
        detail = '; '.join(misshapen[:3]) or f'it has {", ".join(list(tensors)[:3]) or "no tensors"}, ...'
        raise ValueError(f'{path}: no tensor of it fits {type(model).__name__} ({detail})')
    model.load_state_dict(fitting, strict=False)
    missing = [name for name in own if name not in shared]
    return Loaded(missing, [name for name in tensors if name not in own], misshapen)
