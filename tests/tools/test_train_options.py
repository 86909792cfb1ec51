"""What docs/train.md says of options: mixed precision, logs, accumulated gradients, averaged weights, strategies."""

import importlib.util
import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from scripts import ROOT, call, environment

from tools import train
from tools.runner import Runner

PAGE = (ROOT / 'docs/train.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL) for line in block.splitlines()]
DIGITS = f'{ROOT}/configs/classification/vrwkv/vrwkv_digits.py'
HALF = f'{ROOT}/configs/classification/vrwkv/vrwkv_l_22kto1k_384.py'


def applied(monkeypatch, config, *options) -> Config:
    """The config as train.py changes it."""
    monkeypatch.setattr(sys, 'argv', ['train.py', config, *options])
    args = train.parse_args()
    cfg = train.load_config(args)
    train.apply_args(cfg, args)
    return cfg


def fit(folder, tiny, batch_size: int, **changes) -> dict:
    """The checkpoint after an epoch on the tiny data set, in this process."""
    cfg = Config.fromfile(DIGITS)
    cfg.merge_from_dict({'model.backbone.depth': 1, 'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0})
    cfg.train_dataloader.dataset.data_root = str(tiny / 'data/digits')
    cfg.train_dataloader.batch_size = batch_size
    for key in ('val', 'test'):
        cfg[f'{key}_dataloader'] = cfg[f'{key}_evaluator'] = cfg[f'{key}_cfg'] = None
    cfg.default_hooks.checkpoint.pop('save_best')
    cfg.param_scheduler, cfg.log_level = None, logging.ERROR
    cfg.work_dir, cfg.experiment_name = str(folder), folder.name
    cfg.merge_from_dict(changes)
    Runner.from_cfg(cfg).train()
    return torch.load(folder / 'epoch_1.pth', weights_only=False)


def test_mixed_precision(monkeypatch):
    for config in (DIGITS, HALF):
        wrapper = applied(monkeypatch, config, '--amp', 'bfloat16').optim_wrapper
        assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ('AmpOptimWrapper', 'bfloat16', 1.0)
        wrapper = applied(monkeypatch, config, '--amp').optim_wrapper
        assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ('AmpOptimWrapper', 'float16', 'dynamic')
    assert applied(monkeypatch, DIGITS).optim_wrapper.get('type') is None


def test_what_is_not_installed_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: None if name == 'wandb' else found(name, *rest))
    with pytest.raises(train.UserError, match='--log wandb: it is not installed: pip install wandb'):
        applied(monkeypatch, DIGITS, '--log', 'wandb')


def test_weights_and_biases_offline(tiny, tmp_path):
    options = ('--work-dir', tmp_path / 'run', '--log', 'wandb', '--cfg-options', 'train_cfg.max_epochs=1')
    call('python', ROOT / 'tools/train.py', tiny / 'tiny.py', *options, cwd=tiny, WANDB_MODE='offline')
    assert list(tmp_path.glob('run/*/vis_data/wandb/offline-run-*/run-*.wandb'))


def test_accumulated_gradients_are_those_of_a_larger_batch(tiny, tmp_path):
    whole = fit(tmp_path / 'whole', tiny, 16)['state_dict']
    parts = fit(tmp_path / 'parts', tiny, 4, **{'optim_wrapper.accumulative_counts': 4})['state_dict']
    apart = fit(tmp_path / 'apart', tiny, 4)['state_dict']
    for name, tensor in whole.items():
        assert (parts[name] - tensor).abs().max() < 1e-4, name
    assert (apart['head.fc.weight'] - whole['head.fc.weight']).abs().max() > 1e-3


@HOOKS.register_module()
class Watch(Hook):
    """Keeps a bias after every step, before the average is taken; in the class, as a runner makes its hooks."""

    priority = 'HIGHEST'
    seen: list[torch.Tensor] = []

    def after_train_iter(self, runner, *_, **__) -> None:
        self.seen.append(runner.model.head.fc.bias.detach().clone())


def test_averaged_weights(tiny, tmp_path):
    (snippet,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    (tmp_path / 'my_ema.py').write_text(snippet.replace("'configs", f"'{ROOT}/configs"))
    (hook,) = Config.fromfile(tmp_path / 'my_ema.py').custom_hooks
    Watch.seen.clear()
    saved = fit(tmp_path / 'run', tiny, 16, custom_hooks=[hook, {'type': 'Watch'}])
    expected = Watch.seen[0]  # the average starts with what the first step made
    for bias in Watch.seen[1:]:
        expected = (1 - hook.momentum) * expected + hook.momentum * bias
    assert len(Watch.seen) == 5
    assert torch.allclose(saved['state_dict']['head.fc.bias'], expected, atol=1e-7)
    assert torch.equal(saved['ema_state_dict']['module.head.fc.bias'], Watch.seen[-1])


@pytest.fixture(scope='module')
def plain(tiny):
    """A config for two processes, and the losses of its run without a strategy."""
    (tiny / 'plain.py').write_text(
        f"_base_ = ['{DIGITS}']\nmodel = dict(backbone=dict(depth=2))\ntrain_cfg = dict(max_epochs=3)\n"
        'train_dataloader = dict(batch_size=8, num_workers=0)\ndefault_hooks = dict(logger=dict(interval=1))\n'
        'optim_wrapper = dict(clip_grad=dict(max_norm=0.05))\n'  # small enough to clip
    )
    return losses('plain', tiny)


def losses(name: str, tiny, *options) -> list[float]:
    """Of all iterations so far."""
    command = (ROOT / 'tools/dist_train.sh', f'{name}.py', 2, '--work-dir', tiny / name, *options)
    call(*command, cwd=tiny, OMP_NUM_THREADS=1)
    logs = sorted((tiny / name).glob('*/vis_data/scalars.json'))
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [entry['loss'] for entry in entries if 'loss' in entry]


def write_sharded(name: str, tiny, changes: str = '') -> None:
    """plain.py with the strategy of a config of the repository."""
    text = (ROOT / f'configs/classification/sharded/vrwkv_base_{name}_16xb64_in1k.py').read_text()
    text = text.replace("'../vrwkv/vrwkv_base_16xb64_in1k.py'", "'plain.py'")
    (tiny / f'{name}.py').write_text(text + changes)


@pytest.mark.slow
def test_fsdp_trains_as_one_model_does(plain, tiny):
    assert len(plain) == 15
    write_sharded('fsdp', tiny)
    assert losses('fsdp', tiny) == pytest.approx(plain, rel=1e-4)
    said = call(ROOT / 'tools/dist_test.sh', 'plain.py', 'fsdp/epoch_3.pth', 1, cwd=tiny)
    assert 'accuracy/top1: ' in said.output  # its checkpoint is that of any run
    a, b = (torch.load(tiny / run / 'epoch_3.pth', weights_only=False)['state_dict'] for run in ('fsdp', 'plain'))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-3) for key in a)
    if not torch.cuda.is_available():
        command = (ROOT / 'tools/dist_train.sh', 'fsdp.py', 2, '--work-dir', tiny / 'fsdp', '--resume')
        done = subprocess.run(list(map(str, command)), cwd=tiny, env=environment(), capture_output=True, text=True)
        assert done.returncode and 'FSDP on a CPU does not save the optimiser' in done.stderr


@pytest.mark.slow
def test_deepspeed_trains_as_one_model_does_and_resumes(plain, tiny):
    pytest.importorskip('deepspeed', reason='DeepSpeed is not installed')
    write_sharded('deepspeed', tiny, '\nstrategy.update(gradient_clipping=0.05)\n')
    losses('deepspeed', tiny, '--cfg-options', 'train_cfg.max_epochs=2')
    assert losses('deepspeed', tiny, '--resume') == pytest.approx(plain, rel=5e-3)  # in bfloat16


@pytest.mark.parametrize(
    ('strategy', 'message'),
    [('FSDPStrategy', 'FSDPStrategy spreads a model over processes'), ('ColossalAIStrategy', 'got ColossalAIStrategy')],
)
def test_strategies_that_cannot_be(tiny, strategy, message):
    options = ('--cfg-options', f'strategy.type={strategy}')
    said = call('python', ROOT / 'tools/train.py', 'tiny.py', *options, cwd=tiny, expect=2)
    assert message in said.stderr and 'Traceback' not in said.output


def test_commands_of_the_page_are_those_tested():
    scripts = {command.split()[0] for command in COMMANDS}
    assert scripts == {'tools/dist_train.sh'}
    configs = {command.split()[1] for command in COMMANDS} - {'my_ema.py'}
    assert all((ROOT / config).is_file() for config in configs)
    for line in COMMANDS[:3]:  # the options are taken
        monkey = pytest.MonkeyPatch()
        with monkey.context() as m:
            applied(m, DIGITS, *line.split()[3:])


def test_links_resolve():
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', PAGE) if '://' not in link]
    assert links and all((ROOT / 'docs' / link).exists() for link in links)
