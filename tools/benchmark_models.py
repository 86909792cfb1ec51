"""Times VRWKV and VRWKV6 beside timm's DeiT: inference and training steps, eager, compiled and as CUDA graphs.

Prints a Markdown table, each line as soon as it is measured. GPU: bfloat16 autocast, medians of CUDA events after a
warm-up, peak memory of the calls (weights included). CPU: float32, two threads, the two models in turns. A training
step is forward and backward of the tokens' mean square. VRWKV6-T is compared with VRWKV-T, everything else with the
DeiT of its size, whose attention is PyTorch's fused one.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from vision_rwkv.backbones import VRWKV, VRWKV6  # noqa: E402
from vision_rwkv.ops import implementation  # noqa: E402

POST_NORM = {'post_norm': True, 'init_values': 1e-5}
OURS = {
    'vrwkv_t': lambda side: VRWKV(img_size=side, embed_dims=192),
    'vrwkv_s': lambda side: VRWKV(img_size=side, embed_dims=384, **POST_NORM),
    'vrwkv_b': lambda side: VRWKV(img_size=side, embed_dims=768, **POST_NORM),
    'vrwkv6_t': lambda side: VRWKV6(img_size=side, embed_dims=192, num_heads=3),
}
DEIT = {'deit_t': 'deit_tiny_patch16_224', 'deit_b': 'deit_base_patch16_224'}
GRAPHS = ('graphs', 'cudagraph')  # torch.compile's; captured by hand
MODES = ('eager', 'compiled', *GRAPHS)


class Row(NamedTuple):
    """A model and its rival at one size of image; ``bars`` is how much faster ours must be, by pass and mode."""

    ours: str
    rival: str
    side: int
    batch: int
    bars: dict[tuple[str, str], float]


def _bars(eager: float, graphs: float, train: float) -> dict[tuple[str, str], float]:
    return {
        ('infer', 'eager'): eager,
        ('infer', 'graphs'): graphs,
        ('train', 'eager'): train,
        ('train', 'compiled'): train,
        ('train', 'graphs'): train,
    }


_SLOWER = _bars(1 / 1.5, 1 / 1.5, 1 / 2)
CUDA_ROWS = {
    't-224': Row('vrwkv_t', 'deit_t', 224, 128, _bars(1, 1, 1)),
    't-512': Row('vrwkv_t', 'deit_t', 512, 32, {}),
    't-1024': Row('vrwkv_t', 'deit_t', 1024, 8, {('infer', 'eager'): 1.5, ('infer', 'graphs'): 2}),
    't-2048': Row('vrwkv_t', 'deit_t', 2048, 2, _bars(4, 5, 3)),
    't-2048x1': Row('vrwkv_t', 'deit_t', 2048, 1, {('infer', 'cudagraph'): 3}),
    'b-224': Row('vrwkv_b', 'deit_b', 224, 64, {('infer', 'eager'): 1, ('train', 'eager'): 1}),
    'b-1024': Row('vrwkv_b', 'deit_b', 1024, 4, {}),
    'b-2048x1': Row('vrwkv_b', 'deit_b', 2048, 1, {('infer', 'eager'): 4, ('train', 'eager'): 3}),
    '6-224': Row('vrwkv6_t', 'vrwkv_t', 224, 128, _SLOWER),
    '6-1024': Row('vrwkv6_t', 'vrwkv_t', 1024, 8, _SLOWER),
    '6-2048': Row('vrwkv6_t', 'vrwkv_t', 2048, 2, _SLOWER),
    '6-2048x1': Row('vrwkv6_t', 'vrwkv_t', 2048, 1, {('infer', 'cudagraph'): 1 / 1.5, ('train', 'eager'): 1 / 2}),
}
CPU_ROWS = {
    'cpu-224': Row('vrwkv_t', 'deit_t', 224, 1, {('infer', 'eager'): 1}),
    'cpu-1024': Row('vrwkv_t', 'deit_t', 1024, 1, {('infer', 'eager'): 2.3}),
    'cpu-2048': Row('vrwkv_t', 'deit_t', 2048, 1, {('infer', 'eager'): 6}),
}
SCALING = {f'scale-{name[-1]}': name for name in ('vrwkv_t', 'vrwkv_s', 'vrwkv_b')}
SCALING_SIDES = (1024, 2048, 4096)
SCALING_BAR = 4.4  # for four times the tokens


def make(name: str, side: int, device: str) -> nn.Module:
    """The model, for images of this side, in eval mode."""
    if name in OURS:
        model = OURS[name](side)
    else:
        import timm

        model = timm.create_model(DEIT[name], img_size=side, num_classes=0)
        if not all(block.attn.fused_attn for block in model.blocks):
            sys.exit('benchmark_models.py: error: timm does not use fused attention here, and a comparison needs it')
    return model.eval().to(device)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What the model makes of the images before any head."""
    return model(x)[-1] if isinstance(model, (VRWKV, VRWKV6)) else model.forward_features(x)


class Net(nn.Module):
    """`features` as a module, for torch.compile."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return features(self.model, x)


def step(name: str, side: int, batch: int, what: str, mode: str, device: str) -> Callable[[], object]:
    """What is timed: one inference or training step of a new model."""
    net, x = Net(make(name, side, device)), torch.randn(batch, 3, side, side, device=device)
    if mode == 'compiled':
        net = torch.compile(net, dynamic=False, fullgraph=True)
    elif mode == 'graphs':
        net = torch.compile(net, dynamic=False, fullgraph=True, mode='reduce-overhead')
    # Inference mode spares both sides autograd's bookkeeping; the compiler has its own.
    quiet = torch.no_grad if mode in ('compiled', 'graphs') else torch.inference_mode

    def infer() -> Tensor:
        with quiet(), torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            return net(x)

    def train() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            y = net(x)
        y.float().square().mean().backward()

    if what == 'train':
        net.train()
        return train
    return captured(infer) if mode == 'cudagraph' else infer


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """``function`` as a CUDA graph; the call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(reads: Callable[[], object] = function) -> None:
        """``reads`` holds the model and the images, whose memory the graph reads."""
        graph.replay()

    return replay


def cuda_time(function: Callable[[], object], seconds: float, graph: bool = False) -> tuple[float, float]:
    """Median milliseconds and peak GiB of a call; of a graph what it keeps, as its replay allocates nothing."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    count = int(min(max(seconds / once, 5), 200))
    for _ in range(count // 2):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2)]
    for first, last in zip(*events, strict=True):
        first.record()
        function()
        last.record()
    torch.cuda.synchronize()
    times = [first.elapsed_time(last) for first, last in zip(*events, strict=True)]
    memory = torch.cuda.max_memory_allocated()
    if graph:
        torch.cuda.empty_cache()
        memory = torch.cuda.memory_reserved()
    return statistics.median(times), memory / 2**30


def clean() -> None:
    """Forget compiled code and free memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def verdict(ratio: float, bar: float | None) -> str:
    """A bar and whether ``ratio`` reaches it."""
    return '-' if bar is None else f'{bar:.2f} {"met" if ratio >= bar else "NOT met"}'


def cuda_row(key: str, row: Row, passes: list[str], modes: list[str], seconds: float, profile: bool) -> None:
    """Print the lines of one row."""
    for what in passes:
        for mode in modes:
            if what == 'train' and mode == 'cudagraph':
                continue
            cells = []
            for name in (row.ours, row.rival):
                function = step(name, row.side, row.batch, what, mode, 'cuda')
                cells.append(cuda_time(function, seconds, mode in GRAPHS))
                if profile and name == row.ours:
                    print_profile(function)
                del function
                clean()
            (ours, memory), (rival, rival_memory) = cells
            fits = '' if memory <= rival_memory or what == 'infer' else ' MORE'
            print(
                f'| {key} | {row.side}, {row.batch} | {what} | {mode} | {row.ours} {ours:.2f} ({memory:.2f}{fits}) '
                f'| {row.rival} {rival:.2f} ({rival_memory:.2f}) | {rival / ours:.2f} '
                f'| {verdict(rival / ours, row.bars.get((what, mode)))} |',
                flush=True,
            )


def print_profile(function: Callable[[], object]) -> None:
    """The kernels that a call spends its time in."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    for event in kernels[:24]:
        print(f'    {event.self_device_time_total / 3000:8.3f} ms {event.count // 3:5d}x  {event.key[:90]}')


def scaling_row(key: str, name: str, passes: list[str], seconds: float) -> None:
    """Print how time and memory of one image grow with the tokens."""
    for what in passes:
        before: tuple[float, float] | None = None
        for side in SCALING_SIDES:
            time_ms, memory = cuda_time(step(name, side, 1, what, 'eager', 'cuda'), seconds)
            clean()
            growth = '-' if before is None else f'{time_ms / before[0]:.2f}, {memory / before[1]:.2f}'
            good = before is None or max(time_ms / before[0], memory / before[1]) <= SCALING_BAR
            print(
                f'| {key} | {side}, 1 | {what} | eager | {name} {time_ms:.2f} ({memory:.2f}) | - | x4 tokens: {growth} '
                f'| {"-" if before is None else f"at most {SCALING_BAR} " + ("met" if good else "NOT met")} |',
                flush=True,
            )
            before = time_ms, memory


def cpu_row(key: str, row: Row, seconds: float) -> None:
    """Print one row, the two models in turns, so that both see the same machine."""
    functions = [step(name, row.side, row.batch, 'infer', 'eager', 'cpu') for name in (row.ours, row.rival)]
    times: list[list[float]] = [[], []]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, into in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            into.append(1e3 * (time.perf_counter() - start))
    ours, rival = map(statistics.median, times)
    print(
        f'| {key} | {row.side}, {row.batch} | infer | eager | {row.ours} {ours:.1f} | {row.rival} {rival:.1f} '
        f'| {rival / ours:.2f} | {verdict(rival / ours, row.bars.get(("infer", "eager")))} |',
        flush=True,
    )


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='default: cpu')
    parser.add_argument(
        '--rows', nargs='+', choices=[*CUDA_ROWS, *SCALING, *CPU_ROWS], help='default: all of the device'
    )
    parser.add_argument(
        '--passes', nargs='+', choices=['infer', 'train'], default=['infer', 'train'], help='on a GPU; default: both'
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES), help='on a GPU; default: all')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument('--seconds', type=float, help='time for each figure (default: 1 on a GPU, 20 on a CPU)')
    parser.add_argument('--profile', action='store_true', help='list the GPU kernels of our model under each line')
    args = parser.parse_args()
    torch.manual_seed(0)
    known = list(CPU_ROWS) if args.device == 'cpu' else [*CUDA_ROWS, *SCALING]
    rows = args.rows or known
    if wrong := [row for row in rows if row not in known]:
        parser.error(f'not rows of --device {args.device}: {", ".join(wrong)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('benchmark_models.py: error: --device cuda needs a CUDA GPU, and PyTorch sees none')
    print(f'{device_name(args.device, args.threads)}, PyTorch {torch.__version__}, {implementation(args.device)}\n')
    memory = ' (peak GiB)' if args.device == 'cuda' else ''
    print(f'| row | side, batch | pass | mode | ours ms{memory} | rival ms{memory} | times faster | bar |')
    print('|---' * 8 + '|', flush=True)
    for key in rows:
        if key in CPU_ROWS:
            cpu_row(key, CPU_ROWS[key], args.seconds or 20)
        elif key in SCALING:
            scaling_row(key, SCALING[key], args.passes, args.seconds or 1)
        else:
            cuda_row(key, CUDA_ROWS[key], args.passes, args.modes, args.seconds or 1, args.profile)


def device_name(device: str, threads: int) -> str:
    """The machine in words; sets the number of threads on a CPU."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    torch.set_num_threads(threads)
    return f'{threads} threads, {torch.backends.cpu.get_cpu_capability()}'


if __name__ == '__main__':
    main()
