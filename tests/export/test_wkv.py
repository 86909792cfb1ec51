"""Bi-WKV and WKV6 as ONNX operators: right and safe for any number of tokens, in memory linear in it."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from vision_rwkv import ops
from vision_rwkv.export import wkv

MOST = 20000
# Around the sizes of chunks and groups, and of several levels of them.
TOKENS = [1, 2, 7, 8, 9, 15, 16, 17, 127, 128, 129, 196, 2049]


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def session(function, inputs, dims, path):
    """ONNX Runtime on what ``function`` of the library becomes; ``dims`` are those of each input."""
    program = torch.export.export(Call(function), inputs, dynamic_shapes=(dims,))
    table = {
        torch.ops.vision_rwkv.bi_wkv.default: lambda w, u, k, v: wkv.bi_wkv(w, u, k, v, MOST),
        torch.ops.vision_rwkv.wkv6.default: lambda r, k, v, w, u: wkv.wkv6(r, k, v, w, u, MOST),
    }
    torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=table).save(path)
    made = onnxruntime.InferenceSession(path)
    return lambda *xs: made.run(None, {i.name: x.numpy() for i, x in zip(made.get_inputs(), xs, strict=True)})[0]


def bi_wkv_inputs(batch, tokens, channels=12):
    k, v = torch.randn(2, batch, tokens, channels)
    return 3 * torch.randn(channels) / tokens, torch.randn(channels), 3 * k, v


def wkv6_inputs(batch, tokens, heads=2, size=8):
    r, k, v, w = torch.randn(4, batch, tokens, heads, size)
    return r, k, v, -w.exp(), torch.randn(heads, size)


def worst(got, expected):
    assert got.shape == tuple(expected.shape)
    return np.abs(got - expected.numpy()).max() / max(1, expected.abs().max())


@pytest.fixture(scope='module')
def bi_wkv(tmp_path_factory):
    dims = {0: Dim('batch'), 1: Dim('tokens')}
    return session(ops.bi_wkv, bi_wkv_inputs(2, 50), (None, None, dims, dims), tmp_path_factory.mktemp('bi') / 'a.onnx')


@pytest.fixture(scope='module')
def wkv6(tmp_path_factory):
    dims = {0: Dim('batch'), 1: Dim('tokens')}
    return session(ops.wkv6, wkv6_inputs(2, 50), (*[dims] * 4, None), tmp_path_factory.mktemp('6') / 'a.onnx')


@pytest.mark.parametrize('tokens', TOKENS)
def test_any_number_of_tokens(bi_wkv, wkv6, tokens):
    torch.manual_seed(tokens)
    for batch in (1, 3):
        inputs = bi_wkv_inputs(batch, tokens)
        assert worst(bi_wkv(*inputs), ops.bi_wkv(*inputs)) < 1e-5
        inputs = wkv6_inputs(batch, tokens)
        assert worst(wkv6(*inputs), ops.wkv6(*inputs)) < 1e-5


def test_a_number_of_tokens_known_beforehand(tmp_path):
    torch.manual_seed(0)
    dims = {0: Dim('batch')}
    inputs = bi_wkv_inputs(2, 133)
    call = session(ops.bi_wkv, inputs, (None, None, dims, dims), tmp_path / 'a.onnx')
    assert worst(call(*inputs), ops.bi_wkv(*inputs)) < 1e-5
    inputs = wkv6_inputs(2, 300)
    call = session(ops.wkv6, inputs, (*[dims] * 4, None), tmp_path / 'b.onnx')
    assert worst(call(*inputs), ops.wkv6(*inputs)) < 1e-5


@pytest.mark.parametrize(
    ('scale', 'decay', 'bonus'),
    [(1e4, 50, 0), (1e4, -50, 100), (1e30, 1e3, 1e3), (100, 1e6, -1e6), (100, -1e6, 0), (1, 1e38, 0), (1, -1e38, 0)],
)
def test_extreme_keys_and_decays(bi_wkv, scale, decay, bonus):
    torch.manual_seed(0)
    _, _, k, v = bi_wkv_inputs(2, 300)
    w, u = torch.full((12,), float(decay)), torch.full((12,), float(bonus))
    assert worst(bi_wkv(w, u, scale * k, v), ops.bi_wkv(w, u, scale * k, v)) < 1e-5


@pytest.mark.parametrize('decay', [0.0, -1e-3, -50.0, -1e30, -float('inf')])
def test_extreme_decays_of_wkv6(wkv6, decay):
    torch.manual_seed(0)
    r, k, v, _, u = wkv6_inputs(2, 300)
    w = torch.full_like(r, decay)
    w[:, ::3] = -0.5  # beside it, decays that must keep their digits
    assert worst(wkv6(r, k, v, w, u), ops.wkv6(r, k, v, w, u)) < 1e-5


def test_memory_is_linear_in_the_number_of_tokens(bi_wkv, wkv6):
    inputs = bi_wkv_inputs(1, MOST)  # all pairs of tokens: 19 GB
    assert worst(bi_wkv(*inputs), ops.bi_wkv(*inputs)) < 1e-5
    inputs = wkv6_inputs(1, MOST)
    assert worst(wkv6(*inputs), ops.wkv6(*inputs)) < 1e-5


def test_more_tokens_than_it_was_made_for_are_never_a_wrong_answer(bi_wkv, wkv6):
    assert np.isnan(bi_wkv(*bi_wkv_inputs(1, MOST + 1))).all()
    assert np.isnan(wkv6(*wkv6_inputs(1, MOST + 1))).all()
