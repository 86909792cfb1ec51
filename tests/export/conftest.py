"""The repository root on the path, as the scripts put it there, and models written and loaded again."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests/golden')]


@pytest.fixture
def exported(tmp_path):
    """Writes a model in a format and loads it again: exported(model, format, size, any_size) -> function of images."""
    from vision_rwkv.export import FORMATS, to_program

    def write_and_load(model, name, size=(64, 64), any_size=False):
        suffix, write, load = FORMATS[name]
        path = tmp_path / f'model{suffix}'
        write(to_program(model, *size, any_size=any_size), path)
        return load(path)

    return write_and_load
