"""Every released layout comes out under our names, and nothing else does."""

import itertools
from collections import OrderedDict

import pytest
import torch
from released import HEADS, linear, ours, shapes_of, shell, tensors_of

from vision_rwkv.checkpoints import CheckpointError, fit, read, to_our_names
from vision_rwkv.checkpoints.layouts import rows_of_1k

CLASSIFIERS = ('vrwkv_t', 'vrwkv6_t', 'vrwkv_l_384', 'vrwkv_l_192')
EXTRAS = {'epoch': 20, 'optimizer': {'state': {}}, 'scaler': {'scale': 65536.0}}
LAYOUTS = {
    'openmmlab': lambda t: {'meta': {'epoch': 300, 'mmcls_version': '0.25.0', 'CLASSES': ('a', 'b')}, 'state_dict': t},
    'model': lambda t: {'model': t, 'model_ema': t, **EXTRAS},
    'module': lambda t: {'module': OrderedDict(t), **EXTRAS},
    'bare': lambda t: OrderedDict(t),
    'distributed': lambda t: {'state_dict': {f'module.{name}': tensor for name, tensor in t.items()}},
}

CASES = [*itertools.product(HEADS, LAYOUTS, [False]), ('vrwkv_t', 'openmmlab', True), ('vrwkv_l_384', 'model', True)]


@pytest.mark.parametrize(('model', 'layout', 'legacy'), CASES)
def test_released_files_fit(model, layout, legacy, tmp_path):
    tensors = tensors_of(model)
    marks = {name: torch.tensor(float(i)).expand(tensor.shape) for i, (name, tensor) in enumerate(tensors.items())}
    torch.save(LAYOUTS[layout](marks), tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
    expected = ours(model)
    fitted = fit(read(tmp_path / 'a.pth'), expected)
    assert fitted.new == fitted.left_over == []
    assert {name: tensor.shape for name, tensor in fitted.tensors.items()} == {
        name: tensor.shape for name, tensor in expected.state_dict().items()
    }
    marked = {name: tensor.flatten()[0].item() for name, tensor in fitted.tensors.items()}
    for i, name in enumerate(tensors):  # the head of VRWKV-L alone has other names
        ours_now = name.replace('head.0.', 'head.layers.pre_logits.').replace('head.2.', 'head.layers.head.')
        assert marked[ours_now if model.startswith('vrwkv_l') else name] == i


@pytest.mark.parametrize('model', CLASSIFIERS)
def test_backbones_alone(model, tmp_path):
    """A file with or without `backbone.`, with or without a head, for a backbone by itself."""
    tensors = tensors_of(model)
    backbone = {n.removeprefix('backbone.'): tensor for n, tensor in tensors.items() if n.startswith('backbone.')}
    alone = shell({name: tensor.shape for name, tensor in backbone.items()})
    headed = {name.removeprefix('backbone.'): tensor for name, tensor in tensors.items()}
    for contents in (backbone, tensors, {'model': headed}):
        fitted = fit(contents, alone)
        assert fitted.tensors.keys() == backbone.keys() and not fitted.new
        assert all(name.startswith('head.') for name in fitted.left_over)


def test_rows_of_the_22k_head():
    """Known rows; 999 synsets are found by name, and no class is without a row."""
    from timm.data import ImageNetInfo

    rows = rows_of_1k()
    names_22k, names_1k = (ImageNetInfo(f'imagenet-{kind}').label_names() for kind in ('22k', '1k'))
    assert rows.shape == (1000,) and rows.min() >= 0
    different = [(names_1k[i], row) for i, row in enumerate(rows.tolist()) if names_22k[row] != names_1k[i]]
    assert different == [('n04399382', 11136)]
    assert rows[0] == names_22k.index('n01440764')  # tench


def test_22k_head_for_1k_classes():
    tensors = tensors_of('vrwkv_l_192')
    tensors['head.2.weight'] = torch.arange(21841.0)[:, None].expand(21841, 3072)
    tensors['head.2.bias'] = -torch.arange(21841.0)
    fitted = fit({'model': tensors}, ours('vrwkv_l_384'))
    rows = rows_of_1k().float()
    assert torch.equal(fitted.tensors['head.layers.head.weight'][:, 7], rows)
    assert torch.equal(fitted.tensors['head.layers.head.bias'], -rows)
    with pytest.raises(
        CheckpointError, match=r'head\.layers\.head\.bias has the shape \(21841,\) in the file, \(10,\)'
    ):
        fit({'model': tensors}, shell(shapes_of('vrwkv_t') | linear('head.layers.head', 10, 3072)))


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        ({}, 'got nothing'),
        ({'weights': {'a': torch.zeros(1)}}, r'got weights \(dict\)'),
        ({'state_dict': {'a': torch.zeros(1), 'b': 3, 'c': None}}, r'got b \(int\), c \(NoneType\)'),
        ({'state_dict': {'a': torch.zeros(1)}, 'model': {'a': torch.zeros(1)}}, 'under state_dict and model'),
        (
            {
                'patch_embed.projection.weight': torch.zeros(1),
                'ln1.bias': torch.zeros(1),
                'backbone.ln1.bias': torch.zeros(1),
            },
            'the same name',
        ),
    ],
)
def test_unknown_layouts(contents, message):
    with pytest.raises(CheckpointError, match=message):
        to_our_names(contents)
