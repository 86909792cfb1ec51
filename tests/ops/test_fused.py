"""Q-Shift, point-wise operators and recomputing layers: values and gradients, registration, errors, what is saved."""

import pytest
import torch
from fused_cases import EPS, NAMES, PRECISIONS, SIZES, Size, _dynamic, _normalised, cases, check
from op_cases import DEVICES, error

from vision_rwkv import ops

OPERATORS = ['q_shift', 'mix_linear', 'gated_linear', 'squared_relu_linear', 'gate', 'squared_relu', 'residual']
OPERATORS += ['log_decay', 'norm_gate', 'dynamic_linear']
# For the tiles of dynamic_mix: one, many with a rest, channels that are no multiple of 32, and more than a tile takes.
TILES = [
    Size(1, (3, 7), 1, 64),
    Size(2, (96, 97), 1, 192, pixels=2, heads=3),
    Size(3, (5, 7), 2, 80, gamma=0.2),
    Size(1, (5, 7), 0, 240, gamma=0.2, heads=3),
    Size(2, (96, 97), 1, 384, heads=6),
    Size(1, (9, 11), 1, 768, heads=12),
]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('size', ['tiny', 'heads', 'odd', 'empty'])
@pytest.mark.parametrize('name', NAMES)
def test_every_precision(name, size, precision, device):
    found = cases(SIZES[size])
    if name not in found:
        pytest.skip('heads of 64 channels only')
    check(found[name], precision, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('precision', ['float32', 'autocast-bfloat16'])
@pytest.mark.parametrize('size', ['one_token', 'far', 'past_the_border', 'wide', 'long'])
@pytest.mark.parametrize(
    'name', ['q_shift', 'q_shift_norm_delta', 'mix_linear', 'dynamic_linear', 'residual_whole', 'log_decay']
)
def test_every_size(name, size, precision, device):
    check(cases(SIZES[size])[name], precision, device)


@pytest.mark.parametrize('name', NAMES)
def test_gradcheck(name):
    case = cases(SIZES['odd']._replace(batch=2, channels=5))[name] if name != 'norm_gate' else None
    if case is None:
        case = cases(SIZES['one_token']._replace(channels=64))[name]
    leaves = [x.detach().requires_grad_() for x in case.inputs.values()]
    assert torch.autograd.gradcheck(lambda *xs: case.op(*xs), leaves, fast_mode=True)


def dynamic(dtype, device):
    """Mixes, low-rank factors and maps for `dynamic_linear` on 128 channels; gradients of one in bfloat16 that is there
    several times would be rounded in any order."""
    shapes = [(128, 160), (5, 32, 128), (128, 64), (64, 128)]
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)  # noqa: E731
    return [leaf(128) for _ in range(6)], [leaf(*shape) for shape in shapes], [leaf(128, 128) for _ in range(4)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    x, y = (torch.randn(2, 13, 128, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    a, b, weight, bias = (torch.rand(128, device=device, requires_grad=True) for _ in range(4))
    map_ = torch.randn(128, 128, dtype=dtype, device=device, requires_grad=True)
    stats = torch.ops.vision_rwkv.norm_stats(x.detach(), 1e-5)
    where = (3, 4, 1, 0.25, 2)
    calls = {
        'q_shift': (x, [a, b], None, weight, bias, stats, *where, dtype),
        'mix_linear': (x, [a, b], [map_, map_], weight, bias, stats, 1e-5, *where, dtype),
        'gated_linear': (x, y, map_),
        'squared_relu_linear': (x, map_),
        'gate': (x, y),
        'squared_relu': (x,),
        'residual': (x, y, y, weight, bias, a, None, 1e-5, None),
        'log_decay': (x, a),
        'norm_gate': (x, y, weight, bias, 2, 1e-5, dtype),
        'dynamic_linear': (x, *dynamic(dtype, device), weight, bias, stats, 1e-5, *where, dtype),
    }
    assert list(calls) == OPERATORS
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.vision_rwkv, name).default, arguments)


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['bfloat16', 'float16', 'autocast-bfloat16', 'autocast-float16'])
@pytest.mark.parametrize('with_norm', [True, False])
@pytest.mark.parametrize('size', TILES)
def test_dynamic_mix_of_every_tile(size, with_norm, precision):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to('cuda')  # noqa: E731
    dtype, cast, (bound, _) = PRECISIONS[precision]
    half, c = cast or dtype, size.channels
    x, mixes = (1 + normal(*size.shape)).to(dtype), normal(6, c)
    shapes = [(c, 160), (5, 32, c), (c, 64), (64, c)]
    ranks = [(normal(*shape) / shape[-2] ** 0.5).to(half) for shape in shapes]
    norm = [1 + 0.1 * normal(c), normal(c)] if with_norm else [None, None]
    stats = torch.ops.vision_rwkv.norm_stats(x, EPS) if with_norm else None
    arguments = x, mixes.unbind(), ranks, *norm, stats, *size.hw, *size.shift[1:], half
    mixed, raw = torch.ops.vision_rwkv.dynamic_mix(*arguments)
    n = _normalised(x.double(), *(p.double() for p in norm)) if with_norm else x.double()
    same = torch.eye(c, dtype=torch.float64, device='cuda').expand(4, c, c)
    want = _dynamic(n, mixes.double(), *(rank.double() for rank in ranks), same, size)
    for got, exact in zip([*mixed.unbind(), raw], want, strict=True):
        assert error(got, exact) <= bound
    assert all(map(torch.equal, (mixed, raw), torch.ops.vision_rwkv.dynamic_mix(*arguments)))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape', [(2, 13, 24), (1, 1, 7), (0, 3, 8)])
def test_squared_relu_mlp(shape, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, device=device)
    key, value = (torch.randn(n, m, dtype=torch.float64, device=device) for n, m in ((48, shape[2]), (10, 48)))
    x, key, value = (t.to(dtype) for t in (x, key, value))
    want = torch.relu(x.double() @ key.double().t()).square() @ value.double().t()
    got = ops.squared_relu_mlp(x, key, value)
    assert got.dtype == dtype and got.shape == (*shape[:2], 10)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (got.double() - want).norm() <= tolerance * want.norm()
    names = ['test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic']
    torch.library.opcheck(torch.ops.vision_rwkv.squared_relu_mlp.default, (x, key, value), test_utils=names)
    with pytest.raises(RuntimeError, match='squared_relu_mlp has no gradient'):
        ops.squared_relu_mlp(x.requires_grad_(), key, value)


@pytest.mark.parametrize('name', NAMES)
def test_second_derivative_is_refused(name):
    if name == 'residual_plain':
        pytest.skip('linear')
    case = cases(SIZES['tiny'])[name]
    leaves = [x.detach().requires_grad_() for x in case.inputs.values()]
    results = case.op(*leaves)
    total = sum(y.sum() for y in results) if isinstance(results, list) else results.sum()
    (grad,) = torch.autograd.grad(total, leaves[-1], create_graph=True)
    with pytest.raises(RuntimeError, match='has no second derivative'):
        grad.sum().backward()


@pytest.mark.parametrize('device', DEVICES)
def test_statistics_of_a_residual(device):
    x, z = (torch.randn(2, 7, 45, device=device) for _ in range(2))
    out, stats = ops.residual(x, z, stats_eps=1e-5)
    variance, mean = torch.var_mean(out, -1, correction=0)
    torch.testing.assert_close(stats, torch.stack([mean, (variance + 1e-5).rsqrt()], -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('device', DEVICES)
def test_any_strides_and_alignment(device):
    shape = (2, 12, 64)
    x = torch.randn(shape, device=device)
    odd = torch.empty(x.numel() + 1, device=device)[1:].view(shape).copy_(x)
    flipped = x.transpose(1, 2).contiguous().transpose(1, 2)
    a, weight, bias = (torch.rand(64, device=device) for _ in range(3))
    norm = ops.Norm(weight, bias, 1e-5)
    for other in (odd, flipped):
        torch.testing.assert_close(ops.q_shift(other, [a], (3, 4), norm=norm), ops.q_shift(x, [a], (3, 4), norm=norm))
        torch.testing.assert_close(ops.gate(other, other), ops.gate(x, x))
        torch.testing.assert_close(ops.squared_relu(other), ops.squared_relu(x))
        torch.testing.assert_close(ops.residual(other, other, norm=norm), ops.residual(x, x, norm=norm))
        torch.testing.assert_close(ops.log_decay(other, a), ops.log_decay(x, a))
        torch.testing.assert_close(
            ops.norm_gate(other, other, weight, bias, 1, 1e-5), ops.norm_gate(x, x, weight, bias, 1, 1e-5)
        )


@pytest.mark.parametrize('device', DEVICES)
def test_same_bits_again(device):
    case = cases(SIZES['long'])['q_shift_norm_delta']
    given = [x.to(device, torch.float32).requires_grad_() for x in case.inputs.values()]
    first, second = (torch.autograd.grad(case.op(*given).sum(), given) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_layers_save_their_arguments_alone():
    x = torch.randn(2, 12, 64, requires_grad=True)
    a, b = torch.rand(64), torch.rand(64)
    maps = [torch.randn(64, 64, requires_grad=True) for _ in range(2)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        k, r = ops.mix_linear(x, [a, b], maps, (3, 4))
        ops.gated_linear(r, k, maps[0])
        ops.squared_relu_linear(k, maps[0])
    tokens = {t.data_ptr() for t in saved if t.shape == x.shape}
    assert tokens == {x.data_ptr(), k.data_ptr(), r.data_ptr()}


def test_messages():
    x = torch.zeros(2, 12, 8)
    mix = torch.zeros(8)
    cases = [
        (lambda: ops.q_shift(x[0], [mix], (3, 4)), 'q_shift: x must have shape (B, T, C), got (12, 8)'),
        (lambda: ops.q_shift(x, [mix], (3, 5)), 'q_shift: x must have at least 3 * 5 tokens, got 12'),
        (lambda: ops.q_shift(x, [mix[:4]], (3, 4)), 'q_shift: a mix must have 8 values, one a channel, got (4,)'),
        (
            lambda: ops.mix_linear(x, [mix], [x[0]], (3, 4), heads=3),
            'mix_linear: the 8 channels of x must be a multiple of the 3 heads',
        ),
        (
            lambda: ops.q_shift(x, [mix], (3, 4), delta=x),
            'q_shift: delta must have shape (1, 2, 12, 8), got (2, 12, 8)',
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', NAMES)
def test_gradients_of_transposed_tokens(name, device):
    case = cases(SIZES['heads'])[name]
    turned = {x: t.transpose(0, -1).contiguous().transpose(0, -1) for x, t in case.inputs.items()}
    check(case._replace(inputs=turned), 'float32', device)
