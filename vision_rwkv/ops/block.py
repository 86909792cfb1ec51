"""What torch.compile has to know of the operators of a block, which exist in native code alone (kernels/block)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vision_rwkv.ops import _checks, _native

SPATIAL, CHANNEL = 3, 2  # mixes of the two halves


def _fake(x, stats, norms, eps1, eps2, next_eps, post_norm, *others):
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, others[-1]))
    return out, _stats(out) if next_eps is not None else out.new_empty(0)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2), dtype=_checks.compute_dtype(x))


def _kept_fake(x, stats, norms, eps1, eps2, next_eps, post_norm, mixes, maps, w, u, gamma1, *others):
    dtype = others[-1]
    out = _fake(x, stats, norms, eps1, eps2, next_eps, post_norm, dtype)
    y, z, hidden, receptance, values = (
        x.new_empty((*x.shape[:2], size), dtype=dtype) for size in (*[x.shape[2]] * 2, len(maps[4]), *[x.shape[2]] * 2)
    )
    kvr = x.new_empty((SPATIAL, *x.shape), dtype=dtype)
    kept = [kvr, y, torch.empty_like(out[0]), hidden, receptance, values]
    if post_norm or gamma1 is not None:
        kept.append(z)
    if not post_norm:
        kept += [_stats(out[0])] if stats is not None else [_stats(out[0]), _stats(x)]
    return [*out, *kept]


def _backward_fake(g, x, stats, norms, eps1, eps2, next_eps, post_norm, mixes, maps, w, u, gamma1, gamma2, *_):
    sums = _checks.compute_dtype(x)
    columns = [x.new_empty((n + (0 if post_norm else 2), x.shape[2]), dtype=sums) for n in (SPATIAL, CHANNEL)]
    like: Callable[[Tensor], Tensor] = torch.empty_like
    others = [*(norms if post_norm else []), *(p for p in (gamma1, gamma2) if p is not None)]
    spatial = maps[0].new_empty((SPATIAL, *maps[0].shape))
    return [x.new_empty(x.shape), *columns, *map(like, (w, u)), spatial, *map(like, (*maps[SPATIAL:], *others))]


if _native.has_block():
    torch.library.register_fake(f'{_native.NAMESPACE}::vrwkv_block', _fake)
    torch.library.register_fake(f'{_native.NAMESPACE}::vrwkv_block_kept', _kept_fake)
    torch.library.register_fake(f'{_native.NAMESPACE}::vrwkv_block_backward', _backward_fake)
