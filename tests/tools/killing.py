"""Kills training at random moments with SIGKILL, resumes it, and compares it with a run that nothing happened to.

python tests/tools/killing.py --kills 20 --seed 0

Two processes train a small classifier on handwritten digits. Each time all of them are killed, or one: the launcher,
the first, the second, or a data-loading worker. Then nothing may be left running and every checkpoint must be whole and
equal, to the last bit, to the other run's of the same epoch; in the end so must be every loss and metric.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from scripts import ROOT, call, environment

sys.path.insert(0, str(ROOT))

from tools import make_digits  # noqa: E402
from tools.draw_predictions import read_log  # noqa: E402
from tools.saving import latest_checkpoint  # noqa: E402

VICTIMS = ('all', 'launcher', 'process 0', 'process 1', 'worker')
BOUND = 60  # seconds in which everything must have ended; a killed process is noticed at once
COMPARED = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
CONFIG = f"""
_base_ = ['{ROOT}/configs/classification/vrwkv/vrwkv_digits.py']
train_dataloader = dict(num_workers=1)
default_hooks = dict(logger=dict(interval=1))
"""


def children(pid: int) -> list[int]:
    """The living processes that ``pid`` started."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            state, parent = stat.read_text().rpartition(')')[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != 'Z':
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_for(condition: Callable, seconds: float = 200):
    """What ``condition()`` gives, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)
    return value


class Training:
    """Two processes that train a config of ``folder``, taking up what is in ``work_dir``; ends with the context."""

    def __init__(self, config: str, folder: Path, work_dir: Path, *options: str):
        command = [ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', work_dir, '--resume', *options]
        self.said = folder / f'{work_dir.name}.txt'
        with open(self.said, 'w') as log:
            self.launcher = subprocess.Popen(
                list(map(str, command)),
                cwd=folder,
                env=environment() | {'OMP_NUM_THREADS': '1'},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> 'Training':
        return self

    def __exit__(self, *_) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()

    def wait_for(self, condition: Callable):
        """What ``condition()`` gives as soon as that is true, or None if the training ends before."""
        value = wait_for(lambda: condition() or self.launcher.poll() is not None)
        return value if self.launcher.poll() is None else None

    def training(self) -> bool:
        """Whether the first iteration is done."""
        return 'Epoch(train)' in self.said.read_text()

    def find(self, victim: str) -> list[int]:
        """The processes of this name that there are now."""
        processes = children(self.launcher.pid)
        workers = [worker for process in processes for worker in children(process)]
        if victim.startswith('process'):
            rank = int(victim.split()[1])
            environments = ((pid, Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')) for pid in processes)
            return [pid for pid, variables in environments if f'RANK={rank}'.encode() in variables]
        everything = [self.launcher.pid, *processes, *workers]
        return {'all': everything, 'launcher': [self.launcher.pid], 'worker': workers[:1]}[victim]

    def kill(self, victim: str) -> float | None:
        """Kill it, and wait until everything has ended: in so many seconds. None if there was nothing to kill.

        A worker that has loaded the last batch of its epoch is not missed: then the next one is killed.
        """
        family = self.wait_for(lambda: self.find(victim) and self.find('all'))
        if not family:
            return None
        start = time.monotonic()
        while self.launcher.poll() is None:
            for pid in self.find(victim):
                os.kill(pid, signal.SIGKILL)
            if victim != 'worker':
                break
            time.sleep(1)
        wait_for(lambda: self.launcher.poll() is not None, BOUND)
        wait_for(lambda: not any(Path(f'/proc/{pid}').exists() for pid in family), BOUND)
        assert self.launcher.returncode, f'{victim} was killed, and the launcher ended as if all were well'
        return time.monotonic() - start


def assert_same(a, b, where: str = '') -> None:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f'{where}/{i}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_checkpoints(work_dir: Path, whole: Path) -> list[int]:
    """Those of epochs that ``whole`` has too are equal; all can be read. Their epochs."""
    epochs = []
    for path in sorted(work_dir.glob('*epoch_*.pth')):
        ours = torch.load(path, weights_only=False)
        if path.name.startswith('epoch_'):
            epochs.append(ours['meta']['epoch'])
        if (whole / path.name).exists():
            other = torch.load(whole / path.name, weights_only=False)
            assert ours['meta']['epoch'] == other['meta']['epoch']
            for part in COMPARED:
                assert_same(ours.get(part), other.get(part), f'{path}/{part}')
    return sorted(epochs)


def assert_same_runs(work_dir: Path, whole: Path) -> None:
    """The last checkpoints, the best one, and every loss and metric logged."""
    assert assert_same_checkpoints(work_dir, whole)
    assert os.readlink(work_dir / 'best.pth') == os.readlink(whole / 'best.pth')
    assert read_log(work_dir) == read_log(whole)


def kill_often(folder: Path, kills: int, seed: int, epochs: int) -> None:
    """Kill one run so often, let it end, and compare; ``folder`` is empty."""
    rng = random.Random(seed)
    make_digits.make(folder / 'data/digits', 'classification')
    (folder / 'config.py').write_text(CONFIG)
    options = ('--cfg-options', f'train_cfg.max_epochs={epochs}', f'param_scheduler.1.end={epochs}')
    start = time.monotonic()
    command = [ROOT / 'tools/dist_train.sh', 'config.py', 2, '--work-dir', 'whole', *options]
    call(*command, 'default_hooks.checkpoint.max_keep_ckpts=-1', cwd=folder, OMP_NUM_THREADS=1)
    an_epoch = (time.monotonic() - start) / epochs
    print(
        f'uninterrupted: {epochs} epochs, {an_epoch:.1f} s each with the start; top-1 {top1(folder / "whole")}',
        flush=True,
    )

    work_dir, last, done = folder / 'killed', 0, 0
    while done < kills:
        victim, moment = rng.choice(VICTIMS), rng.uniform(0, 1.5 * an_epoch)
        with Training('config.py', folder, work_dir, *options) as run:
            run.wait_for(run.training)
            time.sleep(moment)
            seconds = run.kill(victim)
            said = run.said.read_text()
        resumed = re.search(r'resumed epoch: (\d+)', said)
        assert int(resumed[1] if resumed else 0) == last, f'resumed {resumed and resumed[0]}, expected epoch {last}'
        present = assert_same_checkpoints(work_dir, folder / 'whole')
        last = int(re.search(r'epoch_(\d+)', latest_checkpoint(work_dir) or 'epoch_0')[1])
        if seconds is None:
            assert last == epochs, said
            break
        done += 1
        words = ''.join(re.findall(r'^(?:train\.py: error|process \d was ended).*', said, re.MULTILINE)[:1])
        print(
            f'{done:2}. {victim} killed {moment:.1f} s after the first iteration; all ended in {seconds:.1f} s; '
            f'whole checkpoints: {", ".join(map(str, present)) or "none"}  {words}',
            flush=True,
        )
    call(*command[:4], work_dir, '--resume', *options, cwd=folder, OMP_NUM_THREADS=1)
    assert_same_runs(work_dir, folder / 'whole')
    assert done == kills, f'the run ended after {done} kills: more epochs are needed'
    print(f'{done} kills, and the same in the end: top-1 {top1(work_dir)}')


def top1(work_dir: Path) -> float:
    """Of the last epoch."""
    _, accuracies = read_log(work_dir)
    return accuracies[max(accuracies)]


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0, help='of the moments and the victims')
    parser.add_argument('--epochs', type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_often(Path(folder), args.kills, args.seed, args.epochs)


if __name__ == '__main__':
    main()
