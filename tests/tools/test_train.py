"""Training for real: two processes, killed and resumed, and what a run leaves behind."""

import os
import re

import torch
from killing import Training, assert_same, assert_same_checkpoints, assert_same_runs
from scripts import ROOT, call

from tools.draw_predictions import read_log


def test_killed_and_resumed_equals_uninterrupted(trained, tiny):
    """All processes at once, then one of the two; `make test-kills` does so at random moments."""
    work_dir = tiny / 'killed'
    for victim, epoch in (('all', 2), ('process 1', 4)):
        with Training('tiny.py', tiny, work_dir) as run:
            run.wait_for(lambda epoch=epoch: (work_dir / f'epoch_{epoch}.pth').exists())
            assert run.kill(victim), run.said.read_text()
        assert epoch in assert_same_checkpoints(work_dir, trained.work_dir)
    assert 'process 1 was ended by signal 9' in run.said.read_text()
    command = (ROOT / 'tools/dist_train.sh', 'tiny.py', 2, '--work-dir', work_dir, '--resume')
    said = call(*command, cwd=tiny, OMP_NUM_THREADS=1)
    assert re.search(r'resumed epoch: [45], iter: ', said.output)
    assert 'weights_only' not in said.output
    assert_same_runs(work_dir, trained.work_dir)


def test_processes_end_with_no_thread_of_their_group(trained, tiny):
    """One at work when Python ends aborts the process, now and then."""
    (tiny / 'told_at_exit.py').write_text("""
import atexit, os
from pathlib import Path

def tell():
    names = [(task / 'comm').read_text().strip() for task in Path('/proc/self/task').iterdir()]
    Path(f'threads_{os.environ["RANK"]}.txt').write_text(' '.join(names))

atexit.register(tell)
""")
    imports = "custom_imports = dict(imports=['classification', 'told_at_exit'])"
    (tiny / 'told.py').write_text(f"_base_ = 'tiny.py'\n{imports}\n")
    work_dir = tiny / 'told'
    train = (ROOT / 'tools/dist_train.sh', 'told.py', 2, '--work-dir', work_dir)
    test = (ROOT / 'tools/dist_test.sh', 'told.py', trained.work_dir / 'best.pth', 2, '--work-dir', work_dir)
    for command in (train, test):
        call(*command, cwd=tiny, PYTHONPATH=tiny)
        for said in (tiny / 'threads_0.txt', tiny / 'threads_1.txt'):
            assert 'gloo' not in said.read_text()
            said.unlink()


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
