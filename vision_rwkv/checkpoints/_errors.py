"""What goes wrong with a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be had, read, or fitted to a model; the message says what and why."""


@contextmanager
def about(source: str | Path) -> Iterator[None]:
    """Errors raised within begin with ``source``, the path or URL of the checkpoint."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from error
