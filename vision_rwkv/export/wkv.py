"""Bi-WKV and WKV6 in standard ONNX operators, in memory linear in T, for a number of tokens known only at run time.

Tokens are cut into chunks. Within a chunk every pair of tokens is weighed; a chunk hands on one summary, and what the
chunks before each, and after each, come to is found the same way, from groups of chunks, groups of groups and so on,
without a loop. As safe as vision_rwkv.ops.fallback: sums are kept relative to their largest term, and a decay is made
of just the terms between two tokens.
"""

from typing import Any

import numpy as np
from onnxscript import ir
from onnxscript import opset18 as op

BI_CHUNK = 8  # tokens of a chunk of Bi-WKV; its pairs take so many times the memory of the tokens
CHUNK = 16  # of WKV6; a chunk has one N x N state
GROUP = 16  # chunks, or groups, of a group
HUGE = 1e30  # of a decay: as good as infinite, but times any number of tokens it is not, and times 0 it is 0
LOWEST = float(np.finfo(np.float32).min)

Value = Any  # of the graph being made: ir.Value
Sum = tuple[Value, Value, Value]  # logarithm of the largest term; numerator and denominator relative to that


def _constant(array: np.ndarray) -> Value:
    tensor: Any = ir.tensor(array)
    return op.Constant(value=tensor)


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=values)


def _floats(array: np.ndarray) -> Value:
    return _constant(array.astype(np.float32))


class Tokens:
    """How many tokens, or chunks, lie along an axis: ``number`` at most, or exactly, if ``value`` is None.

    value: the number at run time, an int64 tensor (1,).
    """

    def __init__(self, number: int, value: Value | None = None):
        self.number, self.value = number, value

    @staticmethod
    def of(x: Value, axis: int, most: int) -> 'Tokens':
        """Those along an axis of ``x``; ``most`` holds where the graph does not say how many there are."""
        size = x.shape[axis]
        if isinstance(size, int):
            return Tokens(size)
        return Tokens(most, op.Shape(x, start=axis, end=axis + 1))

    def chunks(self, size: int) -> 'Tokens':
        """The number of chunks of ``size``, the last one perhaps not full."""
        value = None if self.value is None else op.Div(op.Add(self.value, _ints(size - 1)), _ints(size))
        return Tokens(-(-self.number // size), value)

    def cut(self, x: Value, axis: int, size: int, rest: tuple[int, ...], fill: float = 0.0) -> Value:
        """x (..., T, *rest) as (..., chunks, size, *rest), filled up at the end."""
        if self.value is not None:
            missing = op.Mod(op.Neg(self.value), _ints(size))
            x = op.Pad(x, op.Concat(_ints(0), missing, axis=0), fill, _ints(axis))
        elif self.number % size:
            x = op.Pad(x, _ints(0, -self.number % size), fill, _ints(axis))
        return op.Reshape(x, _ints(*[0] * axis, -1, size, *rest))

    def join(self, x: Value, axis: int, rest: tuple[int, ...]) -> Value:
        """The inverse of `cut`."""
        x = op.Reshape(x, _ints(*[0] * axis, -1, *rest))
        return op.Slice(x, _ints(0), _ints(self.number) if self.value is None else self.value, _ints(axis))

    def checked(self, y: Value) -> Value:
        """``y``, but not a number where more tokens came than the graph was made for."""
        if self.value is None:
            return y
        return op.Where(op.Greater(self.value, _ints(self.number)), float('nan'), y)


def _levels(chunks: Tokens) -> int:
    """How many levels of groups hold them."""
    levels = 1
    while GROUP**levels < chunks.number:
        levels += 1
    return levels


def _flip(x: Value, axis: int) -> Value:
    return op.Slice(x, _ints(-1), _ints(np.iinfo(np.int64).min), _ints(axis), _ints(-1))


def _both_ways(forward: Value, backward: Value, axis: int) -> Value:
    """Both along the batch, the second one in the opposite order along ``axis``, so that one pass serves both."""
    return op.Concat(forward, _flip(backward, axis), axis=0)


def _apart(x: Value, axis: int) -> tuple[Value, Value]:
    """The inverse of `_both_ways`."""
    forward, backward = op.Split(x, axis=0, num_outputs=2)
    return forward, _flip(backward, axis)


# Bi-WKV --------------------------------------------------------------------------------------------------------------


def _sum(key: Value, value: Value, weight: Value | None, axis: int) -> Sum:
    """Sums of exp(key) value and exp(key) weight (None: 1) over ``axis``, which is gone afterwards."""
    top = op.ReduceMax(key, _ints(axis), keepdims=1)
    # A maximum of nothing, -inf, must not be subtracted: -inf - -inf is not a number.
    terms = op.Exp(op.Sub(key, op.Max(top, LOWEST)))
    parts = op.Mul(terms, value), terms if weight is None else op.Mul(terms, weight)
    a, b = (op.ReduceSum(part, _ints(axis), keepdims=0) for part in parts)
    return op.Squeeze(top, _ints(axis)), a, b


def _add(*sums: Sum) -> Sum:
    """The sum of sums."""
    top = op.Max(*(m for m, _, _ in sums))
    base = op.Max(top, LOWEST)
    scales = [op.Exp(op.Sub(m, base)) for m, _, _ in sums]
    totals = []
    for part in (1, 2):
        terms = [op.Mul(scale, s[part]) for scale, s in zip(scales, sums, strict=True)]
        totals.append(op.Sum(*terms))
    return top, totals[0], totals[1]


def _unsqueezed(sums: Sum, axis: int) -> Sum:
    m, a, b = (op.Unsqueeze(x, _ints(axis)) for x in sums)
    return m, a, b


def _decays(w: Value, distances: np.ndarray) -> Value:
    """-distance * w (C,), for distances of any shape: (*shape, C)."""
    return op.Mul(_floats(-distances[..., None]), w)


def _before(w: Value, sums: Sum, count: Tokens, dim: int, levels: int) -> Sum:
    """Of (B, n, C) each, the sums over those before, decayed by w (C,) for each that lies between."""
    fills = (-float('inf'), 0.0, 0.0)
    m, a, b = (count.cut(x, 1, GROUP, (dim,), fill) for x, fill in zip(sums, fills, strict=True))
    place = np.arange(GROUP)
    between = place[:, None] - place - 1  # of i at t
    future = _floats(np.where(between < 0, -np.inf, 0)[..., None])
    decay = op.Add(_decays(w, np.maximum(between, 0)), future)  # (GROUP, GROUP, C)
    over = [op.Unsqueeze(x, _ints(2)) for x in (m, a, b)]
    found = _sum(op.Add(over[0], decay), over[1], over[2], 3)
    if levels > 1:
        whole = _sum(op.Add(m, _decays(w, GROUP - 1 - place)), a, b, 2)
        m, a, b = _unsqueezed(_before(op.Mul(w, float(GROUP)), whole, count.chunks(GROUP), dim, levels - 1), 2)
        found = _add(found, (op.Add(m, _decays(w, place)), a, b))
    m, a, b = (count.join(x, 1, (dim,)) for x in found)
    return m, a, b


def bi_wkv(w: Value, u: Value, k: Value, v: Value, most: int) -> Value:
    """Bi-WKV in float32; shapes as vision_rwkv.ops.bi_wkv, of 1 to ``most`` tokens."""
    count, dim = Tokens.of(k, 1, most), k.shape[2]
    chunks = count.chunks(BI_CHUNK)
    w = op.Clip(w, -HUGE, HUGE)
    key, value = count.cut(k, 1, BI_CHUNK, (dim,), -float('inf')), count.cut(v, 1, BI_CHUNK, (dim,))  # (B, n, L, C)
    place = np.arange(BI_CHUNK)
    apart = np.abs(place[:, None] - place)
    others = _decays(w, np.maximum(apart - 1, 0))
    exponent = op.Where(_constant(apart[..., None] == 0), u, others)  # (L, L, C), of i at t
    total = _sum(op.Add(op.Unsqueeze(key, _ints(2)), exponent), op.Unsqueeze(value, _ints(2)), None, 3)

    start, end = _decays(w, place), _decays(w, BI_CHUNK - 1 - place)  # to the ends of the chunk
    sums = zip(_sum(op.Add(key, end), value, None, 2), _sum(op.Add(key, start), value, None, 2), strict=True)
    m, a, b = (_both_ways(one, other, 1) for one, other in sums)
    found = _before(op.Mul(w, float(BI_CHUNK)), (m, a, b), chunks, dim, _levels(chunks))
    left, right = zip(*(_apart(x, 1) for x in found), strict=True)
    sides = []
    for side, decay in ((left, start), (right, end)):
        m, a, b = _unsqueezed(side, 2)
        sides.append((op.Add(m, decay), a, b))
    _, a, b = _add(total, *sides)
    return count.checked(count.join(op.Div(a, b), 1, (dim,)))


# WKV6: log decays are at most 0 and vary over the tokens; a state is N x N --------------------------------------------


def _pairs_between(size: int) -> Value:
    """(size * size, size): row (t, i) is 1 at each j strictly between t and i, so that it sums what lies between."""
    place = np.arange(size)
    t, i = place[:, None, None], place[:, None]
    return _floats(((np.minimum(t, i) < place) & (place < np.maximum(t, i))).reshape(size * size, size))


def _earlier(size: int) -> np.ndarray:
    """(size, size): row t is 1 at each i < t."""
    return np.tril(np.ones((size, size)), -1)


def _exp_sum(rows: np.ndarray, w: Value) -> Value:
    """exp of the sums of w (..., L, N) that the rows (L, L) choose."""
    return op.Exp(op.MatMul(_floats(rows), w))


def _states(w: Value, made: Value, count: Tokens, dim: int, levels: int) -> Value:
    """The state before each chunk: w (B, H, n, N) log decay over a chunk, made (B, H, n, N, N) its own contribution."""
    w, made = count.cut(w, 2, GROUP, (dim,)), count.cut(made, 2, GROUP, (dim, dim))
    between = op.Reshape(op.MatMul(_pairs_between(GROUP), w), _ints(0, 0, -1, GROUP, GROUP, dim))
    decay = op.Mul(op.Exp(between), _floats(_earlier(GROUP)[..., None]))  # (B, H, g, t, i, N)
    # Each row of the state by itself: (B, H, g, N, t, i) @ (B, H, g, N, i, N).
    rows = op.MatMul(op.Transpose(decay, perm=(0, 1, 2, 5, 3, 4)), op.Transpose(made, perm=(0, 1, 2, 4, 3, 5)))
    states = op.Transpose(rows, perm=(0, 1, 2, 4, 3, 5))
    if levels > 1:
        to_end = op.Unsqueeze(_exp_sum(_earlier(GROUP).T, w), _ints(5))
        whole = op.ReduceSum(op.Mul(to_end, made), _ints(3), keepdims=0)
        total = op.ReduceSum(w, _ints(3), keepdims=0)
        before = _states(total, whole, count.chunks(GROUP), dim, levels - 1)
        from_start = op.Unsqueeze(_exp_sum(_earlier(GROUP), w), _ints(5))
        states = op.Add(states, op.Mul(from_start, op.Unsqueeze(before, _ints(3))))
    return count.join(states, 2, (dim, dim))


def wkv6(r: Value, k: Value, v: Value, w: Value, u: Value, most: int) -> Value:
    """WKV6 in both directions in float32; shapes as vision_rwkv.ops.wkv6, of 1 to ``most`` tokens."""
    count, heads, dim = Tokens.of(r, 1, most), r.shape[2], r.shape[3]
    chunks = count.chunks(CHUNK)
    w = op.Max(w, -HUGE)
    r, k, v, w = (count.cut(op.Transpose(x, perm=(0, 2, 1, 3)), 2, CHUNK, (dim,)) for x in (r, k, v, w))
    between = op.Reshape(op.MatMul(_pairs_between(CHUNK), w), _ints(0, 0, -1, CHUNK, CHUNK, dim))
    own = _constant(np.eye(CHUNK, dtype=bool)[..., None])
    decay = op.Where(own, op.Reshape(u, _ints(heads, 1, 1, 1, dim)), op.Exp(between))  # (B, H, n, t, i, N)
    products = op.Mul(op.Unsqueeze(r, _ints(4)), op.Mul(op.Unsqueeze(k, _ints(3)), decay))
    y = op.MatMul(op.ReduceSum(products, _ints(5), keepdims=0), v)

    to_start, to_end = _exp_sum(_earlier(CHUNK), w), _exp_sum(_earlier(CHUNK).T, w)
    made = [op.MatMul(op.Transpose(op.Mul(k, decay), perm=(0, 1, 2, 4, 3)), v) for decay in (to_end, to_start)]
    whole = op.ReduceSum(w, _ints(3), keepdims=0)
    states = _states(_both_ways(whole, whole, 2), _both_ways(made[0], made[1], 2), chunks, dim, _levels(chunks))
    for state, decay in zip(_apart(states, 2), (to_start, to_end), strict=True):
        y = op.Add(y, op.MatMul(op.Mul(r, decay), state))
    return count.checked(op.Transpose(count.join(y, 2, (dim,)), perm=(0, 2, 1, 3)))
