// Division of kernels' indices.
#pragma once

#include <cstdint>

namespace rows {

// Division by a number that the host knows, for dividends below 2^31.
struct Divisor {
    unsigned by, magic, shift;

    static Divisor make(int64_t by) {
        unsigned shift = 0;
        while ((int64_t(1) << shift) < by) ++shift;
        const int64_t rest = (int64_t(1) << shift) - by;
        return {static_cast<unsigned>(by), static_cast<unsigned>((rest << 32) / by + 1), shift};
    }

    __device__ unsigned divide(unsigned x) const { return (__umulhi(x, magic) + x) >> shift; }
};

}  // namespace rows
