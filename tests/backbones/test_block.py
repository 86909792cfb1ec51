"""A block by one call (kernels/block) and by its modules: the same values and gradients, and when which one runs."""

import copy

import pytest
import torch
from models import images, make

from vision_rwkv.backbones import VRWKV, VRWKV6, blocks
from vision_rwkv.backbones.blocks import Carry
from vision_rwkv.backbones.shift import SEQUENCE
from vision_rwkv.ops._native import has_block

OPTIONS = {
    'plain': (VRWKV, {}),
    'post_norm': (VRWKV, {'post_norm': True, 'init_values': 0.5}),
    'shift': (VRWKV, {'drop_path_rate': 0.5, 'channel_gamma': 0.2, 'shift_pixel': 2}),
    'six': (VRWKV6, {'drop_path_rate': 0.5}),
    'six_post_norm': (VRWKV6, {'post_norm': True, 'init_values': 0.5, 'with_cls_token': True}),
}


def results(model, dtype, whole, monkeypatch):
    """Output, gradients, and the output of inference."""
    monkeypatch.setattr(blocks, 'has_block', lambda: whole)
    torch.manual_seed(3)  # of drop path
    x = images(batch=4).requires_grad_()
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        output = model.train()(x)[0]
        output.float().square().sum().backward()
        with torch.no_grad():
            quiet = model.eval()(x)[0]
    return [output.detach(), quiet, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.skipif(not has_block(), reason='no native code')
@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_equals_its_modules(name, dtype, monkeypatch):
    version, options = OPTIONS[name]
    model = make(version, **options)
    twin = copy.deepcopy(model)
    got, want = results(model, dtype, True, monkeypatch), results(twin, dtype, False, monkeypatch)
    assert all(map(torch.equal, got, want))


def hook(model):
    model.layers[0].ffn.register_forward_hook(lambda *_: None)


def replaced(model):
    model.layers[0].att.key = torch.nn.Sequential(model.layers[0].att.key)


@pytest.mark.parametrize('change', [None, hook, replaced])
@pytest.mark.parametrize('version', [VRWKV, VRWKV6])
def test_only_blocks_out_of_the_ordinary_call_their_modules(version, change):
    model = make(version)
    if change:
        change(model)
    hw = (2, 3)
    whole = [layer._whole_parts(hw) is not None for layer in model.layers]
    assert whole == [has_block() and not change, *[has_block()] * (len(whole) - 1)]
    assert model.layers[1]._whole_parts(SEQUENCE) is None
    assert make(version, key_norm=True).layers[0]._whole_parts(hw) is None
    assert make(version, shift_pixel=0).layers[0]._whole_parts(hw) is None


def test_statistics_are_handed_on_for_the_same_eps_only():
    model = make(VRWKV)
    x, hw = torch.randn(2, 6, model.embed_dims), (2, 3)
    carry = Carry()
    x = model.layers[1](x, hw, carry)
    want = torch.stack([x.mean(-1), (x.var(-1, correction=0) + model.layers[1].ln1.eps).rsqrt()], -1)
    torch.testing.assert_close(carry.stats.values, want)
    model.layers[2].ln1.eps = 1.0
    assert torch.equal(model.layers[2](x, hw, carry), model.layers[2](x, hw))
