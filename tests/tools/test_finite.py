"""A run whose numbers go wrong ends at once, names the place, and leaves nothing spoilt behind."""

import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from tools import finite
from tools.cli import UserError
from tools.runner import Runner
from vision_rwkv.checkpoints import not_finite

BAD = 6  # the iteration, of 4 in each epoch


class Numbers(torch.utils.data.Dataset):
    """Sixteen random vectors; ``bad`` is the number of one that is not finite."""

    def __init__(self, bad: int | None = None):
        self.items = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        if bad is not None:
            self.items[bad, 1] = math.inf

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.items[index]


def collate(items: list) -> dict:
    """A batch as a model takes it."""
    return {'inputs': torch.stack(items)}


class Layer(nn.Module):
    """A linear layer that goes wrong when asked to."""

    def __init__(self):
        super().__init__()
        self.inner, self.trouble = nn.Linear(3, 3), None

    def forward(self, x):
        x = self.inner(x)
        if self.trouble == 'forward':
            x = x / (x[:, :1] - x[:, :1])
        if self.trouble == 'backward':
            x = x + (x - x.detach()).abs().sqrt()  # 0, but its derivative is infinite
        return x


class Model(BaseModel):
    """Two layers, and dropout between: a second run of a batch must draw the same."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.trouble = None
        self.drawn = []

    def forward(self, inputs, mode='tensor'):
        x = nn.functional.dropout(self.layers[0](inputs), 0.5, self.training)
        self.drawn.append(x.eq(0))
        if self.trouble == 'between':
            x = x * math.inf
        x = self.layers[1](x)
        loss = x.square().mean()
        return {'loss': loss - math.inf if self.trouble == 'loss' else loss}


class Trouble(Hook):
    """Makes a part of the model go wrong in one iteration."""

    def __init__(self, part: str, trouble: str):
        self.part, self.trouble = part, trouble

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == BAD:
            module = runner.model.get_submodule(self.part)
            if self.trouble == 'weights':
                module.inner.weight.data[0, 0] = math.nan
            module.trouble = self.trouble


class Scaled(OptimWrapper):
    """AmpOptimWrapper's loss scaling, on a CPU and in float32."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu')
        self._scale_update_param = None

    backward, step = AmpOptimWrapper.backward, AmpOptimWrapper.step


def runner_of(
    folder: Path, *hooks: Hook, data=None, wrapper=OptimWrapper, clip=True, epochs=3, keep=-1, workers=0
) -> Runner:
    """A runner of the model, which saves each epoch."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return Runner(
        model,
        str(folder),
        train_dataloader={
            'dataset': data or Numbers(),
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
            'batch_size': 4,
            'num_workers': workers,
            'collate_fn': collate,
        },
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        optim_wrapper=wrapper(optimizer=optimizer, clip_grad={'max_norm': 1.0} if clip else None),
        custom_hooks=list(hooks),
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1, 'max_keep_ckpts': keep}},
        experiment_name=folder.name,
        log_level='ERROR',
        randomness={'seed': 0},
    )


def failure(runner: Runner) -> str:
    """What the run ends with; its weights are those of before the iteration, and its checkpoints are finite."""
    with pytest.raises(UserError) as error:
        runner.train()
    for path in Path(runner.work_dir).glob('*.pth'):
        assert not not_finite(torch.load(path, weights_only=False)['state_dict'])
    return str(error.value)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('wrapper', [OptimWrapper, Scaled])
@pytest.mark.parametrize(
    ('part', 'trouble', 'message'),
    [
        ('layers.1', 'forward', r'the loss is inf; first not finite: layers\.1 \(Layer\): 12 of 12 numbers'),
        (
            '',
            'between',
            r'the loss is nan; first not finite: the input of layers\.1 \(Layer\): 12 of 12 numbers',
        ),
        ('', 'loss', r'the loss is -inf; first not finite: the model \(Model\): 1 of 1 numbers'),
        ('layers.1', 'weights', r'the loss is nan; first not finite: the weights .*: layers\.1\.inner\.weight'),
    ],
)
def test_the_loss(part, trouble, message, wrapper, clip, tmp_path):
    runner = runner_of(tmp_path, Trouble(part, trouble), wrapper=wrapper, clip=clip)
    said = failure(runner)
    expected = f'^epoch 2, iteration {BAD}: {message}; last whole checkpoint: {tmp_path}/epoch_1.pth$'
    assert re.search(expected, said), said
    if trouble != 'weights':
        assert not not_finite(runner.model.state_dict())
        first, second = runner.model.drawn[-2:]
        assert torch.equal(first, second)


def test_the_batch(tmp_path):
    said = failure(runner_of(tmp_path, data=Numbers(bad=9)))
    assert (
        said == 'epoch 1, iteration 3: the loss is nan; first not finite: the batch itself; last whole checkpoint: none'
    )


def test_the_gradient(tmp_path):
    said = failure(runner_of(tmp_path, Trouble('layers.0', 'backward')))
    assert 'iteration 6: the norm of the gradient is nan; first not finite: the gradient of layers.0.inner.bias' in said
    assert '(not finite: 2 of 4 gradients)' in said


def test_a_gradient_that_is_not_clipped_is_never_saved(tmp_path):
    """Nothing looks at it: what it does to the weights shows in the next loss, or before they are saved."""
    said = failure(runner_of(tmp_path, Trouble('layers.0', 'backward'), clip=False))
    assert 'iteration 7: the loss is nan; first not finite: the weights before this iteration: layers.0.inner' in said
    said = failure(runner_of(tmp_path / 'last', LastInEpoch('layers.0', 'backward'), clip=False))
    assert ': epoch_2.pth is not written: weights that are not finite: layers.0.inner' in said
    assert said.endswith(f'{tmp_path}/last/epoch_1.pth')


class LastInEpoch(Trouble):
    """The same in the last iteration of an epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == 8:
            runner.model.get_submodule(self.part).trouble = self.trouble


def test_loss_scaling_may_skip_steps_but_not_for_ever(tmp_path):
    runner = runner_of(tmp_path, epochs=1, wrapper=Scaled)
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**127)
    runner.train()  # a few steps are skipped, and that is all
    runner = runner_of(tmp_path / 'all', Trouble('layers.0', 'backward'), epochs=30, wrapper=Scaled)
    said = failure(runner)
    assert f'iteration {BAD - 1 + finite.SKIPPED}: no gradient was finite in {finite.SKIPPED} iterations' in said
    assert 'first not finite: the gradient of layers.0.inner.bias' in said


def test_a_sound_run_is_the_same_with_and_without(tmp_path, monkeypatch):
    runner_of(tmp_path / 'with').train()
    monkeypatch.setattr('tools.runner.StopIfNotFinite', Hook)
    runner_of(tmp_path / 'without').train()
    a, b = (torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False) for name in ('with', 'without'))
    assert all(torch.equal(a['state_dict'][name], b['state_dict'][name]) for name in a['state_dict'])
    assert sorted(a['state_dict']) == sorted(b['state_dict'])
