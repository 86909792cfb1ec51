"""Mixed precision against float32 on handwritten digits: trains each version in each precision, and compares.

Data first: tools/make_digits.py --out data/digits. bfloat16 and float16 need a GPU. What has ended is not run again and
what was cut off is taken up, so that a call may be repeated, or split with --only, --seeds and --dtypes.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

from tools.cli import UserError, run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODELS = ('vrwkv', 'vrwkv6')
DTYPES = ('float32', 'bfloat16', 'float16')
BATCH = 64
WARMUP = 4  # epochs, as in the config
POINTS = 1.0  # of accuracy that mixed precision may lose
KEPT_EPOCHS = 20  # between checkpoints


class Task(NamedTuple):
    """One run: its work dir is out/MODEL-DTYPE-SEED."""

    out: Path
    model: str
    dtype: str
    seed: int
    epochs: int

    @property
    def work_dir(self) -> Path:
        return self.out / f'{self.model}-{self.dtype}-{self.seed}'


class Result(NamedTuple):
    """accuracy: top-1 at the end. bad: logged losses that are not finite. skipped: steps loss scaling left out."""

    steps: int
    accuracy: float
    bad: int
    skipped: int


def command(task: Task, data: Path) -> list[str]:
    """How the run is started: tools/train.py with the config's schedule stretched, and validated at its end alone."""
    options: dict[str, object] = {
        'train_dataloader.batch_size': BATCH,
        'train_dataloader.dataset.data_root': data,
        'val_dataloader.dataset.data_root': data,
        'train_cfg.max_epochs': task.epochs,
        'train_cfg.val_interval': task.epochs,
        'param_scheduler.0.end': min(WARMUP, task.epochs - 1),
        'param_scheduler.1.begin': min(WARMUP, task.epochs - 1),
        'param_scheduler.1.end': task.epochs,
        'default_hooks.checkpoint.interval': KEPT_EPOCHS,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,  # no averages: each step's loss
    }
    if task.dtype != 'float32':
        options |= {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': task.dtype}
    if task.dtype == 'bfloat16':
        options['optim_wrapper.loss_scale'] = 1.0  # it has float32's range
    config = ROOT / f'configs/classification/{task.model}/{task.model}_digits.py'
    words = [
        sys.executable,
        ROOT / 'tools/train.py',
        config,
        '--work-dir',
        task.work_dir,
        '--seed',
        task.seed,
        '--resume',
    ]
    return [*map(str, words), '--cfg-options', *(f'{key}={value}' for key, value in options.items())]


def read(task: Task) -> Result | None:
    """What a run's logs say, if it has ended."""
    losses, norms, accuracy = {}, {}, None
    for log in sorted(task.work_dir.glob('*/vis_data/scalars.json')):
        for entry in map(json.loads, log.read_text().splitlines()):
            if 'loss' in entry:
                losses[entry['step']], norms[entry['step']] = entry['loss'], entry['grad_norm']
            elif entry.get('step') == task.epochs:
                accuracy = entry['accuracy/top1']
    if accuracy is None:
        return None
    bad = sum(not math.isfinite(loss) for loss in losses.values())
    skipped = sum(not math.isfinite(norm) for norm in norms.values())
    return Result(len(losses), accuracy, bad, skipped)


def train(task: Task, data: Path) -> Result | str:
    """Run a task unless it has ended; its result, or the last words of one that failed."""
    done = read(task)
    if done:
        return done
    task.work_dir.mkdir(parents=True, exist_ok=True)
    start, said = time.monotonic(), task.work_dir / 'output.txt'
    with open(said, 'w') as file:
        environment = {'OMP_NUM_THREADS': '1', **os.environ}
        failed = subprocess.run(command(task, data), env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    print(f'{task.work_dir.name}: exit status {failed} after {time.monotonic() - start:.0f} s', flush=True)
    done = read(task)
    return done if done and not failed else said.read_text().strip().rpartition('\n')[2]


def table(results: dict[Task, Result | str]) -> str:
    """A line for each run."""
    lines = [
        '| model | precision | seed | steps | top-1 | losses NaN or inf | skipped steps |',
        '|---|---|---|---|---|---|---|',
    ]
    for task, result in results.items():
        if isinstance(result, Result):
            figures = f'{result.steps} | {result.accuracy:.2f} | {result.bad} | {result.skipped}'
        else:
            figures = f'failed: {result} | | |'
        lines.append(f'| {task.model} | {task.dtype} | {task.seed} | {figures} |')
    return '\n'.join(lines)


def verdicts(results: dict[Task, Result | str]) -> tuple[list[str], bool]:
    """(a line for each version and mixed precision, whether all is well): means over the seeds that float32 has too."""
    lines, well = [], all(isinstance(r, Result) and not r.bad for r in results.values())
    by_key = {(t.model, t.dtype, t.seed): r.accuracy for t, r in results.items() if isinstance(r, Result)}
    for model, dtype in dict.fromkeys((task.model, task.dtype) for task in results if task.dtype != DTYPES[0]):
        seeds = [s for m, d, s in by_key if (m, d) == (model, dtype) and (model, DTYPES[0], s) in by_key]
        if not seeds:
            continue
        mixed, single = (statistics.mean(by_key[model, d, s] for s in seeds) for d in (dtype, DTYPES[0]))
        lost = single - mixed
        well &= lost <= POINTS
        lines.append(
            f'{model} in {dtype}: {mixed:.2f} to {single:.2f} in float32, mean of {len(seeds)} seeds ({-lost:+.2f})'
        )
    return lines, well


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/amp'), help='work dirs of the runs')
    parser.add_argument('--data', type=Path, default=Path('data/digits'))
    parser.add_argument('--only', nargs='+', choices=MODELS, default=MODELS)
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=DTYPES)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--steps', type=int, default=2000, help='at least; whole epochs, two or more')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    return parser.parse_args(arguments)


def main() -> None:
    """Train, and print the table; exit status 1 if a run failed or lost too much."""
    args = parse_args()
    images = len(list((args.data / 'train').glob('*/*.png')))
    if not images:
        raise UserError(f'no digits in {args.data}: tools/make_digits.py --out {args.data}')
    epochs = max(2, math.ceil(args.steps / math.ceil(images / BATCH)))
    tasks = [
        Task(args.out, model, dtype, seed, epochs)
        for seed in args.seeds
        for model in args.only
        for dtype in args.dtypes
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(tasks, pool.map(partial(train, data=args.data), tasks), strict=True))
    lines, well = verdicts(results)
    print(table(dict(sorted(results.items()))), *lines, sep='\n')
    sys.exit(not well)


if __name__ == '__main__':
    run(main)
