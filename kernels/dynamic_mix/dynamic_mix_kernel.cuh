// The kernels of dynamic_mix_cuda.cu; the plan is in README.md.
//
// Lane 4g + q of a warp has the channels 8q .. 8q + 7 of a unit of 32, of the tokens g and g + 8 of each 16. To the
// instruction the first and the last four of them are the columns 2q, 2q + 1, 2q + 8 and 2q + 9 of a left operand each,
// and every two of them the columns 2q and 2q + 1 of a result; the weights are packed in that order. So a lane reads
// and writes 16 bytes of a token at a time, lanes exchange nothing, and left operands pass from warp to warp through
// shared memory as the registers that they are.
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
constexpr int kTeam = 6;      // warps that share a tile: as many units as VRWKV6-T has
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
// the channels, else (others, channels). The blocks of half a unit lie together; missing channels' weights are 0.
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
    const int block = (blockIdx.x * blockDim.x + threadIdx.x) / 32, half_unit = block / inner;
    if (half_unit >= 2 * units_of(mine.channels)) return;
    const int first = half_unit / 2 * kUnit + half_unit % 2 * (kChannels / 2), first_other = block % inner * 16;
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

// The packed weights, in shared memory where they fit there.
struct Weights {
    const uint4 *mix_down, *mix_up, *decay_down, *decay_up;

    template <bool kShared>
    static __device__ __forceinline__ uint4 read(const uint4* from) {
        if constexpr (kShared) return *from;
        return __ldg(from);
    }
};

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

// c + a b, 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ Sum multiply(const Sum& c, uint4 a, uint32_t b0, uint32_t b1) {
    Sum d;
    if constexpr (std::is_same<T, __half>::value) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%10,%11,%12,%13};"
            : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]),
              "f"(c.x[3]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%10,%11,%12,%13};"
            : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]),
              "f"(c.x[3]));
    }
    return d;
}

// What works on tiles: of kParts times 16 tokens, one for each of the kTeams teams of a block, of which a processor has
// one, with as many registers as these take. Where weights lie in shared memory, small tiles leave registers to more
// teams, which wait for memory in turns; where they are read from the cache, larger ones read them less often.
template <bool kShared>
struct Tiles {
    static constexpr int kParts = kShared ? 1 : 2, kTeams = kShared ? 3 : 2;
    static constexpr int kTile = 16 * kParts;
    static constexpr int kTokens = 2 * kParts;  // a lane's of them
    static constexpr int kThreads = 32 * kTeam * kTeams;
    // A team's shared memory, in vectors: left operands from a unit of each warp, and of all low ranks.
    static constexpr int kInputs = kTeam * (kUnit / 16) * kParts * 32, kTeamMemory = kInputs + kMixBlocks * kParts * 32;
    static constexpr int kMemory = kTeams * kTeamMemory, kStep = kTeams * kTile;

    // Of a tile's tokens and kBlocks times 16 columns.
    template <int kBlocks>
    using Sums = Sum[kBlocks][kParts][2];

    // sums += a b over `steps` times 16. The left operands of a step lie together, the right ones by the strides;
    // pointers are the lane's.
    template <typename T, int kBlocks>
    static __device__ __forceinline__ void add_product(Sums<kBlocks>& sums, const uint4* a, const uint4* b, int steps,
                                                       int step_stride, int block_stride) {
#pragma unroll 4
        for (int step = 0; step < steps; ++step) {
            uint4 left[kParts], right[kBlocks];
#pragma unroll
            for (int p = 0; p < kParts; ++p) left[p] = a[(step * kParts + p) * 32];
#pragma unroll
            for (int n = 0; n < kBlocks; ++n)
                right[n] = Weights::read<kShared>(b + step * step_stride + n * block_stride);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                for (int p = 0; p < kParts; ++p) {
                    sums[n][p][0] = multiply<T>(sums[n][p][0], left[p], right[n].x, right[n].y);
                    sums[n][p][1] = multiply<T>(sums[n][p][1], left[p], right[n].z, right[n].w);
                }
            }
        }
    }

    // tanh of sums as left operands.
    template <typename T, int kBlocks>
    static __device__ __forceinline__ void write_tanh(const Sums<kBlocks>& sums, uint4* to) {
        const auto pair = [](const float* x) {
            float y[2];
            asm("tanh.approx.f32 %0, %1;" : "=f"(y[0]) : "f"(x[0]));
            asm("tanh.approx.f32 %0, %1;" : "=f"(y[1]) : "f"(x[1]));
            return pack<T>(y[0], y[1]);
        };
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                const float *low = sums[n][p][0].x, *high = sums[n][p][1].x;
                to[(n * kParts + p) * 32] = make_uint4(pair(low), pair(low + 2), pair(high), pair(high + 2));
            }
        }
    }

    // Channels and tokens
    // -------------------------------------------------------------------------------------------------------

    // A value of each of a lane's channels, for each of its tokens.
    using Values = float[kTokens][kChannels];

    // A lane's channels of a unit. Those past the last one are read from the last ones, and count for nothing.
    struct Channels {
        int first;
        bool on;

        __device__ __forceinline__ Channels(const Args& args, int unit, int lane) {
            first = unit * kUnit + lane % 4 * kChannels;
            on = first < args.channels;
            first = min(first, args.channels - kChannels);
        }

        __device__ __forceinline__ void read(const float* parameter, float (&to)[kChannels]) const {
#pragma unroll
            for (int i = 0; i < kChannels; i += 4) {
                float part[4];
                load(parameter + first + i, part);
#pragma unroll
                for (int j = 0; j < 4; ++j) to[i + j] = part[j];
            }
        }

        // As left operands.
        template <typename T>
        __device__ __forceinline__ void write(const Values& values, uint4* to) const {
#pragma unroll
            for (int step = 0; step < kUnit / 16; ++step) {
#pragma unroll
                for (int p = 0; p < kParts; ++p) {
                    const float *low = values[2 * p] + 4 * step, *high = values[2 * p + 1] + 4 * step;
                    const uint4 operand = make_uint4(pack<T>(low[0], low[1]), pack<T>(high[0], high[1]),
                                                     pack<T>(low[2], low[3]), pack<T>(high[2], high[3]));
                    to[(step * kParts + p) * 32] = on ? operand : make_uint4(0, 0, 0, 0);
                }
            }
        }

        // As rows of `to`, of which the tile's first one is `tile`.
        template <typename T>
        __device__ __forceinline__ void store_rows(const Args& args, const Values& values, T* to, int tile,
                                                   int lane) const {
            const int row = tile + lane / 4;
            to += static_cast<int64_t>(row) * args.channels + first;
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                if (on && row + 8 * k < args.rows) store(to + 8 * k * args.channels, values[k]);
            }
        }
    };

    // A lane's channels of its tokens and of their neighbours, as they are read.
    template <typename X>
    struct Packet {
        static constexpr int kVec = 16 / sizeof(X);
        using Vector = Pack<X, kVec>;
        Vector here[kTokens][kChannels / kVec], there[kTokens][kChannels / kVec];
        float2 stats[kTokens], far_stats[kTokens];
        bool inside[kTokens];  // whether the neighbour is on the map

        __device__ __forceinline__ void read(const Args& args, const X* x, int tile, int unit, int lane) {
            const Channels channels(args, unit, lane);
            const int in_head = channels.first - static_cast<int>(args.by_dim.divide(channels.first)) * args.dim;
            const int direction = min(static_cast<int>(args.by_quarter.divide(in_head)), kStay);
            const bool horizontal = direction < 2;
            const int step = direction % 2 ? args.pixels : -args.pixels, limit = horizontal ? args.width : args.height;
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
                const int index = min(tile + 8 * k + lane / 4, args.rows - 1);
                const int position = index - static_cast<int>(args.by_tokens.divide(index)) * args.tokens;
                const int row = static_cast<int>(args.by_width.divide(position)), column = position - row * args.width;
                const int at = (horizontal ? column : row) + step;
                const bool stays = direction == kStay || position >= args.height * args.width;  // or is past the map
                inside[k] = stays || (at >= 0 && at < limit);
                const int source = index + (stays || !inside[k] ? 0 : horizontal ? step : step * args.width);
                const X* own = x + static_cast<int64_t>(index) * args.channels + channels.first;
                const X* far = x + static_cast<int64_t>(source) * args.channels + channels.first;
#pragma unroll
                for (int i = 0; i < kChannels / kVec; ++i) {
                    here[k][i] = *reinterpret_cast<const Vector*>(own + i * kVec);
                    there[k][i] = *reinterpret_cast<const Vector*>(far + i * kVec);
                }
                stats[k] = args.stats_of(index);
                far_stats[k] = args.stats_of(source);
            }
        }

        // Normalised values, and how far those of the neighbours are from them.
        __device__ __forceinline__ void values(const Args& args, const Channels& channels, Values& own,
                                               Values& apart) const {
            float weight[kChannels] = {1, 1, 1, 1, 1, 1, 1, 1}, bias[kChannels] = {0, 0, 0, 0, 0, 0, 0, 0};
            if (args.weight) {
                channels.read(args.weight, weight);
                channels.read(args.bias, bias);
            }
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
#pragma unroll
                for (int j = 0; j < kChannels; ++j) {
                    const float unit = (to_float(here[k][j / kVec].values[j % kVec]) - stats[k].x) * stats[k].y;
                    const float far = (to_float(there[k][j / kVec].values[j % kVec]) - far_stats[k].x) * far_stats[k].y;
                    own[k][j] = fmaf(unit, weight[j], bias[j]);
                    apart[k][j] = (inside[k] ? fmaf(far, weight[j], bias[j]) : 0.0f) - own[k][j];
                }
            }
        }
    };

    // Tiles
    // -------------------------------------------------------------------------------------------------------

    // The warps that share a tile, as a lane sees them.
    struct Team {
        int index, warp, lane;
        uint4 *inputs, *low;  // of the lane: what products with all channels, and with low ranks, take

        __device__ __forceinline__ explicit Team(uint4* memory) {
            index = threadIdx.x / (32 * kTeam), warp = threadIdx.x / 32 % kTeam, lane = threadIdx.x % 32;
            inputs = memory + index * kTeamMemory + lane;
            low = inputs + kInputs;
        }

        // Waits for the others. Where weights come from global memory all teams go together, so that one finds in the
        // cache what the other has read.
        __device__ __forceinline__ void meet() const {
            if constexpr (kShared) {
                asm volatile("bar.sync %0, %1;" ::"r"(1 + index), "n"(32 * kTeam) : "memory");
            } else {
                __syncthreads();
            }
        }
    };

    // A unit's part of the product of all channels with a matrix, of which a warp takes kBlocks blocks.
    template <typename T, int kBlocks>
    static __device__ __forceinline__ void add_chunk(Sums<kBlocks>& sums, const Args& args, const Team& team, int chunk,
                                                     const uint4* down, int inner) {
        const int first = chunk * kTeam, steps = 2 * min(kTeam, units_of(args.channels) - first);
        const uint4* mine = down + (2 * first * inner + team.warp * kBlocks) * 32 + team.lane;
        add_product<T, kBlocks>(sums, team.inputs, mine, steps, inner * 32, 32);
    }

    // The product of `steps` blocks of low ranks with a unit's columns, added to start[column].
    template <typename T>
    static __device__ __forceinline__ void product_up(const Team& team, const uint4* low, int steps, const uint4* up,
                                                      int inner, const float (&start)[kChannels], Values& out) {
        Sums<2> sums;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[n][p][i / 4].x[i % 4] = start[4 * n + i / 4 * 2 + i % 2];
            }
        }
        add_product<T, 2>(sums, low, up + team.lane, steps, 32, inner * 32);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) out[k][j] = sums[j / 4][k / 2][j / 2 % 2].x[k % 2 * 2 + j % 2];
        }
    }

    // The inputs of all mixes for a unit: the decay's to the team, the others' to `out`.
    template <typename T>
    static __device__ __forceinline__ void mix_unit(const Args& args, const Team& team, const uint4* up, int tile,
                                                    int unit, const Values& own, const Values& apart, T* out) {
        const Channels channels(args, unit, team.lane);
        const int64_t plane = static_cast<int64_t>(args.rows) * args.channels;
#pragma unroll
        for (int i = 0; i < kMixes; ++i) {
            float mix[kChannels];
            Values values;
            channels.read(args.mix[1 + i], mix);
            product_up<T>(team, team.low + 2 * i * kParts * 32, 2, up + (2 * unit * kMixBlocks + 2 * i) * 32,
                          kMixBlocks, mix, values);
#pragma unroll
            for (int k = 0; k < kTokens; ++k) {
#pragma unroll
                for (int j = 0; j < kChannels; ++j) values[k][j] = fmaf(apart[k][j], values[k][j], own[k][j]);
            }
            if (i == 0) {
                channels.template write<T>(values, team.inputs + team.warp * (kUnit / 16) * kParts * 32);
            } else {
                channels.store_rows(args, values, out + (i - 1) * plane, tile, team.lane);
            }
        }
    }

    // All of a tile's results. `packet` has its first chunk, a unit for each warp, and then that of the tile `next`; of
    // weights in shared memory it is read here, for registers that wait for the next tile would not be left to this
    // one.
    template <typename X, typename T>
    static __device__ __forceinline__ void mix_tile(const Args& args, const X* x, const Weights& weights,
                                                    const Team& team, int tile, int next, Packet<X>& packet, T* out,
                                                    T* raw) {
        const int units = units_of(args.channels), chunks = kShared ? 1 : (units + kTeam - 1) / kTeam;
        Values own, apart;
        Sums<2> low = {};  // a warp has those of one mix
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int unit = chunk * kTeam + team.warp;
            if (unit < units) {
                const Channels channels(args, unit, team.lane);
                float mix[kChannels];
                Values blend;
                if constexpr (kShared) packet.read(args, x, tile, unit, team.lane);
                packet.values(args, channels, own, apart);
                channels.read(args.mix[0], mix);
#pragma unroll
                for (int k = 0; k < kTokens; ++k) {
#pragma unroll
                    for (int j = 0; j < kChannels; ++j) blend[k][j] = fmaf(apart[k][j], mix[j], own[k][j]);
                }
                channels.template write<T>(blend, team.inputs + team.warp * (kUnit / 16) * kParts * 32);
            }
            const bool last = chunk + 1 == chunks;
            if constexpr (!kShared) packet.read(args, x, tile, last ? team.warp : unit + kTeam, team.lane);
            team.meet();
            if (team.warp < kMixes) {
                add_chunk<T, 2>(low, args, team, chunk, weights.mix_down, kMixBlocks);
                if (last) write_tanh<T, 2>(low, team.low + 2 * team.warp * kParts * 32);
            }
            team.meet();
        }

        Sums<1> decay = {};  // a warp has 16 columns, or none
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int unit = chunk * kTeam + team.warp;
            if (unit < units) {
                if constexpr (!kShared) packet.values(args, Channels(args, unit, team.lane), own, apart);
                mix_unit<T>(args, team, weights.mix_up, tile, unit, own, apart, out);
            }
            const bool last = chunk + 1 == chunks;
            if constexpr (!kShared)
                packet.read(args, x, last ? next : tile, last ? team.warp : unit + kTeam, team.lane);
            team.meet();
            if (team.warp < kDecayBlocks) {
                add_chunk<T, 1>(decay, args, team, chunk, weights.decay_down, kDecayBlocks);
                if (last) write_tanh<T, 1>(decay, team.low + team.warp * kParts * 32);
            }
            team.meet();
        }

        for (int unit = team.warp; unit < units; unit += kTeam) {
            const float nothing[kChannels] = {};
            Values values;
            product_up<T>(team, team.low, kDecayBlocks, weights.decay_up + 2 * unit * kDecayBlocks * 32, kDecayBlocks,
                          nothing, values);
            Channels(args, unit, team.lane).store_rows(args, values, raw, tile, team.lane);
        }
    }
};

// From the tokens x (rows, channels) to the inputs `out` of key, value, receptance and gate, (4, rows, channels), and
// the decay `raw`, (rows, channels). kShared: the weights fit in shared memory, and the team has a warp for each unit.
template <typename X, typename T, bool kShared>
__global__ void __launch_bounds__(Tiles<kShared>::kThreads, 1)
    mix_tokens(const __grid_constant__ Args args, const X* __restrict__ x, const uint4* __restrict__ packed,
               T* __restrict__ out, T* __restrict__ raw) {
    using Here = Tiles<kShared>;
    extern __shared__ uint4 shared[];
    uint4* const copy = shared + Here::kMemory;
    const int padded = units_of(args.channels) * kUnit;
    const int mix_size = padded * (kMixes * kRank / 8), decay_size = padded * (kDecayRank / 8);
    if constexpr (kShared) {
        for (int i = threadIdx.x; i < 2 * (mix_size + decay_size); i += Here::kThreads) {
            copy_async(copy + i, packed + i);
        }
    }
    const typename Here::Team team(shared);
    // Of the blocks' first tiles, then of their second ones, so that what remains after whole rounds goes to as many
    // processors as there are. Together, teams go on until the first one is done: tiles past the last one have no rows.
    const int together = kShared ? 0 : team.index * gridDim.x * Here::kTile;
    const int stride = gridDim.x * Here::kStep;
    int tile = (team.index * gridDim.x + blockIdx.x) * Here::kTile;
    typename Here::template Packet<X> packet;
    if constexpr (!kShared) packet.read(args, x, tile, team.warp, team.lane);
    if constexpr (kShared) {
        wait_copies();
        __syncthreads();
    }
    const uint4* from = kShared ? copy : packed;
    const Weights weights{from, from + mix_size, from + 2 * mix_size, from + 2 * mix_size + decay_size};
#pragma unroll 1
    for (; tile - together < args.rows; tile += stride) {
        Here::template mix_tile<X, T>(args, x, weights, team, tile, tile + stride, packet, out, raw);
    }
}

}  // namespace dynamic_mix
