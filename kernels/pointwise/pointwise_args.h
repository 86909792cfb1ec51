// One call of the residual on the CPU, as plain pointers. Tensors are contiguous.
#pragma once

#include <cstdint>

namespace vision_rwkv {

template <typename Real>
struct ResidualArgs {
    int64_t tokens, channels;
    const Real *x, *z, *gate;           // (B, T, C); gate may be null
    const Real *weight, *bias, *gamma;  // (C,), or null
    const Real* scale;                  // (B,), or null
    double eps, stats_eps;
    Real *out, *stats;  // (B, T, C); (B, T, 2) or null
};

}  // namespace vision_rwkv
