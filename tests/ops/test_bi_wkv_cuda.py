"""Bi-WKV's CUDA kernels where they differ from the others: tiles, exact path, alignment, streams, graphs, memory."""

import pytest
import torch

from vision_rwkv.ops import bi_wkv, fallback, gated_bi_wkv

pytestmark = pytest.mark.cuda

NAMES = ('y', 'w', 'u', 'k', 'v')
# Relative L2 error of y and of the gradients, for inputs rounded to the type.
TOLERANCE = {
    torch.float32: (1e-5, 5e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
    torch.float64: (1e-10, 1e-10),
}


@pytest.fixture(autouse=True)
def native():
    if not torch._C._dispatch_has_kernel_for_dispatch_key('vision_rwkv::bi_wkv', 'CUDA'):
        pytest.skip('the library was built without CUDA code')


def inputs(batch, tokens, channels, dtype=torch.float32, *, w=None, u=1.0, k=1.0, parameters=torch.float32):
    """w, u, k, v and the gradient of y; w uniform in +-w (20/T if None), the others normal."""
    torch.manual_seed(tokens)
    random = lambda *shape: torch.randn(*shape, device='cuda', dtype=torch.float64)  # noqa: E731
    decay = (2 * torch.rand(channels, device='cuda', dtype=torch.float64) - 1) * (20 / tokens if w is None else w)
    key, value, gy = (random(batch, tokens, channels) for _ in range(3))
    return decay.to(parameters), (u * random(channels)).to(parameters), *(x.to(dtype) for x in (k * key, value, gy))


def run(w, u, k, v, gy) -> list[torch.Tensor]:
    """y and the gradients of w, u, k, v."""
    leaves = [x.detach().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def check(case):
    doubles = [x.double() for x in case]
    expected = [fallback.bi_wkv(*doubles[:4]), *fallback.bi_wkv_backward(*doubles)]
    for name, got, want, source in zip(NAMES, run(*case), expected, (case[2], *case[:4]), strict=True):
        assert got.dtype == source.dtype and got.shape == source.shape, name
        limit = TOLERANCE[case[2].dtype][0 if name == 'y' else 1]
        # One token alone has no gradient of w, u and k, two have none of w: what is there then is rounding.
        scale = want.norm() if want.norm() > 1e-12 else 1.0
        assert (got.double() - want).norm() <= limit * scale, name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('tokens', [1, 2, 16, 31, 33, 49, 196, 197, 256, 257, 576, 1025, 4200])
def test_every_length(tokens, dtype):
    check(inputs(2, tokens, 40, dtype))


# The first is taken in one pass; of the second, fewer tiles are on chip at the same time than it has.
@pytest.mark.parametrize('tokens', [16384, 40000])
def test_many_chunks(tokens):
    check(inputs(1, tokens, 20))


def test_more_tiles_than_blocks_in_one_pass():
    check(inputs(6, 8192, 112))


@pytest.mark.parametrize('tokens', [33, 300])
def test_more_sequences_than_blocks(tokens):
    check(inputs(700, tokens, 33))


# Decays, bonuses and keys that leave the fast path in some channels or in all.
@pytest.mark.parametrize('w,u,k', [(5, 1, 1), (None, 1, 40), (0.05, 1, 10), (None, 60, 1), (0.2, 1, 3), (1, 30, 5)])
@pytest.mark.parametrize('tokens', [196, 1024])
def test_exact_path(tokens, w, u, k):
    check(inputs(2, tokens, 40, w=w, u=u, k=k))


def test_exact_and_fast_tiles_of_one_sequence():
    """Some chunks have a key that only the exact path holds: both kinds read each other's sums."""
    w, u, k, v, gy = inputs(2, 2048, 40, w=1e-3)
    k[:, 100::1024] = 75
    check((w, u, k, v, gy))


@pytest.mark.parametrize('tokens', [33, 300, 1025])
@pytest.mark.parametrize('w,k', [(None, 1), (5, 30)])
def test_double(tokens, w, k):
    check(inputs(2, tokens, 20, torch.float64, w=w, k=k, parameters=torch.float64))


@pytest.mark.parametrize('parameters', [torch.float64, torch.float16])
def test_parameters_of_another_dtype(parameters):
    w, u, k, v, gy = inputs(2, 300, 20, parameters=parameters)
    got = run(w, u, k, v, gy)
    want = run(w.float(), u.float(), k, v, gy)
    assert [x.dtype for x in got] == [k.dtype, parameters, parameters, k.dtype, k.dtype]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('tokens', [100, 700])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_alignment(tokens, dtype):
    """Tensors that 16-byte copies cannot read give the same bits."""
    case = inputs(2, tokens, 48, dtype)
    odd = [torch.empty(x.numel() + 1, dtype=x.dtype, device='cuda')[1:].view_as(x).copy_(x) for x in case]
    assert all(torch.equal(a, b) for a, b in zip(run(*odd), run(*case), strict=True))


@pytest.mark.parametrize('tokens', [196, 1025])
def test_same_bits_twice(tokens):
    case = inputs(3, tokens, 33)
    assert all(torch.equal(a, b) for a, b in zip(run(*case), run(*case), strict=True))


@pytest.mark.parametrize('tokens', [50, 1025])
def test_graph_on_another_stream(tokens):
    case = inputs(2, tokens, 40)
    want = run(*case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(*case)
    for _ in range(2):
        for x in got:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_several_streams_at_once():
    case = inputs(4, 4096, 192)
    want = run(*case)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams * 3:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run(*case))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for got in results for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize('tokens', [196, 4096])
def test_memory(tokens):
    """The workspace is small beside the tensors: outputs and less than one input more."""
    w, u, k, v, gy = inputs(64 if tokens < 1000 else 4, tokens, 192)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.vision_rwkv.bi_wkv_backward(w, u, k, v, gy)
    assert torch.cuda.max_memory_allocated() - before < 3 * k.nbytes


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('tokens,channels', [(1, 40), (49, 33), (196, 192), (257, 48), (4200, 40)])
@pytest.mark.parametrize('u', [1, 60])  # the latter takes the exact path
def test_gated(tokens, channels, u, dtype):
    w, _, k, v, r = inputs(2, tokens, channels, dtype)
    w, u = w * tokens, u * torch.randn(channels, device='cuda') * tokens
    wide = [w.double() / tokens, u.double() / tokens, k.double(), v.double()]
    want = fallback.bi_wkv(*wide) * torch.sigmoid(4 * r.double())
    got = gated_bi_wkv(w, u, k, v, 4 * r)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= TOLERANCE[dtype][0] * want.norm()


def test_gated_takes_views_and_no_tokens():
    w, u, k, v, r = inputs(2, 60, 32)
    k, v, r = (x.unflatten(1, (30, 2))[:, :, 0] for x in (k, v, r))
    want = gated_bi_wkv(w, u, k.contiguous(), v.contiguous(), r.contiguous())
    assert torch.equal(gated_bi_wkv(w, u, k, v, r), want)
    assert gated_bi_wkv(w, u, k[:, :0], v[:, :0], r[:, :0]).shape == (2, 0, 32)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_are_cast_together(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(n, device='cuda') for n in (1, 7, 2048, 2049, 5000, 0)]
    views = [torch.randn(33, device='cuda')[1:], torch.randn(8, 6, device='cuda').t()]
    many = [torch.randn(3, device='cuda') for _ in range(9)]
    for case in (weights, views, many, []):
        got = torch.ops.vision_rwkv.cast_weights(case, dtype)
        assert len(got) == len(case)
        assert all(torch.equal(x, y.to(dtype)) for x, y in zip(got, case, strict=True))


@pytest.mark.parametrize('side', [3, 8, 200])  # not whole vectors, one of them, several blocks
def test_weights_are_cast_into_a_stack(side):
    torch.manual_seed(0)
    weights = [torch.randn(side, side, device='cuda') for _ in range(3)] + [torch.randn(5, device='cuda')]
    for case in (weights, [weights[0].t(), *weights[1:]]):
        stack, other = torch.ops.vision_rwkv.cast_weights(case, torch.bfloat16, 3)
        assert torch.equal(stack, torch.stack(case[:3]).bfloat16()) and torch.equal(other, case[3].bfloat16())
