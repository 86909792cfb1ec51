"""Input checks and dtype rules shared by the operators."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(op: str, layouts: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Check one call's tensors against ``layouts``, such as {'k': 'BTC', 'w': 'C'}; the first one sets the device.

    Raises TypeError (not a tensor, dtype) or ValueError (rank, shape, device).
    """
    sizes: dict[str, tuple[int, str]] = {}
    first = next(iter(tensors))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f'{op}: {name} must be a torch.Tensor, got {type(x).__name__}')
        if x.dtype not in DTYPES:
            raise TypeError(f'{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}')
        layout = f'({", ".join(layouts[name])}{"," if len(layouts[name]) == 1 else ""})'
        if x.dim() != len(layouts[name]):
            raise ValueError(f'{op}: {name} must have shape {layout}, got {tuple(x.shape)}')
        for letter, size in zip(layouts[name], x.shape, strict=True):
            want, source = sizes.setdefault(letter, (size, name))
            if size != want:
                raise ValueError(
                    f'{op}: {name} must have shape {layout} with {letter} = {want} as in {source}, got {tuple(x.shape)}'
                )
        if x.device != tensors[first].device:
            raise ValueError(f'{op}: {name} must be on {tensors[first].device} like {first}, got {x.device}')


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Check that the tensors share the first one's dtype; raises TypeError."""
    (lead, reference), *others = tensors.items()
    for name, x in others:
        if x.dtype != reference.dtype:
            raise TypeError(f'{op}: {name} must be {reference.dtype} like {lead}, got {x.dtype}')


def autocast(*xs: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the token tensors in autocast's dtype, as a linear layer would take them; float64 stays."""
    device = xs[0].device.type
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return xs
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in xs)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute in for the input x: autocast's dtype under autocast, else that of x."""
    device = x.device.type
    if device == 'meta' or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def is_exporting() -> bool:
    """Whether torch.export traces this; `torch.compiler.is_exporting` says so to torch.compile too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def compute_dtype(*xs: Tensor) -> torch.dtype:
    """What sums are kept in: float64 if any input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32
