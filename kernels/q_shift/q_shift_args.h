// One call of Q-Shift on the CPU, as plain pointers. Tensors are contiguous.
#pragma once

#include <cstdint>

namespace vision_rwkv {

// Channels that take the same neighbour: (dy, dx) tokens away, themselves for (0, 0).
struct Segment {
    int64_t begin, end, dy, dx;
};

template <typename Real>
struct QShiftArgs {
    int64_t rows, tokens, channels, height, width;
    const Segment* segments;
    int64_t segment_count;
    int64_t mix_count;
    const Real* const* mixes;           // each (C,)
    const Real *x, *delta;              // (B, T, C); (mixes, B, T, C) or null
    const Real *weight, *bias, *stats;  // (C,), (C,), (B, T, 2); null without a norm
    Real* out;                          // (mixes, B, T, C)
    // backward
    const Real* g;
    Real *gx, *gdelta;
    Real* sums;  // of one run of rows: gradients of the mixes, then of weight and bias, (mixes + 2, C)
};

}  // namespace vision_rwkv
