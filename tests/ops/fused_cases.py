"""The operators around Bi-WKV and WKV6 beside their definitions: plain PyTorch expressions and reference.q_shift."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from op_cases import error
from torch import Tensor

from vision_rwkv import ops
from vision_rwkv.ops import reference

EPS = 1e-5
PRECISIONS = {  # dtype of the tokens, autocast's dtype, bounds of the relative L2 error of results and gradients
    'float64': (torch.float64, None, (1e-11, 1e-10)),
    'float32': (torch.float32, None, (1e-5, 5e-5)),
    'bfloat16': (torch.bfloat16, None, (1e-2, 1.5e-2)),
    'float16': (torch.float16, None, (2e-3, 3e-3)),
    'autocast-bfloat16': (torch.float32, torch.bfloat16, (1e-2, 1.5e-2)),
    'autocast-float16': (torch.float32, torch.float16, (2e-3, 3e-3)),
}


class Size(NamedTuple):
    """Tokens (batch, h * w + others, channels), and how they are shifted."""

    batch: int
    hw: tuple[int, int]
    others: int
    channels: int
    pixels: int = 1
    gamma: float = 1 / 4
    heads: int = 1

    @property
    def shift(self) -> tuple[tuple[int, int], int, float, int]:
        return self.hw, self.pixels, self.gamma, self.heads

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.hw[0] * self.hw[1] + self.others, self.channels


SIZES = {
    'tiny': Size(2, (6, 5), 0, 192),
    'heads': Size(2, (3, 7), 1, 128, heads=2),
    'odd': Size(3, (4, 3), 2, 45),
    'one_token': Size(1, (1, 1), 0, 8),
    'far': Size(2, (5, 9), 0, 24, pixels=3, gamma=0.1),
    'past_the_border': Size(1, (2, 6), 0, 64, pixels=9),
    'wide': Size(1, (4, 4), 0, 768),
    'long': Size(2, (40, 33), 0, 48),
    'empty': Size(0, (2, 3), 0, 16),
}


class Case(NamedTuple):
    """An operator, its definition, and its inputs (float64); those named in ``tokens`` take the tokens' dtype."""

    op: Callable[..., Tensor | list[Tensor]]
    definition: Callable[..., Tensor | list[Tensor]]
    inputs: dict[str, Tensor]
    tokens: str = 'x'


def _normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _mixed(n: Tensor, mixes: list[Tensor], size: Size, delta: Tensor | float = 0.0) -> Tensor:
    mix = torch.stack([mix.view(-1) for mix in mixes])[:, None, None] - delta
    return n * mix + reference.q_shift(n, *size.shift) * (1 - mix)


def _dynamic(n, mixes, w1, w2, w3, w4, maps, size: Size) -> list[Tensor]:
    apart = reference.q_shift(n, *size.shift) - n
    z = torch.tanh((n + apart * mixes[0]) @ w1).unflatten(-1, (5, -1))
    inputs = [n + apart * (mixes[1 + i] + z[..., i, :] @ w2[i]) for i in range(5)]
    outputs = [part @ m.T for part, m in zip(inputs[1:], maps, strict=True)]
    return [*outputs, torch.tanh(inputs[0] @ w3) @ w4]


def cases(size: Size) -> dict[str, Case]:
    """Every operator at one size; inputs are normal, seeded."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    c = size.channels
    x, y = 1 + normal(*size.shape), normal(*size.shape)
    a, b, d = (normal(1, 1, c) for _ in range(3))
    norm = {'weight': 1 + 0.1 * normal(c), 'bias': normal(c)}
    maps = {'one': normal(2 * c, c) / c**0.5, 'two': normal(c, c) / c**0.5}
    rank = 32 if c % 64 == 0 else 3  # as in the models, for which there are kernels
    scale = torch.rand(size.batch, generator=generator).double()  # exact in float32 too, which the kernels take
    with_norm = lambda w, b: ops.Norm(w, b, EPS)  # noqa: E731

    def whole_residual(x, z, gate, weight, bias, gamma):
        factor = scale.to(x.device, torch.float32 if x.dtype != torch.float64 else x.dtype)
        return ops.residual(x, z, gate=gate, norm=with_norm(weight, bias), gamma=gamma, scale=factor)[0]

    def whole_residual_definition(x, z, gate, weight, bias, gamma):
        return x + scale.to(x).view(-1, 1, 1) * gamma * _normalised(torch.sigmoid(gate) * z, weight, bias)

    found = {
        'q_shift': Case(
            lambda x, a, b, d: ops.q_shift(x, [a, b, d], *size.shift),
            lambda x, a, b, d: _mixed(x, [a, b, d], size),
            {'x': x, 'a': a, 'b': b, 'd': d},
        ),
        'q_shift_norm_delta': Case(
            lambda x, delta, a, b, w, v: ops.q_shift(x, [a, b], *size.shift, norm=with_norm(w, v), delta=delta),
            lambda x, delta, a, b, w, v: _mixed(_normalised(x, w, v), [a, b], size, delta),
            {'x': x, 'delta': normal(2, *size.shape), 'a': a, 'b': b, **norm},
            'x delta',
        ),
        'mix_linear': Case(
            lambda x, a, b, w, v, m, n: ops.mix_linear(x, [a, b], [m, n], *size.shift, norm=with_norm(w, v)),
            lambda x, a, b, w, v, m, n: [
                part @ weight.T for part, weight in zip(_mixed(_normalised(x, w, v), [a, b], size), (m, n), strict=True)
            ],
            {'x': x, 'a': a, 'b': b, **norm, **maps},
            'x one two',
        ),
        'dynamic_linear': Case(
            lambda x, mixes, w1, w2, w3, w4, m, w, v: ops.dynamic_linear(
                x, mixes.unbind(), [w1, w2, w3, w4], m.unbind(), *size.shift, norm=with_norm(w, v)
            ),
            lambda x, mixes, w1, w2, w3, w4, m, w, v: _dynamic(_normalised(x, w, v), mixes, w1, w2, w3, w4, m, size),
            {
                'x': x,
                'mixes': normal(6, c),
                'w1': normal(c, 5 * rank) / c**0.5,
                'w2': normal(5, rank, c) / rank**0.5,
                'w3': normal(c, 2 * rank) / c**0.5,
                'w4': normal(2 * rank, c) / rank**0.5,
                'maps': normal(4, c, c) / c**0.5,
                **norm,
            },
            'x w1 w2 w3 w4 maps',
        ),
        'gated_linear': Case(
            ops.gated_linear,
            lambda r, y, m: (torch.sigmoid(r) * y) @ m.T,
            {'r': x, 'y': y, 'one': maps['one']},
            'r y one',
        ),
        'squared_relu_linear': Case(
            ops.squared_relu_linear, lambda x, m: torch.relu(x).square() @ m.T, {'x': x, 'one': maps['one']}, 'x one'
        ),
        'gate': Case(ops.gate, lambda r, y: torch.sigmoid(r) * y, {'r': x, 'y': y}, 'r y'),
        'squared_relu': Case(ops.squared_relu, lambda x: torch.relu(x).square(), {'x': x}),
        'residual_plain': Case(lambda x, z: ops.residual(x, z)[0], torch.add, {'x': x, 'z': y}, 'x z'),
        'residual_gated': Case(
            lambda x, z, gate: ops.residual(x, z, gate=gate)[0],
            lambda x, z, gate: x + torch.sigmoid(gate) * z,
            {'x': x, 'z': y, 'gate': normal(*size.shape)},
            'x z gate',
        ),
        'residual_scaled': Case(
            lambda x, z, gamma: ops.residual(x, z, gamma=gamma)[0],
            lambda x, z, gamma: x + gamma * z,
            {'x': x, 'z': y, 'gamma': normal(c)},
            'x z',
        ),
        'residual_whole': Case(
            whole_residual,
            whole_residual_definition,
            {'x': x, 'z': y, 'gate': normal(*size.shape), **norm, 'gamma': normal(c)},
            'x z gate',
        ),
        'log_decay': Case(ops.log_decay, lambda raw, base: -torch.exp(base + raw), {'raw': y, 'base': a}, 'raw'),
    }
    if size.channels % 64 == 0:
        heads = size.channels // 64
        found['norm_gate'] = Case(
            lambda y, gate, w, b: ops.norm_gate(y, gate, w, b, heads, EPS),
            lambda y, gate, w, b: F.group_norm(y.flatten(0, 1), heads, w, b, EPS).view_as(y) * F.silu(gate),
            {'y': y, 'gate': x, **norm},
            'y gate',
        )
    return found


NAMES = list(cases(SIZES['tiny']))


def run(
    op: Callable, inputs: dict[str, Tensor], dtype: torch.dtype | None = None, at: tuple[int, int] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of all inputs for fixed random gradients of the results, rounded to ``dtype``.

    at: a sample and a token; the gradients of all other results are zero.
    """
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    results = op(*leaves)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype or y.dtype).to(y) for y in results
    ]
    if at is not None:
        one = torch.zeros(results[0].shape[-3:-1] + (1,), dtype=torch.bool)
        one[at] = True
        upstream = [g * one.to(g.device) for g in upstream]
    return [y.detach() for y in results], list(torch.autograd.grad(results, leaves, upstream))


def parts(case: Case, exact: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For each gradient the norm of what the single tokens give it, in which nothing cancels."""
    first = next(x for name, x in exact.items() if name in case.tokens.split())
    places = [(b, t) for b in range(first.shape[0]) for t in range(first.shape[1])]
    squares = [[g.square().sum() for g in run(case.definition, exact, dtype, at)[1]] for at in places]
    return [torch.stack(column).sum().sqrt() for column in zip(*squares, strict=True)]


def check(case: Case, precision: str, device: str) -> None:
    """Compare results and gradients with the definition in float64 on the same rounded inputs."""
    dtype, cast, (bound, gradient_bound) = PRECISIONS[precision]
    other = torch.float64 if dtype == torch.float64 else torch.float32
    given = {
        name: x.to(device, cast or dtype).to(dtype) if name in case.tokens.split() else x.to(device, other)
        for name, x in case.inputs.items()
    }
    with torch.autocast(device, cast) if cast else nullcontext():
        results, gradients = run(case.op, given)
    doubles = {name: x.double() for name, x in given.items()}
    want, want_gradients = run(case.definition, doubles, results[0].dtype)
    for got, exact in zip(results, want, strict=True):
        assert got.shape == exact.shape
        assert error(got, exact) <= bound
    for i, ((name, x), got, exact) in enumerate(zip(given.items(), gradients, want_gradients, strict=True)):
        assert got.dtype == x.dtype and got.shape == x.shape, name
        if exact.norm() > 1e-9 * exact.numel() ** 0.5:  # else nothing but the rounding of sums that cancel
            off = error(got, exact)
            if off > gradient_bound:  # a sum over tokens that cancel is as exact as what it is a sum of
                off *= exact.norm() / parts(case, doubles, results[0].dtype)[i]
            assert off <= gradient_bound, name
