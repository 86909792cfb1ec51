// y from the chunks and the states between them: y = A v + (r before) S + (r after) S', where A holds the pairs of a
// chunk's tokens. With r and k exchanged and gy for v it gives the gradient of v.
#pragma once

#include "wkv6_cuda_common.cuh"

namespace wkv6 {

// Where output_kernel keeps things in shared memory.
template <typename T, typename W>
struct OutputShared {
    static constexpr int kV = 0;
    static constexpr int kStates =
        kV + Tile::kBytes;  // two, and keys at two levels; each twice: one is filled, one read
    static constexpr int kStateRows = kGroup * StateTile::kRowBytes;  // those of a group
    static constexpr int kKeys = kStates + 4 * kStateRows;
    static constexpr int kTotals = kKeys + 4 * GroupTile::kBytes;
    static constexpr int kBonus = kTotals + kWarps * kN * 4;  // the head's u
    static constexpr int kComing = kBonus + kN * 4;           // r, k, w
    static constexpr int kBytes = kComing + 2 * Coming<T>::kBytes + Coming<W>::kBytes;
};

// Scores of 16 tokens with the keys of the same 16, by level: each in two sets of columns.
struct OwnScores {
    Sum level8[2], level4[2], level2[2];
    float next[2], self[2];  // with the other token of the pair, and with itself, for both rows of the lane
};

// Adds a group's part and leaves the decays joined to the whole strip.
template <bool kSplit>
__device__ inline void own_scores(OwnScores& out, const Block& r, const Block& k, DecaySums& d, const float (&u)[4]) {
    for (int i = 0; i < 8; ++i) {
        out.next[i / 4] += r.x[i] * shuffle_xor(k.x[i], 4);
        out.self[i / 4] += r.x[i] * k.x[i] * u[i % 4];
    }
    d.join<1>();
    {
        const Block decay = d.factor<2>();
        const Left r2 = as_left<kSplit>(r * decay), k2 = as_left<kSplit>(k * decay);
        multiply<kSplit>(out.level2[0], out.level2[1], r2, as_right(k2, 0), as_right(k2, 1));
    }
    d.join<2>();
    {
        const Block decay = d.factor<4>();
        const Left r4 = as_left<kSplit>(r * decay), k4 = as_left<kSplit>(k * decay);
        multiply<kSplit>(out.level4[0], out.level4[1], r4, as_right(k4, 0), as_right(k4, 1));
    }
    d.join<4>();
    {
        const Block decay = d.factor<8>();
        const Left r8 = as_left<kSplit>(r * decay), k8 = as_left<kSplit>(k * decay);
        multiply<kSplit>(out.level8[0], out.level8[1], r8, as_right(k8, 0), as_right(k8, 1));
    }
    d.join<8>();
}

// Over the four lanes that share a token.
__device__ inline float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Each pair's score from its level. Those of tokens with themselves stay in own.self, summed over the channels.
__device__ inline void select_scores(Sum (&scores)[2], OwnScores& own) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (int i = 0; i < 2; ++i) {
        own.next[i] = row_sum(own.next[i]);
        own.self[i] = row_sum(own.self[i]);
    }
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
            const bool same_half = i / 2 == half, same_quarter = g / 4 == q / 2, same_pair = g / 2 == q;
            const float near = !same_pair ? own.level2[half].x[i] : g % 2 == i % 2 ? 0.f : own.next[half];
            scores[half].x[i] = !same_half ? own.level8[half].x[i] : !same_quarter ? own.level4[half].x[i] : near;
        }
    }
}

// scores += r k^T for the 16 keys at `row` of a tile.
template <bool kSplit>
__device__ inline void add_scores(Sum (&scores)[2], const Left& r, GroupTile keys, int row) {
    Right b[2];
    load_right<kSplit, false>(b, keys, row, 0);
    multiply<kSplit>(scores[0], scores[1], r, b[0], b[1]);
}

// out += a b for the 16 rows of a tile or state at `row`.
template <bool kSplit, typename Layout>
__device__ inline void add_product(Sum (&out)[8], const Left& a, Layout tile, int row) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        Right b[2];
        load_right<kSplit, true>(b, tile, row, 2 * n);
        multiply<kSplit>(out[2 * n], out[2 * n + 1], a, b[0], b[1]);
    }
}

// What becomes of y in inference: (norm of a token's head * weight + bias) * silu(gate).
template <typename T>
struct Finish {
    const T* gate;
    const float *weight, *bias;
    float eps;

    // y: 64 channels of 16 tokens, in blocks of a group each; `mine` and `channel` are a lane's first ones.
    __device__ void operator()(Block (&y)[kGroups], T* out, int64_t mine, int channel, int64_t stride, bool first,
                               bool second) const {
        float mean[2] = {}, rstd[2] = {};
        Block gates[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            load_block(gates[group], gate + mine + group * kGroup, stride, first, second);
        }
        for (const Block& block : y) {
            for (int i = 0; i < 8; ++i) mean[i / 4] += block.x[i];
        }
        for (float& x : mean) x = row_sum(x) / kN;
        for (Block& block : y) {
            for (int i = 0; i < 8; ++i) {
                block.x[i] -= mean[i / 4];
                rstd[i / 4] += block.x[i] * block.x[i];
            }
        }
        for (float& x : rstd) x = rsqrtf(row_sum(x) / kN + eps);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float scale[4], shift[4];
            Block& results = gates[group];
            load4(scale, weight + channel + group * kGroup);
            load4(shift, bias + channel + group * kGroup);
            for (int i = 0; i < 8; ++i) {
                const float x = results.x[i], silu = x * reciprocal_fast(1.f + exp2_fast(x * -kLog2E));
                results.x[i] = fmaf(y[group].x[i] * rstd[i / 4], scale[i % 4], shift[i % 4]) * silu;
            }
            store_block(out + mine + group * kGroup, stride, results, first, second);
        }
    }
};

// Block x: sequence and chunk. A warp takes 16 tokens, the channels of the group at hand and all of v's. kFinish: w is
// raw (see LogDecay), and `finish` writes the results.
template <typename T, typename W, bool kSplit, bool kFinish>
__global__ void __launch_bounds__(kThreads, 3)
    output_kernel(const T* __restrict__ r, const T* __restrict__ k, const T* __restrict__ v, const W* __restrict__ w,
                  const float* __restrict__ base, const float* __restrict__ u, const unsigned char* __restrict__ states,
                  Sizes sizes, Finish<T> finish, T* y) {
    extern __shared__ __align__(128) unsigned char shared[];
    using At = OutputShared<T, W>;
    const Tile v_tile{shared + At::kV};
    float* totals = reinterpret_cast<float*>(shared + At::kTotals);
    const Coming<T> r_coming{shared + At::kComing}, k_coming{r_coming.base + Coming<T>::kBytes};
    const Coming<W> w_coming{k_coming.base + Coming<T>::kBytes};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int sibling_row = (warp ^ 1) * kRows, far_row = ((warp & 2) ^ 2) * kRows;
    const unsigned bh = blockIdx.x / sizes.chunks, head = bh % sizes.heads;
    const int64_t chunk = blockIdx.x % sizes.chunks;
    const int64_t stride = sizes.stride(), chunk_origin = sizes.offset(bh) + chunk * kChunk * stride;
    const int rows = static_cast<int>(min(sizes.tokens - chunk * kChunk, static_cast<int64_t>(kChunk)));
    const int remaining = rows - warp * kRows;
    const bool first = g < remaining, second = 8 + g < remaining, active = remaining > 0;
    const int64_t mine = chunk_origin + (first ? warp * kRows + g : 0) * stride + 4 * q;
    const bool is_before = chunk > 0, is_after = chunk < sizes.chunks - 1;  // whether there are states
    float* bonus_all = reinterpret_cast<float*>(shared + At::kBonus);

    const auto start_group = [&](int group) {
        w_coming.start(w + mine + group * kGroup, stride, first, second);
        r_coming.start(r + mine + group * kGroup, stride, first, second);
        k_coming.start(k + mine + group * kGroup, stride, first, second);
    };
    const auto state_tile = [&](int group, int direction) {
        return StateTile{shared + At::kStates + (group % 2 * 2 + direction) * At::kStateRows};
    };
    const unsigned char* state_before = states + (bh * sizes.slots() + chunk - 1) * kStateBytes;
    const unsigned char* state_after = states + ((sizes.bh + bh) * sizes.slots() + chunk) * kStateBytes;
    const auto start_states = [&](int group) {
        if (is_before) copy_state<kSplit>(state_tile(group, 0), state_before, group);
        if (is_after) copy_state<kSplit>(state_tile(group, 1), state_after, group);
    };
    {
        PassingDecays decays;
        Passing<kThreads> values;
        decays.load(w + chunk_origin, stride, rows);
        values.load(v + chunk_origin, stride, rows);
        start_group(0);
        if (threadIdx.x < kN / 4) copy_async<16>(bonus_all + 4 * threadIdx.x, u + head * kN + 4 * threadIdx.x);
        decays.store_totals(totals, LogDecay<kFinish>(base + head * kN + threadIdx.x % 16 * 4));
        values.store<kSplit>(v_tile);
        wait_for_previous_kernel();
        start_states(0);
        wait_copies();
    }
    __syncthreads();

    Sum out[8] = {}, sibling[2] = {}, far[2][2] = {};
    OwnScores own{};
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        unsigned char* keys = shared + At::kKeys + group % 2 * 2 * GroupTile::kBytes;
        const GroupTile keys16{keys}, keys32{keys + GroupTile::kBytes};
        Left r16, r32, r_before, r_after;
        wait_copies();
        if (active) {
            DecaySums d(w_coming.take(), LogDecay<kFinish>(base + head * kN + group * kGroup + 4 * q));
            const Block r_block = r_coming.take(), k_block = k_coming.take();
            const float* group_totals = totals + group * kGroup + 4 * q;
            float bonus[4];
            load4(bonus, bonus_all + group * kGroup + 4 * q);
            own_scores<kSplit>(own, r_block, k_block, d, bonus);
            r_before = as_left<kSplit>(r_block * d.factor_chunk<true>(warp, group_totals));
            r_after = as_left<kSplit>(r_block * d.factor_chunk<false>(warp, group_totals));
            const Block decay16 = d.factor16(warp), decay32 = d.factor32(warp, group_totals);
            store_left<kSplit>(keys16, warp * kRows, as_left<kSplit>(k_block * decay16));
            store_left<kSplit>(keys32, warp * kRows, as_left<kSplit>(k_block * decay32));
            r16 = as_left<kSplit>(r_block * decay16), r32 = as_left<kSplit>(r_block * decay32);
        }
        __syncthreads();  // keys and states are there; those of the last group have been read
        if (group + 1 < kGroups) start_group(group + 1), start_states(group + 1);
        if (!active) continue;
        if (is_before) add_product<kSplit>(out, r_before, state_tile(group, 0), 0);
        if (is_after) add_product<kSplit>(out, r_after, state_tile(group, 1), 0);
        if (sibling_row < rows) add_scores<kSplit>(sibling, r16, keys16, sibling_row);
        if (far_row < rows) add_scores<kSplit>(far[0], r32, keys32, far_row);
        if (far_row + kRows < rows) add_scores<kSplit>(far[1], r32, keys32, far_row + kRows);
    }
    if (!active) return;

    Sum near[2];
    select_scores(near, own);
    add_product<kSplit>(out, as_left<kSplit>(near), v_tile, warp * kRows);
    if (sibling_row < rows) add_product<kSplit>(out, as_left<kSplit>(sibling), v_tile, sibling_row);
    if (far_row < rows) add_product<kSplit>(out, as_left<kSplit>(far[0]), v_tile, far_row);
    if (far_row + kRows < rows) add_product<kSplit>(out, as_left<kSplit>(far[1]), v_tile, far_row + kRows);
    Block y_blocks[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const Sum pair[2] = {out[2 * group], out[2 * group + 1]};
        Block v_block;
        load_block(v_block, v + mine + group * kGroup, stride, first, second);
        y_blocks[group] = as_block(pair);
        for (int i = 0; i < 8; ++i) y_blocks[group].x[i] += own.self[i / 4] * v_block.x[i];
        if (!kFinish) store_block(y + mine + group * kGroup, stride, y_blocks[group], first, second);
    }
    if (kFinish) finish(y_blocks, y, mine, head * kN + 4 * q, stride, first, second);
}

}  // namespace wkv6
