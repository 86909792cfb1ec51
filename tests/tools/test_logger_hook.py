"""The figures of a test are written once, whole, however many processes test."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch.distributed
import torch.multiprocessing
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS

from tools.saving import LoggerHook


class Processor:
    """A log processor whose figures are longer on the first process."""

    def get_log_after_epoch(self, runner, batch_idx, mode, with_non_scalar):
        assert (batch_idx, mode, with_non_scalar) == (3, 'test', True)
        torch.distributed.barrier()  # as the real one, which has to be called by every process
        return {'accuracy': 0.5, 'time': 1 / 3 if runner.rank == 0 else 0.5}, 'the figures'


def end_a_test(rank: int, folder: str, turns: int) -> None:
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', world_size=2, rank=rank)
    logger = MMLogger('test')
    for turn in range(turns):
        hook = HOOKS.build({'type': 'LoggerHook'})
        runner = SimpleNamespace(
            rank=rank,
            log_processor=Processor(),
            test_dataloader=range(3),
            logger=logger,
            log_dir=folder,
            timestamp=f'time{turn}',
        )
        hook.before_run(runner)
        hook.after_test_epoch(runner)
    torch.distributed.destroy_process_group()


def test_is_the_one_that_configs_get():
    assert type(HOOKS.build({'type': 'LoggerHook'})) is LoggerHook


def test_main_process_alone_writes(tmp_path):
    turns = 20
    torch.multiprocessing.spawn(end_a_test, (str(tmp_path), turns), nprocs=2)
    written = sorted(path.name for path in Path(tmp_path).iterdir() if re.match(r'\.?time', path.name))
    assert written == sorted(f'time{turn}.json' for turn in range(turns))
    for name in written:
        assert json.loads((tmp_path / name).read_text()) == {'accuracy': 0.5, 'time': 1 / 3}
