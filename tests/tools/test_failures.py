"""What goes wrong amid a run is said in a line that names the process, the place and the thing; nothing hangs."""

import errno
import os
import re
import shutil
import signal
import time
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch
from scripts import ROOT, call, errors_in
from test_finite import Numbers, failure, runner_of
from torch.distributed import DistBackendError

from tools.failures import explain

# What a hook does in process 1, in iteration 6 of 4 in each epoch.
TROUBLE = """
import os
import signal

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Trouble(Hook):
    def __init__(self, kind):
        self.kind = kind

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.iter + 1 == 6:
            getattr(self, self.kind)(runner)

    def memory(self, runner):
        torch.empty(1 << 50)

    def bug(self, runner):
        raise KeyError('a bug')

    def stop(self, runner):
        os.kill(os.getpid(), signal.SIGSTOP)

    def nan(self, runner):
        runner.model.module.head.fc.weight.data[0, 0] = float('nan')

    def gradient(self, runner):
        runner.model.module.head.fc.weight.register_hook(lambda gradient: gradient * float('nan'))
"""


CUT = """
import os

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Cut(Hook):
    def __init__(self, image):
        self.image = image

    def before_val(self, runner):
        os.truncate(self.image, 100)
"""
MODULES = {'Trouble': TROUBLE, 'Cut': CUT}


def config(tiny: Path, folder: Path, hook: str, **arguments: str) -> Path:
    """tiny.py with this hook of this module in ``folder``, where the module is too."""
    options = {**arguments, 'type': hook}
    path = folder / 'config.py'
    path.write_text(
        f"_base_ = ['{tiny}/tiny.py']\n"
        f"custom_imports = dict(imports=['classification', '{hook.lower()}'])\ncustom_hooks = [{options}]\n"
    )
    (folder / f'{hook.lower()}.py').write_text(MODULES[hook])
    return path


def train(tiny: Path, folder: Path, kind: str, *options: str, expect: int = 2) -> tuple[list[str], str]:
    """Train tiny.py with two processes and this trouble: (the errors, all it said)."""
    command = [ROOT / 'tools/dist_train.sh', config(tiny, folder, 'Trouble', kind=kind), 2, '--work-dir', folder]
    said = call(*command, *options, cwd=tiny, expect=expect, OMP_NUM_THREADS=1, PYTHONPATH=folder)
    return errors_in(said.stderr), said.output


def test_a_process_that_runs_out_of_memory(tiny, tmp_path):
    errors, _ = train(tiny, tmp_path, 'memory')
    (line,) = (line for line in errors if 'out of memory' in line)
    assert re.match(r'train\.py: error: process 1, epoch 2, iteration 6: out of memory: .*tried to allocate', line)
    assert line.endswith(f'last whole checkpoint: {tmp_path}/epoch_1.pth')


@pytest.mark.slow
def test_a_process_that_does_not_answer(tiny, tmp_path):
    """Stopped, not ended: without a timeout the other one would wait for ever."""
    start = time.monotonic()
    errors, _ = train(tiny, tmp_path, 'stop', '--cfg-options', 'env_cfg.dist_cfg.timeout=15')
    assert time.monotonic() - start < 200
    (line,) = (line for line in errors if 'did not answer' in line)
    assert re.match(r'train\.py: error: process 0, epoch 2, iteration 6: .*env_cfg\.dist_cfg\.timeout', line)


@pytest.mark.slow
def test_a_fault_of_the_code_keeps_its_stack(tiny, tmp_path):
    errors, output = train(tiny, tmp_path, 'bug', expect=1)
    assert 'process 1, epoch 2, iteration 6: KeyError' in output
    assert "KeyError: 'a bug'" in '\n'.join(errors) and any('trouble.py' in line for line in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('nan', r'the loss is nan in process 1; first not finite: the weights before this iteration: head\.fc\.weight'),
        (
            'gradient',
            r'the norm of the gradient is nan in process 1; .*: the gradient of head\.fc\.weight \(.* 1 of \d+ .*\)',
        ),
    ],
)
def test_numbers_that_go_wrong_in_one_process(kind, said, tiny, tmp_path):
    """The first process speaks, of the batch of the second."""
    errors, _ = train(tiny, tmp_path, kind)
    (line,) = (line for line in errors if 'process 0' in line)
    whole = f'last whole checkpoint: {tmp_path}/epoch_1.pth'
    assert re.fullmatch(rf'train\.py: error: process 0, epoch 2, iteration 6: {said}; {whole}', line), line


@pytest.mark.parametrize('workers', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_image_that_is_cut_while_training(workers, tiny, tmp_path):
    """It is whole when the run starts and cut when the first epoch is saved."""
    shutil.copytree(tiny, tmp_path / 'run', ignore=shutil.ignore_patterns('whole', 'killed'))
    image = sorted(tmp_path.glob('run/data/digits/train/7/*.png'))[0]
    options = ['--cfg-options', f'train_dataloader.num_workers={workers}']
    cut = config(tiny, tmp_path, 'Cut', image=str(image))
    command = ['python', ROOT / 'tools/train.py', cut, '--work-dir', tmp_path / 'work', *options]
    said = call(*command, cwd=tmp_path / 'run', expect=2, OMP_NUM_THREADS=1, PYTHONPATH=tmp_path)
    (line,) = errors_in(said.stderr)
    name = image.relative_to(tmp_path / 'run')
    assert re.match(rf'train\.py: error: epoch 2, iteration \d+: image {name}: image file is truncated', line)
    assert line.endswith(f'last whole checkpoint: {tmp_path}/work/epoch_1.pth')


class Killed(Numbers):
    """The worker that loads item 9 is killed."""

    def __getitem__(self, index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def run_with_killed_worker(folder: str) -> None:
    """Print what the run ends with."""
    print(failure(runner_of(Path(folder), data=Killed(), workers=1)), flush=True)
    os._exit(0)


def test_a_worker_that_is_killed(tmp_path):
    # In a process of its own: PyTorch raises again whenever another child of the process that had the worker ends.
    code = f'import test_failures; test_failures.run_with_killed_worker({str(tmp_path)!r})'
    said = call('python', '-c', code, cwd=Path(__file__).parent, PYTHONPATH=ROOT).stdout
    which = r'(\(pid.* \d+\)|ended while it handed over a batch)'
    assert re.match(rf'epoch 1, iteration \d: DataLoader worker {which}.*fewer train_dataloader\.num_workers', said)


def test_a_worker_that_ends_while_it_hands_over_a_batch():
    handle = resource_sharer.DupFd(0)
    handle._id = ('nowhere', 0)
    with pytest.raises(OSError) as caught:
        handle.detach()
    assert re.match(r'DataLoader worker ended while it handed over a batch: .*fewer', explain(caught.value))
    assert explain(ConnectionResetError('elsewhere')) is None


def test_a_model_that_takes_too_much_memory(tmp_path):
    runner = runner_of(tmp_path)
    runner.model.layers[0].register_forward_pre_hook(lambda *_: torch.empty(1 << 50))
    assert re.match(r'epoch 1, iteration 1: out of memory: .*allocate 4503599627370496 bytes', failure(runner))


@pytest.mark.parametrize(
    ('error', 'said'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nMore'), 'out of memory: CUDA .* GiB'),
        (
            RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:2'),
            'another process ended, or',
        ),
        (
            DistBackendError('NCCL error in: x.cpp:94, remote process exited'),
            'another process ended, or did not answer',
        ),
        (OSError(28, 'No space left on device', 'log.json'), '^cannot write log.json: No space left on device$'),
        (OSError(errno.EDQUOT, 'Disk quota exceeded', 'log.json'), '^cannot write log.json: Disk quota exceeded$'),
        (OSError(28, 'No space left on device'), '^cannot write to the work dir: No space left on device$'),
    ],
)
def test_what_is_explained(error, said):
    assert re.search(said, explain(error))


@pytest.mark.parametrize('error', [ValueError('x'), KeyError('x'), OSError(2, 'No such file', 'x'), RuntimeError('x')])
def test_what_may_be_a_fault_of_the_code(error):
    assert explain(error) is None
