"""Loads the native library and answers which implementation runs.

The schemas are defined in Python (bi_wkv.py, wkv6.py) together with a PyTorch kernel that serves every device. The
library adds kernels for CPU and CUDA, which the dispatcher then prefers, and the gradients for every device.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = 'vision_rwkv'
_REINSTALL = 'pip install --no-build-isolation --force-reinstall --no-deps vision-rwkv'
_warned: set[str] = set()


def _load() -> str | None:
    """Load the library; return None, or why it is not in use."""
    if os.environ.get('VISION_RWKV_NATIVE', '1') == '0':
        return 'switched off by VISION_RWKV_NATIVE=0'
    found = sorted(Path(__file__).resolve().parent.parent.glob('_native*.so'))
    if not found:
        return 'this installation was built without a C++ compiler or without PyTorch in sight'
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:  # built for another PyTorch: its C++ interface has no stable ABI
        return f'{found[0].name} does not load with PyTorch {torch.__version__}: {error}'
    return None


_problem = _load()
_has_block = hasattr(torch.ops.vision_rwkv, 'vrwkv6_block_kept')  # an older library has other blocks


def implementation(device: torch.device | str = 'cpu') -> str:
    """Which implementation of the operators runs on ``device``: 'native' or 'pytorch'."""
    key = {'cpu': 'CPU', 'cuda': 'CUDA'}.get(torch.device(device).type)
    names = (f'{NAMESPACE}::bi_wkv', f'{NAMESPACE}::wkv6')
    if key and all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names):
        return 'native'
    return 'pytorch'


def has_block() -> bool:
    """Whether there are `vrwkv_block` and `vrwkv6_block`, which exist in native code alone (kernels/block)."""
    return _has_block


def warn_fallback(device: torch.device) -> None:
    """Say once for each kind of device that the slower PyTorch implementation runs, and why."""
    if device.type in _warned or device.type not in ('cpu', 'cuda'):
        return
    _warned.add(device.type)
    if implementation(device) == 'native':
        reason = 'the native code does not cover this dtype or head size.'
    else:
        needs = 'nvcc and a C++ compiler' if device.type == 'cuda' else 'a C++ compiler'
        reason = (
            f'{_problem or f"the native library was built without {device.type.upper()} code"}. '
            f'For the fast one, with {needs} on the PATH: {_REINSTALL}'
        )
    warnings.warn(
        f'vision_rwkv runs its PyTorch implementation on {device.type}, which is right but slow: {reason}', stacklevel=3
    )


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give operator ``name`` its gradient, ``name``_backward none; kernels/autograd does both where it is built."""
    full = f'{NAMESPACE}::{name}'
    if torch._C._dispatch_has_kernel_for_dispatch_key(full, 'Autograd'):
        return
    torch.library.register_autograd(full, backward, setup_context=setup_context)
    torch.library.register_autograd(f'{full}_backward', _refuse_second_derivative(name))


def _refuse_second_derivative(op: str) -> Callable:
    """The backward of an operator's backward: there is none, and it says so."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f'{op} has no second derivative: call backward() or torch.autograd.grad() without create_graph=True'
        )

    return refuse
