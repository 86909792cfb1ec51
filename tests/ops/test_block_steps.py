"""The operators of a block, and the steps of its passes, beside their definitions; registration."""

import pytest
import torch
from fused_cases import EPS, SIZES, Size, _mixed, _normalised
from op_cases import DEVICES, error

from vision_rwkv import ops
from vision_rwkv.ops import fallback, reference
from vision_rwkv.ops._native import has_block

BLOCKS = ['vrwkv_block', 'vrwkv6_block']
NATIVE = pytest.mark.skipif(not has_block(), reason='no native code')
STEP_SIZES = [*SIZES, 'small', 'large']
MORE_SIZES = {'small': Size(2, (7, 7), 1, 384), 'large': Size(1, (3, 5), 0, 1024)}
# Tokens, gradients or branches, and the bound of the relative L2 error.
PAIRS = [
    (torch.float64, torch.float64, 1e-10),
    (torch.float32, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 1e-2),
    (torch.float32, torch.float16, 2e-3),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.float16, torch.float16, 2e-3),
]


def operator(name: str):
    return getattr(torch.ops.vision_rwkv, name)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize('name', STEP_SIZES)
@pytest.mark.parametrize(('count', 'with_norm'), [(2, True), (3, True), (3, False)])
def test_q_shift_residual_backward(name, count, with_norm, dtype, half, bound, device):
    size = {**SIZES, **MORE_SIZES}[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, total = (1 + normal(*size.shape)).to(dtype), normal(*size.shape, seed=1).to(dtype)
    g = normal(count, *size.shape, seed=2).to(half)
    mixes = [normal(size.channels, seed=3 + i).to(wide) for i in range(count)]
    norm = [normal(size.channels, seed=6 + i).to(wide) for i in range(2)] if with_norm else []
    scale = torch.linspace(0, 2, size.batch, dtype=wide)
    exact = [t.double().requires_grad_() for t in (x, *mixes, *norm)]
    n = _normalised(exact[0], *exact[1 + count :]) if with_norm else exact[0]
    gx, *gparameters = torch.autograd.grad(_mixed(n, exact[1 : 1 + count], size), exact, g.double())
    want = gx + total.double()
    branch = want * scale.double().view(-1, 1, 1)

    on = lambda t: t.to(device)  # noqa: E731
    stats = operator('norm_stats')(on(x), EPS) if with_norm else None
    arguments = [on(g), on(x), [*map(on, mixes)], *(map(on, norm) if with_norm else (None, None)), stats, *size.hw]
    arguments += [size.pixels, size.gamma, size.heads, on(total), on(scale), half]
    got, got_branch, columns = operator('q_shift_residual_backward')(*arguments)
    assert got.dtype == dtype and got_branch.dtype == half and columns.shape == (len(gparameters), size.channels)
    if not size.batch:
        return
    assert error(got.cpu(), want) <= bound and error(got_branch.cpu(), branch) <= bound
    for column, parameter in zip(columns.cpu(), gparameters, strict=True):
        assert error(column, parameter.view(-1)) <= bound
    again = operator('q_shift_residual_backward')(*arguments)
    assert all(map(torch.equal, (got, got_branch, columns), again))
    alone, no_branch, _ = operator('q_shift_residual_backward')(*arguments[:-3], None, None, None)
    assert no_branch.numel() == 0 and error(alone.cpu(), gx) <= bound


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize('name', STEP_SIZES)
@pytest.mark.parametrize(('count', 'with_norm'), [(5, True), (5, False), (2, True)])
def test_q_shift_parts_backward(name, count, with_norm, dtype, half, bound, device):
    size = {**SIZES, **MORE_SIZES}[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, mixes = (1 + normal(*size.shape)).to(dtype), [normal(size.channels, seed=1 + i).to(wide) for i in range(count)]
    g, delta = (normal(count, *size.shape, seed=i).to(half) for i in (7, 8))
    norm = [normal(size.channels, seed=9 + i).to(wide) for i in range(2)] if with_norm else []
    n = _normalised(x.double(), *map(torch.Tensor.double, norm)) if with_norm else x.double()
    apart = reference.q_shift(n, *size.shift) - n
    stays = torch.stack(mixes).double()[:, None, None] - delta.double()
    want = g.double() * apart, (g.double() * stays).sum(0), (g.double() * (1 - stays)).sum(0)

    on = lambda t: t.to(device)  # noqa: E731
    stats = operator('norm_stats')(on(x), EPS) if with_norm else None
    arguments = [on(g), on(x), [*map(on, mixes)], on(delta), *(map(on, norm) if with_norm else (None, None)), stats]
    arguments += [*size.hw, size.pixels, size.gamma, size.heads]
    gdelta, parts, columns = operator('q_shift_parts_backward')(*arguments)
    assert gdelta.dtype == parts.dtype == half and parts.shape == (3, *size.shape)
    if not size.batch:
        assert not columns.any()
        return
    for got, expected in zip((gdelta, *parts[:2]), want, strict=True):
        assert error(got.cpu(), expected) <= bound
    assert error(columns.cpu(), want[0].sum((1, 2))) <= bound
    again = operator('q_shift_parts_backward')(*arguments)
    assert torch.equal(again[0], gdelta) and torch.equal(again[1][:2], parts[:2]) and torch.equal(again[2], columns)


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), [pair for pair in PAIRS if pair[0] == pair[1]])
@pytest.mark.parametrize('shape', [(2, 13, 24), (1, 1, 7), (0, 3, 8)])
def test_value_by_value(shape, dtype, half, bound, device):
    g, r, y = (normal(*shape, seed=i).to(dtype) for i in range(3))
    exact_r, exact_y = r.double().requires_grad_(), y.double().requires_grad_()
    gated = torch.sigmoid(exact_r) * exact_y
    want = torch.autograd.grad(gated, (exact_r, exact_y), g.double())
    gradient = g.to(device, copy=True)
    gy = operator('gated_backward_')(gradient, *(t.to(device) for t in (r, gated.detach().to(dtype))))
    assert error(gradient.cpu(), want[0]) <= bound and error(gy.cpu(), want[1]) <= bound

    exact_y = y.double().requires_grad_()
    square = torch.relu(exact_y).square()
    (want,) = torch.autograd.grad(square, exact_y, g.double())
    gradient = g.to(device, copy=True)
    got = operator('squared_relu_backward_')(gradient, y.to(device))
    assert error(got.cpu(), square.detach()) <= bound and error(gradient.cpu(), want) <= bound


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize('name', ['odd', 'tiny', 'wide', 'small', 'large', 'empty'])
def test_norm_tokens(name, dtype, half, bound, device):
    size = {**SIZES, **MORE_SIZES}[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z, position = normal(*size.shape).to(half), normal(1, *size.shape[1:], seed=1).to(wide)
    weight, bias = (normal(size.channels, seed=i).to(wide) for i in (2, 3))
    norm = ops.Norm(weight.to(device), bias.to(device), EPS)
    for added in (position, None):
        want = _normalised(z.double() + (0 if added is None else added.double()), weight.double(), bias.double())
        given = z.to(device), None if added is None else added.to(device), norm.weight, norm.bias
        got, stats = operator('norm_tokens')(*given, EPS, 1e-3, dtype)
        assert got.dtype == dtype and got.shape == z.shape and stats.shape == (*z.shape[:2], 2)
        if size.batch:
            assert error(got.cpu(), want) <= bound
            deviation = (want.var(-1, correction=0) + 1e-3).rsqrt()
            assert error(stats.cpu(), torch.stack([want.mean(-1), deviation], -1)) <= bound
    with torch.autocast(device, torch.bfloat16):
        assert ops.norm_tokens(z.to(device), norm)[0].dtype == wide


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize('shape', [(2, 3, 64, 48, 16), (3, 1, 20, 12, 4), (1, 2, 28, 14, 14), (0, 3, 16, 16, 8)])
def test_patches(shape, dtype, half, bound, device):
    *shape, side = shape
    x = normal(*shape).to(dtype)
    parts = [part.flatten() for image in x for row in image.split(side, -2) for part in row.split(side, -1)]
    got = operator('patches')(x.to(device), side, half).cpu()
    want = torch.stack(parts) if parts else x.new_empty(0, shape[1] * side * side)
    assert got.shape == (shape[0], shape[2] // side * (shape[3] // side), shape[1] * side * side)
    assert torch.equal(got.flatten(0, 1), want.to(half))


def block_arguments(name: str, dtype: torch.dtype, device: str, post_norm: bool) -> list:
    """Of a block of 64 channels on 3 x 4 tokens; with post_norm also layer scale and drop path."""
    c, six = 64, name == 'vrwkv6_block'
    parameter = lambda *shape: torch.randn(*shape, device=device).mul_(0.3).requires_grad_()  # noqa: E731
    maps = [parameter(*shape) for shape in (*[(c, c)] * (5 if six else 4), (2 * c, c), (c, c), (c, 2 * c))]
    x = torch.randn(2, 12, c, device=device, requires_grad=True)
    scales = [torch.rand(2, 1, 1, device=device) for _ in range(2)] if post_norm else [None] * 2
    gammas = [parameter(c), parameter(c)] if post_norm else [None] * 2
    stats = None if post_norm else operator('norm_stats')(x.detach(), 1e-5)
    norms, mixes = [parameter(c) for _ in range(4)], [parameter(1, 1, c) for _ in range(8 if six else 5)]
    ranks = [parameter(*shape) for shape in ((c, 160), (5, 32, c), (c, 64), (64, c))]
    own = [ranks, parameter(1, 1, c), parameter(1, c), parameter(c), parameter(c), 1e-5]
    how = [3, 4, 1, 0.25, dtype]
    eps = [1e-5, 1e-5, None if post_norm else 1e-5, post_norm]
    return [x, stats, norms, *eps, mixes, maps, *(own if six else own[3:5]), *gammas, *scales, *how]


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('post_norm', [False, True])
@pytest.mark.parametrize('name', BLOCKS)
def test_opcheck_of_a_block(name, post_norm, dtype, device):
    torch.manual_seed(0)
    arguments = block_arguments(name, dtype, device, post_norm)
    torch.library.opcheck(operator(name).default, arguments)
    detach = lambda a: a.detach() if isinstance(a, torch.Tensor) else [*map(detach, a)] if isinstance(a, list) else a  # noqa: E731
    arguments = [*map(detach, arguments)]
    names = ['test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic']
    torch.library.opcheck(operator(f'{name}_kept').default, arguments, test_utils=names)
    out, _, *kept = operator(f'{name}_kept')(*arguments)
    torch.library.opcheck(operator(f'{name}_backward').default, [out, *arguments, kept], test_utils=names)


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize('shape', [(2, 13, 24), (3, 196, 40), (1, 700, 16), (2, 0, 8)])
def test_bi_wkv_backward_into(shape, dtype, half, bound, device):
    w, u = normal(shape[2], seed=1).to(dtype), normal(shape[2], seed=2).to(dtype)
    k, v, gy = (normal(*shape, seed=i).to(half) for i in (3, 4, 5))
    length = max(shape[1], 1)
    exact = [t.double() for t in (w, u, k, v, gy)]
    want = fallback.bi_wkv_backward(exact[0] / length, exact[1] / length, *exact[2:])
    g = torch.full((3, *shape), torch.nan, dtype=half, device=device)
    other_layout = torch.empty_like(g[0].transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for gk, gv in [(g[0], g[1]), (g[2], other_layout)]:
        got = operator('bi_wkv_backward_')(*(t.to(device) for t in (w, u, k, v, gy)), gk, gv)
        assert all(x.dtype == dtype for x in got)
        if shape[1]:
            found = [got[0] * length, got[1] * length, gk, gv]
            assert all(error(a.cpu(), b) <= bound for a, b in zip(found, want, strict=True))


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize('shape', [(2, 13, 2, 64), (1, 70, 1, 64), (2, 5, 3, 8), (1, 0, 1, 64)])
def test_wkv6_backward_into(shape, dtype, half, bound, device):
    r, k, v, gy = (normal(*shape, seed=i).to(half) for i in range(4))
    w, u = -normal(*shape, seed=4).exp().to(dtype), normal(*shape[2:], seed=5).to(dtype)
    want = fallback.wkv6_backward(*(t.double() for t in (r, k, v, w, u, gy)))
    g = torch.full((3, *shape), torch.nan, dtype=half, device=device)
    other_layout = torch.empty_like(g[0].transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for into in (g.unbind(), (g[0], other_layout, g[1]), torch.empty_like(g, dtype=dtype).unbind()):
        gw, gu = operator('wkv6_backward_')(*(t.to(device) for t in (r, k, v, w, u, gy)), *into)
        assert gw.dtype == dtype == gu.dtype
        if shape[1]:
            assert all(error(a.cpu(), b) <= bound for a, b in zip([*into, gw, gu], want, strict=True))


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'half', 'bound'), PAIRS)
@pytest.mark.parametrize(('shape', 'heads'), [((2, 13, 128), 2), ((1, 3, 24), 3), ((0, 3, 64), 1)])
def test_norm_gate_backward_into(shape, heads, dtype, half, bound, device):
    y, gate, g = normal(*shape).to(dtype), normal(*shape, seed=1).to(half), normal(*shape, seed=2).to(half)
    wide = torch.promote_types(dtype, torch.float32)
    parameters = [normal(shape[2], seed=i).to(wide) for i in (3, 4)]
    exact = [t.double().requires_grad_() for t in (y, gate, *parameters)]
    n = torch.nn.functional.group_norm(exact[0].flatten(0, 1), heads, *exact[2:], EPS).view(shape)
    want = torch.autograd.grad(n * torch.nn.functional.silu(exact[1]), exact, g.double())
    arguments = [*(t.to(device) for t in (g, y, gate, *parameters)), heads, EPS]
    into = torch.full(shape, torch.nan, dtype=half, device=device)
    other_layout = torch.empty_like(into.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for ggate in (into, other_layout, torch.empty_like(into, dtype=dtype)):
        gy, *gparameters = operator('norm_gate_backward_')(*arguments, ggate)
        if shape[0]:
            assert all(error(a.cpu(), b) <= bound for a, b in zip([gy, ggate, *gparameters], want, strict=True))


@NATIVE
@pytest.mark.parametrize('device', DEVICES)
def test_cast_weights(device):
    weights = [normal(3, 4, seed=i).to(device) for i in range(4)]
    stack, other = operator('cast_weights')(weights, torch.float16, 3)
    assert torch.equal(stack, torch.stack(weights[:3]).half()) and torch.equal(other, weights[3].half())
    with pytest.raises(RuntimeError, match='expected stacked from 0 to 4, the number of weights, got 5'):
        operator('cast_weights')(weights, torch.float16, 5)


def test_inference_alone():
    norm = ops.Norm(torch.ones(8), torch.zeros(8), EPS)
    with pytest.raises(RuntimeError, match='norm_tokens has no gradient'):
        ops.norm_tokens(torch.zeros(1, 2, 8, requires_grad=True), norm)
    with pytest.raises(RuntimeError, match='patches has no gradient'):
        ops.patches(torch.zeros(1, 3, 8, 8, requires_grad=True), 8)


@NATIVE
@pytest.mark.parametrize('name', BLOCKS)
def test_a_block_has_no_second_derivative(name):
    x, *others = block_arguments(name, torch.float32, 'cpu', False)
    (grad,) = torch.autograd.grad(operator(name)(x, *others)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f'{name} has no second derivative'):
        grad.sum().backward()


@NATIVE
@pytest.mark.parametrize(('name', 'mixes', 'maps'), [('vrwkv_block', 5, 7), ('vrwkv6_block', 8, 8)])
def test_messages(name, mixes, maps):
    arguments = block_arguments(name, torch.float32, 'cpu', False)
    arguments[2] = arguments[2][:3]
    want = f'{name}: expected 4 tensors of norms, {mixes} mixes and {maps} maps, got 3, {mixes} and {maps}'
    with pytest.raises(RuntimeError, match=want):
        operator(name)(*arguments)


@NATIVE
def test_messages_of_vrwkv6():
    arguments = block_arguments('vrwkv6_block', torch.float32, 'cpu', False)
    arguments[11] = arguments[11].view(-1)
    with pytest.raises(RuntimeError, match=r'expected a bonus \(H, N\), got \[64\]'):
        operator('vrwkv6_block')(*arguments)
    arguments = block_arguments('vrwkv6_block', torch.float32, 'cpu', False)
    arguments[9] = arguments[9][:3]
    with pytest.raises(RuntimeError, match='expected 6 mixes and 4 low-rank factors, got 6 and 3'):
        operator('vrwkv6_block')(*arguments)
