"""Operators under attack: whatever hypothesis thinks of, on every device. `make attack` takes many times the cases."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from attack_cases import KINDS, Case, cases, kinds, tensors
from attack_checks import attack, has_kernels
from hypothesis import given
from op_cases import DEVICES, OPERATORS, gradients
from torch import Tensor

from vision_rwkv.ops import gated_bi_wkv

WIDE = {'cpu': 3, 'cuda': 90}  # percent of the cases: a GPU has time for their definition, and other kernels for them
SHARES = {'bi_wkv': 0.55, 'wkv6': 0.45}  # of the cases


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small, threads do little but wait for each other: on a busy machine for a very long time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', SHARES)
def test_attack(name, device, attack_count, attacking, capsys):
    """Every case passes, and a fifth of the cases is of each kind."""
    count, worst = Counter(), {}

    @attacking(SHARES[name])
    @given(cases(name, WIDE[device]))
    def every(case: Case) -> None:
        inputs, gy = tensors(case, device)
        attack(case, inputs, gy, worst)
        count.update(['all', *kinds(case, inputs)])

    every()
    with capsys.disabled():
        print(f'\n{name} on {device}: ' + ', '.join(f'{count[kind]} {kind}' for kind in ('all', *KINDS)))
        if attack_count:
            print('largest shares of what may be missed:', {x: round(share, 3) for x, share in worst.items()})
    assert all(5 * count[kind] >= count['all'] for kind in KINDS), count


@pytest.mark.cuda
@pytest.mark.parametrize('name', SHARES)
def test_kernels_alone(name, attacking):
    """Every kernel twice gives the same bits. Next to nothing else runs on the GPU: this is for compute-sanitizer."""

    def run(given: dict[str, Tensor], gy: Tensor) -> list[Tensor]:
        y, grads = gradients(OPERATORS[name], given, gy)
        gated = [gated_bi_wkv(*given.values(), gy)] if name == 'bi_wkv' else []
        return [x.cpu() for x in (y, *grads, *gated)]

    @attacking(SHARES[name])
    @given(cases(name, 100).filter(has_kernels))
    def every(case: Case) -> None:
        inputs, gy = tensors(case, 'cuda')
        assert all(map(torch.equal, run(inputs, gy), run(inputs, gy))), case

    every()
