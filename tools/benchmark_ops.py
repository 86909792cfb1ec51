"""Time the operators: on the CPU against plain PyTorch operators, on a GPU against the memory floor and rivals.

CPU, float32, medians: Bi-WKV in units of torch.exp(k) plus torch.exp(v), WKV6 in units of one torch.bmm of
(2BH, T, 64) by (2BH, 64, 64). GPU: medians by triton's do_bench, which flushes the L2 cache before each call, around
the replay of a CUDA graph; the floor is each input read once and each output written once at the bandwidth of a
device copy measured in the same run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from vision_rwkv.ops import bi_wkv, implementation, wkv6  # noqa: E402

HEAD = 64
CPU_BI_WKV = [(8, 196, 192), (1, 4096, 192), (1, 16384, 192)]
CPU_WKV6 = [(4, 196, 3), (1, 2048, 3), (1, 4096, 3), (1, 8192, 3)]
# The better of the kernels published with the paper, on one H200, float32: forward, backward in ms.
PUBLISHED_BI_WKV = {
    (128, 196, 192): (0.170, 0.534),
    (128, 196, 384): (0.330, 1.065),
    (64, 196, 768): (0.330, 1.064),
    (8, 1024, 768): (0.100, 0.478),
    (1, 4096, 192): (0.101, 0.308),
    (2, 4200, 192): (0.105, 0.412),
    (1, 16384, 192): (0.397, 1.651),
    (8, 16384, 192): (0.562, 2.253),
    (1, 16384, 768): (0.519, 1.933),
}
PUBLISHED_WKV6 = {
    (128, 196, 3): (0.388, 1.622),
    (128, 196, 6): (0.463, 2.472),
    (64, 196, 12): (0.462, 2.472),
    (8, 1024, 12): (1.902, 7.627),
    (1, 4096, 3): (6.170, 20.756),
    (1, 16384, 3): (27.67, 113.3),
    (2, 16384, 3): None,
    (1, 16384, 12): (31.31, 121.6),
}
# flash-linear-attention 0.6 on the same machine, two causal calls: float32 forward, backward; bfloat16 the same.
FLA_WKV6 = {
    (128, 196, 3): (0.710, 1.715, 0.774, 2.261),
    (128, 196, 6): (0.960, 2.062, 0.772, 2.868),
    (64, 196, 12): (0.959, 1.957, 1.522, 1.825),
    (8, 1024, 12): (0.723, 1.564, 0.737, 2.746),
    (1, 4096, 3): (0.751, 1.463, 0.725, 1.625),
    (1, 16384, 3): (0.869, 2.311, 0.978, 2.395),
    (2, 16384, 3): None,
    (1, 16384, 12): (1.628, 3.893, 1.578, 3.633),
}


def bi_wkv_inputs(b: int, t: int, c: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """w, u, k, v as a trained model has them: w and u over T, float32."""
    w, u = (-5 + 8 * torch.rand(c, device=device)) / t, torch.randn(c, device=device) / t
    k, v = (torch.randn(b, t, c, device=device).to(dtype) for _ in range(2))
    return w, u, k, v


def wkv6_inputs(b: int, t: int, h: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """r, k, v, w, u with decays exp(-exp(raw)) from nearly 1 to strong; w and u stay float32."""
    r, k, v = (torch.randn(b, t, h, HEAD, device=device).to(dtype) for _ in range(3))
    w = -torch.exp(-6 + 5 * torch.rand(b, t, h, HEAD, device=device))
    return r, k, v, w, torch.randn(h, HEAD, device=device)


def step(op: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward of ``op`` through autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gy = torch.randn_like(op(*inputs))
    return lambda: torch.autograd.grad(op(*leaves), leaves, gy)


def together(*functions: Callable[[], object], seconds: float) -> list[float]:
    """Median milliseconds of each function, called in turns so that all of them see the same machine."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, into in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            into.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(values) for values in times]


def benchmark_cpu(seconds: float) -> None:
    """Print the CPU table."""
    print(f'{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {implementation("cpu")}')
    print('| operator | shape | unit ms | forward ms | units | forward + backward ms | units |')
    print('|---' * 7 + '|')
    for shape in CPU_BI_WKV:
        inputs = bi_wkv_inputs(*shape, 'cpu', torch.float32)
        _, _, k, v = inputs
        unit = lambda k=k, v=v: (torch.exp(k), torch.exp(v))  # noqa: E731
        print_cpu('bi_wkv', shape, bi_wkv, inputs, unit, seconds)
    for shape in CPU_WKV6:
        b, t, h = shape
        left, right = torch.randn(2 * b * h, t, HEAD), torch.randn(2 * b * h, HEAD, HEAD)
        unit = lambda left=left, right=right: torch.bmm(left, right)  # noqa: E731
        print_cpu('wkv6', (b, t, h, HEAD), wkv6, wkv6_inputs(b, t, h, 'cpu', torch.float32), unit, seconds)


def print_cpu(name: str, shape: tuple[int, ...], op: Callable, inputs: tuple, unit: Callable, seconds: float) -> None:
    unit_ms, forward, both = together(unit, lambda: op(*inputs), step(op, inputs), seconds=seconds)
    print(
        f'| {name} | {shape} | {unit_ms:.3f} | {forward:.3f} | {forward / unit_ms:.2f} '
        f'| {both:.3f} | {both / unit_ms:.2f} |',
        flush=True,
    )


def replayed(function: Callable[[], object]) -> float:
    """Median milliseconds of ``function`` as a CUDA graph."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
    torch.cuda.synchronize()
    return do_bench(graph.replay, warmup=10, rep=60, return_mode='median')


def forward_and_backward(name: str, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Milliseconds of the operator and of its backward operator, each alone."""
    forward = getattr(torch.ops.vision_rwkv, name)
    backward = getattr(torch.ops.vision_rwkv, f'{name}_backward')
    gy = torch.randn_like(forward(*inputs))
    return replayed(lambda: forward(*inputs)), replayed(lambda: backward(*inputs, gy))


def copy_bandwidth() -> float:
    """Bytes read and written a millisecond by a large device copy."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device='cuda').random_(0, 255)
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode='median')


def fla_times(inputs: tuple[Tensor, ...]) -> tuple[float, float] | None:
    """flash-linear-attention on the same inputs: a causal call each way; None where it is not installed."""
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except ImportError:
        return None
    r, k, v, w, u = (x.detach().to(inputs[0].dtype).requires_grad_() for x in inputs)

    def both() -> Tensor:
        ahead, _ = chunk_rwkv6(r, k, v, w, u, scale=1.0)
        back, _ = chunk_rwkv6(*(x.flip(1) for x in (r, k, v, w)), torch.zeros_like(u), scale=1.0)
        return ahead + back.flip(1)

    from triton.testing import do_bench

    y = both()
    gy = torch.randn_like(y)
    with torch.no_grad():
        forward = do_bench(both, return_mode='median')
    leaves = [r, k, v, w, u]
    backward = do_bench(lambda: torch.autograd.grad(y, leaves, gy, retain_graph=True), return_mode='median')
    return forward, backward


def benchmark_cuda(dtypes: list[torch.dtype]) -> None:
    """Print the GPU tables."""
    bandwidth = copy_bandwidth()
    print(f'{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {implementation("cuda")}')
    print(f'device copy {bandwidth / 1e9:.2f} TB/s; floors are those of float32\n')
    header = (
        '| operator | shape | dtype | floor f / b | forward ms (x floor) | backward ms (x floor) | published f / b |'
    )
    print(header + ' flash-linear-attention f / b |\n' + '|---' * 8 + '|')
    for name, make, published, tensors in (
        ('bi_wkv', bi_wkv_inputs, PUBLISHED_BI_WKV, (3, 5)),
        ('wkv6', wkv6_inputs, PUBLISHED_WKV6, (5, 9)),
    ):
        for shape, rival in published.items():
            for dtype in dtypes:
                inputs = make(*shape, 'cuda', dtype)
                floors = [4 * n * inputs[2].numel() / bandwidth for n in tensors]
                times = forward_and_backward(name, inputs)
                cells = [f'{ms:.4f} ({ms / floor:.1f}x)' for ms, floor in zip(times, floors, strict=True)]
                floor = f'{floors[0]:.4f} / {floors[1]:.4f}'
                print(
                    f'| {name} | {shape} | {str(dtype)[6:]} | {floor} | {cells[0]} | {cells[1]} '
                    f'| {quoted(rival)} | {rival_fla(shape, inputs) if name == "wkv6" else "-"} |',
                    flush=True,
                )


def quoted(times: tuple[float, ...] | None) -> str:
    """Times measured elsewhere."""
    return '-' if times is None else f'{times[0]:.3f} / {times[1]:.3f}'


def rival_fla(shape: tuple[int, ...], inputs: tuple[Tensor, ...]) -> str:
    """flash-linear-attention's times, of this run where it is installed, else the quoted ones."""
    now = fla_times(inputs)
    if now:
        return f'{quoted(now)} (this run)'
    known = FLA_WKV6[shape]
    if known is None or inputs[0].dtype == torch.float16:
        return '-'
    return quoted(known[:2] if inputs[0].dtype == torch.float32 else known[2:])


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='default: cpu')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument('--seconds', type=float, default=3.0, help='time spent on each CPU row (default: 3)')
    dtypes = ['float32', 'bfloat16', 'float16']
    parser.add_argument('--dtypes', nargs='+', choices=dtypes, default=dtypes, help='on a GPU; default: all')
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == 'cpu':
        torch.set_num_threads(args.threads)
        benchmark_cpu(args.seconds)
    elif not torch.cuda.is_available():
        sys.exit('benchmark_ops.py: error: --device cuda needs a CUDA GPU, and PyTorch sees none')
    else:
        benchmark_cuda([getattr(torch, name) for name in args.dtypes])


if __name__ == '__main__':
    main()
