"""Each format against PyTorch: batches and sizes, all options of a block, the adapter, what cannot be."""

import sys

import pytest
import torch
from small import make, worst
from torch import nn

from vision_rwkv.backbones.deformable import _attend_by_grid_sample, attend, make_attention, sampling
from vision_rwkv.export import ExportError, formats, lowering, size_step, smallest_side, to_program

CLOSE = 1e-4
RELEASED = {'post_norm': True, 'key_norm': True, 'init_values': 0.5}  # options of the larger models
SIZES = [(64, 64), (32, 45), (50, 129)]


@pytest.mark.parametrize('kind', ['vrwkv', 'vrwkv6'])
def test_onnx_of_any_size(kind, exported):
    model = make(kind, **(RELEASED if kind == 'vrwkv' else {}))
    assert worst(model, exported(model, 'onnx', (256, 192), any_size=True), SIZES) < CLOSE


def test_onnx_of_one_size(exported):
    model = make('vrwkv6', **RELEASED)
    assert worst(model, exported(model, 'onnx', (60, 52)), [(60, 52)]) < CLOSE


@pytest.mark.parametrize('kind', ['vrwkv', 'vrwkv6'])
def test_torch_export_of_any_size(kind, exported):
    model = make(kind, **RELEASED)
    function = exported(model, 'torch-export', (256, 192), any_size=True)
    assert worst(model, function, SIZES) < CLOSE
    with pytest.raises((AssertionError, RuntimeError), match='256'):
        function(torch.zeros(1, 3, 264, 64))


@pytest.mark.slow
def test_aot_inductor_of_any_size(exported):
    model = make('vrwkv', **RELEASED)
    assert worst(model, exported(model, 'aot-inductor', (256, 192), any_size=True), SIZES) < CLOSE


@pytest.mark.parametrize('any_size', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export_of_the_adapter(exported, any_size):
    model = make('adapter')
    size = (128, 160) if any_size else (64, 96)
    function = exported(model, 'torch-export', size, any_size)
    assert worst(model, function, [(64, 96), (128, 64)] if any_size else [size]) < CLOSE


def test_sizes_of_a_model():
    for kind, step, least in (('vrwkv', 1, 32), ('adapter', 32, 64)):
        assert (size_step(make(kind)), smallest_side(make(kind))) == (step, least)


@pytest.mark.parametrize('ratio', [1.0, 0.5])
def test_attention_by_grid_sample_is_that_of_mmcv(ratio):
    torch.manual_seed(0)
    sizes = [(6, 8), (3, 4), (2, 2)]
    attention = make_attention(16, 3, 4, 2, ratio).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    queries, values = torch.randn(2, 12, 16), torch.randn(2, 64, 16)
    where = sampling([(3, 4)], sizes, torch.device('cpu'))
    with torch.no_grad():
        expected = attend(attention, queries, values, queries, where)
        got = queries + _attend_by_grid_sample(attention, queries, values, where)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('size', [(6, 6), (7, 5), (2, 13)])
@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_adaptive_pooling(size, parts):
    x = torch.randn(2, 3, *size)
    expected = nn.functional.adaptive_avg_pool2d(x, parts)
    assert (lowering._adaptive_avg_pool2d(x, (parts, parts)) - expected).abs().max() < 1e-6


def test_missing_packages_are_named(monkeypatch, tmp_path):
    program = to_program(make('vrwkv'), 64, 64)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ExportError, match=r"pip install 'vision-rwkv\[export\]', onnx is not here"):
        formats.write_onnx(program, tmp_path / 'a.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ExportError, match='ONNX Runtime is missing'):
        formats.load_onnx(tmp_path / 'a.onnx')


def test_onnx_of_a_model_that_is_too_large(monkeypatch, tmp_path):
    monkeypatch.setattr(formats, 'ONNX_LIMIT', 1000)
    with pytest.raises(ExportError, match=r'holds 1000 bytes at most, and the weights have \d{5}'):
        formats.write_onnx(to_program(make('vrwkv'), 64, 64), tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.parametrize('name', ['torch-export', 'aot-inductor'])
def test_on_a_gpu(name, exported):
    model = make('vrwkv', **RELEASED).cuda()
    function = exported(model, name, (256, 192), any_size=True)
    images = torch.randn(3, 3, 50, 129, device='cuda')
    with torch.no_grad():
        assert (function(images) - model(images)).abs().max() < 1e-3 * model(images).abs().max()
