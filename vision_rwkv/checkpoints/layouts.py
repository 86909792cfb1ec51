"""The layouts of released files, and of our own: all to one set of names, `backbone.*` beside `head.*` and others."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vision_rwkv.checkpoints._errors import CheckpointError

CONTAINERS = ('state_dict', 'model', 'module')  # OpenMMLab and ours; the code base of VRWKV-L; DeepSpeed
BACKBONE = 'backbone.'
# VRWKV-L's head is a plain Sequential of linear, tanh, linear; ours is MMPretrain's VisionTransformerClsHead.
LARGE_HEAD = {'head.0.': 'head.layers.pre_logits.', 'head.2.': 'head.layers.head.'}

IMAGENET_1K, IMAGENET_22K = 1000, 21841  # classes
ROWS_OF_OTHERS = {'n04399382': 11136}  # 1K classes that the 22K list lacks: the row that stands for them


def _tensors_of(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, out of their container. Raises CheckpointError for an unknown layout."""
    found = [key for key in CONTAINERS if isinstance(contents.get(key), Mapping)]
    if len(found) > 1:
        raise CheckpointError(f'it holds several models, under {" and ".join(found)}: expected one')
    tensors = dict(contents[found[0]] if found else contents)
    others = [f'{name} ({type(value).__name__})' for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise CheckpointError(
            f'unknown layout: expected tensors, alone or under {", ".join(map(repr, CONTAINERS))}, '
            f'got {", ".join(others) or "nothing"}'
        )
    return tensors


def _renamed(tensors: dict[str, Tensor], new_names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {new_names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError('unknown layout: some of its tensors would get the same name')
    return renamed


def to_our_names(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names: `backbone.*`, and heads and necks as OpenMMLab has them today.

    Known layouts: what OpenMMLab's frameworks write, old and new ({'state_dict'}; MMDetection 2.x and MMSegmentation
    0.x have today's names); {'model'} and {'module'}; bare tensors; each with or without the prefixes `module.` and
    `backbone.`; the head of VRWKV-L as head.0 and head.2. Raises CheckpointError for anything else.
    """
    tensors = _tensors_of(contents)
    if all(name.startswith('module.') for name in tensors):
        tensors = {name.removeprefix('module.'): tensor for name, tensor in tensors.items()}
    if 'patch_embed.projection.weight' in tensors:  # a backbone's own names; a head may be beside
        tensors = _renamed(tensors, {n: BACKBONE + n for n in tensors if not n.startswith(('head.', BACKBONE))})
    if all(f'{old}weight' in tensors for old in LARGE_HEAD):
        new = {n: LARGE_HEAD[n[:7]] + n[7:] for n in tensors if n[:7] in LARGE_HEAD}
        tensors = _renamed(tensors, new)
    return tensors


@cache
def rows_of_1k() -> Tensor:
    """(1000,) int64: the row of each ImageNet-1K class in a head of 21841 ImageNet-22K classes, by synset."""
    from timm.data import ImageNetInfo

    rows = {synset: row for row, synset in enumerate(ImageNetInfo('imagenet-22k').label_names())}
    synsets = ImageNetInfo('imagenet-1k').label_names()
    return torch.tensor([rows.get(synset, ROWS_OF_OTHERS.get(synset, -1)) for synset in synsets])
