"""Pieces of tools/runner.py that a whole run does not show."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel

from tools.cli import UserError
from tools.runner import AverageBuffers, Runner, SeedEpochs


def test_an_epoch_draws_the_same_after_anything():
    def draw(**state):
        SeedEpochs().before_train_epoch(SimpleNamespace(**{'seed': 0, 'rank': 0, 'iter': 11, **state}))
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw()
    assert draw() == first
    for other in ({'seed': 1}, {'rank': 1}, {'iter': 22}):
        assert not set(draw(**other)) & set(first)


class Draws(torch.utils.data.Dataset):
    """Each item is what the three random generators give."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return random.random(), np.random.rand(), torch.rand(1).item()


def test_workers_draw_anew_each_epoch_and_the_same_when_seeded_so():
    sampler = {'type': 'DefaultSampler', 'shuffle': False}
    loader = Runner.build_dataloader(
        {'dataset': Draws(), 'sampler': sampler, 'batch_size': 1, 'num_workers': 2, 'collate_fn': list}, seed=0
    )

    def epoch(done):
        SeedEpochs().before_train_epoch(SimpleNamespace(seed=0, rank=0, iter=done))
        return [value for batch in loader for item in batch for value in item]

    first, second = epoch(0), epoch(4)
    assert len({*first, *second}) == 24
    assert epoch(4) == second


class Small(BaseModel):
    """A model to load checkpoints into."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.layer(inputs)


def runner_of(folder) -> Runner:
    """A runner that could train."""
    data = {'dataset': Draws(), 'sampler': {'type': 'DefaultSampler', 'shuffle': False}, 'batch_size': 1}
    optimizer = {'optimizer': {'type': 'SGD', 'lr': 0.1}}
    loop = {'type': 'EpochBasedTrainLoop', 'max_epochs': 1}
    return Runner(
        Small(),
        str(folder),
        train_dataloader=data,
        train_cfg=loop,
        optim_wrapper=optimizer,
        experiment_name=folder.name,
        log_level='ERROR',
    )


def test_a_start_must_fit(tmp_path):
    runner = runner_of(tmp_path)
    weight, bias = torch.ones(3, 2), torch.zeros(3)
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    for name, state, problem in (
        ('half', {'layer.weight': weight}, r'missing from the file: layer\.bias'),
        ('more', {'layer.weight': weight, 'layer.bias': bias, 'layer.scale': bias}, r'unexpected .*: layer\.scale'),
        ('wide', {'layer.weight': torch.ones(3, 3), 'layer.bias': bias}, r'layer\.weight has the shape \(3, 3\)'),
        ('other', {'neck.weight': weight}, 'no tensor in common'),
    ):
        torch.save({'state_dict': state}, tmp_path / f'{name}.pth')
        with pytest.raises(UserError, match=rf'{name}\.pth: it does not fit the model: .*{problem}'):
            runner.load_checkpoint(str(tmp_path / f'{name}.pth'))
        assert all(torch.equal(tensor, before[key]) for key, tensor in runner.model.state_dict().items())


def test_a_start_may_lack_and_leave_whole_parts(tmp_path):
    runner = runner_of(tmp_path)
    runner.model.neck = torch.nn.Linear(3, 3)
    neck = runner.model.neck.weight.clone()
    state = {'layer.weight': torch.ones(3, 2), 'layer.bias': torch.zeros(3), 'head.weight': torch.ones(1, 3)}
    torch.save({'state_dict': state}, tmp_path / 'start.pth')
    runner.load_checkpoint(str(tmp_path / 'start.pth'))
    assert torch.equal(runner.model.layer.weight, state['layer.weight']) and not runner.model.layer.bias.any()
    assert torch.equal(runner.model.neck.weight, neck)


@pytest.mark.parametrize('timeout', ['soon', 0, None])
def test_a_timeout_that_is_none(timeout):
    with pytest.raises(UserError, match=f'env_cfg.dist_cfg.timeout: expected a number of seconds, got {timeout!r}'):
        Runner.setup_env(SimpleNamespace(_launcher='none'), {'dist_cfg': {'timeout': timeout}})


def test_resumed_epochs_are_validated_whatever_the_loop_is_called(tmp_path):
    assert 'ValidateResumed' in [type(hook).__name__ for hook in runner_of(tmp_path).hooks]


def average_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += torch.tensor([rank, 3.0 * rank])
    norm.num_batches_tracked += 4
    AverageBuffers().before_val_epoch(SimpleNamespace(model=norm))
    assert norm.running_mean.tolist() == [0.5, 1.5] and norm.running_var.tolist() == [1, 1]
    assert norm.num_batches_tracked == 4
    torch.distributed.destroy_process_group()


def test_batch_norm_statistics_are_averaged_over_processes(tmp_path):
    torch.multiprocessing.spawn(average_process, (str(tmp_path),), nprocs=2)
