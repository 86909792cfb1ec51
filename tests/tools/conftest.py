"""A tiny data set of real digits, a config for it, and a run of it."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import skimage.data
from PIL import Image
from scripts import ROOT, call

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


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """The data set as make_digits.py writes it."""
    folder = tmp_path_factory.mktemp('digits') / 'digits'
    call(sys.executable, ROOT / 'tools/make_digits.py', '--out', folder, cwd=folder.parent)
    return folder


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> Path:
    """A folder with three of scikit-image's photographs of two sizes, one in grey and one in a folder of its own."""
    folder = tmp_path_factory.mktemp('photos') / 'photos'
    (folder / 'more').mkdir(parents=True)
    for name, size in (('rocket.png', (96, 64)), ('camera.jpg', (64, 64)), ('more/coffee.JPEG', (96, 64))):
        picture = Image.fromarray(getattr(skimage.data, Path(name).stem)())
        picture.resize(size).save(folder / name)
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
        ROOT / 'tools/dist_train.sh',
        'tiny.py',
        2,
        '--work-dir',
        work_dir,
        '--log',
        'tensorboard',
        cwd=tiny,
        OMP_NUM_THREADS=1,
    )
    return SimpleNamespace(work_dir=work_dir, output=said.output)
