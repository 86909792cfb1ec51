// One call of WKV6 on the CPU, as plain pointers. Tensors are contiguous, (B, T, H, N), with N a multiple of 32.
#pragma once

#include <cstdint>

namespace vision_rwkv {

constexpr int64_t kHeadMultiple = 32;  // two of the widest vectors: operators pad N with zeros to a multiple of it

template <typename Real>
struct Wkv6Args {
    int64_t batch, tokens, heads, width;  // width = N
    const Real *r, *k, *v, *w;
    const Real* u;  // (H, N)
    Real* y;        // output
    // backward: y above is gv, and
    const Real* gy;
    Real *gr, *gk, *gw;
    double* gu;  // (B, H, N)
};

}  // namespace vision_rwkv
