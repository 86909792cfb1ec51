"""What the operators must do for any input, with inputs that hypothesis makes up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import bi_wkv_inputs, error, implementations, wkv6_inputs

from vision_rwkv.ops import bi_wkv, reference, wkv6

FEW = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)
BI_WKV = st.builds(
    bi_wkv_inputs,
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(1, 40),
    seed=SEEDS,
    w=st.sampled_from([0.0, 1.0, 20.0, 500.0, 1e4]),
    k=st.sampled_from([0.0, 1.0, 30.0, 1e3]),
)
WKV6 = st.builds(
    wkv6_inputs,
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([1, 3, 16, 64]),
    seed=SEEDS,
    slow=st.sampled_from([-12.0, -3.0]),
    fast=st.sampled_from([-2.0, 3.0]),
)


def in_float32(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {x: t.float() for x, t in inputs.items()}


def flipped(inputs: dict[str, torch.Tensor], names: str) -> dict[str, torch.Tensor]:
    return {x: t.flip(1) if x in names else t for x, t in inputs.items()}


@FEW
@given(BI_WKV)
def test_bi_wkv_lies_between_the_values(inputs):
    inputs = in_float32(inputs)
    y, v = bi_wkv(*inputs.values()), inputs['v']
    slack = 1e-6 * v.abs().amax(1, keepdim=True)
    assert (y <= v.amax(1, keepdim=True) + slack).all() and (y >= v.amin(1, keepdim=True) - slack).all()


@FEW
@given(BI_WKV)
def test_bi_wkv_equals_the_definition_and_its_pytorch_implementation(inputs):
    exact = {x: t.float().double() for x, t in inputs.items()}
    want = reference.bi_wkv(*exact.values())
    for op in implementations('bi_wkv', 'cpu').values():
        assert error(op(*exact.values()), want) < 1e-10
        # float32 holds exponents such as w T or k to 6e-8 of their size, and weights of v to as much: relative to v,
        # since v may cancel in its mean y.
        largest = 1 + inputs['k'].abs().max() + (inputs['w'].abs() * inputs['k'].shape[1]).max()
        off = (op(*in_float32(inputs).values()).double() - want).abs().max()
        assert off < 3e-7 * largest * inputs['v'].abs().max()


@FEW
@given(BI_WKV)
def test_bi_wkv_knows_no_direction(inputs):
    y = bi_wkv(*inputs.values())
    assert error(bi_wkv(*flipped(inputs, 'kv').values()).flip(1), y) < 1e-10


@FEW
@given(BI_WKV, st.floats(-3, 3))
def test_bi_wkv_is_linear_in_v_and_ignores_a_shift_of_k(inputs, factor):
    y = bi_wkv(*inputs.values())
    assert error(bi_wkv(*(inputs | {'v': factor * inputs['v'] + 1}).values()), factor * y + 1) < 1e-9
    assert error(bi_wkv(*(inputs | {'k': inputs['k'] + factor}).values()), y) < 1e-9


@FEW
@given(BI_WKV)
def test_bi_wkv_takes_each_sample_alone(inputs):
    y = bi_wkv(*inputs.values())
    for i in range(len(y)):
        alone = {x: t[i : i + 1] if x in 'kv' else t for x, t in inputs.items()}
        assert error(bi_wkv(*alone.values())[0], y[i]) < 1e-12


@FEW
@given(WKV6)
def test_wkv6_equals_the_definition_and_its_pytorch_implementation(inputs):
    exact = {x: t.float().double() for x, t in inputs.items()}
    want = reference.wkv6(*exact.values())
    for op in implementations('wkv6', 'cpu').values():
        assert error(op(*exact.values()), want) < 1e-10
        assert error(op(*in_float32(inputs).values()), want) < 1e-5


@FEW
@given(WKV6)
def test_wkv6_knows_no_direction(inputs):
    y = wkv6(*inputs.values())
    assert error(wkv6(*flipped(inputs, 'rkvw').values()).flip(1), y) < 1e-10


@FEW
@given(WKV6, st.floats(-3, 3))
def test_wkv6_is_linear_in_r_k_and_v(inputs, factor):
    y = wkv6(*inputs.values())
    for name in 'rkv':
        assert error(wkv6(*(inputs | {name: factor * inputs[name]}).values()), factor * y) < 1e-10


@FEW
@given(WKV6)
def test_wkv6_takes_each_sample_and_head_alone(inputs):
    y = wkv6(*inputs.values())
    b, h = y.shape[0] - 1, y.shape[2] - 1
    alone = [inputs[x][b:, :, h:] for x in 'rkvw']
    assert error(wkv6(*alone, inputs['u'][h:]), y[b:, :, h:]) < 1e-12
