// The kernels of dynamic_mix_cuda.cu; the plan is in README.md.
//
// Operands of the warps' matrix products are laid out so that nothing is exchanged between lanes: lane 4g + q holds
// channels 4q .. 4q + 3 of a group of 16, of the tokens g and g + 8 of its warp's 16. To the instruction these are
// columns 2q, 2q + 1, 2q + 8 and 2q + 9; the weights are packed in the same order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "divisor.cuh"
#include "rows.cuh"

namespace dynamic_mix {

using namespace rows;

constexpr int kTile = 16;   // tokens of a warp
constexpr int kGroup = 16;  // channels taken at a time
constexpr int kMixes = 5;   // of decay, key, value, receptance and gate; there is one more, which blends for these
constexpr int kRank = 32;   // of each of them
constexpr int kDecayRank = 64;
constexpr int kMixBlocks = kMixes * kRank / 16, kDecayBlocks = kDecayRank / 16;
constexpr int kWarpsAProcessor = 12;  // with as many registers as the products' sums take
constexpr int kStay = 4;              // the direction of channels that are not shifted

struct Args {
    int rows, channels, tokens, height, width, pixels, dim, quarter;  // quarter: channels that move one way
    Divisor by_tokens, by_width;
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

// A matrix (rows, columns) on its way to blocks of 16 x 16, each 32 lanes' right operands. down: its rows are channels,
// and the blocks of a group of channels lie together; else its columns are.
struct Packing {
    const float* from;
    uint4* to;
    int rows, columns;
    bool down;
};

constexpr int kPacked = 4;
struct Packings {
    Packing of[kPacked];
};

template <typename T>
__global__ void pack_weights(const __grid_constant__ Packings all) {
    const Packing& mine = all.of[blockIdx.y];
    const int inner = (mine.down ? mine.columns : mine.rows) / 16, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int block = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (block >= mine.rows / 16 * (mine.columns / 16)) return;
    const int outer_first = block / inner * 16, inner_first = block % inner * 16;
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int tile = i / 2, half = i % 2;
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = mine.down ? outer_first + 4 * q + 2 * half + j : inner_first + 2 * q + 8 * half + j;
            const int column = mine.down ? inner_first + 8 * tile + g : outer_first + 4 * (g / 2) + 2 * tile + g % 2;
            pair[j] = mine.from[static_cast<int64_t>(row) * mine.columns + column];
        }
        out[i] = pack<T>(pair[0], pair[1]);
    }
    mine.to[block * 32 + lane] = make_uint4(out[0], out[1], out[2], out[3]);
}

// 16 bytes from global to shared memory without waiting.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Products
// -------------------------------------------------------------------------------------------------------

struct Sum {
    float x[4];
};

// c += a b, 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply(Sum& c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, __half>::value) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Both halves of 16 columns.
template <typename T>
__device__ __forceinline__ void multiply(Sum (&c)[2], const uint32_t (&a)[4], uint4 b) {
    multiply<T>(c[0], a, b.x, b.y);
    multiply<T>(c[1], a, b.z, b.w);
}

// tanh of 16 columns of sums, as a left operand.
template <typename T>
__device__ __forceinline__ void tanh_operand(const Sum (&sums)[2], uint32_t (&out)[4]) {
    const auto tanh_of = [](float x) {
        float y;
        asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* pair = sums[i / 2].x + i % 2 * 2;
        out[i] = pack<T>(tanh_of(pair[0]), tanh_of(pair[1]));
    }
}

// Sums of 16 columns in the order of channels: 0 .. 3 of token g, 4 .. 7 of token g + 8.
__device__ __forceinline__ float channel_of(const Sum (&sums)[2], int i) {
    return sums[i % 4 / 2].x[i / 4 * 2 + i % 2];
}

template <typename T>
__device__ __forceinline__ void operand(const float (&values)[8], uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = 4 * (i % 2) + 2 * (i / 2);
        out[i] = pack<T>(values[at], values[at + 1]);
    }
}

// Tokens
// -------------------------------------------------------------------------------------------------------

// One of a lane's two tokens.
struct Token {
    int index, row, column;  // row: negative for a token past the map, which is not shifted
    bool on;
    float2 stats;

    __device__ __forceinline__ void place(const Args& args, int at) {
        on = at < args.rows;
        index = min(at, args.rows - 1);
        const int position = index - static_cast<int>(args.by_tokens.divide(index)) * args.tokens;
        row = static_cast<int>(args.by_width.divide(position));
        column = position - row * args.width;
        if (position >= args.height * args.width) row = -1;
        stats = args.stats_of(index);
    }

    // Where the channels of a direction come from; `inside`: whether that is on the map.
    __device__ __forceinline__ int source(const Args& args, int direction, bool& inside) const {
        const int step = direction % 2 ? args.pixels : -args.pixels;
        const bool horizontal = direction < 2;
        const int at = (horizontal ? column : row) + step, limit = horizontal ? args.width : args.height;
        const bool stays = direction == kStay || row < 0;
        inside = stays || (at >= 0 && at < limit);
        return index + (stays || !inside ? 0 : horizontal ? step : step * args.width);
    }
};

// Goes over the groups of channels, those of one direction after the other: what a direction needs is found once.
template <typename X>
struct Walk {
    const Args& args;
    const X* x;
    const Token (&tokens)[2];
    int direction = -1, head = 0, at = 0, end = 0;  // channels: of a head's first one, within a head
    int sources[2];
    bool inside[2];
    float2 far_stats[2];

    // To the next group; false past the last one.
    __device__ __forceinline__ bool next() {
        at += kGroup;
        if (at < end) return true;
        if (direction >= 0 && (head += args.dim) < args.channels) {
            at = direction * args.quarter;
            return true;
        }
        return turn();
    }

 private:
    __device__ __forceinline__ bool turn() {
        ++direction;
        head = 0, at = direction * args.quarter, end = direction == kStay ? args.dim : at + args.quarter;
        if (direction > kStay || at >= end) return false;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            sources[k] = tokens[k].source(args, direction, inside[k]);
            far_stats[k] = args.stats_of(sources[k]);
        }
        return true;
    }
};

// What is read of a group's channels, asked for before the group before it is used.
template <typename X>
struct Packet {
    Pack<X, 4> here[2], there[2];
    float2 far_stats[2];
    bool inside[2];
    int group;

    __device__ __forceinline__ void read(const Walk<X>& walk, int q) {
        const int first = walk.head + walk.at;
        group = first / kGroup;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const X* own = walk.x + static_cast<int64_t>(walk.tokens[k].index) * walk.args.channels;
            const X* far = walk.x + static_cast<int64_t>(walk.sources[k]) * walk.args.channels;
            here[k] = *reinterpret_cast<const Pack<X, 4>*>(own + first + 4 * q);
            there[k] = *reinterpret_cast<const Pack<X, 4>*>(far + first + 4 * q);
            far_stats[k] = walk.far_stats[k];
            inside[k] = walk.inside[k];
        }
    }

    // Normalised values, and how far those of the neighbours are from them.
    __device__ __forceinline__ void values(const Args& args, const Token (&tokens)[2], int channel, float (&own)[8],
                                           float (&apart)[8]) const {
        float weight[4] = {1, 1, 1, 1}, bias[4] = {0, 0, 0, 0};
        if (args.weight) {
            load(args.weight + channel, weight);
            load(args.bias + channel, bias);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int k = i / 4, j = i % 4;
            const float unit = (to_float(here[k].values[j]) - tokens[k].stats.x) * tokens[k].stats.y;
            const float far_unit = (to_float(there[k].values[j]) - far_stats[k].x) * far_stats[k].y;
            own[i] = fmaf(unit, weight[j], bias[j]);
            apart[i] = (inside[k] ? fmaf(far_unit, weight[j], bias[j]) : 0.0f) - own[i];
        }
    }
};

// Calls use(packet) for every group.
template <typename X, typename Use>
__device__ __forceinline__ void for_groups(const Args& args, const X* x, const Token (&tokens)[2], int q,
                                           const Use& use) {
    Walk<X> walk{args, x, tokens};
    Packet<X> coming;
    bool more = walk.next();
    if (more) coming.read(walk, q);
#pragma unroll 1
    while (more) {
        const Packet<X> packet = coming;
        more = walk.next();
        if (more) coming.read(walk, q);
        use(packet);
    }
}

// The packed weights, in shared memory where they fit there.
struct Weights {
    const uint4 *mix_down, *mix_up, *decay_down, *decay_up;

    template <bool kShared>
    static __device__ __forceinline__ uint4 read(const uint4* from) {
        if constexpr (kShared) return *from;
        return __ldg(from);
    }
};

// tanh of the blend's product with the low ranks, as left operands.
template <typename X, typename T, bool kShared>
__device__ __forceinline__ void low_ranks(const Args& args, const X* x, const uint4* down, const Token (&tokens)[2],
                                          int lane, uint32_t (&z)[kMixBlocks][4]) {
    const int q = lane % 4;
    Sum sums[kMixBlocks][2] = {};
    for_groups(args, x, tokens, q, [&](const Packet<X>& packet) {
        const int channel = packet.group * kGroup + 4 * q;
        float values[8], apart[8], mix[4];
        packet.values(args, tokens, channel, values, apart);
        load(args.mix[0] + channel, mix);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = fmaf(apart[i], mix[i % 4], values[i]);
        uint32_t a[4];
        operand<T>(values, a);
        const uint4* blocks = down + packet.group * (kMixBlocks * 32) + lane;
#pragma unroll
        for (int n = 0; n < kMixBlocks; ++n) multiply<T>(sums[n], a, Weights::read<kShared>(blocks + n * 32));
    });
#pragma unroll
    for (int n = 0; n < kMixBlocks; ++n) tanh_operand<T>(sums[n], z[n]);
}

// Four channels of both tokens.
template <typename T>
__device__ __forceinline__ void store_both(T* const (&to)[2], const Token (&tokens)[2], int64_t offset,
                                           const float (&values)[8]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float part[4] = {values[4 * k], values[4 * k + 1], values[4 * k + 2], values[4 * k + 3]};
        if (tokens[k].on) store(to[k] + offset, part);
    }
}

// All of a tile's results.
template <typename X, typename T, bool kShared>
__device__ __forceinline__ void mix_tile(const Args& args, const X* x, const Weights& weights, int first, T* out,
                                         T* raw) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    Token tokens[2];
    tokens[0].place(args, first + g);
    tokens[1].place(args, first + g + 8);
    uint32_t z[kMixBlocks][4];
    low_ranks<X, T, kShared>(args, x, weights.mix_down, tokens, lane, z);

    const int64_t plane = static_cast<int64_t>(args.rows) * args.channels;
    const int64_t rows[2] = {static_cast<int64_t>(tokens[0].index) * args.channels,
                             static_cast<int64_t>(tokens[1].index) * args.channels};
    T* const outs[2] = {out + rows[0], out + rows[1]};
    Sum decay[kDecayBlocks][2] = {};
    for_groups(args, x, tokens, q, [&](const Packet<X>& packet) {
        const int channel = packet.group * kGroup + 4 * q;
        float own[8], apart[8];
        packet.values(args, tokens, channel, own, apart);
        const uint4* up = weights.mix_up + packet.group * (kMixBlocks * 32) + lane;
        const uint4* down = weights.decay_down + packet.group * (kDecayBlocks * 32) + lane;
#pragma unroll
        for (int i = 0; i < kMixes; ++i) {
            float mix[4], values[8];
            load(args.mix[1 + i] + channel, mix);
            Sum mixes[2];  // begin with the constant mixes, in the order of channel_of
#pragma unroll
            for (int j = 0; j < 8; ++j) mixes[j / 4].x[j % 4] = mix[j / 4 * 2 + j % 2];
#pragma unroll
            for (int n = 2 * i; n < 2 * i + 2; ++n) multiply<T>(mixes, z[n], Weights::read<kShared>(up + n * 32));
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = fmaf(apart[j], channel_of(mixes, j), own[j]);
            if (i > 0) {
                store_both(outs, tokens, (i - 1) * plane + channel, values);
                continue;
            }
            uint32_t a[4];
            operand<T>(values, a);
#pragma unroll
            for (int n = 0; n < kDecayBlocks; ++n) multiply<T>(decay[n], a, Weights::read<kShared>(down + n * 32));
        }
    });

    uint32_t a[kDecayBlocks][4];
#pragma unroll
    for (int n = 0; n < kDecayBlocks; ++n) tanh_operand<T>(decay[n], a[n]);
    T* const raws[2] = {raw + rows[0], raw + rows[1]};
#pragma unroll 2
    for (int group = 0; group < args.channels / kGroup; ++group) {
        Sum sums[2] = {};
#pragma unroll
        for (int n = 0; n < kDecayBlocks; ++n) {
            multiply<T>(sums, a[n], Weights::read<kShared>(weights.decay_up + (group * kDecayBlocks + n) * 32 + lane));
        }
        float values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = channel_of(sums, j);
        store_both(raws, tokens, group * kGroup + 4 * q, values);
    }
}

// From the tokens x (rows, channels) to the inputs `out` of key, value, receptance and gate, (4, rows, channels), and
// the decay `raw`, (rows, channels).
template <typename X, typename T, bool kShared, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kShared ? 1 : kWarpsAProcessor / kWarps)
    mix_tokens(const __grid_constant__ Args args, const X* __restrict__ x, const uint4* __restrict__ packed,
               T* __restrict__ out, T* __restrict__ raw) {
    extern __shared__ uint4 shared[];
    const int mix_size = args.channels * (kMixes * kRank / 8), decay_size = args.channels * (kDecayRank / 8);
    if constexpr (kShared) {
        for (int i = threadIdx.x; i < 2 * (mix_size + decay_size); i += 32 * kWarps) copy_async(shared + i, packed + i);
        wait_copies();
        __syncthreads();
    }
    const uint4* from = kShared ? shared : packed;
    const Weights weights{from, from + mix_size, from + 2 * mix_size, from + 2 * mix_size + decay_size};
    // Tiles that remain after whole rounds go to as many processors as there are.
    const int tiles = (args.rows + kTile - 1) / kTile;
    for (int tile = threadIdx.x / 32 * gridDim.x + blockIdx.x; tile < tiles; tile += kWarps * gridDim.x) {
        mix_tile<X, T, kShared>(args, x, weights, tile * kTile, out, raw);
    }
}

}  // namespace dynamic_mix
