"""Where single floats stop holding the sums of an operator: kernels must notice, and take the long way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import DEVICES, assert_equals_definition, error, gradients, rounded, wkv6_inputs
from torch import Tensor

from vision_rwkv.ops import bi_wkv, reference, wkv6

T = 300
# Of y and the gradients of w, u, k, v. Where one token outweighs all others, y_t is its v, and the gradients of w and k
# are what is left of differences v - y_t that vanish: they keep fewer digits.
BOUNDS = (1e-5, 5e-4, 5e-5, 5e-4, 5e-5)


def check(given: dict[str, Tensor], device: str) -> None:
    """Compare with the definition in float64."""
    given = rounded('bi_wkv', given, torch.float32, device)
    y, grads = gradients(bi_wkv, given)
    want, want_grads = gradients(reference.bi_wkv, {x: t.double() for x, t in given.items()})
    errors = [error(a, b) for a, b in zip([y, *grads], [want, *want_grads], strict=True)]
    assert all(e <= bound for e, bound in zip(errors, BOUNDS, strict=True)), errors


def inputs(k: Tensor, *, w: Tensor, u: Tensor) -> dict[str, Tensor]:
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {'w': w.double(), 'u': u.double(), 'k': k, 'v': v}


def uniform(*shape: int, low: float, high: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize('device', DEVICES)
def test_a_large_bonus_lifts_a_key_that_underflows(device):
    """exp(k) is below the smallest float next to the largest one, exp(u + k) is not; u rises over the channels."""
    u = torch.linspace(20, 100, 40)
    k = -(u + 2).double() + uniform(2, T, 40, low=-1, high=1)
    k[:, 100] = 0
    check(inputs(k, w=torch.zeros(40), u=u), device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('u', [-40.0, -200.0])
def test_a_token_that_outweighs_all_others_but_not_for_itself(u, device):
    """What is left for it is exp(30) to exp(100) times smaller; this gap rises over the channels."""
    k = uniform(2, T, 40, low=-2, high=0) - torch.linspace(30, 100, 40, dtype=torch.float64)
    k[:, 100] = 0
    given = inputs(k, w=torch.full((40,), 1e-3), u=torch.full((40,), u))
    check(given, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('sign', [-1, 1])
def test_decays_or_growth_over_the_whole_sequence_near_the_smallest_float(sign, device):
    """exp(|w| T) rises from exp(20) to exp(140) over the channels; with w < 0 the farthest token weighs most."""
    w = sign * torch.linspace(20, 140, 61) / T
    k = uniform(1, T, 61, low=-0.5, high=0.5)
    check(inputs(k, w=w, u=torch.zeros(61)), device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('gap', [60.0, 90.0, 250.0])
def test_two_groups_of_keys_far_apart(gap, device):
    """What passes from one end to the other over tokens that weigh nothing; seen by the gradient of w."""
    k = uniform(2, T, 20, low=-1, high=1)
    k[:, 80:220] -= gap
    w = torch.linspace(-10, 10, 20) / T
    check(inputs(k, w=w, u=torch.randn(20)), device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['w', 'u', 'k', 'v'])
@pytest.mark.parametrize('value', [-3e38, 3e38])
def test_the_largest_floats_stay_finite(name, value, device):
    given = inputs(uniform(2, T, 20, low=-1, high=1), w=torch.zeros(20), u=torch.zeros(20))
    given = {x: t.float().to(device) for x, t in given.items()}
    given[name] = given[name].clone()
    given[name][..., ::3] = value
    leaves = [x.requires_grad_() for x in given.values()]
    y = bi_wkv(*leaves)
    assert y.isfinite().all()
    if name != 'v':  # there gradients of the other inputs are as large as v
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize('device', DEVICES)
def test_wkv6_forgets_everything_at_once(device):
    """exp(w) underflows in float32 for some tokens, up to w = -8000."""
    given = wkv6_inputs(1, 70, 2, 16, slow=3, fast=9)
    assert_equals_definition('wkv6', wkv6, given, torch.float32, device)


@pytest.mark.skipif(sys.platform != 'linux', reason='needs the C library that fills new memory on request')
def test_no_scratch_memory_is_read_before_it_is_written():
    """The C library fills the memory of kernels with one byte. Whichever it is, the results have the same bits."""
    code = """
import sys, torch
sys.path.insert(0, 'tests/ops')
from op_cases import OPERATORS, bi_wkv_inputs, gradients, wkv6_inputs
for name, inputs in ('bi_wkv', bi_wkv_inputs(2, 600, 37)), ('wkv6', wkv6_inputs(2, 70, 3, 40)):
    y, grads = gradients(OPERATORS[name], {x: t.float() for x, t in inputs.items()})
    print([x.view(torch.int32).long().sum().item() for x in (y, *grads)])
"""
    root = Path(__file__).resolve().parents[2]
    outputs = []
    for byte in ('1', '128', '200'):
        env = os.environ | {'PYTHONPATH': str(root), 'MALLOC_PERTURB_': byte}
        done = subprocess.run([sys.executable, '-c', code], cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0].count('[') == 2 and len(set(outputs)) == 1, outputs
