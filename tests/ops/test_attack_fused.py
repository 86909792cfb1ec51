"""Q-Shift, the fused and the point-wise operators under attack: random maps, channels, strides, precisions, values."""

from collections import Counter

import pytest
import torch
from attack_cases import laid_out
from fused_cases import NAMES, PRECISIONS, Size, cases, check, run
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICES

SHARE = 0.2  # of the cases that Bi-WKV and WKV6 get; these come on top
KINDS = ('long', 'odd', 'strided', 'extreme')
SCALES = {'model': 1.0, 'tiny': 1e-15, 'large': 8.0}  # of the tokens: exp, float16 and the sigmoids' gradients bound it


@st.composite
def attacks(draw: st.DrawFn) -> dict:
    """An operator, its size and what its inputs are like."""
    pick = lambda *xs: draw(st.sampled_from(xs))  # noqa: E731
    name = pick(*NAMES)
    if pick('short', 'short', 'long') == 'long':
        hw, batch, most = (draw(st.integers(16, 20)), draw(st.integers(17, 20))), pick(1, 2), 1
    else:
        hw, batch, most = (draw(st.integers(1, 6)), draw(st.integers(1, 6))), draw(st.integers(1, 3)), 40
    heads = pick(1, 1, 2, 3)
    fewest = -(-8 // heads)  # of fewer channels than 8 a norm may leave next to nothing
    channels = heads * (64 if name == 'norm_gate' else draw(st.integers(fewest, max(fewest, most))))
    gamma = pick(1 / 4, 1 / 4, 0.1, 0.2)
    size = Size(batch, hw, draw(st.integers(0, 2)), channels, draw(st.integers(1, 4)), gamma, heads)
    layout, scale = pick('contiguous', 'transposed', 'transposed'), pick(*SCALES)
    seed = draw(st.integers(0, 99))
    names = ('name', 'size', 'precision', 'layout', 'scale', 'seed')
    return dict(zip(names, (name, size, pick(*PRECISIONS), layout, scale, seed), strict=True))


def made(attack: dict):
    """The case of fused_cases with tokens of the attack's scale, in its layout."""
    case = cases(attack['size'])[attack['name']]
    tokens, scale = case.tokens.split(), SCALES[attack['scale']]
    if attack['name'] == 'log_decay' and 'float16' in attack['precision']:
        scale = min(scale, 1.0)  # exp of more is past float16
    is_tokens = {x: x in tokens and t.shape == attack['size'].shape for x, t in case.inputs.items()}  # and no weights
    inputs = {x: laid_out(t * scale, attack['layout']) if is_tokens[x] else t for x, t in case.inputs.items()}
    return case._replace(inputs=inputs)


def on_its_own(attack: dict, case, device: str) -> None:
    """Twice the same bits; a NaN in the first sample changes no bit of the others, whose results need no first one."""
    inputs = {x: t.to(device, torch.float32) for x, t in case.inputs.items()}
    results, grads = run(case.op, inputs)
    for again, first in zip(run(case.op, inputs), (results, grads), strict=True):
        assert all(map(torch.equal, again, first)), 'other bits'
    batch, length = attack['size'].batch, results[0].shape[-2]
    if batch == 1:
        return
    place = torch.randint(length, (2,), generator=torch.Generator().manual_seed(attack['seed'])).tolist()
    spoilt = {x: t.clone() for x, t in inputs.items()}
    first = next(iter(spoilt))
    spoilt[first][0, place[0], place[1] % inputs[first].shape[-1]] = torch.nan
    bad, bad_grads = run(case.op, spoilt)
    for got, want in zip([*bad, *bad_grads], [*results, *grads], strict=True):
        where = -3 if got.dim() >= 3 and got.shape[-3] == batch and got.shape[-2] == length else None
        if where:
            assert torch.equal(got.narrow(where, 1, batch - 1), want.narrow(where, 1, batch - 1)), 'a NaN spread'


@pytest.mark.parametrize('device', DEVICES)
def test_attack(device, attacking, capsys):
    """Every case equals its definition, values and gradients, and a fifth of the cases is of each kind."""
    count = Counter()

    @attacking(SHARE)
    @given(attacks())
    def every(attack: dict) -> None:
        case = made(attack)
        check(case, attack['precision'], device)
        on_its_own(attack, case, device)
        size, tokens = attack['size'], next(iter(case.inputs.values()))
        is_kind = {
            'long': size.shape[1] > 256,
            'odd': size.channels % 2 == 1 or size.heads % 2 == 1,
            'strided': not tokens.is_contiguous(),
            'extreme': attack['scale'] != 'model',
        }
        count.update(['all', *(kind for kind in KINDS if is_kind[kind])])

    every()
    with capsys.disabled():
        print(f'\nQ-Shift and others on {device}: ' + ', '.join(f'{count[kind]} {kind}' for kind in ('all', *KINDS)))
    assert all(5 * count[kind] >= count['all'] for kind in KINDS), count
