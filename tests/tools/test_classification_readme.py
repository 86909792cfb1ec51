"""Every command of classification/README.md, in its order, on a data set of a few images."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from scripts import ROOT, call

README = (ROOT / 'classification/README.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', README, re.DOTALL) for line in block.splitlines()]

# What makes a command short enough for a test.
TRAIN = ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=8', 'train_dataloader.num_workers=0']
MODEL = ['model.backbone.depth=1', 'val_dataloader.num_workers=0', 'test_dataloader.num_workers=0']


def shortened(command: str) -> str:
    """``command`` with one process for several, without --amp, which needs a GPU, and with small settings."""
    command = re.sub(r'(\.py|\.pth) [248]( |$)', r'\1 1\2', command).replace(' --amp', '')
    if 'dist_' not in command:
        return command
    options = (TRAIN if 'dist_train' in command else []) + (MODEL if 'digits' not in command else [])
    return f'{command} --cfg-options {" ".join(options)}' if options else command


@pytest.fixture(scope='module')
def clone(tiny, tmp_path_factory) -> Path:
    """A folder that looks like the repository, with data, and my_flowers.py as the README has it."""
    folder = tmp_path_factory.mktemp('clone')
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    for side in ('train', 'val'):
        for label in ('n01440764', 'n01443537', 'n01484850', 'n01491361', 'n01494475'):
            for data in ('imagenet', 'flowers'):
                path = folder / 'data' / data / side / label / 'image.JPEG'
                path.parent.mkdir(parents=True)
                Image.new('RGB', (80, 60), (len(label), 90, 30)).save(path)
    # ImageNet proper has 1000 folders; a list of images does without them.
    meta = folder / 'data/imagenet/meta'
    meta.mkdir()
    for side in ('train', 'val'):
        (meta / f'{side}.txt').write_text('n01440764/image.JPEG 0\nn01443537/image.JPEG 1\n')
    (config,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    (folder / 'my_flowers.py').write_text(config)
    return folder


def test_every_kind_of_command_is_there():
    scripts = {command.split()[0 if command.startswith('tools') else 1] for command in COMMANDS}
    expected = {'dist_train.sh', 'dist_test.sh', 'make_digits.py', 'draw_predictions.py'}
    assert scripts == {f'tools/{name}' for name in expected}


def test_commands_run_in_their_order(clone, tiny):
    for command in COMMANDS:
        said = call('bash', '-c', shortened(command), cwd=clone)
        if 'make_digits' in command:  # few of them will do
            assert '1407 training, 390 validation' in said.stdout
            for side in ('train', 'val'):
                shutil.rmtree(clone / 'data/digits' / side)
                shutil.copytree(tiny / 'data/digits' / side, clone / 'data/digits' / side)
        if '--resume' in command:
            assert 'resumed epoch: 1' in said.output
        if 'dist_test' in command:
            assert 'accuracy/top1: ' in said.output
    assert (clone / 'work_dirs/digits/picture.png').stat().st_size > 10000
    assert list((clone / 'work_dirs/vrwkv6_tiny_8xb128_in1k').glob('*/vis_data/events.out.tfevents*'))
    assert (clone / 'work_dirs/my_flowers/best.pth').exists()


def test_links_resolve():
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link]
    assert links and all((ROOT / 'classification' / link).exists() for link in links)
