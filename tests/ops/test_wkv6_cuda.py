"""WKV6's CUDA kernels where they differ from the other implementations: chunks, streams, graphs, alignment, memory."""

import pytest
import torch

from vision_rwkv.ops import fallback, gated_wkv6, wkv6

pytestmark = pytest.mark.cuda

N = 64
NAMES = ('y', 'r', 'k', 'v', 'w', 'u')
# Relative L2 error of y and of the gradients, for inputs rounded to the type.
TOLERANCE = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)}


@pytest.fixture(autouse=True)
def native():
    if not torch._C._dispatch_has_kernel_for_dispatch_key('vision_rwkv::wkv6', 'CUDA'):
        pytest.skip('the library was built without CUDA code')


def log_decay(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """w from decays of nearly 1 ('slow') to nearly 0 ('fast'), and both beside each other ('mixed')."""
    z = torch.randn(shape, device='cuda')
    mixed = torch.where(z > 0.5, -20.0, torch.where(z > -0.5, -1e-4, -1.0))
    return {'model': -torch.exp(z - 2), 'slow': z * 0 - 1e-4, 'fast': z * 0 - 20, 'mixed': mixed}[kind]


def inputs(batch, tokens, heads, kind='model', dtype=torch.float32, w_dtype=torch.float32, n=N):
    """r, k, v, w, u and the gradient of y."""
    torch.manual_seed(tokens)
    shape = (batch, tokens, heads, n)
    r, k, v, gy = (torch.randn(shape, device='cuda').to(dtype) for _ in range(4))
    return r, k, v, log_decay(kind, shape).to(w_dtype), torch.randn(heads, n, device='cuda'), gy


def run(r, k, v, w, u, gy) -> list[torch.Tensor]:
    """y and the gradients of r, k, v, w, u."""
    leaves = [x.detach().requires_grad_() for x in (r, k, v, w, u)]
    y = wkv6(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def expected(r, k, v, w, u, gy) -> list[torch.Tensor]:
    doubles = [x.double() for x in (r, k, v, w, u)]
    return [fallback.wkv6(*doubles), *fallback.wkv6_backward(*doubles, gy.double())]


def check(case, tolerance):
    for name, x, exact, source in zip(NAMES, run(*case), expected(*case), (case[0], *case[:5]), strict=True):
        assert x.dtype == source.dtype and x.shape == source.shape, name
        limit = tolerance[0] if name == 'y' else tolerance[1]
        assert (x.double() - exact).norm() <= limit * exact.norm(), name


@pytest.mark.parametrize('tokens', [1, 2, 31, 33, 49, 63, 64, 65, 128, 196, 197, 576, 1025, 4200])
def test_every_length(tokens):
    check(inputs(2, tokens, 3), TOLERANCE[torch.float32])


@pytest.mark.parametrize('kind', ['slow', 'fast', 'mixed'])
@pytest.mark.parametrize('tokens', [33, 197, 1025])
def test_every_decay(kind, tokens):
    check(inputs(1, tokens, 5, kind), TOLERANCE[torch.float32])


@pytest.mark.parametrize('kind', ['model', 'slow'])
def test_errors_do_not_grow_with_length(kind):
    check(inputs(1, 16384, 1, kind), TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('w_is_float', [True, False])
@pytest.mark.parametrize('tokens', [1, 49, 197, 1025])
def test_half_precision(dtype, w_is_float, tokens):
    check(inputs(2, tokens, 3, 'mixed', dtype, torch.float32 if w_is_float else dtype), TOLERANCE[dtype])


@pytest.mark.parametrize('batch', [130, 400])  # the second is enough for one block to walk over a whole sequence
def test_many_sequences(batch):
    check(inputs(batch, 130, 1, 'mixed'), TOLERANCE[torch.float32])


def full_batch(heads: int) -> int:
    """A batch with a sequence for each processor, as the kernels by strips ask for where sequences are long."""
    return torch.cuda.get_device_properties(0).multi_processor_count // heads + 1


def check_samples(y: torch.Tensor, exact: torch.Tensor):
    """bfloat16 results, sample by sample: what is wrong in one of them would be lost in the norm of all."""
    error = (y.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() <= TOLERANCE[torch.bfloat16][0] and error.square().mean().sqrt() <= 3.5e-3


# By strips from 65 tokens on; up to 224 make one piece. With 1361 the last piece has one block.
STRIP_TOKENS = [64, 65, 80, 81, 129, 192, 193, 196, 208, 209, 224, 225, 448, 449, 1361]


@pytest.mark.parametrize('tokens', STRIP_TOKENS)
@pytest.mark.parametrize('kind', ['model', 'slow', 'fast', 'mixed'])
@pytest.mark.parametrize('full', [True, False])
def test_bfloat16_by_strips(tokens, kind, full):
    for w_dtype in (torch.float32, torch.bfloat16):
        case = inputs(full_batch(3) if full else 2, tokens, 3, kind, torch.bfloat16, w_dtype)[:5]
        y, exact = wkv6(*case), fallback.wkv6(*(x.double() for x in case))
        check_samples(y, exact)
        assert torch.equal(wkv6(*case), y)


@pytest.mark.parametrize('kind', ['model', 'slow'])
def test_bfloat16_errors_do_not_grow_with_length(kind):
    case = inputs(1, 16384, 1, kind, torch.bfloat16)[:5]
    check_samples(wkv6(*case), fallback.wkv6(*(x.double() for x in case)))


@pytest.mark.parametrize('tokens', [196, 700])
def test_bfloat16_by_strips_takes_infinite_decays(tokens):
    r, k, v, w, u, _ = inputs(full_batch(1), tokens, 1, dtype=torch.bfloat16)
    w[:, 60:70, :, ::3] = -torch.inf
    finite = w.clamp(min=-1e4)
    y = wkv6(r, k, v, w, u)
    check_samples(y, fallback.wkv6(*(x.double() for x in (r, k, v, finite, u))))
    assert torch.equal(wkv6(r, k, v, finite, u), y)


def test_infinite_decay_is_a_reset():
    r, k, v, w, u, gy = inputs(1, 130, 2)
    w[:, 60:70, :, ::3] = -torch.inf
    check((r, k, v, w.clamp(min=-1e4), u, gy), TOLERANCE[torch.float32])
    for x, y in zip(run(r, k, v, w, u, gy), run(r, k, v, w.clamp(min=-1e4), u, gy), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('shape', [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(shape):
    y, *gradients, gu = run(*inputs(*shape))
    assert y.shape == (*shape, N) and all(x.shape == y.shape for x in gradients)
    assert gu.shape == (shape[2], N) and not gu.any()


def test_any_strides_and_alignment():
    r, k, v, w, u, gy = inputs(2, 70, 3)
    plain = run(r, k, v, w, u, gy)
    odd = torch.empty(r.numel() + 1, device='cuda')[1:].view_as(r).copy_(r)  # 4 bytes off what vector loads need
    flipped = v.flip(1).contiguous().flip(1)
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([w, w], -1)[..., 0]
    for x, y in zip(plain, run(odd, strided, flipped, wide, u.t().contiguous().t(), gy), strict=True):
        assert torch.equal(x, y)
    summed = [x.detach().requires_grad_() for x in (r, k, v, w, u)]
    wkv6(*summed).sum().backward()  # a gradient of stride 0
    for x, y in zip(summed, run(r, k, v, w, u, torch.ones_like(gy))[1:], strict=True):
        assert torch.equal(x.grad, y)


@pytest.mark.parametrize('batch', [1, 400])
def test_same_bits_again(batch):
    case = inputs(batch, 197, 3)
    for x, y in zip(run(*case), run(*case), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('n', [1, 16, 48, 100])
def test_other_head_sizes(n):
    check(inputs(2, 37, 3, n=n), TOLERANCE[torch.float32])


def test_float64():
    case = [x.double() for x in inputs(1, 37, 2)]
    check(case, (1e-12, 1e-12))
    mixed = inputs(1, 37, 2, w_dtype=torch.float64)
    check(mixed, (1e-6, 1e-6))


@pytest.mark.parametrize(
    'size, dtype',
    [
        ((2, 50, 3), torch.float32),
        ((2, 700, 3), torch.float32),
        ((200, 196, 1), torch.bfloat16),
        ((2, 700, 3), torch.bfloat16),
    ],
)
def test_graph_on_another_stream(size, dtype):
    case = inputs(*size, dtype=dtype)
    eager = run(*case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    r, k, v, w, u, gy = case
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = [wkv6(r, k, v, w, u), *torch.ops.vision_rwkv.wkv6_backward(*case)]
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(captured, eager, strict=True):
        assert torch.equal(x, y)


def test_memory_is_linear():
    peaks = []
    for tokens in (8192, 16384):
        r, k, v, w, u, gy = inputs(1, tokens, 3)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.ops.vision_rwkv.wkv6_backward(r, k, v, w, u, gy)
        peaks.append((torch.cuda.max_memory_allocated() - before) / (r.numel() * r.element_size()))
    # Four gradients and the states between chunks: four times as much as a tensor, whatever T.
    assert max(peaks) < 8.5 and abs(peaks[0] - peaks[1]) < 0.2


def test_wrong_arguments():
    r, k, v, w, u, _ = inputs(1, 8, 2)
    with pytest.raises(RuntimeError, match='shape'):
        torch.ops.vision_rwkv.wkv6(r, k, v[:, :4], w, u)
    with pytest.raises(RuntimeError, match='u must have shape'):
        torch.ops.vision_rwkv.wkv6(r, k, v, w, u[:1])
    with pytest.raises(RuntimeError, match='device'):
        torch.ops.vision_rwkv.wkv6(r, k, v, w, u.cpu())


def gated_inputs(batch, tokens, heads, dtype, base_mean=-3):
    """r, k, v, raw, base, u, gate, weight, bias of `gated_wkv6`."""
    torch.manual_seed(tokens)
    r, k, v, raw, gate = (torch.randn(batch, tokens, heads * N, device='cuda').to(dtype) for _ in range(5))
    base, weight, bias = (torch.randn(heads * N, device='cuda') for _ in range(3))
    return r, k, v, raw, base + base_mean, torch.randn(heads, N, device='cuda'), gate, weight, bias


def gated_by_definition(r, k, v, raw, base, u, gate, weight, bias, eps):
    heads, doubles = len(u), [x.double() for x in (r, k, v, -torch.exp(raw.double() + base.double()), u)]
    y = fallback.wkv6(*(x.unflatten(-1, (heads, -1)) for x in doubles[:4]), doubles[4]).flatten(0, 1).flatten(1)
    normed = torch.nn.functional.group_norm(y, heads, weight.double(), bias.double(), eps).view_as(gate)
    return normed * torch.nn.functional.silu(gate.double())


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('size', [(2, 1, 1), (2, 49, 3), (1, 196, 2), (300, 196, 1), (1, 4200, 2)])
def test_gated(size, dtype):
    given = gated_inputs(*size, dtype)
    got, want = gated_wkv6(*given, 1e-5), gated_by_definition(*given, 1e-5)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).norm() <= TOLERANCE[dtype][0] * want.norm()


@pytest.mark.parametrize('tokens', STRIP_TOKENS)
@pytest.mark.parametrize('base_mean', [-12, -3, 4])  # decays of nearly 1, of all sizes and of nearly 0
@pytest.mark.parametrize('full', [True, False])
def test_gated_bfloat16_by_strips(tokens, base_mean, full):
    given = gated_inputs(full_batch(3) if full else 2, tokens, 3, torch.bfloat16, base_mean)
    got, want = gated_wkv6(*given, 1e-5), gated_by_definition(*given, 1e-5)
    check_samples(got, want)
    assert torch.equal(gated_wkv6(*given, 1e-5), got)


def test_gated_takes_views_and_no_tokens_and_other_dtypes():
    r, k, v, raw, base, u, gate, *norm = gated_inputs(2, 60, 2, torch.float32)
    views = [x.unflatten(1, (30, 2))[:, :, 0] for x in (r, k, v, raw, gate)]
    r, k, v, raw, gate = (x.contiguous() for x in views)
    want = gated_wkv6(r, k, v, raw, base, u, gate, *norm, 1e-5)
    assert torch.equal(gated_wkv6(*views[:4], base, u, views[4], *norm, 1e-5), want)
    doubles = [x.double() for x in (r, k, v, raw, base, u, gate, *norm)]
    assert (gated_wkv6(*doubles, 1e-5) - want).norm() <= 1e-5 * want.norm()
    empty = [x[:, :0] for x in (r, k, v, raw, gate)]
    assert gated_wkv6(*empty[:4], base, u, empty[4], *norm, 1e-5).shape == (2, 0, 2 * N)
    with pytest.raises(RuntimeError, match='base must have 128 values'):
        gated_wkv6(r, k, v, raw, base[:5], u, gate, *norm, 1e-5)
