"""Training again gives the same bits, and two processes train as one with the batch of both does."""

import pytest
import torch
from scripts import ROOT, call

VERSIONS = ['vrwkv', 'vrwkv6']
CONFIG = """
_base_ = ['{root}/configs/classification/{version}/{version}_digits.py']
model = dict(backbone=dict(depth=2, drop_path_rate={drop_path}))
train_dataloader = dict(batch_size={batch}, num_workers=0{pipeline})
train_cfg = dict(max_epochs={epochs})
val_cfg = val_dataloader = val_evaluator = None
default_hooks = dict(checkpoint=dict(save_best=None, interval={epochs}))
{more}
"""
# Nothing random in a sample: processes draw their randomness from seeds of their own.
PLAIN = ", dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])"
MEAN_LOSS = """
from pathlib import Path
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class MeanLoss(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, 'mean')
        if runner.rank == 0:
            with open(Path(runner.work_dir, 'losses.txt'), 'a') as file:
                file.write(f'{loss.item()!r}\\n')
"""


def write(folder, name: str, **values) -> str:
    """A config of the 80 digits of `tiny`, in its folder."""
    (folder / name).write_text(CONFIG.format(root=ROOT, **{'pipeline': '', 'more': '', 'drop_path': 0.0} | values))
    return name


@pytest.mark.parametrize('version', VERSIONS)
def test_the_same_seed_gives_the_same_weights_after_50_steps(version, tiny):
    """With augmentation and drop path: 10 steps an epoch. Another seed gives others."""
    config = write(tiny, f'again_{version}.py', version=version, batch=8, epochs=5, drop_path=0.2)
    weights = []
    names = ('first', 'second', 'other') if version == 'vrwkv' else ('first', 'second')
    for name in names:
        work_dir = tiny / f'{name}_{version}'
        options = ('--seed', 7 if name == 'other' else 3, '--work-dir', work_dir)
        if name == 'other':
            options += ('--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.checkpoint.interval=1')
        call(
            'python', ROOT / 'tools/train.py', config, *options, cwd=tiny, OMP_NUM_THREADS=2, OMP_WAIT_POLICY='passive'
        )
        path = work_dir / f'epoch_{1 if name == "other" else 5}.pth'
        weights.append(torch.load(path, weights_only=False)['state_dict'])
    first, second, *others = weights
    assert first.keys() == second.keys()
    assert all(torch.equal(first[x], second[x]) for x in first)
    for other in others:
        assert not all(torch.equal(first[x], other[x]) for x in first)


@pytest.mark.parametrize('version', VERSIONS)
def test_two_processes_equal_one_with_the_batch_of_both(version, tiny):
    """20 steps: every loss, and the weights at the end, but for rounding."""
    (tiny / 'mean_loss.py').write_text(MEAN_LOSS)
    more = "custom_imports = dict(imports=['classification', 'mean_loss'])\ncustom_hooks = [dict(type='MeanLoss')]"
    losses, weights = [], []
    for processes in (1, 2):
        batch = 16 // processes
        config = write(
            tiny, f'{processes}_{version}.py', version=version, batch=batch, epochs=4, pipeline=PLAIN, more=more
        )
        work_dir = tiny / f'{processes}_processes_{version}'
        command = (ROOT / 'tools/dist_train.sh', config, processes, '--work-dir', work_dir)
        call(*command, cwd=tiny, OMP_NUM_THREADS=1, PYTHONPATH=tiny)
        losses.append([float(line) for line in (work_dir / 'losses.txt').read_text().split()])
        weights.append(torch.load(work_dir / 'epoch_4.pth', weights_only=False)['state_dict'])
    (one, two), (one_end, two_end) = losses, weights
    assert len(one) == len(two) == 20 and min(one[-5:]) < one[0]
    assert one == pytest.approx(two, rel=1e-5)
    for name, x in one_end.items():
        torch.testing.assert_close(two_end[name], x, rtol=1e-3, atol=1e-3, msg=name)
