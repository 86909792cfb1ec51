"""Reads checkpoint files of strangers: nothing in a file is ever run."""

import io
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vision_rwkv.checkpoints._errors import CheckpointError, about
from vision_rwkv.checkpoints.downloading import download

# Whose classes may stand in a released file beside tensors and plain data: metadata of OpenMMLab's frameworks, old and
# new, yacs configs, numpy numbers. None of them is imported; stand-ins are made instead.
# In MMEngine's logs getattr names a function; here it gives nothing, and nothing can be called.
TOLERATED = ('mmcls', 'mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'addict', 'yacs', 'numpy')

LEGACY_PICKLES = 4  # files of before PyTorch 1.6: magic number, protocol, system, contents

Allowed = tuple[Callable, str]


class _Dict:
    """Stands in for a class or function: whatever it is called with, a dict comes out, to hold the object's items.

    A Counter, as PyTorch's safe unpickler fills no other kind of dict with both items and attributes.
    """

    def __new__(cls, *args):
        return Counter()


class _Nothing:
    """Stands in for what has a state of its own kind, as numpy's arrays have; all of it is ignored."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for a zip file that unpacks to more than it is: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f'refused: {entry.filename} in it is compressed, to unpack to {entry.file_size} bytes'
            )
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > size:
        raise CheckpointError(f'refused: it claims to hold {claimed} bytes, and has {size}')


def _check_tensors(contents: Any) -> None:
    """Raise CheckpointError unless all tensors in ``contents`` are dense, and their numbers in the file."""
    stack, seen = [contents], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.is_meta or value.layout != torch.strided or value.is_quantized:
                raise CheckpointError(f'refused: expected dense tensors, got one with {value.layout} on {value.device}')
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)


def _pickles(path: Path) -> Iterator[BinaryIO]:
    """The pickles of a file that torch.save wrote, each as a stream at its beginning."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith('data.pkl'):
                    yield io.BytesIO(archive.read(name))
    else:
        with open(path, 'rb') as file:
            for _ in range(LEGACY_PICKLES):
                yield file


def _names_in(path: Path) -> set[str]:
    """The classes and functions the pickles of a file ask for, as 'module.name'; nothing is run."""
    names = set()
    for stream in _pickles(path):
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == 'GLOBAL':
                name = str(argument).replace(' ', '.', 1)
                names.add(name.replace('__builtin__.', 'builtins.'))
    return names


def _stand_ins(path: Path, allowed: tuple[Allowed, ...]) -> list[Allowed]:
    known = {name for _, name in allowed}
    names = {name: name.partition('.')[0] for name in _names_in(path) - known}
    found: list[Allowed] = []
    for name, origin in names.items():
        if origin == 'numpy' or name in ('builtins.getattr', 'builtins.slice'):
            found.append((_Nothing, name))
        elif origin in TOLERATED:
            found.append((_Dict, name))
    return found


def _read_pickle(path: Path, map_location: Any, allowed: tuple[Allowed, ...]) -> Any:
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.serialization.safe_globals([*allowed, *_stand_ins(path, allowed)]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r'GLOBAL (\S+)', str(error))
        reason = asked[1] if asked else str(error).rpartition('WeightsUnpickler error:')[2].strip().partition('\n')[0]
        raise CheckpointError(
            'refused: beside tensors and plain data, only inert metadata of OpenMMLab, yacs and numpy is accepted; '
            f'this file asks for more: {reason}'
        ) from error
    except Exception as error:  # damage can make anything of a pickle
        raise CheckpointError(f'not a checkpoint, or a damaged one: {error or type(error).__name__}') from error


def _read_safetensors(path: Path, map_location: Any) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError('reading it needs safetensors: pip install safetensors') from error
    try:
        return load_file(path, device='cpu' if map_location is None else str(map_location))
    except SafetensorError as error:
        raise CheckpointError(f'not a safetensors file, or a damaged one: {error}') from error


def read(source: str | Path, map_location: Any = 'cpu', allowed: tuple[Allowed, ...] = ()) -> dict:
    """The contents of a checkpoint file: what torch.save was given, or the tensors of a .safetensors file.

    Args:
        source: path, or http(s) URL, which is downloaded once and kept where torch.hub keeps files.
        map_location: as of `torch.load`.
        allowed: classes and functions, with the 'module.name' they go by in a file, that may be made and called.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is no dict, or it asks for anything but tensors,
            plain data, metadata of OpenMMLab, yacs configs (both become dicts), numpy's numbers and arrays (which are
            lost) and what is ``allowed``; or it is compressed.
    """
    path = download(str(source)) if str(source).startswith(('http://', 'https://')) else Path(source).expanduser()
    with about(source):
        if not path.is_file():
            raise CheckpointError('there is no such file')
        if path.suffix == '.safetensors':
            return _read_safetensors(path, map_location)
        contents = _read_pickle(path, map_location, allowed)
        if not isinstance(contents, dict):
            raise CheckpointError(f'expected a dict in it, got {type(contents).__name__}')
        _check_tensors(contents)
        return contents
