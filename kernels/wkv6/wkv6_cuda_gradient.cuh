// Gradients of r, k, w and u, from the chunks and the states between them.
// (output_kernel gives that of v.)
//
// w_j decays what passes over token j, so its gradient is the sum of r_t gr_t,
// or k_t gk_t, over pairs that straddle j. A pair counts at the level where a
// boundary first separates its tokens: for a token right of the boundary all
// partners are left of it, so j in the right half gets the sum over the tokens
// t > j of that half, and j in the left half over t < j. Nothing is subtracted,
// so nothing cancels.
#pragma once

#include "wkv6_cuda_common.cuh"

namespace wkv6 {

template <typename T, typename W>
struct GradientShared {
    static constexpr int kV = 0;
    static constexpr int kGy = kV + Tile::kBytes;
    static constexpr int kTiles = kGy + Tile::kBytes;  // k at levels 16 and 32, r at levels 16 and 32
    static constexpr int kStates = kTiles + 4 * GroupTile::kBytes;
    static constexpr int kStateRows = kGroup * StateTile::kRowBytes;  // those of a group
    static constexpr int kTotals = kStates + 2 * 4 * kStateRows;      // twice four states: one is filled, one read
    static constexpr int kSums = kTotals + kWarps * kN * 4;           // of products over 16 tokens: three for each warp
    static constexpr int kThrough = kSums + 3 * kWarps * kGroup * 4;  // state to state
    static constexpr int kBonus = kThrough + kGroup * 4;
    static constexpr int kU = kBonus + kWarps * kN * 4;
    static constexpr int kComing = kU + kN * 4;  // r, k, w
    static constexpr int kBytes = kComing + 2 * Coming<T>::kBytes + Coming<W>::kBytes;
    static_assert(kBytes <= 99 * 1024, "more than a block gets on compute capability 8.6, 8.9 and 12.0");
};

// Products of tokens' gy and v: of the rows that a warp owns with its own 16
// tokens, its sibling's and the other half's.
struct Products {
    Left own, sibling, far[2];
    float self[2], next[2];  // with itself and the other token of its pair, for
                             // both rows of the lane
};

template <bool kSplit>
__device__ inline void products(Products& out, Tile rows, Tile columns, int warp) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const int column_rows[4] = {warp, warp ^ 1, (warp & 2) ^ 2, ((warp & 2) ^ 2) + 1};
    Sum sums[4][2] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        Left a;
        load_left<kSplit, false>(a, rows, warp * kRows, 2 * group);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Right b[2];
            load_right<kSplit, false>(b, columns, column_rows[i] * kRows, 2 * group);
            multiply<kSplit>(sums[i][0], sums[i][1], a, b[0], b[1]);
        }
    }
    for (int i = 0; i < 2; ++i) {  // the diagonal sits in the lane with q = g / 2 of each row
        const float x = sums[0][i].x[2 * i], y = sums[0][i].x[2 * i + 1];
        const int from = (lane & ~3) + g / 2;
        out.self[i] = __shfl_sync(0xffffffffu, g % 2 ? y : x, from);
        out.next[i] = __shfl_sync(0xffffffffu, g % 2 ? x : y, from);
    }
    out.own = as_left<kSplit>(sums[0]);
    out.sibling = as_left<kSplit>(sums[1]);
    for (int i = 0; i < 2; ++i) out.far[i] = as_left<kSplit>(sums[2 + i]);
}

// The pairs of the own 16 x 16 that meet at a level below 16.
__device__ inline Left at_level(const Left& own, int level) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    Left out;
    for (int i = 0; i < 4; ++i) {
        const bool same_half = i == 0 || i == 3, same_quarter = g / 4 == q / 2, same_pair = g / 2 == q;
        const bool keep = level == 8   ? !same_half
                          : level == 4 ? same_half && !same_quarter
                                       : same_half && same_quarter && !same_pair;
        out.hi[i] = keep ? own.hi[i] : 0, out.lo[i] = keep ? own.lo[i] : 0;
    }
    return out;
}

// pairs (16 x 16) times the tokens' block: the block's registers are a left
// operand, turned into right ones.
template <bool kSplit>
__device__ inline Block times_own(const Left& pairs, const Block& block) {
    const Left x = as_left<kSplit>(block);
    Sum sums[2] = {};
    Right b[2];
    for (int i = 0; i < 4; ++i) {
        b[i / 2].hi[i % 2] = transpose(x.hi[i]);
        if (kSplit) b[i / 2].lo[i % 2] = transpose(x.lo[i]);
    }
    multiply<kSplit>(sums[0], sums[1], pairs, b[0], b[1]);
    return as_block(sums);
}

template <bool kSplit>
__device__ inline void add_times_tile(Sum (&sums)[2], const Left& pairs, GroupTile tile, int row) {
    Right b[2];
    load_right<kSplit, true>(b, tile, row, 0);
    multiply<kSplit>(sums[0], sums[1], pairs, b[0], b[1]);
}

// The warp's rows of gy or v (all channels of v) times the state's rows of this
// group.
template <bool kSplit>
__device__ inline Block times_state(Tile rows, StateTile state, int warp) {
    Sum sums[2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        Left a;
        Right b[2];
        load_left<kSplit, false>(a, rows, warp * kRows, 2 * n);
        load_right<kSplit, false>(b, state, 0, 2 * n);
        multiply<kSplit>(sums[0], sums[1], a, b[0], b[1]);
    }
    return as_block(sums);
}

// Sums over the warp's eight tokens of a register, that is over the lanes of
// equal q.
__device__ inline float sum_tokens(float x) {
    for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// Sums over the warp's 16 tokens to three tables of kWarps rows and kGroup
// columns.
__device__ inline void store_token_sums(float* tables, const Block& a, const Block& b, const Block& c) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float x[3][4];
    for (int i = 0; i < 4; ++i) {
        x[0][i] = a.x[i] + a.x[4 + i], x[1][i] = b.x[i] + b.x[4 + i], x[2][i] = c.x[i] + c.x[4 + i];
    }
    for (int mask = 4; mask < 32; mask *= 2) {
        for (int i = 0; i < 12; ++i) x[i / 4][i % 4] += shuffle_xor(x[i / 4][i % 4], mask);
    }
    if (lane < 4) {
        for (int i = 0; i < 3; ++i) store4(tables + (i * kWarps + warp) * kGroup + 4 * lane, x[i]);
    }
}

// What is still to be summed for the gradient of w at token j: `after` over the
// later, `before` over the earlier tokens of the same part of the chunk.
struct Pending {
    Block after, before;
};

// Halves the parts, from 2 `half` tokens to `half`: each half's tokens get the
// sum of what the other half passes over.
template <int kHalf>
__device__ inline void halve(Block& gw, const Pending& pending) {
    [[maybe_unused]] const int g = threadIdx.x % 32 / 4;
    if constexpr (kHalf == 8) {
        for (int i = 0; i < 4; ++i) {
            gw.x[i] += sum_tokens(pending.after.x[4 + i]);
            gw.x[4 + i] += sum_tokens(pending.before.x[i]);
        }
    } else {
        for (int i = 0; i < 8; ++i) {
            float x = g & kHalf ? pending.after.x[i] : pending.before.x[i];
            for (int mask = 1; mask < kHalf; mask *= 2) x += shuffle_xor(x, 4 * mask);
            gw.x[i] += shuffle_xor(x, 4 * kHalf);
        }
    }
}

// Pairs across the boundary between two parts of kHalf tokens: products of this
// token with its gradient.
template <int kHalf>
__device__ inline void enter(Pending& pending, const Block& crossing) {
    const float right = threadIdx.x % 32 / 4 & kHalf ? 1.f : 0.f, left = 1.f - right;
    for (int i = 0; i < 8; ++i) {
        if (kHalf == 8) {
            (i < 4 ? pending.before : pending.after).x[i] += crossing.x[i];
        } else {
            pending.after.x[i] = fmaf(right, crossing.x[i], pending.after.x[i]);
            pending.before.x[i] = fmaf(left, crossing.x[i], pending.before.x[i]);
        }
    }
}

// The same where the warp's tokens are all on one side of the boundary.
__device__ inline void enter(Pending& pending, const Block& crossing, bool is_right) {
    const float right = is_right ? 1.f : 0.f, left = 1.f - right;
    for (int i = 0; i < 8; ++i) {
        pending.after.x[i] = fmaf(right, crossing.x[i], pending.after.x[i]);
        pending.before.x[i] = fmaf(left, crossing.x[i], pending.before.x[i]);
    }
}

// Of the four states in shared memory, the sums over v's channels of S G (+ S'
// G'), decayed over the chunk: one number for each channel of the group.
template <bool kSplit>
__device__ inline void through_chunk(float* out, const StateTile (&tiles)[4], const float* totals) {
    const int row = threadIdx.x / 8, unit = threadIdx.x % 8;
    float sum = 0;
    for (int pair = 0; pair < 4; pair += 2) {
        float x[2][8];
        for (int i = 0; i < 2; ++i) {
            const auto* hi = reinterpret_cast<const uint32_t*>(tiles[pair + i].at(row, unit, 0));
            const auto* lo = reinterpret_cast<const uint32_t*>(tiles[pair + i].at(row, unit, 1));
            for (int j = 0; j < 4; ++j) {
                x[i][2 * j] = __uint_as_float(hi[j] << 16);
                x[i][2 * j + 1] = __uint_as_float(hi[j] & 0xffff0000u);
                if (kSplit) x[i][2 * j] += __uint_as_float(lo[j] << 16);
                if (kSplit) x[i][2 * j + 1] += __uint_as_float(lo[j] & 0xffff0000u);
            }
        }
        for (int j = 0; j < 8; ++j) sum += x[0][j] * x[1][j];
    }
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
    float total = 0;
    for (int i = 0; i < kWarps; ++i) total += totals[i * kN + channel_of_slot(row)];
    if (unit == 0) out[channel_of_slot(row)] = sum * exp2_fast(total);
}

// One group of channels of a warp's 16 tokens.
template <bool kSplit>
struct GroupGradient {
    Block r, k;        // the inputs
    Block gr, gk, gw;  // the gradients
    Block decay16, decay32, before, after;
    Block crossing2, crossing4,
        crossing8;  // a level's products of r and k with their gradients
    Pending pending;

    // One level's part of gr and gk; returns their products with r and k, for gw.
    __device__ Block level(const Block& from_k, const Block& from_r, const Block& decay) {
        const Block x = from_k * decay, y = from_r * decay;
        Block crossing = r * x;
        add_product(crossing, k, y);
        add(gr, x);
        add(gk, y);
        return crossing;
    }

    __device__ Block own_level(const Products& by_row, const Products& by_column, int half, const Block& decay) {
        return level(times_own<kSplit>(at_level(by_row.own, half), k * decay),
                     times_own<kSplit>(at_level(by_column.own, half), r * decay), decay);
    }

    // Pairs of two of the warp's own tokens, and the decays to everything else.
    __device__ void among_own(const Products& by_row, const Products& by_column, DecaySums& d, const float (&u)[4],
                              const float* totals, int warp) {
        for (int i = 0; i < 8; ++i) {  // the token itself, and the other one of its pair
            const float self = by_row.self[i / 4] * u[i % 4];
            gr.x[i] = self * k.x[i] + by_row.next[i / 4] * shuffle_xor(k.x[i], 4);
            gk.x[i] = self * r.x[i] + by_column.next[i / 4] * shuffle_xor(r.x[i], 4);
        }
        d.join<1>();
        crossing2 = own_level(by_row, by_column, 2, d.factor<2>());
        d.join<2>();
        crossing4 = own_level(by_row, by_column, 4, d.factor<4>());
        d.join<4>();
        crossing8 = own_level(by_row, by_column, 8, d.factor<8>());
        d.join<8>();
        decay16 = d.factor16(warp), decay32 = d.factor32(warp, totals);
        before = d.factor_chunk<true>(warp, totals), after = d.factor_chunk<false>(warp, totals);
    }

    // Pairs with tokens of other warps. `tiles`: k and r at level 16, k and r at
    // level 32. Adds the warp's sums to `tables` for the other warps' gw.
    __device__ void with_other_warps(const Products& by_row, const Products& by_column, const GroupTile (&tiles)[4],
                                     float* tables, int warp) {
        const int far_row = ((warp & 2) ^ 2) * kRows, sibling_row = (warp ^ 1) * kRows;
        Sum from_k[2] = {}, from_r[2] = {};
        for (int i = 0; i < 2; ++i) {
            add_times_tile<kSplit>(from_k, by_row.far[i], tiles[2], far_row + i * kRows);
            add_times_tile<kSplit>(from_r, by_column.far[i], tiles[3], far_row + i * kRows);
        }
        const Block crossing = level(as_block(from_k), as_block(from_r), decay32);
        store_token_sums(tables, pending.after, pending.before, crossing);
        enter(pending, crossing, warp & 2);
        Sum sibling_k[2] = {}, sibling_r[2] = {};
        add_times_tile<kSplit>(sibling_k, by_row.sibling, tiles[0], sibling_row);
        add_times_tile<kSplit>(sibling_r, by_column.sibling, tiles[1], sibling_row);
        enter(pending, level(as_block(sibling_k), as_block(sibling_r), decay16), warp & 1);
    }

    __device__ void sum_w() {
        gw = Block{};
        halve<8>(gw, pending);
        enter<8>(pending, crossing8);
        halve<4>(gw, pending);
        enter<4>(pending, crossing4);
        halve<2>(gw, pending);
        enter<2>(pending, crossing2);
        halve<1>(gw, pending);
    }

    // What the other warps' tokens and the states pass over this warp's; q: the
    // lane's four channels.
    __device__ void add_passing(const float* tables, const float* through, int warp, int q) {
        for (int i = 0; i < 4; ++i) {
            const int channel = 4 * q + i;
            float x = through[channel];
#pragma unroll
            for (int other = 0; other < kWarps; ++other) {
                if (other > warp) x += tables[other * kGroup + channel];
                if (other < warp) x += tables[(kWarps + other) * kGroup + channel];
            }
            if (warp == 1) x += tables[2 * kWarps * kGroup + channel];
            if (warp == 2) x += tables[(2 * kWarps + 3) * kGroup + channel];
            gw.x[i] += x, gw.x[4 + i] += x;
        }
    }
};

// Block x: sequence and chunk. `bonus_parts`: (bh, chunks, kN), what each chunk
// adds to the gradient of u.
template <typename T, typename W, bool kSplit>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const T* __restrict__ r, const T* __restrict__ k, const T* __restrict__ v, const W* __restrict__ w,
                    const float* __restrict__ u, const T* __restrict__ gy, const unsigned char* __restrict__ states,
                    Sizes sizes, T* gr, T* gk, W* gw, float* bonus_parts) {
    extern __shared__ __align__(128) unsigned char shared[];
    using At = GradientShared<T, W>;
    const Tile v_tile{shared + At::kV}, gy_tile{shared + At::kGy};
    const GroupTile tiles[4] = {{shared + At::kTiles},
                                {shared + At::kTiles + GroupTile::kBytes},
                                {shared + At::kTiles + 2 * GroupTile::kBytes},
                                {shared + At::kTiles + 3 * GroupTile::kBytes}};
    float* totals = reinterpret_cast<float*>(shared + At::kTotals);
    float* tables = reinterpret_cast<float*>(shared + At::kSums);
    float* through = reinterpret_cast<float*>(shared + At::kThrough);
    float* bonus_sums = reinterpret_cast<float*>(shared + At::kBonus);
    float* bonus_all = reinterpret_cast<float*>(shared + At::kU);
    const Coming<T> r_coming{shared + At::kComing}, k_coming{r_coming.base + Coming<T>::kBytes};
    const Coming<W> w_coming{k_coming.base + Coming<T>::kBytes};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const unsigned bh = blockIdx.x / sizes.chunks, head = bh % sizes.heads;
    const int64_t chunk = blockIdx.x % sizes.chunks;
    const int64_t stride = sizes.stride(), chunk_origin = sizes.offset(bh) + chunk * kChunk * stride;
    const int rows = static_cast<int>(min(sizes.tokens - chunk * kChunk, static_cast<int64_t>(kChunk)));
    const int remaining = rows - warp * kRows;
    const bool first = g < remaining, second = 8 + g < remaining, active = remaining > 0;
    const int64_t mine = chunk_origin + (first ? warp * kRows + g : 0) * stride + 4 * q;

    // States in the order of memory: S before the chunk, S' after it, then of (r,
    // gy): G' before, G after.
    const bool is_before = chunk > 0, is_after = chunk < sizes.chunks - 1;
    const int64_t set_bytes = 2 * sizes.bh * sizes.slots() * kStateBytes;
    const unsigned char* state_before = states + (bh * sizes.slots() + chunk - 1) * kStateBytes;
    const unsigned char* state_after = states + ((sizes.bh + bh) * sizes.slots() + chunk) * kStateBytes;
    const auto state_tile = [&](int group, int which) {
        return StateTile{shared + At::kStates + (group % 2 * 4 + which) * At::kStateRows};
    };
    const auto start_group = [&](int group) {
        w_coming.start(w + mine + group * kGroup, stride, first, second);
        r_coming.start(r + mine + group * kGroup, stride, first, second);
        k_coming.start(k + mine + group * kGroup, stride, first, second);
    };
    const auto start_states = [&](int group) {
        if (is_before) {
            copy_state<kSplit>(state_tile(group, 0), state_before, group);
            copy_state<kSplit>(state_tile(group, 2), state_before + set_bytes, group);
        }
        if (is_after) {
            copy_state<kSplit>(state_tile(group, 1), state_after, group);
            copy_state<kSplit>(state_tile(group, 3), state_after + set_bytes, group);
        }
    };
    {
        PassingDecays decays;
        Passing<kThreads> values, gradients;
        decays.load(w + chunk_origin, stride, rows);
        values.load(v + chunk_origin, stride, rows);
        gradients.load(gy + chunk_origin, stride, rows);
        start_group(0);
        if (threadIdx.x < kN / 4) copy_async<16>(bonus_all + 4 * threadIdx.x, u + head * kN + 4 * threadIdx.x);
        decays.store_totals(totals, LogDecay<false>(nullptr));
        values.store<kSplit>(v_tile);
        gradients.store<kSplit>(gy_tile);
    }
    wait_for_previous_kernel();
    start_states(0);
    wait_copies();
    __syncthreads();
    Products by_row, by_column;  // gy_t v_i with the warp's tokens as t and as i
    products<kSplit>(by_row, gy_tile, v_tile, warp);
    products<kSplit>(by_column, v_tile, gy_tile, warp);

#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        GroupGradient<kSplit> x;
        wait_copies();
        DecaySums d(w_coming.take(), LogDecay<false>(nullptr));
        x.r = r_coming.take(), x.k = k_coming.take();
        if (group + 1 < kGroups) start_group(group + 1);
        float bonus[4];
        load4(bonus, bonus_all + group * kGroup + 4 * q);
        x.among_own(by_row, by_column, d, bonus, totals + group * kGroup + 4 * q, warp);
        for (int i = 0; i < 4; ++i) {
            const float sum =
                sum_tokens(by_row.self[0] * x.r.x[i] * x.k.x[i] + by_row.self[1] * x.r.x[4 + i] * x.k.x[4 + i]);
            if (lane < 4) bonus_sums[warp * kN + group * kGroup + 4 * q + i] = sum;
        }
        store_left<kSplit>(tiles[0], warp * kRows, as_left<kSplit>(x.k * x.decay16));
        store_left<kSplit>(tiles[1], warp * kRows, as_left<kSplit>(x.r * x.decay16));
        store_left<kSplit>(tiles[2], warp * kRows, as_left<kSplit>(x.k * x.decay32));
        store_left<kSplit>(tiles[3], warp * kRows, as_left<kSplit>(x.r * x.decay32));
        __syncthreads();  // tiles and states are there; `tables` and `through` of
                          // the last group have been read
        if (group + 1 < kGroups) start_states(group + 1);

        x.pending = Pending{};
        if (active && is_before) {
            x.pending.after = x.level(times_state<kSplit>(gy_tile, state_tile(group, 0), warp),
                                      times_state<kSplit>(v_tile, state_tile(group, 2), warp), x.before);
        }
        if (active && is_after) {
            x.pending.before = x.level(times_state<kSplit>(gy_tile, state_tile(group, 1), warp),
                                       times_state<kSplit>(v_tile, state_tile(group, 3), warp), x.after);
        }
        if (is_before && is_after) {  // S passes to G, S' to G'
            const StateTile passing[4] = {state_tile(group, 0), state_tile(group, 3), state_tile(group, 1),
                                          state_tile(group, 2)};
            through_chunk<kSplit>(through, passing, totals + group * kGroup);
        } else if (threadIdx.x < kGroup) {
            through[threadIdx.x] = 0;
        }
        x.with_other_warps(by_row, by_column, tiles, tables, warp);
        store_block(gr + mine + group * kGroup, stride, x.gr, first, second);
        store_block(gk + mine + group * kGroup, stride, x.gk, first, second);
        x.sum_w();
        __syncthreads();
        x.add_passing(tables, through, warp, q);
        store_block(gw + mine + group * kGroup, stride, x.gw, first, second);
    }
    if (threadIdx.x < kN) {
        float sum = 0;
        for (int i = 0; i < kWarps; ++i) sum += bonus_sums[i * kN + threadIdx.x];
        bonus_parts[(static_cast<int64_t>(bh) * sizes.chunks + chunk) * kN + threadIdx.x] = sum;
    }
}

constexpr int kBonusThreads = 1024, kBonusChannels = 8;

// Sums over batches and chunks, in a fixed order. Block x: head and, fastest, channels.
static __global__ void __launch_bounds__(kBonusThreads)
    bonus_kernel(const float* __restrict__ parts, Sizes sizes, float* gu) {
    constexpr int kParts = kBonusThreads / kBonusChannels, kBlocks = kN / kBonusChannels;
    __shared__ float sums[kParts][kBonusChannels];
    const int own = threadIdx.x % kBonusChannels, part = threadIdx.x / kBonusChannels;
    const int channel = blockIdx.x % kBlocks * kBonusChannels + own;
    const int64_t batches = sizes.bh / sizes.heads, head = blockIdx.x / kBlocks;
    wait_for_previous_kernel();
    float sum = 0;
#pragma unroll 4
    for (int64_t i = part; i < batches * sizes.chunks; i += kParts) {
        const int64_t bh = i / sizes.chunks * sizes.heads + head;
        sum += parts[(bh * sizes.chunks + i % sizes.chunks) * kN + channel];
    }
    sums[part][own] = sum;
    __syncthreads();
    if (part == 0) {
        for (int i = 1; i < kParts; ++i) sum += sums[i][own];
        gu[head * kN + channel] = sum;
    }
}

}  // namespace wkv6
