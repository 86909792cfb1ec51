"""Files to write: their names, and whole or not at all."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, with the same suffix, that becomes ``path`` at the end if nothing was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.stem}.partial{path.suffix}')
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def png(name: str) -> Path:
    """For argparse: the path of a picture to write."""
    if not name.endswith('.png'):
        raise argparse.ArgumentTypeError(f'expected a name that ends in .png, got {name}')
    return Path(name)
