"""Checkpoints of any origin: downloaded whole, read without running code from them, fitted to a model or refused."""

from vision_rwkv.checkpoints._errors import CheckpointError, about
from vision_rwkv.checkpoints.downloading import download
from vision_rwkv.checkpoints.fitting import Fitted, check_finite, fit, load, not_finite
from vision_rwkv.checkpoints.layouts import to_our_names
from vision_rwkv.checkpoints.reading import read

__all__ = [
    'CheckpointError',
    'Fitted',
    'about',
    'check_finite',
    'download',
    'fit',
    'load',
    'not_finite',
    'read',
    'to_our_names',
]
