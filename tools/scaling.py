"""Memory and time of VRWKV and VRWKV6 by resolution and batch, from what layers keep, read and write: docs/scaling.md.

Prints the table, or with --measured a file of measured points beside what the model says of them; exit status 1 if one
is further off than --within percent.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from torch import nn  # noqa: E402

from vision_rwkv.backbones import VRWKV, VRWKV6  # noqa: E402
from vision_rwkv.backbones.blocks import ceil_div  # noqa: E402

GIB = 2**30
WORKSPACE = 32 * 2**20  # cuBLAS's, on an H100 or H200
TILE, CHUNK = 256, 64  # tokens that Bi-WKV and WKV6 take at a time on CUDA
POST = {'post_norm': True, 'init_values': 1e-5}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    'vrwkv_t': lambda side: VRWKV(img_size=side, embed_dims=192),
    'vrwkv_s': lambda side: VRWKV(img_size=side, embed_dims=384, **POST),
    'vrwkv_b': lambda side: VRWKV(img_size=side, embed_dims=768, **POST),
    'vrwkv_l': lambda side: VRWKV(img_size=side, embed_dims=1024, depth=24, key_norm=True, **POST),
    'vrwkv6_t': lambda side: VRWKV6(img_size=side, embed_dims=192, num_heads=3),
    'vrwkv6_s': lambda side: VRWKV6(img_size=side, embed_dims=384, num_heads=6, **POST),
    'vrwkv6_b': lambda side: VRWKV6(img_size=side, embed_dims=768, num_heads=12, **POST),
}


class Layer(NamedTuple):
    """A layer in units of one bfloat16 tensor (B, T, C). Float32 counts twice; docs/scaling.md lists the terms.

    kept: what autograd keeps. working: what else lives at the fullest moment of the backward pass. fullest: what lives
    at that of inference. cast: bytes over C^2 of copies of weights, of all layers in inference, of each layer in
    training. passes: read and written outside of matrix products, forward and in what training adds; products: in them.
    square: multiply-adds of a token over C^2, forward. launches: kernels, forward.
    """

    kept: float
    working: float
    fullest: float
    cast: tuple[float, float]
    passes: tuple[float, float]
    products: tuple[float, float]
    square: float
    launches: int


def layer_of(model: nn.Module) -> Layer:
    """What one layer of the model costs."""
    block, tokens = model.layers[1], model.grid[0] * model.grid[1]
    thin = (5 * 32 + 64) / model.embed_dims  # low-rank values of VRWKV6, in units
    stats = 0 if block.post_norm else 2 * 4 / model.embed_dims  # of both norms: two float32 numbers a token each
    if isinstance(model, VRWKV6):
        states = 4 * (ceil_div(tokens, CHUNK) - 1) * CHUNK / tokens  # between chunks: 64 x 64 a head, both directions
        products = 25 + thin, 69 + 6 * thin
        layer = Layer(18 + stats, 25 + 3 * thin, 10 + states, (28, 0), (65, 157), products, 14 + 2 * thin, 22)
    else:
        again = 2 if tokens > TILE else 0  # keys and values are read twice, three times in the backward pass
        layer = Layer(14 + stats, 10, 12, (26, 0), (32 + again, 79 + 3 * again), (20, 40), 13, 14)
    if block.post_norm:  # a norm of each branch: the first one's input is kept, and read again
        layer = layer._replace(kept=layer.kept + 1, passes=(layer.passes[0], layer.passes[1] + 1))
    if block.ffn.key_norm is not None:  # of y, and of the hidden keys, in float32 under autocast
        passes = layer.passes[0] + 3 + 12 + 12, layer.passes[1] + 8 + 32
        cast = 2 * 4 * len(model.layers), 2 * 4  # of the maps of the hidden keys: those of all layers stay
        layer = layer._replace(kept=layer.kept + 14, working=13, fullest=25, cast=cast, passes=passes)
    return layer


class Gpu(NamedTuple):
    """What a GPU's kernels reach: bytes a second forward and backward, operations a second, seconds for a launch."""

    forward: float = 2.95e12
    backward: float = 2.06e12
    products: float = 700e12
    launch: float = 1.5e-6


class Point(NamedTuple):
    """A model at one size. kind: 'infer' or 'train', a forward pass, or one with its backward."""

    model: str
    side: int
    batch: int
    kind: str


def tensors(point: Point, model: nn.Module) -> tuple[float, float]:
    """Bytes of one unit, and of the images."""
    tokens = point.batch * model.grid[0] * model.grid[1]
    return 2.0 * tokens * model.embed_dims, 4.0 * point.batch * 3 * point.side**2


def memory(point: Point, optimizer: bool = False, workspaces: int = 1) -> float:
    """Peak bytes allocated under bfloat16 autocast, weights and images included.

    optimizer: AdamW's two tensors as well. workspaces: of cuBLAS, which keeps one for each thread on each stream.
    """
    model = made(point)
    layer, (unit, images) = layer_of(model), tensors(point, model)
    weights = 4 * sum(p.numel() for p in model.parameters())
    square = model.embed_dims**2
    always = workspaces * WORKSPACE + weights + images
    if point.kind == 'infer':
        return always + layer.cast[0] * square + layer.fullest * unit
    always += 2 * weights if optimizer else 0
    # The patches, the first norm's input, the model's output; and the gradient of the last layer's last map.
    start = images / 2 + (len(model.layers) * layer.kept + layer.working + 2 + 2) * unit
    start += (len(model.layers) * layer.cast[1] + 4 * 4) * square
    end = weights + images / 2 + (layer.kept + layer.working) * unit  # all gradients, and the first layer
    return always + max(start, end)


def seconds(point: Point, gpu: Gpu) -> float:
    """Time of the kernels of a pass, launched without waiting for the host (as a CUDA graph, or where each is long)."""
    model = made(point)
    layer, (unit, images) = layer_of(model), tensors(point, model)
    square = model.embed_dims**2
    flops, cast = unit * square / model.embed_dims * layer.square, 8 * 13 * square  # weights in float32 and bfloat16
    total = layer.launches * gpu.launch + (layer.passes[0] * unit + cast) / gpu.forward
    total += max(layer.products[0] * unit / gpu.forward, flops / gpu.products)
    if point.kind == 'train':
        total += 2 * layer.launches * gpu.launch + (layer.passes[1] * unit + 2 * cast) / gpu.backward
        total += max(layer.products[1] * unit / gpu.backward, 2 * flops / gpu.products)
    ends = 2 * images + (14 if point.kind == 'infer' else 40) * unit
    return len(model.layers) * total + ends / gpu.forward


_made: dict[tuple[str, int], nn.Module] = {}


def made(point: Point) -> nn.Module:
    """The model, without data."""
    key = point.model, point.side
    if key not in _made:
        with torch.device('meta'):
            _made[key] = MODELS[point.model](point.side)
    return _made[key]


def table(gpu: Gpu) -> None:
    """Print every model at a few sizes, and what data parallelism sends."""
    print('| model | side, batch | infer ms | infer GiB | train ms | train GiB | with AdamW | kept an image MiB |')
    print('|---' * 8 + '|')
    for name in MODELS:
        for side, batch in ((224, 128), (512, 32), (1024, 8), (2048, 2)):
            infer, train = (Point(name, side, batch, kind) for kind in ('infer', 'train'))
            model = made(train)
            kept = layer_of(model).kept * len(model.layers) * tensors(train, model)[0] / batch / 2**20
            times = [f'{1e3 * seconds(point, gpu):.1f}' for point in (infer, train)]
            sizes = [f'{x / GIB:.2f}' for x in (memory(infer), memory(train), memory(train, optimizer=True))]
            cells = (name, f'{side}, {batch}', times[0], sizes[0], times[1], *sizes[1:], f'{kept:.0f}')
            print('| ' + ' | '.join(cells) + ' |')
    print('\n| model | parameters M | float32 gradients MB | all-reduce of 8 / 256, MB sent a GPU |\n|---|---|---|---|')
    for name in MODELS:
        parameters = sum(p.numel() for p in made(Point(name, 224, 1, 'train')).parameters())
        sent = [2 * (n - 1) / n * 4 * parameters / 1e6 for n in (8, 256)]
        print(f'| {name} | {parameters / 1e6:.1f} | {4 * parameters / 1e6:.0f} | {sent[0]:.0f} / {sent[1]:.0f} |')


def compare(path: Path, gpu: Gpu, within: float) -> bool:
    """Print measured points beside the model's; whether all are within so many percent. Raises ValueError."""
    fine = True
    print('| model | side, batch | pass | ms measured | ms model | workspaces | GiB measured | GiB model |')
    print('|---' * 8 + '|')
    for entry in json.loads(path.read_text()):
        if entry.get('model') not in MODELS or entry.get('kind') not in ('infer', 'train'):
            raise ValueError(f'{path}: expected a model of {", ".join(MODELS)} and a kind infer or train, got {entry}')
        point, workspaces = Point(*(entry[name] for name in Point._fields)), entry.get('workspaces', 1)
        cells = [point.model, f'{point.side}, {point.batch}', point.kind]
        for name, value in (('ms', 1e3 * seconds(point, gpu)), ('gib', memory(point, workspaces=workspaces) / GIB)):
            got = entry.get(name)
            if name == 'gib':
                cells.append('-' if got is None else f'{workspaces}')
            off = None if got is None else 100 * (value / got - 1)
            fine = fine and (off is None or abs(off) <= within)
            fixed = ', fixes a constant' if name == 'ms' and entry.get('calibrates') else ''
            cells += ['-'] * 2 if off is None else [f'{got:g}', f'{value:.2f} ({off:+.1f} %{fixed})']
        print('| ' + ' | '.join(cells) + ' |')
    return fine


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--measured', type=Path, help='JSON: a list of {model, side, batch, kind, ms and/or gib, workspaces}'
    )
    parser.add_argument('--within', type=float, default=15, help='percent (default: 15)')
    args = parser.parse_args()
    if args.measured is None:
        table(Gpu())
    elif not args.measured.is_file():
        sys.exit(f'scaling.py: error: {args.measured} does not exist')
    else:
        try:
            fine = compare(args.measured, Gpu(), args.within)
        except ValueError as error:  # what is no JSON as well
            sys.exit(f'scaling.py: error: {error}')
        if not fine:
            sys.exit(f'scaling.py: points are more than {args.within:g} percent off')


if __name__ == '__main__':
    main()
