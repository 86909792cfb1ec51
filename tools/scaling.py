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

GIB = 2**30
WORKSPACE = 32 * 2**20  # cuBLAS's, on each stream
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

    kept: what autograd keeps. working: what else lives at the fullest moment of the backward pass. passes: read and
    written outside of matrix products, forward and backward; products: in them. square: multiply-adds of a token
    over C^2, forward. launches: kernels, forward.
    """

    kept: float
    working: float
    passes: tuple[float, float]
    products: tuple[float, float]
    square: float
    launches: int


def layer_of(model: nn.Module) -> Layer:
    """What one layer of the model costs."""
    block = model.layers[1]
    thin = (5 * 32 + 64) / model.embed_dims  # low-rank values of VRWKV6, in units
    if isinstance(model, VRWKV6):
        layer = Layer(29 + thin, 20, (82, 171), (32 + 3 * thin, 69 + 6 * thin), 14 + 2 * thin, 30)
    else:
        layer = Layer(14, 12, (38, 83), (20, 40), 13, 21)
    if block.post_norm:  # a norm of each branch: the first one's input is kept, both are read again
        layer = layer._replace(kept=layer.kept + 1, passes=(layer.passes[0] - 2, layer.passes[1] + 4))
    if block.ffn.key_norm is not None:  # of y, and of the hidden keys, in float32 under autocast
        more = 2 + 1 + 8 + 4
        passes = layer.passes[0] + 3 + 12 + 12, layer.passes[1] + 8 + 32
        layer = layer._replace(kept=layer.kept + more, working=layer.working + 12, passes=passes)
    return layer


class Gpu(NamedTuple):
    """What a GPU's kernels reach: bytes a second forward and backward, operations a second, seconds for a launch."""

    forward: float = 3.3e12
    backward: float = 2.0e12
    products: float = 600e12
    launch: float = 2.5e-6


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


def memory(point: Point, optimizer: bool = False) -> float:
    """Peak bytes under bfloat16 autocast, weights and images included; ``optimizer``: AdamW's two tensors as well."""
    model = made(point)
    layer, (unit, images) = layer_of(model), tensors(point, model)
    parameters = sum(p.numel() for p in model.parameters())
    if point.kind == 'infer':  # residual stream twice, branch, hidden keys and their squares, receptance, values
        return WORKSPACE + parameters * (4 + 2) + images + 15 * unit
    ends = 2 + 5 + 6  # weights' gradients are not units: embedding and first norm, final norm, map and its gradient
    states = parameters * (4 + 4 + (8 if optimizer else 0))
    return WORKSPACE + states + 1.5 * images + (len(model.layers) * layer.kept + layer.working + ends) * unit


def seconds(point: Point, gpu: Gpu) -> float:
    """Time of the kernels of a pass, launched without waiting for the host (as a CUDA graph, or where each is long)."""
    model = made(point)
    layer, (unit, images) = layer_of(model), tensors(point, model)
    flops = 2 * (unit / 2) * model.embed_dims * layer.square  # of a layer
    total = layer.launches * gpu.launch + layer.passes[0] * unit / gpu.forward
    total += max(layer.products[0] * unit / gpu.forward, flops / gpu.products)
    if point.kind == 'train':
        total += 2 * layer.launches * gpu.launch + layer.passes[1] * unit / gpu.backward
        total += max(layer.products[1] * unit / gpu.backward, 2 * flops / gpu.products)
    ends = 2.5 * images + (10 if point.kind == 'infer' else 40) * unit
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
    print('| model | side, batch | pass | ms measured | ms model | GiB measured | GiB model |')
    print('|---' * 7 + '|')
    for entry in json.loads(path.read_text()):
        if entry.get('model') not in MODELS or entry.get('kind') not in ('infer', 'train'):
            raise ValueError(f'{path}: expected a model of {", ".join(MODELS)} and a kind infer or train, got {entry}')
        point = Point(*(entry[name] for name in Point._fields))
        cells = [point.model, f'{point.side}, {point.batch}', point.kind]
        for name, value in (('ms', 1e3 * seconds(point, gpu)), ('gib', memory(point) / GIB)):
            got = entry.get(name)
            off = None if got is None else 100 * (value / got - 1)
            fine = fine and (off is None or abs(off) <= within)
            cells += ['-' if got is None else f'{got:g}', f'{value:.2f}' + ('' if off is None else f' ({off:+.0f} %)')]
        print('| ' + ' | '.join(cells) + ' |')
    return fine


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--measured', type=Path, help='JSON: a list of {model, side, batch, kind, ms and/or gib}')
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
        sys.exit(0 if fine else f'scaling.py: points are more than {args.within:g} percent off')


if __name__ == '__main__':
    main()
