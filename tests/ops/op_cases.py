"""Inputs, the definition in float64, and how far from it each dtype may be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vision_rwkv.ops import bi_wkv, fallback, reference, wkv6

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)]
TOKENS = [1, 2, 31, 33, 49, 196, 197, 576]
# Largest relative L2 error of y, and of each gradient, for inputs rounded to the dtype.
BOUNDS = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (1e-5, 5e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
OPERATORS = {'bi_wkv': bi_wkv, 'wkv6': wkv6}
DEFINITIONS = {'bi_wkv': reference.bi_wkv, 'wkv6': reference.wkv6}
NAMES = {'bi_wkv': 'wukv', 'wkv6': 'rkvwu'}
TOKEN_TENSORS = {'bi_wkv': 'kv', 'wkv6': 'rkv'}  # those that share a dtype


def bi_wkv_inputs(b: int, t: int, c: int, *, seed: int = 0, w: float = 20, k: float = 2) -> dict[str, Tensor]:
    """w uniform in +-w/T, the other inputs normal, k with deviation k; float64."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    decay = (2 * torch.rand(c, generator=g, dtype=torch.float64) - 1) * w / max(t, 1)
    return {'w': decay, 'u': normal(c), 'k': k * normal(b, t, c), 'v': normal(b, t, c)}


def wkv6_inputs(
    b: int, t: int, h: int, n: int, *, seed: int = 0, slow: float = -6, fast: float = 1
) -> dict[str, Tensor]:
    """w = -exp(uniform in slow..fast): a token keeps nearly all of the state, or nearly none; float64."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    raw = slow + (fast - slow) * torch.rand(b, t, h, n, generator=g, dtype=torch.float64)
    return {
        'r': normal(b, t, h, n),
        'k': normal(b, t, h, n),
        'v': normal(b, t, h, n),
        'w': -raw.exp(),
        'u': normal(h, n),
    }


def rounded(name: str, inputs: dict[str, Tensor], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs on ``device``: token tensors in ``dtype``, the others in float32, or all float64."""
    other = torch.float64 if dtype == torch.float64 else torch.float32
    return {x: t.to(device, dtype if x in TOKEN_TENSORS[name] else other) for x, t in inputs.items()}


def gradients(op: Callable, inputs: dict[str, Tensor], gy: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of every input, for a fixed random gradient of y."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    y = op(*leaves)
    if gy is None:
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y.detach(), list(torch.autograd.grad(y, leaves, gy.to(y)))


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; the absolute one where nothing is wanted. NaN never passes a bound."""
    got, want = got.double().cpu(), want.double().cpu()
    scale = want.norm().item()
    return ((got - want).norm() / (scale if scale > 1e-30 else 1)).item()


def implementations(name: str, device: str) -> dict[str, Callable]:
    """The operator as people call it, and its PyTorch implementation, with autograd."""
    forward, backward = getattr(fallback, name), getattr(fallback, f'{name}_backward')

    class InPyTorch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, gy):
            return backward(*ctx.saved_tensors, gy)

    return {'operator': OPERATORS[name], 'pytorch': InPyTorch.apply}


def assert_equals_definition(
    name: str, op: Callable, inputs: dict[str, Tensor], dtype: torch.dtype, device: str
) -> None:
    """Compare y and every gradient with the definition in float64, on the same rounded inputs."""
    given = rounded(name, inputs, dtype, device)
    gy = torch.randn(given['k'].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gy = gy.to(device, dtype)
    y, grads = gradients(op, given, gy)
    exact = {x: t.double() for x, t in given.items()}
    want, want_grads = gradients(DEFINITIONS[name], exact, gy.double())
    assert y.dtype == given['k'].dtype and y.shape == given['k'].shape
    bound, grad_bound = BOUNDS[dtype]
    errors = {'y': error(y, want)}
    assert errors['y'] <= bound, errors
    largest = max(g.double().norm().item() / g.numel() ** 0.5 for g in want_grads)
    for x, grad, want_grad in zip(given, grads, want_grads, strict=True):
        assert grad.dtype == given[x].dtype and grad.shape == given[x].shape
        if want_grad.double().norm() <= 1e-9 * largest * want_grad.numel() ** 0.5:
            continue  # nothing but the rounding of sums that cancel, as for u at T = 1
        errors[x] = error(grad, want_grad)
        assert errors[x] <= grad_bound, errors
