"""Checkpoints in MMEngine: released files as they are, strictly fitted, and no code run from any file."""

import logging
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import weight_init
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader, get_torch_safe_globals
from torch import Tensor, nn

from vision_rwkv.backbones.base import Backbone
from vision_rwkv.checkpoints import CheckpointError, Fitted, about, check_finite, fit, read, to_our_names
from vision_rwkv.checkpoints.layouts import CONTAINERS


def _statistic(owner: Any, name: str) -> Callable:
    """In place of getattr: a log's ways to compute statistics, which MMEngine's checkpoints hold, and nothing else."""
    if owner is HistoryBuffer and isinstance(vars(owner).get(name), FunctionType) and not name.startswith('_'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'GLOBAL getattr of {owner!r} and {name!r}')


def _allowed() -> tuple[tuple[Callable, str], ...]:
    """What MMEngine's own checkpoints need to be resumed: logs, and numpy's numbers and arrays in them."""
    numbers = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'}
    allowed = {*get_torch_safe_globals(), *numbers} - {getattr}
    named = [(f, f'{f.__module__}.{f.__qualname__}') for f in allowed]
    old_numpy = [(f, name.replace('numpy._core', 'numpy.core')) for f, name in named if 'numpy._core' in name]
    return *named, *old_numpy, (_statistic, 'builtins.getattr')


@CheckpointLoader.register_scheme(prefixes=('', 'http://', 'https://'), force=True)
def load_from_file(filename: str, map_location: Any = 'cpu') -> dict:
    """The contents of a checkpoint file or URL, its tensors under 'state_dict' with our names, whatever its layout.

    In place of MMEngine's own loader, which runs code from the file where reading without fails. Raises
    CheckpointError.
    """
    contents = read(filename, map_location or 'cpu', _allowed())
    with about(filename):
        tensors = to_our_names(contents)
    others = {key: value for key, value in contents.items() if key not in CONTAINERS and not isinstance(value, Tensor)}
    return {**others, 'state_dict': tensors}


def fit_and_tell(contents: dict, model: nn.Module, filename: str, start: bool) -> Fitted:
    """As `fit`; the log says what is new in the model and left over in the file. Raises CheckpointError."""
    with about(filename):
        fitted = fit(contents, model, start)
        check_finite(fitted.tensors)
    for names, fate in ((fitted.new, 'keep their initial values'), (fitted.left_over, 'of the file are not used')):
        if names:
            text = f'{filename}: {len(names)} tensors {fate}: {", ".join(names)}'
            print_log(text, logger='current', level=logging.WARNING)
    return fitted


@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class PretrainedInit(weight_init.PretrainedInit):
    """MMEngine's, but a backbone of ours, or a model with one, takes a checkpoint as `fit` does, or fails."""

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into ``module``. Raises CheckpointError, with nothing loaded."""
        if not any(isinstance(part, Backbone) for part in module.modules()):
            super().__call__(module)
            return
        contents = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location)
        if self.prefix:
            prefix = f'{self.prefix.rstrip(".")}.'
            tensors = contents['state_dict'].items()
            contents = {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}
            if not contents:
                raise CheckpointError(f'{self.checkpoint}: no tensor has a name that begins with {prefix}')
        fitted = fit_and_tell(contents, module, self.checkpoint, start=True)
        module.load_state_dict(fitted.tensors, strict=False)
        if hasattr(module, '_params_init_info'):
            weight_init.update_init_info(module, init_info=self._get_init_info())
