"""Training for real: two processes, killed and resumed, and what a run leaves behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import torch
from scripts import ROOT, call, environment

from tools.draw_predictions import read_log


def children(pid: int) -> list[int]:
    """All living processes under ``pid``."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            state, parent = stat.read_text().rpartition(')')[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != 'Z':
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def wait_for(condition, seconds: float = 200) -> None:
    """Return as soon as ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def train_and_kill(folder: Path, work_dir: Path, epoch: int) -> None:
    """Start a training run and end its process group with SIGKILL as soon as the checkpoint of ``epoch`` is there."""
    command = [ROOT / 'tools/dist_train.sh', 'tiny.py', '2', '--work-dir', work_dir]
    env = environment() | {'OMP_NUM_THREADS': '1'}
    with open(folder / 'killed.log', 'w') as log:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for(lambda: (work_dir / f'epoch_{epoch}.pth').exists() or process.poll() is not None)
            family = children(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert len(family) >= 2, (folder / 'killed.log').read_text()
    wait_for(lambda: not any(Path(f'/proc/{pid}').exists() for pid in family), 30)


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


def test_killed_and_resumed_equals_uninterrupted(trained, tiny):
    work_dir = tiny / 'killed'
    train_and_kill(tiny, work_dir, epoch=3)
    assert not (work_dir / 'epoch_6.pth').exists(), 'it ended before it could be killed'
    command = (ROOT / 'tools/dist_train.sh', 'tiny.py', 2, '--work-dir', work_dir, '--resume')
    said = call(*command, cwd=tiny, OMP_NUM_THREADS=1)
    assert re.search(r'resumed epoch: [345], iter: ', said.output)
    assert 'weights_only' not in said.output

    for name in ('epoch_6.pth', 'best.pth'):
        whole, resumed = (torch.load(folder / name, weights_only=False) for folder in (trained.work_dir, work_dir))
        for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
            assert_same(whole.get(part), resumed.get(part), f'{name}/{part}')
        assert whole['meta']['epoch'] == resumed['meta']['epoch']
    whole, resumed = (read_log(folder) for folder in (trained.work_dir, work_dir))
    assert whole == resumed  # every loss and every accuracy


def test_validation_that_was_cut_off_is_made_up_for(trained, tiny, tmp_path):
    checkpoint = torch.load(trained.work_dir / 'epoch_4.pth', weights_only=False)
    for key in ('best_score', 'best_ckpt'):
        del checkpoint['message_hub']['runtime_info'][key]
    torch.save(checkpoint, tmp_path / 'epoch_4.pth')
    options = ('--work-dir', tmp_path, '--resume', '--cfg-options', 'train_cfg.max_epochs=4')
    call('python', ROOT / 'tools/train.py', 'tiny.py', *options, cwd=tiny)
    assert read_log(tmp_path) == ({}, {4: read_log(trained.work_dir)[1][4]})
    best = torch.load(tmp_path / 'best.pth', weights_only=False)
    assert_same(best['state_dict'], checkpoint['state_dict'])


def test_a_run_keeps_the_best_and_the_last_checkpoints(trained):
    _, accuracies = read_log(trained.work_dir)
    assert sorted(accuracies) == [1, 2, 3, 4, 5, 6]
    best = max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))
    assert os.readlink(trained.work_dir / 'best.pth') == f'best_accuracy_top1_epoch_{best}.pth'
    assert {path.name for path in trained.work_dir.glob('epoch_*.pth')} == {f'epoch_{i}.pth' for i in (4, 5, 6)}
    assert not list(trained.work_dir.glob('.*partial'))


def test_a_run_tells_its_progress(trained):
    assert re.search(r'Epoch\(train\) +\[1\]\[1/4\].* eta: \d+:\d\d:\d\d .* loss: ', trained.output)
    assert list(trained.work_dir.glob('*/vis_data/events.out.tfevents*'))


def test_a_model_that_learns(trained):
    losses, _ = read_log(trained.work_dir)
    assert len(losses) == 24
    steps = sorted(losses)
    assert sum(losses[i] for i in steps[-4:]) < sum(losses[i] for i in steps[:4])
