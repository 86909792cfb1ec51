// For weights that do not fit in shared memory: six warps share a tile of 32 tokens, and two such teams go together, so
// that one finds the weights in the cache that the other has read.
//
// Channels are taken 192 at a time, a unit for each warp, and read again for the mixes.
#pragma once

#include "dynamic_mix/dynamic_mix_common.cuh"

namespace dynamic_mix {

constexpr int kTeam = 6, kTeams = 2, kTeamThreads = 32 * kTeam * kTeams;
constexpr int kParts = 2, kTeamTile = 16 * kParts, kTeamTokens = 2 * kParts;  // a lane's of them
// A team's shared memory, in vectors: left operands from a unit of each warp, and of all low ranks.
constexpr int kInputs = kTeam * kSteps * kParts * 32, kTeamVectors = kInputs + kMixBlocks * kParts * 32;
constexpr int kTeamBytes = kTeams * kTeamVectors * static_cast<int>(sizeof(uint4));

// Where the packed weights lie.
struct Weights {
    const uint4 *mix_down, *mix_up, *decay_down, *decay_up;

    __device__ __forceinline__ Weights(const uint4* packed, int channels)
        : mix_down(packed),
          mix_up(mix_down + mix_vectors(channels)),
          decay_down(mix_up + mix_vectors(channels)),
          decay_up(decay_down + decay_vectors(channels)) {}
};

// Of a tile's tokens and kBlocks times 16 columns.
template <int kBlocks>
using Sums = Sum[kBlocks][kParts][2];

using TeamValues = Values[kTeamTokens];

// sums += a b over `steps` times 16. The left operands of a step lie together, the right ones by the strides; pointers
// are the lane's.
template <typename T, int kBlocks>
__device__ __forceinline__ void add_product(Sums<kBlocks>& sums, const uint4* a, const uint4* b, int steps,
                                            int step_stride, int block_stride) {
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
        uint4 left[kParts], right[kBlocks];
#pragma unroll
        for (int p = 0; p < kParts; ++p) left[p] = a[(step * kParts + p) * 32];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) right[n] = __ldg(b + step * step_stride + n * block_stride);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                multiply<T>(sums[n][p][0], left[p], right[n].x, right[n].y);
                multiply<T>(sums[n][p][1], left[p], right[n].z, right[n].w);
            }
        }
    }
}

template <typename T, int kBlocks>
__device__ __forceinline__ void write_tanh(const Sums<kBlocks>& sums, uint4* to) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) to[(n * kParts + p) * 32] = tanh_operand<T>(sums[n][p]);
    }
}

// A lane's channels of its tokens and of their neighbours.
template <typename X>
struct Packet {
    Neighbours<X> of[kTeamTokens];

    __device__ __forceinline__ void read(const Args& args, const X* x, int tile, int unit, int lane) {
        using Read = Neighbours<X>;
        const Channels channels(args, unit, lane);
        const int direction = direction_of(args, channels);
#pragma unroll
        for (int k = 0; k < kTeamTokens; ++k) {
            const Token token(args, tile + 8 * k + lane / 4);
            const Neighbour neighbour(args, token, direction);
            const int source = token.index + neighbour.away;
            const X* own = x + static_cast<int64_t>(token.index) * args.channels + channels.first;
            const X* far = x + static_cast<int64_t>(source) * args.channels + channels.first;
#pragma unroll
            for (int i = 0; i < Read::kVectors; ++i) {
                of[k].here[i] = *reinterpret_cast<const typename Read::Vector*>(own + i * Read::kVec);
                of[k].there[i] = *reinterpret_cast<const typename Read::Vector*>(far + i * Read::kVec);
            }
            of[k].stats = token.stats, of[k].far_stats = args.stats_of(source), of[k].inside = neighbour.inside;
        }
    }

    __device__ __forceinline__ void values(const Args& args, const Channels& channels, TeamValues& own,
                                           TeamValues& apart) const {
        Values weight = {1, 1, 1, 1, 1, 1, 1, 1}, bias = {};
        if (args.weight) {
            channels.read(args.weight, weight);
            channels.read(args.bias, bias);
        }
#pragma unroll
        for (int k = 0; k < kTeamTokens; ++k) of[k].values(weight, bias, own[k], apart[k]);
    }
};

// The warps that share a tile, as a lane sees them.
struct Team {
    int index, warp, lane;
    uint4 *inputs, *low;  // of the lane: what products with all channels, and with low ranks, take

    __device__ __forceinline__ explicit Team(uint4* memory) {
        index = threadIdx.x / (32 * kTeam), warp = threadIdx.x / 32 % kTeam, lane = threadIdx.x % 32;
        inputs = memory + index * kTeamVectors + lane;
        low = inputs + kInputs;
    }

    // Values of a unit, as left operands of the products with all channels.
    template <typename T>
    __device__ __forceinline__ void write_inputs(const TeamValues& values) const {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                inputs[((warp * kSteps + step) * kParts + p) * 32] = operand<T>(values[2 * p], values[2 * p + 1], step);
            }
        }
    }
};

// A unit's part of the product of all channels with a matrix, of which a warp takes kBlocks blocks.
template <typename T, int kBlocks>
__device__ __forceinline__ void add_chunk(Sums<kBlocks>& sums, const Args& args, const Team& team, int chunk,
                                          const uint4* down, int inner) {
    const int first = chunk * kTeam, steps = kSteps * min(kTeam, units_of(args.channels) - first);
    const uint4* mine = down + (kSteps * first * inner + team.warp * kBlocks) * 32;
    add_product<T, kBlocks>(sums, team.inputs, mine, steps, inner * 32, 32);
}

// The product of `steps` blocks of low ranks with a unit's columns, added to start[column].
template <typename T>
__device__ __forceinline__ void product_up(const uint4* low, int steps, const uint4* up, const Values& start,
                                           TeamValues& out) {
    Sums<2> sums;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[n][p][i / 4].x[i % 4] = start[4 * n + i / 4 * 2 + i % 2];
        }
    }
    add_product<T, 2>(sums, low, up, steps, 64, 32);
#pragma unroll
    for (int k = 0; k < kTeamTokens; ++k) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) out[k][j] = sums[j / 4][k / 2][j / 2 % 2].x[k % 2 * 2 + j % 2];
    }
}

template <typename T>
__device__ __forceinline__ void store_row(const Args& args, const Channels& channels, const Values& values, T* to,
                                          int row) {
    store_if<T>(channels.on && row < args.rows, to + static_cast<int64_t>(row) * args.channels + channels.first,
                values);
}

// The inputs of all mixes for a unit: the decay's to the team, the others' to `out`.
template <typename T>
__device__ __forceinline__ void mix_unit(const Args& args, const Team& team, const uint4* up, int tile, int unit,
                                         const TeamValues& own, const TeamValues& apart, T* out) {
    const Channels channels(args, unit, team.lane);
    const int64_t plane = static_cast<int64_t>(args.rows) * args.channels;
#pragma unroll
    for (int i = 0; i < kMixes; ++i) {
        Values mix;
        TeamValues values;
        channels.read(args.mix[1 + i], mix);
        product_up<T>(team.low + kRank / 16 * i * kParts * 32, kRank / 16,
                      up + 2 * (unit * kMixBlocks + kRank / 16 * i) * 32, mix, values);
#pragma unroll
        for (int k = 0; k < kTeamTokens; ++k) {
#pragma unroll
            for (int j = 0; j < kChannels; ++j) values[k][j] = fmaf(apart[k][j], values[k][j], own[k][j]);
        }
        if (i == 0) {
            team.write_inputs<T>(values);
        } else {
#pragma unroll
            for (int k = 0; k < kTeamTokens; ++k) {
                store_row<T>(args, channels, values[k], out + (i - 1) * plane, tile + team.lane / 4 + 8 * k);
            }
        }
    }
}

// All of a tile's results. `packet` has its first chunk, a unit for each warp, and then that of the tile `next`.
template <typename X, typename T>
__device__ __forceinline__ void mix_tile(const Args& args, const X* x, const Weights& weights, const Team& team,
                                         int tile, int next, Packet<X>& packet, T* out, T* raw) {
    const int units = units_of(args.channels), chunks = (units + kTeam - 1) / kTeam;
    TeamValues own, apart;
    Sums<2> low = {};  // a warp has those of one mix
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int unit = chunk * kTeam + team.warp;
        if (unit < units) {
            const Channels channels(args, unit, team.lane);
            Values mix;
            TeamValues blend;
            packet.values(args, channels, own, apart);
            channels.read(args.mix[0], mix);
#pragma unroll
            for (int k = 0; k < kTeamTokens; ++k) {
#pragma unroll
                for (int j = 0; j < kChannels; ++j) blend[k][j] = fmaf(apart[k][j], mix[j], own[k][j]);
            }
            team.write_inputs<T>(blend);
        }
        const bool last = chunk + 1 == chunks;
        packet.read(args, x, tile, last ? team.warp : unit + kTeam, team.lane);
        __syncthreads();
        if (team.warp < kMixes) {
            add_chunk<T, 2>(low, args, team, chunk, weights.mix_down, kMixBlocks);
            if (last) write_tanh<T, 2>(low, team.low + 2 * team.warp * kParts * 32);
        }
        __syncthreads();
    }

    Sums<1> decay = {};  // a warp has 16 columns, or none
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int unit = chunk * kTeam + team.warp;
        if (unit < units) {
            packet.values(args, Channels(args, unit, team.lane), own, apart);
            mix_unit<T>(args, team, weights.mix_up, tile, unit, own, apart, out);
        }
        const bool last = chunk + 1 == chunks;
        packet.read(args, x, last ? next : tile, last ? team.warp : unit + kTeam, team.lane);
        __syncthreads();
        if (team.warp < kDecayBlocks) {
            add_chunk<T, 1>(decay, args, team, chunk, weights.decay_down, kDecayBlocks);
            if (last) write_tanh<T, 1>(decay, team.low + team.warp * kParts * 32);
        }
        __syncthreads();
    }

    for (int unit = team.warp; unit < units; unit += kTeam) {
        const Values nothing = {};
        TeamValues values;
        product_up<T>(team.low, kDecayBlocks, weights.decay_up + 2 * unit * kDecayBlocks * 32, nothing, values);
        const Channels channels(args, unit, team.lane);
#pragma unroll
        for (int k = 0; k < kTeamTokens; ++k)
            store_row<T>(args, channels, values[k], raw, tile + team.lane / 4 + 8 * k);
    }
}

// From the tokens x (rows, channels) to the inputs `out` of key, value, receptance and gate, (4, rows, channels), and
// the decay `raw`, (rows, channels).
template <typename X, typename T>
__global__ void __launch_bounds__(kTeamThreads, 1)
    mix_by_teams(const __grid_constant__ Args args, const X* __restrict__ x, const uint4* __restrict__ packed,
                 T* __restrict__ out, T* __restrict__ raw) {
    extern __shared__ uint4 shared[];
    const Team team(shared);
    const Weights weights(packed + team.lane, args.channels);
    // Of the blocks' first tiles, then of their second ones, so that what remains after whole rounds goes to as many
    // processors as there are. Together, teams go on until the first one is done: tiles past the last one have no rows.
    const int first = team.index * gridDim.x * kTeamTile, stride = gridDim.x * kTeams * kTeamTile;
    Packet<X> packet;
    packet.read(args, x, first + blockIdx.x * kTeamTile, team.warp, team.lane);
#pragma unroll 1
    for (int tile = blockIdx.x * kTeamTile; tile < args.rows; tile += stride) {
        mix_tile<X, T>(args, x, weights, team, first + tile, first + tile + stride, packet, out, raw);
    }
}

}  // namespace dynamic_mix
