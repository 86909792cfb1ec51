"""What docs/predict.md and docs/see.md show, run on small photographs and models with weights as they are drawn."""

import ast
import json
import re
import shlex
import shutil
import sys

import pytest
import untrained
from mmpretrain.datasets import ImageNet
from PIL import Image
from scripts import ROOT, call

from tools import attention, erf, plot_log, predict

SCRIPTS = {f'tools/{module.__name__.rpartition(".")[2]}.py': module for module in (attention, erf, plot_log, predict)}
PAGES = {name: (ROOT / f'docs/{name}.md').read_text() for name in ('predict', 'see')}
# Images as small as the photographs of the tests.
SMALL = {
    'detection/mask_rcnn/mask_rcnn_vrwkv_adapter_tiny_fpn_1x_coco': """
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 120), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]))
""",
    'segmentation/ade20k/upernet_vrwkv_adapter_tiny_512_160k_ade20k': """
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 64), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='PackSegInputs'),
]))
""",
    'classification/vrwkv/vrwkv_tiny_8xb128_in1k': '',
    'classification/vrwkv6/vrwkv6_tiny_8xb128_in1k': '',
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', PAGES[page], re.DOTALL)


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page, 'bash') for line in block.splitlines()]


@pytest.fixture(scope='module')
def clone(tmp_path_factory, photos):
    """A folder that looks like the repository, with the photographs and the released files that the pages name."""
    folder = tmp_path_factory.mktemp('clone')
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    shutil.copytree(photos, folder / 'photos')
    for name, more in SMALL.items():
        config = folder / f'configs/{name}.py'
        config.write_text(config.read_text() + more)
        version = config.stem.partition('_')[0]
        released = f'{version}_t_in1k_224' if name.startswith('classification') else config.stem
        untrained.write(config, folder / f'{released}.pth')
    return folder


def run(command: list[str], monkeypatch, *more) -> None:
    python, script, *arguments = command
    assert python == 'python'
    untrained.call(SCRIPTS[script], monkeypatch, *arguments, *more)


def test_predict_commands(clone, monkeypatch):
    monkeypatch.chdir(clone)
    expected = {
        'classified': ['camera', 'coffee', 'rocket'],
        'detected': ['rocket'],
        'segmented': ['rocket'],
    }
    for command, (name, pictures) in zip(commands('predict'), expected.items(), strict=True):
        run(command, monkeypatch)
        written = clone / 'work_dirs' / name
        assert sorted(path.stem for path in (written / 'pictures').iterdir()) == pictures
        assert len(json.loads((written / 'results.json').read_text())['results']) == len(pictures)


def test_three_lines_of_python_each(clone):
    code = blocks('predict', 'python')
    assert [len(ast.parse(lines).body) for lines in code] == [3, 3, 3]
    keep = 'import json\nopen("shown.json", "w").write(json.dumps(shown))'
    script = '\n'.join(['shown = []', 'print = shown.append', *code, keep])
    call(sys.executable, '-c', script, cwd=clone, PYTHONPATH=ROOT, OMP_NUM_THREADS=1)
    name, boxes, shape = json.loads((clone / 'shown.json').read_text())
    assert name in ImageNet.METAINFO['classes'] and isinstance(boxes, list) and shape == [64, 96]


def test_see_commands(clone, trained, monkeypatch):
    monkeypatch.chdir(clone)
    for name in ('digits', 'other'):
        (clone / 'work_dirs').mkdir(exist_ok=True)
        shutil.copytree(trained.work_dir, clone / 'work_dirs' / name)
    for command in commands('see'):
        run(command, monkeypatch, *(('--size', 64) if 'erf' in command[1] else ()))
        picture = command[command.index('--out') + 1]
        assert Image.open(clone / picture).size[0] > 400


@pytest.mark.parametrize('page', PAGES)
def test_pages_and_links(page):
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', PAGES[page]) if '://' not in link]
    assert all((ROOT / 'docs' / link).exists() for link in links)
    assert f'(docs/{page}.md)' in (ROOT / 'README.md').read_text()
    assert {command[1] for command in commands(page)} <= set(SCRIPTS)
