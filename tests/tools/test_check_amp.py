"""Mixed precision is compared run by run, and a run that has ended is not run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, call

from tools import check_amp
from tools.check_amp import Result, Task


def test_runs_that_end_and_runs_that_fail(tiny, tmp_path):
    command = ['python', ROOT / 'tools/check_amp.py', '--out', tmp_path, '--data', tiny / 'data/digits', '--jobs', 2]
    command += ['--only', 'vrwkv', '--seeds', 5, '--steps', 1]
    environment = {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': 1}
    said = call(*command, '--dtypes', 'float32', 'bfloat16', cwd=tmp_path, expect=1, **environment).stdout
    assert 'vrwkv-float32-5: exit status 0' in said and 'vrwkv-bfloat16-5: exit status 2' in said
    (row,) = (line for line in said.splitlines() if line.startswith('| vrwkv | float32 '))
    steps, accuracy, bad, skipped = row.split('|')[4:8]
    assert (int(steps), int(bad), int(skipped)) == (4, 0, 0) and 0 <= float(accuracy) <= 100
    assert (
        '| vrwkv | bfloat16 | 5 | failed: train.py: error: mixed precision (--amp, AmpOptimWrapper) needs a GPU' in said
    )
    said = call(*command, '--dtypes', 'float32', cwd=tmp_path, **environment).stdout
    assert 'exit status' not in said and row in said


@pytest.mark.cuda
def test_mixed_precision(tiny, tmp_path):
    command = [sys.executable, ROOT / 'tools/check_amp.py', '--out', tmp_path, '--data', tiny / 'data/digits']
    command += ['--jobs', '6', '--seeds', '0', '--steps', '20']  # too few to compare accuracies: any exit status
    said = subprocess.run(command, capture_output=True, text=True, timeout=500).stdout
    rows = [line.split('|') for line in said.splitlines() if line.startswith('| vrwkv')]
    assert len(rows) == 6 and all(int(row[4]) == 20 and int(row[6]) == 0 for row in rows), said


def test_a_run_in_bfloat16_needs_no_loss_scale(tmp_path):
    def options(dtype):
        words = check_amp.command(Task(tmp_path, 'vrwkv6', dtype, 1, 91), Path('digits'))
        return {word for word in words if word.startswith('optim_wrapper')}

    assert options('float32') == set()
    assert options('float16') == {'optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.dtype=float16'}
    assert options('bfloat16') >= {'optim_wrapper.dtype=bfloat16', 'optim_wrapper.loss_scale=1.0'}


def test_what_logs_say(tmp_path):
    task = Task(tmp_path, 'vrwkv', 'float16', 0, 2)
    assert check_amp.read(task) is None
    entries = [{'loss': 2.0, 'grad_norm': torch.inf, 'step': 1}, {'loss': torch.nan, 'grad_norm': 1.0, 'step': 2}]
    for part, entry in (('first', entries[:1]), ('then', [*entries, {'accuracy/top1': 97.0, 'step': 2}])):
        log = task.work_dir / part / 'vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('\n'.join(map(json.dumps, entry)))
    assert check_amp.read(task) == Result(steps=2, accuracy=97.0, bad=1, skipped=1)


def test_verdicts():
    def of(accuracies, bad=0):
        return {
            Task(Path(), 'vrwkv', dtype, seed, 2): Result(2000, accuracy, bad, 0)
            for dtype, values in accuracies.items()
            for seed, accuracy in enumerate(values)
        }

    near = {'float32': [98.0, 97.0], 'float16': [96.5, 96.6]}
    (line,), well = check_amp.verdicts(of(near))
    assert well and line == 'vrwkv in float16: 96.55 to 97.50 in float32, mean of 2 seeds (-0.95)'
    assert not check_amp.verdicts(of({**near, 'float16': [96.4, 96.5]}))[1]
    assert not check_amp.verdicts(of(near, bad=1))[1]
    assert not check_amp.verdicts({**of(near), Task(Path(), 'vrwkv', 'float16', 2, 2): 'out of memory'})[1]
