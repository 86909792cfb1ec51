"""Every operator equals its definition in float64, forward and every gradient, whichever implementation runs."""

import pytest
import torch
from op_cases import (
    DEVICES,
    TOKENS,
    assert_equals_definition,
    bi_wkv_inputs,
    error,
    gradients,
    implementations,
    rounded,
    wkv6_inputs,
)

from vision_rwkv.ops import bi_wkv, wkv6

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ['operator', 'pytorch']


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('tokens', TOKENS)
def test_bi_wkv(tokens, dtype, kind, device):
    op = implementations('bi_wkv', device)[kind]
    assert_equals_definition('bi_wkv', op, bi_wkv_inputs(2, tokens, 35), dtype, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('tokens', TOKENS[:-1])
def test_wkv6(tokens, dtype, kind, device):
    op = implementations('wkv6', device)[kind]
    assert_equals_definition('wkv6', op, wkv6_inputs(1, tokens, 3, 64 if tokens < 100 else 16), dtype, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('shape', [(1, 1025, 3), (130, 5, 7), (1, 70, 1), (3, 65, 64), (2, 64, 129)])
def test_bi_wkv_shapes(shape, device):
    assert_equals_definition('bi_wkv', bi_wkv, bi_wkv_inputs(*shape), torch.float32, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('shape', [(1, 197, 1, 64), (130, 3, 2, 4), (2, 33, 5, 7), (1, 40, 1, 1), (1, 20, 2, 96)])
def test_wkv6_shapes(shape, device):
    assert_equals_definition('wkv6', wkv6, wkv6_inputs(*shape), torch.float32, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('w', [-20, 20, -300, 300])
@pytest.mark.parametrize('k', [0.1, 40])
def test_bi_wkv_extreme_decay_and_keys(w, k, kind, device):
    """All decays of one sign and steep, keys up to about +-120."""
    inputs = bi_wkv_inputs(2, 131, 19, k=k)
    inputs['w'] = inputs['w'].abs() * w / 20
    assert_equals_definition('bi_wkv', implementations('bi_wkv', device)[kind], inputs, torch.float32, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('u', [-200.0, -30.0, 30.0, 200.0])
def test_bi_wkv_extreme_bonus(u, device):
    inputs = bi_wkv_inputs(2, 67, 9, k=30)
    inputs['u'] += u
    assert_equals_definition('bi_wkv', bi_wkv, inputs, torch.float32, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('w', [-5.0, 5.0])
def test_bi_wkv_steep_over_many_tokens(w, device):
    """exp(|w| T) is far outside of every dtype."""
    inputs = bi_wkv_inputs(1, 1024, 8)
    inputs['w'] = torch.full_like(inputs['w'], w)
    given = rounded('bi_wkv', inputs, torch.float32, device)
    y, grads = gradients(bi_wkv, given)
    exact = {x: t.double() for x, t in given.items()}
    want, want_grads = gradients(implementations('bi_wkv', device)['pytorch'], exact)
    assert error(y, want) < 1e-5
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert error(grad, want_grad) < 5e-5


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('slow', 'fast'), [(-12, -9), (2, 3), (-9, 3)])
def test_wkv6_decays_from_nearly_one_to_nearly_nothing(slow, fast, kind, device):
    inputs = wkv6_inputs(1, 150, 2, 16, slow=slow, fast=fast)
    assert_equals_definition('wkv6', implementations('wkv6', device)[kind], inputs, torch.float32, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['bi_wkv', 'wkv6'])
def test_long_sequences(name, device):
    """T = 4200 against the PyTorch implementation in float64, itself equal to the definition above."""
    inputs = bi_wkv_inputs(1, 4200, 6) if name == 'bi_wkv' else wkv6_inputs(1, 4200, 1, 8)
    operator, in_pytorch = implementations(name, device).values()
    y, grads = gradients(operator, rounded(name, inputs, torch.float32, device))
    exact = {x: t.float().double().to(device) for x, t in inputs.items()}
    want, want_grads = gradients(in_pytorch, exact)
    assert error(y, want) < 1e-5
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert error(grad, want_grad) < 5e-5


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('w_dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_other_inputs_may_differ_in_dtype(w_dtype, device):
    given = rounded('wkv6', wkv6_inputs(1, 37, 2, 64), torch.bfloat16, device)
    given |= {x: given[x].to(w_dtype) for x in 'wu'}
    y, grads = gradients(wkv6, given)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [t.dtype for t in given.values()]
    exact, _ = gradients(implementations('wkv6', device)['pytorch'], {x: t.double() for x, t in given.items()})
    assert error(y, exact) < 1e-2


@pytest.mark.parametrize('device', DEVICES)
def test_any_strides(device):
    """Transposed, sliced, expanded inputs and a transposed gradient give what contiguous ones give."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(5, 2, 40, generator=g).to(device).permute(1, 2, 0)  # (2, 40, 5)
    v = torch.randn(2, 80, 10, generator=g).to(device)[:, ::2, 1::2]
    w, u = (torch.randn(1, generator=g).to(device) / 40).expand(5), torch.randn(10, generator=g).to(device)[::2]
    gy = torch.randn(2, 5, 40, generator=g, dtype=torch.float64).transpose(1, 2)
    odd = {'w': w, 'u': u, 'k': k, 'v': v}
    assert not any(x.is_contiguous() for x in odd.values())
    plain = {x: t.clone(memory_format=torch.contiguous_format) for x, t in odd.items()}
    y, grads = gradients(bi_wkv, odd, gy)
    want, want_grads = gradients(bi_wkv, plain, gy.contiguous())
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))

    x = torch.randn(4, 1, 64, 30, 3, generator=g).to(device).permute(0, 1, 3, 4, 2)  # r, k, v, w of (1, 30, 3, 64)
    odd = dict(zip('rkvwu', [*x[:3], -x[3].abs(), torch.randn(64, 3, generator=g).to(device).t()], strict=True))
    assert not any(odd[name].is_contiguous() for name in 'rkvu')
    y, grads = gradients(wkv6, odd)
    want, want_grads = gradients(wkv6, {x: t.contiguous() for x, t in odd.items()})
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(shape, kind, device):
    given = rounded('bi_wkv', bi_wkv_inputs(*shape), torch.float32, device)
    y, grads = gradients(implementations('bi_wkv', device)[kind], given)
    assert y.shape == shape and not grads[0].any() and not grads[1].any()
    given = rounded('wkv6', wkv6_inputs(*shape, 4), torch.float32, device)
    y, grads = gradients(implementations('wkv6', device)[kind], given)
    assert y.shape == (*shape, 4) and not grads[4].any()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['bi_wkv', 'wkv6'])
def test_every_element_is_written(name, device, monkeypatch):
    """New memory is NaN: whatever a kernel leaves unwritten, or reads before writing, shows."""
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
    inputs = bi_wkv_inputs(3, 67, 37) if name == 'bi_wkv' else wkv6_inputs(2, 67, 3, 24)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        assert_equals_definition(name, implementations(name, device)['operator'], inputs, torch.float32, device)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['bi_wkv', 'wkv6'])
def test_same_bits_twice(name, device):
    inputs = bi_wkv_inputs(2, 300, 70) if name == 'bi_wkv' else wkv6_inputs(2, 300, 2, 64)
    given = rounded(name, inputs, torch.float32, device)
    op = implementations(name, device)['operator']
    first, first_grads = gradients(op, given)
    for _ in range(3):
        y, grads = gradients(op, given)
        assert torch.equal(y, first)
        assert all(torch.equal(a, b) for a, b in zip(grads, first_grads, strict=True))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('tensor', ['k', 'v'])
def test_bad_numbers_stay_in_their_channel(tensor, value, device):
    given = rounded('bi_wkv', bi_wkv_inputs(3, 90, 40), torch.float32, device)
    clean, clean_grads = gradients(bi_wkv, given)
    given[tensor][1, 50, 7] = value
    y, grads = gradients(bi_wkv, given)
    touched = torch.zeros(3, 90, 40, dtype=torch.bool, device=device)
    touched[1, :, 7] = True
    if tensor == 'v' or value != value:  # an infinite key is an infinite weight, or none: that may stay finite
        assert not y[touched].isfinite().all()
    for got, want in zip([y, *grads[2:]], [clean, *clean_grads[2:]], strict=True):
        assert torch.equal(got[~touched], want[~touched])


@pytest.mark.parametrize('device', DEVICES)
def test_bad_numbers_stay_in_their_sample_and_head(device):
    given = rounded('wkv6', wkv6_inputs(3, 50, 2, 64), torch.float32, device)
    clean, clean_grads = gradients(wkv6, given)
    given['k'][1, 20, 1, 5] = float('nan')
    y, grads = gradients(wkv6, given)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, :, 1] = True
    assert y[touched].isnan().any()
    for got, want in zip([y, *grads[:4]], [clean, *clean_grads[:4]], strict=True):
        assert torch.equal(got[~touched], want[~touched])
