// One call of Bi-WKV on the CPU, as plain pointers. Tensors are contiguous: k, v, y, gy, gk, gv (B, T, C), w, u (C,).
#pragma once

#include <cstdint>

namespace vision_rwkv {

template <typename Real>
struct BiWkvArgs {
    int64_t batch, tokens, channels;
    const Real *w, *u, *k, *v;
    Real* y;  // forward
    // backward
    const Real* gy;
    Real *gw, *gu, *gk, *gv;
};

}  // namespace vision_rwkv
