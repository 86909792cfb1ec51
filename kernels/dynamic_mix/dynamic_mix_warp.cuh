// For weights that fit in shared memory: a warp does tiles of 16 tokens alone, and waits for no other.
//
// It takes the channels a unit at a time, twice: for the product of the blend with all low ranks, whose sums stay in
// registers, and, once their tanh is there, for the mixes.
#pragma once

#include "dynamic_mix/dynamic_mix_common.cuh"

namespace dynamic_mix {

constexpr int kTile = 16, kTileTokens = 2;              // a lane's of them
constexpr int kWarps = 12, kWarpThreads = 32 * kWarps;  // of a block, of which a processor has one
constexpr int kMostUnits = 6, kMostChannels = kMostUnits * kUnit;

using TileValues = Values[kTileTokens];

// 16 bytes from global to shared memory without waiting.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A lane's channels of a token and its neighbour, of both of its tokens.
template <typename X>
constexpr int kComingVectors = 2 * kTileTokens * Neighbours<X>::kVectors;

// What a block keeps in shared memory: the weights, and for each channel the norm's weight and bias and the blend's
// mix; for each two channels those of the other mixes, twice, as a sum of products starts with them, in the order in
// which the lanes of a token read; and what each warp's lanes have on their way.
template <typename X>
struct WarpShared {
    uint4 mix_down[mix_vectors(kMostChannels)], mix_up[mix_vectors(kMostChannels)];
    uint4 decay_down[decay_vectors(kMostChannels)], decay_up[decay_vectors(kMostChannels)];
    float weight[kMostChannels], bias[kMostChannels], blend[kMostChannels];
    Sum mixes[kMixes][kMostUnits][kChannels / 2][4];
    uint4 coming[kWarps][kComingVectors<X>][32];

    __device__ __forceinline__ void start_weights(const uint4* packed, int channels) {
        const auto copy = [&](uint4* to, int count) {
#pragma unroll 1
            for (int i = threadIdx.x; i < count; i += kWarpThreads) copy_async(to + i, packed + i);
            packed += count;
        };
        copy(mix_down, mix_vectors(channels));
        copy(mix_up, mix_vectors(channels));
        copy(decay_down, decay_vectors(channels));
        copy(decay_up, decay_vectors(channels));
    }

    __device__ __forceinline__ void write_parameters(const Args& args) {
        for (int i = threadIdx.x; i < kMostChannels; i += kWarpThreads) {
            const int channel = min(i, args.channels - 1);
            weight[i] = args.weight ? args.weight[channel] : 1;
            bias[i] = args.weight ? args.bias[channel] : 0;
            blend[i] = args.mix[0][channel];
#pragma unroll
            for (int m = 0; m < kMixes; ++m) {
                Sum& both = mixes[m][i / kUnit][i % kChannels / 2][i % kUnit / kChannels];
                both.x[i % 2] = both.x[2 + i % 2] = args.mix[1 + m][channel];
            }
        }
    }
};

constexpr int kWays = kStay + 1;

// A lane's tokens.
struct TileTokens {
    int index[kTileTokens];  // of those past the last one, the last
    float2 stats[kTileTokens];
    unsigned ways;  // of each token and direction: 1 if its neighbour is another token, 2 if the neighbour is 0

    __device__ __forceinline__ TileTokens(const Args& args, int tile, int lane) : ways(0) {
#pragma unroll
        for (int k = 0; k < kTileTokens; ++k) {
            const Token token(args, tile + 8 * k + lane / 4);
            index[k] = token.index, stats[k] = token.stats;
#pragma unroll
            for (int direction = 0; direction < kStay; ++direction) {
                const Neighbour neighbour(args, token, direction);
                ways |= (neighbour.away != 0 | (neighbour.inside ? 0 : 2)) << (2 * (k * kWays + direction));
            }
        }
    }

    __device__ __forceinline__ unsigned way(int k, int direction) const {
        return ways >> (2 * (k * kWays + direction)) & 3;
    }
};

// The ways that a lane's channels of each unit move.
struct Directions {
    unsigned bits = 0;  // four of each unit

    __device__ __forceinline__ Directions(const Args& args, int lane) {
        for (int unit = 0; unit < kMostUnits; ++unit) {
            bits |= static_cast<unsigned>(direction_of(args, Channels(args, unit, lane))) << (4 * unit);
        }
    }
    __device__ __forceinline__ int of(int unit) const { return bits >> (4 * unit) & 15; }
};

// A unit on its way to the lane's part of the shared memory.
template <typename X>
struct Coming {
    using Read = Neighbours<X>;
    uint4* memory;
    Directions directions;
    float2 far_stats[kTileTokens];

    __device__ __forceinline__ void start(const Args& args, const X* x, int unit, int lane, const TileTokens& tokens) {
        const Channels channels(args, unit, lane);
        const int direction = directions.of(unit), step = step_of(args, direction);
#pragma unroll
        for (int k = 0; k < kTileTokens; ++k) {
            const int source = tokens.index[k] + (tokens.way(k, direction) & 1 ? step : 0);
            const X* own = x + static_cast<int64_t>(tokens.index[k]) * args.channels + channels.first;
            const X* far = x + static_cast<int64_t>(source) * args.channels + channels.first;
            uint4* to = memory + k * 2 * Read::kVectors * 32;
            far_stats[k] = args.stats_of(source);
#pragma unroll
            for (int i = 0; i < Read::kVectors; ++i) {
                copy_async(to + i * 32, own + i * Read::kVec);
                copy_async(to + (Read::kVectors + i) * 32, far + i * Read::kVec);
            }
        }
    }

    // weight, bias: of the lane's channels.
    __device__ __forceinline__ void values(const float* weight, const float* bias, int unit, const TileTokens& tokens,
                                           TileValues& own, TileValues& apart) const {
        const int direction = directions.of(unit);
        Values weights, biases;
        read8(weight, weights);
        read8(bias, biases);
        wait_copies();
#pragma unroll
        for (int k = 0; k < kTileTokens; ++k) {
            Read read;
            read.stats = tokens.stats[k], read.far_stats = far_stats[k];
            read.inside = !(tokens.way(k, direction) & 2);
#pragma unroll
            for (int i = 0; i < Read::kVectors; ++i) {
                const uint4* at = memory + (k * 2 * Read::kVectors + i) * 32;
                read.here[i] = *reinterpret_cast<const typename Read::Vector*>(at);
                read.there[i] = *reinterpret_cast<const typename Read::Vector*>(at + Read::kVectors * 32);
            }
            read.values(weights, biases, own[k], apart[k]);
        }
    }
};

// sums += the product of kCount left operands with as many times kBlocks blocks of 16 columns. blocks: the lane's.
template <typename T, int kCount, int kBlocks>
__device__ __forceinline__ void add_product(Sum (&sums)[kBlocks][2], const uint4* left, const uint4* blocks) {
#pragma unroll
    for (int step = 0; step < kCount; ++step) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            const uint4 right = blocks[(step * kBlocks + n) * 32];
            multiply<T>(sums[n][0], left[step], right.x, right.y);
            multiply<T>(sums[n][1], left[step], right.z, right.w);
        }
    }
}

// The same with a unit's values.
template <typename T, int kBlocks>
__device__ __forceinline__ void add_unit(Sum (&sums)[kBlocks][2], const TileValues& values, const uint4* blocks) {
    uint4 left[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) left[step] = operand<T>(values[0], values[1], step);
    add_product<T, kSteps>(sums, left, blocks);
}

// Of a token and channel of the lane.
__device__ __forceinline__ float value_of(const Sum (&sums)[2][2], int k, int j) {
    return sums[j / 4][j / 2 % 2].x[2 * k + j % 2];
}

// Where the lane's first token of a tile has its channels of a unit.
template <typename T>
__device__ __forceinline__ T* row_of(const Args& args, T* to, int tile, int unit, int lane) {
    return to + static_cast<int64_t>(tile + lane / 4) * args.channels + Channels(args, unit, lane).first;
}

template <typename T>
__device__ __forceinline__ void store_tile(const Args& args, const TileValues& values, T* to, int tile, int unit,
                                           int lane) {
    const bool on = Channels(args, unit, lane).on;
    const int row = tile + lane / 4;
    store_if<T>(on && row < args.rows, to, values[0]);
    store_if<T>(on && row + 8 < args.rows, to + 8 * args.channels, values[1]);
}

// From the tokens x (rows, channels) to the inputs `out` of key, value, receptance and gate, (4, rows, channels), and
// the decay `raw`, (rows, channels).
template <typename X, typename T>
__global__ void __launch_bounds__(kWarpThreads, 1)
    mix_by_warps(const __grid_constant__ Args args, const X* __restrict__ x, const uint4* __restrict__ packed,
                 T* __restrict__ out, T* __restrict__ raw) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<WarpShared<X>*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = units_of(args.channels);
    const int first_channel = lane % 4 * kChannels;  // of each unit
    shared.start_weights(packed, args.channels);
    shared.write_parameters(args);

    // Of the blocks' first warps, then of their second ones, so that few tiles go to as many processors as there are.
    int tile = (warp * gridDim.x + blockIdx.x) * kTile;
    TileTokens tokens(args, tile, lane);
    Coming<X> coming{&shared.coming[warp][0][lane], Directions(args, lane)};
    wait_copies();
    __syncthreads();
    if (tile < args.rows) coming.start(args, x, 0, lane, tokens);
    const int stride = gridDim.x * kWarps * kTile;
#pragma unroll 1
    for (; tile < args.rows; tile += stride) {
        TileValues own, apart;
        uint4 low[kMixBlocks];
        {
            Sum sums[kMixBlocks][2] = {};
#pragma unroll 1
            for (int unit = 0; unit < units; ++unit) {
                const int channel = unit * kUnit + first_channel;
                Values mix;
                TileValues blend;
                coming.values(shared.weight + channel, shared.bias + channel, unit, tokens, own, apart);
                coming.start(args, x, unit + 1 < units ? unit + 1 : 0, lane, tokens);
                read8(shared.blend + channel, mix);
#pragma unroll
                for (int k = 0; k < kTileTokens; ++k) {
#pragma unroll
                    for (int j = 0; j < kChannels; ++j) blend[k][j] = fmaf(apart[k][j], mix[j], own[k][j]);
                }
                add_unit<T>(sums, blend, shared.mix_down + unit * kSteps * kMixBlocks * 32 + lane);
            }
#pragma unroll
            for (int n = 0; n < kMixBlocks; ++n) low[n] = tanh_operand<T>(sums[n]);
        }
        Sum decay[kDecayBlocks][2] = {};
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit) {
            const int channel = unit * kUnit + first_channel;
            coming.values(shared.weight + channel, shared.bias + channel, unit, tokens, own, apart);
            if (unit + 1 < units) coming.start(args, x, unit + 1, lane, tokens);
            T* to = row_of(args, out, tile, unit, lane);
#pragma unroll
            for (int i = 0; i < kMixes; ++i) {
                const auto mix = [&](int pair) { return shared.mixes[i][unit][pair][lane % 4]; };
                Sum sums[2][2] = {{mix(0), mix(1)}, {mix(2), mix(3)}};
                add_product<T, kRank / 16>(sums, low + kRank / 16 * i,
                                           shared.mix_up + 2 * (unit * kMixBlocks + kRank / 16 * i) * 32 + lane);
                TileValues values;
#pragma unroll
                for (int k = 0; k < kTileTokens; ++k) {
#pragma unroll
                    for (int j = 0; j < kChannels; ++j) {
                        values[k][j] = fmaf(apart[k][j], value_of(sums, k, j), own[k][j]);
                    }
                }
                if (i == 0) {
                    add_unit<T>(decay, values, shared.decay_down + unit * kSteps * kDecayBlocks * 32 + lane);
                } else {
                    store_tile<T>(args, values, to, tile, unit, lane);
                    to += static_cast<int64_t>(args.rows) * args.channels;
                }
            }
        }
        tokens = TileTokens(args, tile + stride, lane);
        if (tile + stride < args.rows) coming.start(args, x, 0, lane, tokens);
        uint4 decay_low[kDecayBlocks];
#pragma unroll
        for (int n = 0; n < kDecayBlocks; ++n) decay_low[n] = tanh_operand<T>(decay[n]);
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit) {
            Sum sums[2][2] = {};
            add_product<T, kDecayBlocks>(sums, decay_low, shared.decay_up + 2 * unit * kDecayBlocks * 32 + lane);
            TileValues values;
#pragma unroll
            for (int k = 0; k < kTileTokens; ++k) {
#pragma unroll
                for (int j = 0; j < kChannels; ++j) values[k][j] = value_of(sums, k, j);
            }
            store_tile<T>(args, values, row_of(args, raw, tile, unit, lane), tile, unit, lane);
        }
    }
}

}  // namespace dynamic_mix
