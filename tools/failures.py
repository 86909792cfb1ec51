"""What goes wrong in a run that is no fault of the code: said in a line that names it."""

import errno
import re
import time
import traceback
from multiprocessing import resource_sharer

import torch

from openmmlab import DataError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)
# How PyTorch's backends say that another process is gone, or does not answer within the timeout.
PEERS = re.compile(
    r'gloo|Connection (closed|reset) by peer|Timed out waiting|NCCL|ncclRemoteError|process group', re.IGNORECASE
)


def lost_another(error: Exception) -> bool:
    """Whether it says no more than that another process ended or does not answer."""
    return isinstance(error, RuntimeError) and bool(PEERS.search(str(error).partition('\n')[0]))


def lost_worker(error: Exception) -> bool:
    """Whether a data-loading worker ended while it handed over a batch, and PyTorch took it to be alive still."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, (OSError, EOFError)) and any(
        frame.f_code.co_filename == resource_sharer.__file__ for frame, _ in frames
    )


def _of_lost_worker(error: Exception) -> str:
    """What PyTorch says when it hears of the worker's end: it raises that in the midst of whatever is done then."""
    try:
        time.sleep(1)
    except RuntimeError as heard:
        return str(heard)
    return f'DataLoader worker ended while it handed over a batch: {error}'


def explain(error: Exception) -> str | None:
    """What happened, in a line; None for an error that may be one of the code, whose stack is worth reading."""
    said = _of_lost_worker(error) if lost_worker(error) else str(error)
    first, last = said.partition('\n')[0], said.strip().rpartition('\n')[2]
    if isinstance(error, FloatingPointError):
        return first
    if isinstance(error, DataError):  # from a data-loading worker, its stack comes first
        return last.rpartition(f'{DataError.__name__}: ')[2]
    if isinstance(error, OSError) and error.errno in FULL:
        return f'cannot write {error.filename or "to the work dir"}: {error.strerror}'
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or MEMORY.search(first):
        return f'out of memory: {first}; a smaller train_dataloader.batch_size takes less'
    if re.match(r'DataLoader worker .*(killed|exited|ended)', first):
        return f'{first}; a worker that takes too much memory is killed: fewer train_dataloader.num_workers take less'
    if lost_another(error):
        return f'another process ended, or did not answer in env_cfg.dist_cfg.timeout: {first}'
    return None
