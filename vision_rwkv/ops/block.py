"""What torch.compile has to know of the operators of a block, which exist in native code alone (kernels/block)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vision_rwkv.ops import _checks, _native

CHANNEL_MIXES = 2  # after those of the spatial mix
MAPS_AFTER = 4  # those of the spatial mix's tokens


def _fake(x, stats, norms, eps1, eps2, next_eps, post_norm, *others):
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, others[-1]))
    return out, _stats(out) if next_eps is not None else out.new_empty(0)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2), dtype=_checks.compute_dtype(x))


def _kept_bi_wkv(tokens: Tensor, w: Tensor, u: Tensor) -> list[Tensor]:
    """What the spatial mix of VRWKV keeps besides its mapped tokens, given one of those, and its own arguments."""
    return [tokens.new_empty(tokens.shape)]


def _kept_wkv6(tokens: Tensor, ranks: list[Tensor], decay: Tensor, *others) -> list[Tensor]:
    """The same of VRWKV6; WKV6's result is in float32 where that of half precision could overflow."""
    wide = torch.float32 if tokens.dtype == torch.float16 else tokens.dtype
    return [tokens.new_empty(tokens.shape, dtype=t) for t in (_checks.compute_dtype(tokens, decay), wide, tokens.dtype)]


def _kept_fake(kept_spatial: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def fake(x, stats, norms, eps1, eps2, next_eps, post_norm, mixes, maps, *others):
        *own, gamma1, gamma2, scale1, scale2, height, width, pixels, gamma, dtype = others
        out = _fake(x, stats, norms, eps1, eps2, next_eps, post_norm, dtype)
        z, hidden, receptance, values = (
            x.new_empty((*x.shape[:2], size), dtype=dtype) for size in (x.shape[2], len(maps[-3]), *[x.shape[2]] * 2)
        )
        inputs = x.new_empty((len(maps) - MAPS_AFTER, *x.shape), dtype=dtype)
        kept = [inputs, *kept_spatial(z, *own), torch.empty_like(out[0]), hidden, receptance, values]
        if post_norm or gamma1 is not None:
            kept.append(z)
        if not post_norm:
            kept += [_stats(out[0])] if stats is not None else [_stats(out[0]), _stats(x)]
        return [*out, *kept]

    return fake


def _backward_fake(g, x, stats, norms, eps1, eps2, next_eps, post_norm, mixes, maps, *others):
    *own, gamma1, gamma2, _, _, _, _, _, _, _, _ = others
    sums = _checks.compute_dtype(x)
    counts = len(mixes) - CHANNEL_MIXES, CHANNEL_MIXES
    columns = [x.new_empty((n + (0 if post_norm else 2), x.shape[2]), dtype=sums) for n in counts]
    spatial = maps[0].new_empty((len(maps) - MAPS_AFTER, *maps[0].shape))
    own = [p for p in tree_leaves(own) if isinstance(p, Tensor)]
    parameters = [*own, *(norms if post_norm else []), *(p for p in (gamma1, gamma2) if p is not None)]
    return [x.new_empty(x.shape), *columns, spatial, *map(torch.empty_like, (*maps[-MAPS_AFTER:], *parameters))]


if _native.has_block():
    for name, kept in (('vrwkv_block', _kept_bi_wkv), ('vrwkv6_block', _kept_wkv6)):
        torch.library.register_fake(f'{_native.NAMESPACE}::{name}', _fake)
        torch.library.register_fake(f'{_native.NAMESPACE}::{name}_kept', _kept_fake(kept))
        torch.library.register_fake(f'{_native.NAMESPACE}::{name}_backward', _backward_fake)
