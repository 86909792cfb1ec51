"""Initial values of the parameters that are not linear weights.

Notation of the formulas: layer l of L, p = l / (L - 1) and q = 1 - l / L, channel c of C. They are those of the
released models' training code; "fancy" is what all of these use. Everything is computed in float64 and rounded once.
"""

import torch
from torch import Tensor, nn

INIT_MODES = ('fancy', 'local', 'global')


def depth_ratios(layer: int, depth: int) -> tuple[float, float]:
    """(p, q) of a layer; p is 0 for the only layer of a model."""
    return layer / max(depth - 1, 1), 1 - layer / depth


def ramp(dim: int, power: float) -> Tensor:
    """(c / C) ** power: (C,), float64."""
    return (torch.arange(dim, dtype=torch.float64) / dim) ** power


def full_ramp(dim: int, power: float = 1.0) -> Tensor:
    """(c / (C - 1)) ** power, which reaches 1: (C,), float64."""
    return (torch.arange(dim, dtype=torch.float64) / max(dim - 1, 1)) ** power


def zigzag(dim: int) -> Tensor:
    """0, 1, -1, 0, 1, -1, ...: (C,), float64."""
    return ((torch.arange(dim, dtype=torch.float64) + 1) % 3) - 1


def parameter(values: Tensor, *shape: int) -> nn.Parameter:
    """A parameter of ``values`` in the default dtype, reshaped if ``shape`` is given."""
    return nn.Parameter(values.reshape(shape or values.shape).to(torch.get_default_dtype()))


def mix_parameter(mode: str, fancy: Tensor) -> nn.Parameter:
    """A (1, 1, C) mix: ``fancy`` (C,), or 1 ("local", no neighbour), or 0.5 ("global")."""
    values = fancy if mode == 'fancy' else torch.full_like(fancy, 1.0 if mode == 'local' else 0.5)
    return parameter(values, 1, 1, -1)


def constant(mode: str, fancy: Tensor) -> nn.Parameter:
    """A (C,) decay or bonus: ``fancy`` (C,), or 1 ("local"), or 0 ("global")."""
    return parameter(fancy if mode == 'fancy' else torch.full_like(fancy, 1.0 if mode == 'local' else 0.0))


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's weight from the truncated normal distribution of deviation 0.02, bias 0; for `apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
