"""A tiny data set of real digits, a config for it, and scripts run as a user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Mixup, drop path, augmentation in workers and EMA: all that a resumed run has to take up where it was.
TINY_CONFIG = f"""
_base_ = ['{ROOT}/configs/classification/vrwkv/vrwkv_digits.py']
model = dict(
    backbone=dict(depth=2, drop_path_rate=0.3),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)], probs=[0.5]),
)
train_dataloader = dict(batch_size=12, num_workers=2)
train_cfg = dict(max_epochs=6)
custom_hooks = [dict(type='EMAHook', momentum=0.1, priority='ABOVE_NORMAL')]
default_hooks = dict(logger=dict(interval=1))
"""


def environment() -> dict[str, str]:
    """This process's environment with this Python first, and nothing of a launcher's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith('SLURM_')}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'NNODES', 'PYTHONPATH'):
        kept.pop(name, None)
    kept['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{kept["PATH"]}'
    return kept


def call(*command, cwd, expect=0, **extra_environment) -> SimpleNamespace:
    """Run a command to its end; fail, with all it said, unless its exit status is ``expect``."""
    env = environment() | {name: str(value) for name, value in extra_environment.items()}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == expect, f'{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}'
    return SimpleNamespace(stdout=done.stdout, stderr=done.stderr, output=done.stdout + done.stderr)


def errors_in(stderr: str) -> list[str]:
    """The lines of ``stderr``, but for what libraries always say there."""
    noise = ('Could not import OneDL', 'Warning', 'warnings.warn', 'redispatch')
    return [line for line in stderr.splitlines() if line.strip() and not any(word in line for word in noise)]


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """The data set as make_digits.py writes it."""
    folder = tmp_path_factory.mktemp('digits') / 'digits'
    call(sys.executable, ROOT / 'tools/make_digits.py', '--out', folder, cwd=folder.parent)
    return folder


@pytest.fixture(scope='session')
def tiny(digits, tmp_path_factory) -> Path:
    """A folder to run in: tiny.py, and data/digits with 8 training and 4 validation images of each class."""
    folder = tmp_path_factory.mktemp('tiny')
    for side, count in (('train', 8), ('val', 4)):
        for label in sorted((digits / side).iterdir()):
            target = folder / 'data/digits' / side / label.name
            target.mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                shutil.copy(image, target)
    (folder / 'tiny.py').write_text(TINY_CONFIG)
    return folder


@pytest.fixture(scope='session')
def trained(tiny) -> SimpleNamespace:
    """A run of two processes to its end, with TensorBoard: its work_dir and what it said."""
    work_dir = tiny / 'whole'
    said = call(
        ROOT / 'tools/dist_train.sh', 'tiny.py', 2, '--work-dir', work_dir, '--tensorboard', cwd=tiny, OMP_NUM_THREADS=1
    )
    return SimpleNamespace(work_dir=work_dir, output=said.output)
