// What the kernels of dynamic_mix_cuda.cu share; the plan is in README.md.
//
// Lane 4g + q of a warp has the channels 8q .. 8q + 7 of a unit of 32, of the tokens g and g + 8 of each 16. To the
// instruction the first and the last four of them are the columns 2q, 2q + 1, 2q + 8 and 2q + 9 of a left operand each,
// and every two of them the columns 2q and 2q + 1 of a result; the weights are packed in that order. So a lane reads
// and writes 16 bytes of a token at a time, lanes exchange nothing, and results are left operands of further products
// as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "divisor.cuh"
#include "rows.cuh"

namespace dynamic_mix {

using namespace rows;

constexpr int kUnit = 32;     // channels of a warp at a time
constexpr int kChannels = 8;  // a lane's of them
constexpr int kSteps = 2;     // left operands of a unit: of the first and the last four of a lane's channels
constexpr int kGroup = 16;    // channels that move one way are a multiple of these
constexpr int kMixes = 5;     // of decay, key, value, receptance and gate; there is one more, which blends for these
constexpr int kRank = 32;     // of each of them
constexpr int kDecayRank = 64;
constexpr int kMixBlocks = kMixes * kRank / 16, kDecayBlocks = kDecayRank / 16;
constexpr int kStay = 4;  // the direction of channels that are not shifted

struct Args {
    int rows, channels, tokens, height, width, pixels, dim, quarter;  // quarter: channels that move one way
    Divisor by_tokens, by_width, by_dim, by_quarter;
    const float* mix[1 + kMixes];
    const float *weight, *bias, *stats;  // null without a norm

    __device__ __forceinline__ float2 stats_of(int token) const {
        return stats ? reinterpret_cast<const float2*>(stats)[token] : make_float2(0, 1);
    }
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
    const __half2 both = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
}

// Weights
// -------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int units_of(int channels) { return (channels + kUnit - 1) / kUnit; }

// A matrix on its way to blocks of 16 x 16, each 32 lanes' right operands: (channels, others) where it leads down from
// the channels, else (others, channels). The blocks that one left operand meets lie together: those of half a unit, or
// of 16 low ranks and a unit. Missing channels' weights are 0.
struct Packing {
    const float* from;
    uint4* to;
    int channels, others;
    bool down;
};

constexpr int kPacked = 4;
struct Packings {
    Packing of[kPacked];
};

template <typename T>
__global__ void pack_weights(const __grid_constant__ Packings all) {
    const Packing& mine = all.of[blockIdx.y];
    const int inner = mine.others / 16, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int block = (blockIdx.x * blockDim.x + threadIdx.x) / 32, unit = block / (2 * inner);
    if (unit >= units_of(mine.channels)) return;
    const int in_unit = block % (2 * inner), half_unit = mine.down ? in_unit / inner : in_unit % 2;
    const int first = unit * kUnit + half_unit * (kChannels / 2);
    const int first_other = 16 * (mine.down ? in_unit % inner : in_unit / 2);
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int tile = i / 2, half = i % 2;
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int channel = first + (mine.down ? kChannels * q + 2 * half : kChannels * (g / 2) + 2 * tile) +
                                (mine.down ? j : g % 2);
            const int other = first_other + (mine.down ? 8 * tile + g : 2 * q + 8 * half + j);
            const int64_t at = mine.down ? static_cast<int64_t>(channel) * mine.others + other
                                         : static_cast<int64_t>(other) * mine.channels + channel;
            pair[j] = channel < mine.channels ? mine.from[at] : 0.0f;
        }
        out[i] = pack<T>(pair[0], pair[1]);
    }
    mine.to[block * 32 + lane] = make_uint4(out[0], out[1], out[2], out[3]);
}

// How many vectors the packed weights have, of so many channels, matrix after matrix.
__host__ __device__ constexpr int mix_vectors(int channels) {
    return units_of(channels) * kUnit * (kMixes * kRank / 8);
}
__host__ __device__ constexpr int decay_vectors(int channels) { return units_of(channels) * kUnit * (kDecayRank / 8); }

// Products
// -------------------------------------------------------------------------------------------------------

struct alignas(16) Sum {
    float x[4];
};

// c += a b, 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply(Sum& c, const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, __half>::value) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
}

// tanh of 16 columns' sums, of two tiles of a product, as a left operand.
template <typename T>
__device__ __forceinline__ uint4 tanh_operand(const Sum (&sums)[2]) {
    const auto pair = [](const float* x) {
        float y[2];
        asm("tanh.approx.f32 %0, %1;" : "=f"(y[0]) : "f"(x[0]));
        asm("tanh.approx.f32 %0, %1;" : "=f"(y[1]) : "f"(x[1]));
        return pack<T>(y[0], y[1]);
    };
    const float *low = sums[0].x, *high = sums[1].x;
    return make_uint4(pair(low), pair(low + 2), pair(high), pair(high + 2));
}

// Channels and tokens
// -------------------------------------------------------------------------------------------------------

// A value of each of a lane's channels.
using Values = float[kChannels];

__device__ __forceinline__ void read8(const float* from, Values& to) {
#pragma unroll
    for (int i = 0; i < kChannels; i += 4) {
        float part[4];
        load(from + i, part);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[i + j] = part[j];
    }
}

// Of the tokens g and g + 8, as the left operand of a step.
template <typename T>
__device__ __forceinline__ uint4 operand(const Values& token, const Values& token8, int step) {
    const float *low = token + 4 * step, *high = token8 + 4 * step;
    return make_uint4(pack<T>(low[0], low[1]), pack<T>(high[0], high[1]), pack<T>(low[2], low[3]),
                      pack<T>(high[2], high[3]));
}

// In one piece; the compiler would make four of some.
template <typename T>
__device__ __forceinline__ void store_if(bool exists, T* to, const Values& x) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(
                     static_cast<int>(exists)),
                 "l"(to), "r"(pack<T>(x[0], x[1])), "r"(pack<T>(x[2], x[3])), "r"(pack<T>(x[4], x[5])),
                 "r"(pack<T>(x[6], x[7]))
                 : "memory");
}

// A lane's channels of a unit. Those past the last one are read from the last ones, and their weights are 0.
struct Channels {
    int first;
    bool on;

    __device__ __forceinline__ Channels(const Args& args, int unit, int lane) {
        first = unit * kUnit + lane % 4 * kChannels;
        on = first < args.channels;
        first = min(first, args.channels - kChannels);
    }

    __device__ __forceinline__ void read(const float* parameter, Values& to) const { read8(parameter + first, to); }
};

// Where a token stands on its map; of those past the last one, the last.
struct Token {
    int index, row, column;
    bool on_map;
    float2 stats;

    __device__ __forceinline__ Token(const Args& args, int at) : index(min(at, args.rows - 1)) {
        const int position = index - static_cast<int>(args.by_tokens.divide(index)) * args.tokens;
        row = static_cast<int>(args.by_width.divide(position)), column = position - row * args.width;
        on_map = position < args.height * args.width;
        stats = args.stats_of(index);
    }
};

// The way that a lane's channels move.
__device__ __forceinline__ int direction_of(const Args& args, const Channels& channels) {
    const int in_head = channels.first - static_cast<int>(args.by_dim.divide(channels.first)) * args.dim;
    return min(static_cast<int>(args.by_quarter.divide(in_head)), kStay);
}

// How many tokens away the token is that is taken.
__device__ __forceinline__ int step_of(const Args& args, int direction) {
    const int pixels = direction % 2 ? args.pixels : -args.pixels;
    return direction == kStay ? 0 : direction < 2 ? pixels : pixels * args.width;
}

// Of a token, in one direction: how many tokens away, 0 where it is not on the map, and itself if it does not move.
struct Neighbour {
    int away;
    bool inside;  // whether it is on the map

    __device__ __forceinline__ Neighbour(const Args& args, const Token& token, int direction) {
        const int pixels = direction % 2 ? args.pixels : -args.pixels;
        const int at = (direction < 2 ? token.column : token.row) + pixels;
        const bool keeps = direction == kStay || !token.on_map;
        inside = keeps || (at >= 0 && at < (direction < 2 ? args.width : args.height));
        away = keeps || !inside ? 0 : step_of(args, direction);
    }
};

// A lane's channels of a token and of its neighbour, as they are read.
template <typename X>
struct Neighbours {
    static constexpr int kVec = 16 / sizeof(X), kVectors = kChannels / kVec;
    using Vector = Pack<X, kVec>;
    Vector here[kVectors], there[kVectors];
    float2 stats, far_stats;
    bool inside;  // whether the neighbour is on the map

    // Normalised values, and how far those of the neighbour are from them.
    __device__ __forceinline__ void values(const Values& weight, const Values& bias, Values& own, Values& apart) const {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
            const float unit = fmaf(to_float(here[j / kVec].values[j % kVec]), stats.y, -stats.x * stats.y);
            const float far = fmaf(to_float(there[j / kVec].values[j % kVec]), far_stats.y, -far_stats.x * far_stats.y);
            own[j] = fmaf(unit, weight[j], bias[j]);
            apart[j] = (inside ? fmaf(far, weight[j], bias[j]) : 0.0f) - own[j];
        }
    }
};

}  // namespace dynamic_mix
