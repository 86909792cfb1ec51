"""The operators as PyTorch sees them: registration, autograd, autocast, torch.compile, and what bad input is told."""

import pytest
import torch
from op_cases import (
    DEFINITIONS,
    DEVICES,
    OPERATORS,
    bi_wkv_inputs,
    error,
    gradients,
    implementations,
    rounded,
    wkv6_inputs,
)

from vision_rwkv.ops import bi_wkv, gated_bi_wkv, gated_wkv6, log_decay, norm_gate, wkv6

BOTH = ['bi_wkv', 'wkv6']
LAYOUT = {'bi_wkv': {'w': 'C', 'u': 'C', 'k': 'BTC', 'v': 'BTC'}, 'wkv6': dict.fromkeys('rkvw', 'BTHN') | {'u': 'HN'}}


def make(name: str, dtype=torch.float64, device='cpu', tokens: int = 7) -> dict[str, torch.Tensor]:
    inputs = bi_wkv_inputs(2, tokens, 3) if name == 'bi_wkv' else wkv6_inputs(2, tokens, 2, 4)
    return rounded(name, inputs, dtype, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['operator', 'pytorch'])
@pytest.mark.parametrize('name', BOTH)
def test_gradcheck(name, kind, device):
    leaves = [x.requires_grad_() for x in make(name, device=device).values()]
    assert torch.autograd.gradcheck(implementations(name, device)[kind], leaves)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', BOTH)
def test_opcheck(name, dtype, device):
    inputs = [x.requires_grad_() for x in make(name, dtype, device).values()]
    torch.library.opcheck(getattr(torch.ops.vision_rwkv, name).default, inputs)
    inputs = [x.detach() for x in inputs]
    gy = torch.randn_like(inputs[2])
    torch.library.opcheck(getattr(torch.ops.vision_rwkv, f'{name}_backward').default, [*inputs, gy])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_gated_bi_wkv(dtype, device):
    w, u, k, v = make('bi_wkv', dtype, device).values()
    r = torch.randn_like(k)
    want = torch.sigmoid(r) * bi_wkv(w / k.shape[1], u / k.shape[1], k, v)
    torch.testing.assert_close(gated_bi_wkv(w, u, k, v, r), want)
    torch.library.opcheck(
        torch.ops.vision_rwkv.gated_bi_wkv.default,
        (w, u, k, v, r),
        test_utils=['test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic'],
    )
    with pytest.raises(RuntimeError, match='gated_bi_wkv has no gradient'):
        gated_bi_wkv(w, u, k.requires_grad_(), v, r)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gated_wkv6(dtype, device):
    torch.manual_seed(0)
    r, k, v, raw, gate = (torch.randn(2, 9, 8, device=device).to(dtype) for _ in range(5))
    base, weight, bias = (torch.rand(8, dtype=torch.float64, device=device) for _ in range(3))
    u = torch.randn(2, 4, dtype=torch.float64, device=device)
    base, weight, bias, u = (x if dtype == torch.float64 else x.float() for x in (base, weight, bias, u))
    w = log_decay(raw, base)
    heads = [x.double().unflatten(-1, (2, 4)) for x in (r, k, v, w)]
    want = norm_gate(wkv6(*heads, u).flatten(2), gate.double(), weight.double(), bias.double(), 2, 1e-5)
    got = gated_wkv6(r, k, v, raw, base, u, gate, weight, bias, 1e-5)
    assert got.dtype == dtype
    assert error(got, want) <= {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}.get(dtype, 2e-3)
    torch.library.opcheck(
        torch.ops.vision_rwkv.gated_wkv6.default,
        (r, k, v, raw, base, u, gate, weight, bias, 1e-5),
        test_utils=['test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic'],
    )
    with pytest.raises(RuntimeError, match='gated_wkv6 has no gradient'):
        gated_wkv6(r.requires_grad_(), k, v, raw, base, u, gate, weight, bias, 1e-5)


@pytest.mark.parametrize('name', BOTH)
def test_second_derivative_is_refused(name):
    inputs = [x.requires_grad_() for x in make(name).values()]
    (grad,) = torch.autograd.grad(OPERATORS[name](*inputs).sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match=f'{name} has no second derivative'):
        grad.sum().backward()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', BOTH)
def test_autocast_casts_tokens_but_not_decay_and_bonus(name, dtype, device):
    given = make(name, torch.float32, device, tokens=20)
    with torch.autocast(device, dtype):
        y, grads = gradients(OPERATORS[name], given)
    assert y.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads)  # as the inputs
    by_hand = {x: t.to(dtype) if x in 'rkv' and not (name == 'wkv6' and x in 'wu') else t for x, t in given.items()}
    want, _ = gradients(OPERATORS[name], by_hand)
    assert torch.equal(y, want)
    exact, _ = gradients(DEFINITIONS[name], {x: t.double() for x, t in by_hand.items()})
    assert error(y, exact) < 1e-2


@pytest.mark.parametrize('name', BOTH)
def test_autocast_leaves_float64(name):
    with torch.autocast('cpu', torch.bfloat16):
        assert OPERATORS[name](*make(name).values()).dtype == torch.float64


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', BOTH)
def test_compiles_to_one_graph(name, device):
    op = OPERATORS[name]
    given = make(name, torch.float32, device, tokens=20)
    compiled = torch.compile(lambda *inputs: 2 * op(*inputs), fullgraph=True, dynamic=True)
    for tokens in (20, 33):
        given = make(name, torch.float32, device, tokens)
        y, grads = gradients(compiled, given)
        want, want_grads = gradients(lambda *inputs: 2 * op(*inputs), given)
        assert error(y, want) < 1e-6
        assert all(error(a, b) < 1e-6 for a, b in zip(grads, want_grads, strict=True))


def test_meta_tensors_have_shapes():
    k = torch.empty(2, 7, 3, device='meta', dtype=torch.bfloat16)
    w = torch.empty(3, device='meta')
    assert bi_wkv(w, w, k, k).shape == k.shape and bi_wkv(w, w, k, k).dtype == torch.bfloat16


WRONG = [
    ('rank', lambda x: x[None], ValueError),
    ('size', lambda x: torch.cat([x, x], -1), ValueError),
    ('dtype', lambda x: x.long(), TypeError),
    ('device', lambda x: x.to('meta'), ValueError),
    ('type', lambda x: x.tolist(), TypeError),
    ('none', lambda x: None, TypeError),
]


@pytest.mark.parametrize(('what', 'spoil', 'expected'), WRONG, ids=[case[0] for case in WRONG])
@pytest.mark.parametrize(('name', 'tensor'), [(name, x) for name in BOTH for x in LAYOUT[name]])
def test_bad_input_is_named(name, tensor, what, spoil, expected):
    given = make(name)
    given[tensor] = spoil(given[tensor])
    with pytest.raises(expected) as caught:
        OPERATORS[name](*given.values())
    message = str(caught.value)
    # What sets a size or the device may be the odd one out: then the others are named as differing from it.
    assert message.startswith(f'{name}: ') and f'{tensor}' in message.removeprefix(f'{name}: ')
    assert 'must' in message and 'got' in message


def test_messages():
    w, k = torch.zeros(3), torch.zeros(2, 5, 3)
    cases = [
        ((w, torch.zeros(4), k, k), 'bi_wkv: u must have shape (C,) with C = 3 as in k, got (4,)'),
        ((w, w, k[0], k), 'bi_wkv: k must have shape (B, T, C), got (5, 3)'),
        ((w, w, k, k.double()), 'bi_wkv: v must be torch.float32 like k, got torch.float64'),
        ((w, w, k.int(), k), 'bi_wkv: k must be float32, bfloat16, float16 or float64, got torch.int32'),
        ((w.to('meta'), w, k, k), 'bi_wkv: w must be on cpu like k, got meta'),
        ((w, w, [1.0], k), 'bi_wkv: k must be a torch.Tensor, got list'),
    ]
    for inputs, message in cases:
        with pytest.raises((TypeError, ValueError)) as caught:
            bi_wkv(*inputs)
        assert str(caught.value) == message


@pytest.mark.parametrize('name', BOTH)
def test_direct_calls_with_bad_shapes_are_refused(name):
    """torch.ops can be called without our checks; the kernels must not read out of bounds."""
    for tensor in LAYOUT[name]:
        given = make(name, torch.float32)
        given[tensor] = given[tensor][..., :-1]
        with pytest.raises((RuntimeError, ValueError)):  # the latter from einsum, where opt_einsum is installed
            getattr(torch.ops.vision_rwkv, name)(*given.values())


@pytest.mark.cuda
def test_mixed_devices_are_named():
    given = make('wkv6', torch.float32)
    with pytest.raises(ValueError, match='wkv6: u must be on cuda:0 like r, got cpu'):
        wkv6(*(t if x == 'u' else t.cuda() for x, t in given.items()))
