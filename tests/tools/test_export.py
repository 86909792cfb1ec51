"""tools/export.py as it is called; what it refuses, and that a file is there whole or not at all."""

import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from scripts import ROOT, call

from tools import export
from tools.cli import UserError

sys.path.insert(0, str(ROOT / 'tests/golden'))
import golden  # noqa: E402

CONFIGS = ROOT / 'configs'
DIGITS = CONFIGS / 'classification/vrwkv/vrwkv_digits.py'
SCENES = CONFIGS / 'segmentation/digits/upernet_vrwkv_adapter_digits.py'
T = CONFIGS / 'classification/vrwkv/vrwkv_tiny_8xb128_in1k.py'
T6 = CONFIGS / 'classification/vrwkv6/vrwkv6_tiny_8xb128_in1k.py'
SMALL = ('--cfg-options', 'model.backbone.depth=1')


def checkpoint(config, folder, **options):
    """A checkpoint of a config with the golden recipe's weights."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({f'model.backbone.{key}': value for key, value in options.items()})
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    golden.fill(model.backbone)
    path = folder / f'{config.stem}.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    return path


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return checkpoint(DIGITS, tmp_path_factory.mktemp('small'), depth=1)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
    export.main()


def test_a_file_beside_its_checkpoint(small, tmp_path):
    beside = tmp_path / 'small.pth'
    beside.write_bytes(small.read_bytes())
    script = (sys.executable, ROOT / 'tools/export.py', DIGITS, beside, '--format', 'onnx', '--runs', 1)
    said = call(*script, *SMALL, cwd=tmp_path)
    assert f'{tmp_path}/small.onnx: onnx, 32 x 32, ' in said.stdout
    assert '1 x 32 x 32 on cpu, ' in said.stdout and ' ms, PyTorch ' in said.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ['small.onnx', 'small.pth']


@pytest.mark.parametrize('to_rgb', [True, False])
def test_pixels_to_scores_are_those_of_the_toolbox(small, to_rgb):
    cfg = Config.fromfile(DIGITS)
    cfg.merge_from_dict({'model.backbone.depth': 1, 'data_preprocessor.to_rgb': to_rgb})
    model = export.build(cfg, str(small)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32)).float()
    with torch.no_grad():
        data = model.model.data_preprocessor({'inputs': [x.flip(0) for x in images]})  # OpenMMLab reads blue first
        expected = model.model(data['inputs'], mode='tensor')
        assert (model(images) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--format', 'torch-export', '--out', 'a.onnx'), r'ends in \.pt2, got a\.onnx'),
        (('--format', 'onnx', '--device', 'cuda'), 'ONNX is made on the CPU'),
        (('--format', 'onnx', '--runs', '0'), '--runs must be at least 1, got 0'),
        (('--format', 'onnx', '--dynamic-size', '30'), 'image size must be from 32 to 30 a side, got 32 32'),
        (('--format', 'onnx', '--shape', '0', '32'), 'image size must be from 1 to 32 a side, got 0 32'),
        (('--format', 'engine'), "invalid choice: 'engine'"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, small, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, DIGITS, small, *arguments, *SMALL)
    assert not list(tmp_path.iterdir())


def test_detection_is_refused(monkeypatch, small):
    config = CONFIGS / 'detection/mask_rcnn/mask_rcnn_vrwkv_adapter_digits.py'
    with pytest.raises(UserError, match='only classifiers .* can be exported, got MaskRCNN'):
        run(monkeypatch, config, small, '--format', 'onnx')


def test_a_file_that_differs_is_not_left_behind(monkeypatch, small, tmp_path):
    suffix, write, load = export.FORMATS['torch-export']
    off = {'torch-export': (suffix, write, lambda path: lambda images: load(path)(images) + 1e-3)}
    monkeypatch.setattr(export, 'FORMATS', off)
    out = tmp_path / 'a.pt2'
    out.write_text('what was there before')
    with pytest.raises(UserError, match=r'not written: at 1 x 32 x 32 it differs from PyTorch by 0\.001'):
        run(monkeypatch, DIGITS, small, '--format', 'torch-export', '--out', out, *SMALL)
    assert out.read_text() == 'what was there before'
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'arguments'),
    [
        (T, ('--format', 'onnx', '--dynamic-size', 512)),
        (T6, ('--format', 'onnx', '--dynamic-size', 512)),
        (SCENES, ('--format', 'onnx')),
        (T, ('--format', 'aot-inductor')),
        (T6, ('--format', 'aot-inductor')),
    ],
    ids=lambda value: value.stem if hasattr(value, 'stem') else '-'.join(map(str, value[1:])),
)
def test_models(monkeypatch, capsys, tmp_path, config, arguments):
    run(monkeypatch, config, checkpoint(config, tmp_path), *arguments, '--runs', 3)  # fails unless it matches
    print(capsys.readouterr().out)
