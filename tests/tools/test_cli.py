"""Arguments, and one line for each error a person can act on."""

import importlib.util
import sys

import pytest
import torch
from mmengine.config import Config
from scripts import ROOT, call, errors_in

from tools import test, train
from tools.cli import UserError, check_data

DIGITS = f'{ROOT}/configs/classification/vrwkv/vrwkv_digits.py'


def fails(monkeypatch, script, *arguments) -> str:
    """The message of the UserError that ``script`` ends in."""
    monkeypatch.setattr(sys, 'argv', [script.__file__, *map(str, arguments)])
    with pytest.raises(UserError) as error:
        script.main()
    return str(error.value)


@pytest.mark.parametrize('processes', [1, 2])
def test_one_line_and_exit_status(tmp_path, processes):
    script = (
        [ROOT / 'tools/dist_train.sh', 'no.py', 2] if processes == 2 else ['python', ROOT / 'tools/train.py', 'no.py']
    )
    said = call(*script, cwd=tmp_path, expect=2)
    assert errors_in(said.stderr) == [f'train.py: error: config not found: no.py (from {tmp_path})']


def test_launcher_explains_itself(tmp_path):
    assert 'usage: ' in call(ROOT / 'tools/dist_train.sh', 'config.py', cwd=tmp_path, expect=2).stderr
    assert 'usage: ' in call(ROOT / 'tools/dist_test.sh', 'config.py', 'x.pth', cwd=tmp_path, expect=2).stderr
    said = call(ROOT / 'tools/dist_train.sh', 'config.py', '--resume', cwd=tmp_path, expect=1)
    assert "got '--resume'" in said.stderr
    said = call(ROOT / 'tools/dist_train.sh', 'config.py', 2, cwd=tmp_path, expect=1, NNODES=2, MASTER_ADDR='host')
    assert 'NODE_RANK must be set' in said.stderr


def test_a_process_that_dies_is_named(tmp_path):
    (tmp_path / 'dies.py').write_text('import os; os.kill(os.getpid(), 11)')
    said = call('python', ROOT / 'tools/launch.py', 1, 'dies.py', cwd=tmp_path, expect=1)
    assert errors_in(said.stderr) == ['process 0 was ended by signal 11']


def test_transformers_5_is_named(tmp_path):
    info = tmp_path / 'transformers-5.1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.1.0\n')
    said = call('python', ROOT / 'tools/train.py', DIGITS, cwd=tmp_path, expect=2, PYTHONPATH=tmp_path)
    (line,) = errors_in(said.stderr)
    assert 'transformers < 5, but 5.1.0 is installed' in line


@pytest.mark.parametrize(
    ('script', 'flag', 'instead'),
    [
        (train, '--resume-from', '--resume CHECKPOINT'),
        (train, '--auto-resume', '--resume'),
        (train, '--load-from', 'load_from=CHECKPOINT'),
        (train, '--no-validate', 'val_cfg=None'),
        (train, '--gpus', 'dist_train.sh'),
        (train, '--gpu-ids', 'CUDA_VISIBLE_DEVICES'),
        (test, '--metrics', 'test_evaluator'),
        (test, '--eval', 'test_evaluator'),
        (test, '--gpu-collect', 'collect_device=gpu'),
    ],
)
def test_flags_of_the_published_scripts(monkeypatch, script, flag, instead):
    assert f'{flag} no longer exists; ' in (message := fails(monkeypatch, script, 'a.py', 'b.pth', flag, '1'))
    assert instead in message


def test_missing_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert 'config not found: no.py' in fails(monkeypatch, train, 'no.py')
    assert 'config not found: no.py' in fails(monkeypatch, test, 'no.py', 'no.pth')
    assert 'checkpoint not found: no.pth' in fails(monkeypatch, test, DIGITS, 'no.pth')
    assert 'checkpoint not found: no.pth' in fails(monkeypatch, train, DIGITS, '--resume', 'no.pth')
    assert 'data folder not found: data/digits' in fails(monkeypatch, train, DIGITS)
    (tmp_path / 'some.pth').touch()
    assert 'data folder not found: data/digits' in fails(monkeypatch, test, DIGITS, 'some.pth')
    (tmp_path / 'no_base.py').write_text("_base_ = 'nowhere.py'")
    assert 'nowhere.py' in fails(monkeypatch, train, 'no_base.py')


def test_missing_split_of_a_data_set(tmp_path):
    (tmp_path / 'data/digits/val').mkdir(parents=True)
    said = call('python', ROOT / 'tools/train.py', DIGITS, cwd=tmp_path, expect=2)
    (line,) = errors_in(said.stderr)
    assert line.startswith('train.py: error: data: ') and 'data/digits/train' in line


def test_bad_options(monkeypatch, tmp_path):
    (tmp_path / 'data/digits').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert 'expects KEY=VALUE' in fails(monkeypatch, train, DIGITS, '--cfg-options', 'word')
    assert '--unknown' in fails(monkeypatch, train, DIGITS, '--unknown')
    assert 'ends in .pkl' in fails(monkeypatch, test, DIGITS, 'x.pth', '--out', 'x.json')
    without = ('--cfg-options', 'auto_scale_lr=None')
    assert 'base_batch_size' in fails(monkeypatch, train, DIGITS, '--auto-scale-lr', *without)
    monkeypatch.setattr('tools.cli.get_device', lambda: 'cpu')
    assert 'needs a GPU' in fails(monkeypatch, train, DIGITS, '--amp')
    nothing = f'{ROOT}/configs/classification/vrwkv/vrwkv_l_in22k_192.py'
    assert 'no test_dataloader' in fails(monkeypatch, test, nothing, 'x.pth')


def test_options_reach_the_config(monkeypatch, tmp_path):
    (tmp_path / 'work').mkdir()
    torch.save({}, tmp_path / 'work/epoch_7.pth')
    argv = [
        DIGITS,
        '--work-dir',
        tmp_path / 'work',
        '--resume',
        '--amp',
        '--auto-scale-lr',
        '--log',
        'tensorboard',
        'wandb',
        '--seed',
        3,
    ]
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, argv), '--cfg-options', 'train_cfg.max_epochs=2'])
    found = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: name == 'wandb' or found(name, *rest))
    args = train.parse_args()
    cfg = train.load_config(args)
    train.apply_args(cfg, args)
    assert cfg.work_dir == str(tmp_path / 'work')
    assert (cfg.resume, cfg.load_from) == (True, f'{tmp_path}/work/epoch_7.pth')
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ('AmpOptimWrapper', 'float16', 'dynamic')
    assert cfg.auto_scale_lr == {'base_batch_size': 64, 'enable': True}
    backends = [backend['type'] for backend in cfg.visualizer.vis_backends]
    assert backends == ['LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend']
    assert (cfg.randomness.seed, cfg.train_cfg.max_epochs) == (3, 2)


def test_resume_with_nothing_to_resume_keeps_load_from(monkeypatch, tmp_path):
    argv = ['train.py', DIGITS, '--work-dir', str(tmp_path), '--resume', '--cfg-options', 'load_from=start.pth']
    monkeypatch.setattr(sys, 'argv', argv)
    args = train.parse_args()
    cfg = train.load_config(args)
    train.apply_args(cfg, args)
    assert (cfg.resume, cfg.load_from) == (False, 'start.pth')


def test_data_folders_of_nested_data_sets(tmp_path):
    def dataloader(root):
        inner = {'type': 'ConcatDataset', 'datasets': [{'data_root': str(tmp_path)}, {'data_root': root}]}
        return Config({'d': {'dataset': {'type': 'RepeatDataset', 'dataset': inner}}}).d

    check_data(None, dataloader(str(tmp_path)), dataloader('s3://bucket/data'))
    with pytest.raises(UserError, match='data folder not found: nowhere'):
        check_data(dataloader('nowhere'))
