// What the Q-Shift kernels share: where a channel's neighbours are, and the arguments of a call.
#pragma once

#include "divisor.cuh"
#include "rows.cuh"

namespace q_shift {

using namespace rows;

constexpr int kMixes = 8;  // at most
constexpr int kStay = 4;   // the direction of channels that are not shifted

// The step from a thread's channels to their source; the channels of the token as far the other way come from here.
struct Step {
    bool horizontal;
    int pixels, offset;  // along the axis, and in tokens; 0 for channels that stay
    int limit;           // the axis has so many
};

struct Neighbours {
    int offset;          // the source is so many tokens further, the taker as many before
    bool source, taker;  // whether there are any
};

struct Place {
    int tokens, height, width, pixels, dim, borders[4];
    Divisor by_tokens, by_width;

    __device__ int direction(int channel) const {
        const int place = channel % dim;
        int found = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) found += place >= borders[i];
        return found;
    }

    __device__ Step step_of(int direction) const {
        const bool horizontal = direction < 2;
        const int signed_pixels = direction == kStay ? 0 : direction % 2 ? pixels : -pixels;
        return {horizontal, signed_pixels, horizontal ? signed_pixels : signed_pixels * width,
                horizontal ? width : height};
    }

    __device__ Step step(int channel) const { return step_of(direction(channel)); }

    // index: of a token among those of all samples.
    __device__ Neighbours neighbours(int index, const Step& step) const {
        const int position = index - static_cast<int>(by_tokens.divide(index)) * tokens;
        if (position >= height * width) return {0, true, true};
        const int row = static_cast<int>(by_width.divide(position)),
                  at = step.horizontal ? position - row * width : row;
        const auto exists = [&](int place) { return place >= 0 && place < step.limit; };
        return {step.offset, exists(at + step.pixels), exists(at - step.pixels)};
    }
};

struct Args {
    int rows, channels, mixes;
    Place place;
    const float* mix[kMixes];            // each (channels,)
    const float *weight, *bias, *stats;  // stats (rows, 2); null without a norm
};

template <int kVec>
__device__ __forceinline__ void load_parameter(const float* from, int channel, float otherwise, float (&to)[kVec]) {
    if (from) {
        load(from + channel, to);
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) to[j] = otherwise;
    }
}

}  // namespace q_shift
