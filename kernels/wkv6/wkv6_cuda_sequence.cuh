// y of a piece of a sequence, or of all of it where it is short, for bfloat16 tensors: every input is read once, and
// the states within the piece stay in registers.
//
// Each of the two blocks of a piece holds its half of the tokens in shared memory, in strips of 16:
//
// 1. A warp takes a strip. It finds the scores within it (as output_kernel does, but with sums of log2 decays that are
//    matrix products with zeros and ones), and decays r and k to both of its ends.
// 2. A state passes from strip to strip in the registers of four warps, 16 of v's channels each: its product with r is
//    what a strip's tokens get from those before, then it decays and k^T v is added. Of several pieces, where
//    strip_state_kernel has left what passes between blocks, both directions go on together. Else the two blocks are a
//    cluster: each first follows the direction that starts at its end of the piece, then the other one, from where its
//    neighbour has arrived.
// 3. The strip's warp again: the scores times v, the results of both directions, and what follows.
#pragma once

#include "wkv6_cuda_output.cuh"
#include "wkv6_cuda_strip.cuh"

namespace wkv6 {

constexpr int kSequenceThreads = 2 * kSweepThreads;
static_assert(kStrips <= 2 * kSweepWarps);

// Scores of each token with eight keys: those of its half of the strip, or kOther those of the other half. The depth of
// an instruction is twice the same eight slots, once for either half.
template <bool kOther>
__device__ inline void add_half_scores(Sum& scores, const Left& r, const Left& k) {
    for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {r.hi[i], 0, 0, r.hi[i + 1]};
        const uint32_t b[2] = {k.hi[i + kOther], k.hi[i + 1 - kOther]};
        mma_bf16(scores, a, b);
    }
}

// Step 1. Returns the scores within the strip, as a left operand. decays: of this strip; shared: all there is.
template <typename W, bool kRaw>
__device__ inline Left prepare_strip(Strip strip, float* decays, const unsigned char* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint4* all = reinterpret_cast<const uint4*>(shared + StripsShared::kPicksAt) + lane;
    const float* base = reinterpret_cast<const float*>(shared + StripsShared::kBase) + 4 * q;
    const float* bonus = reinterpret_cast<const float*>(shared + StripsShared::kBonus) + 4 * q;
    const GroupPlace place;
    // By level. level8 has the scores with the other half, the others those with the same half.
    Sum level8{}, level4{}, level2{}, level1{};
    float self[2] = {};
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        const LogDecay<kRaw> decay(base + group * kGroup);
        float u[4];
        load4(u, bonus + group * kGroup);
        const Left r_arrived = place.load(strip.r(0), group), k_arrived = place.load(strip.k(0), group);
        Block log_decays = arrived_decays<W>(strip, place, group);
        __syncwarp();  // what has been read here is about to be overwritten
        add_half_scores<false>(level1, r_arrived, k_arrived);
        const Block r = as_block(r_arrived), k = as_block(k_arrived);
        for (int i = 0; i < 8; ++i) {
            log_decays.x[i] = decay(log_decays.x[i], i % 4);
            self[i / 4] += r.x[i] * k.x[i] * u[i % 4];
        }
        const DecayOperands d(log_decays);
        {
            const Block before = d.sums(all, kToFirst), decay_before = exp2_fast(before);
            place.store(strip.r(0), group, as_left<false>(r * decay_before));
            place.store(strip.k(1), group, as_left<false>(k * decay_before));
            if (g == 7) store_sums(decays, group, before, log_decays);
        }
        {
            const Block decay_after = exp2_fast(d.sums(all, kToLast));
            place.store(strip.r(1), group, as_left<false>(r * decay_after));
            place.store(strip.k(0), group, as_left<false>(k * decay_after));
        }
        {
            const Block to_half = exp2_fast(d.sums(all, kToHalf));
            add_half_scores<true>(level8, as_left<false>(r * to_half), as_left<false>(k * to_half));
        }
        {
            const Block to_quarter = exp2_fast(d.sums(all, kToQuarter));
            add_half_scores<false>(level4, as_left<false>(r * to_quarter), as_left<false>(k * to_quarter));
        }
        {
            const Block to_eighth = exp2_fast(d.sums(all, kToEighth));
            add_half_scores<false>(level2, as_left<false>(r * to_eighth), as_left<false>(k * to_eighth));
        }
    }
    finish_decays(decays);
    for (float& x : self) x = row_sum(x);
    float near[4];
    for (int i = 0; i < 4; ++i) {
        const bool same_quarter = g / 4 == q / 2, same_pair = g / 2 == q, same = g % 2 == i % 2;
        const float in_pair = same ? self[i / 2] : level1.x[i];
        near[i] = !same_quarter ? level4.x[i] : !same_pair ? level2.x[i] : in_pair;
    }
    return Left{{split<false>(near[0], near[1]).hi, split<false>(level8.x[2], level8.x[3]).hi,
                 split<false>(level8.x[0], level8.x[1]).hi, split<false>(near[2], near[3]).hi},
                {}};
}

// Step 2, by kSweepWarps warps. last: whether the state has somewhere to go after the last strip.
__device__ inline void sweep(StripState& state, unsigned char* shared, int count, int direction, int columns,
                             bool last) {
    const float* decays = reinterpret_cast<const float*>(shared + StripsShared::kDecays);
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
        const int at = direction ? count - 1 - step : step;
        const Strip strip{shared + at * Strip::kBytes};
        const Block y = state.results(strip.r(direction));
        if (last || step + 1 < count) state.pass(strip.k(direction), strip.v(), decays + at * kN, columns);
        // The tiles have been read.
        if (direction) {
            wait_for_threads<kSweepThreads>(2);
        } else {
            wait_for_threads<kSweepThreads>(1);
        }
        float4* results = strip.results(direction, columns);
        results[0] = make_float4(y.x[0], y.x[1], y.x[2], y.x[3]);
        results[32] = make_float4(y.x[4], y.x[5], y.x[6], y.x[7]);
    }
}

// The state that comes into a block in one direction, of several pieces, for this warp of a sweep.
__device__ inline void load_incoming(StripState& state, const float4* states, const float* decays, const Sizes& sizes,
                                     const Pieces& pieces, unsigned bh, int block, int direction) {
    const int rank = block % kPieceBlocks, piece = block / kPieceBlocks;
    const int slot = kPieceBlocks * piece + (direction ? 1 : -1);  // where it comes into the piece
    const bool exists = slot >= 0 && slot < pieces.slots();
    const float4* from = states + pieces.state(direction, sizes.bh, bh, slot);
    if (direction == rank) {
        if (exists) state.load(from);
    } else if (pieces.paired(piece)) {
        state.load(states + pieces.state(direction, sizes.bh, bh, kPieceBlocks * piece));
        if (exists) state.add(from, decays + pieces.block_decays(sizes.bh, bh, block ^ 1));
    }
}

// Block x: sequence, piece and, fastest, half of it. `states`, `decays`: by strip_state_kernel and strip_scan_kernel;
// of a single piece workspace.
template <typename W, bool kFinish>
__global__ void __launch_bounds__(kSequenceThreads, 3)
    sequence_kernel(const __nv_bfloat16* __restrict__ r, const __nv_bfloat16* __restrict__ k,
                    const __nv_bfloat16* __restrict__ v, const W* __restrict__ w, const float* __restrict__ base,
                    const float* __restrict__ u, Sizes sizes, Pieces pieces, float4* states, const float* decays,
                    Finish<__nv_bfloat16> finish, __nv_bfloat16* y) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const unsigned sequence_blocks = pieces.count() * kPieceBlocks;
    const unsigned bh = blockIdx.x / sequence_blocks, head = bh % sizes.heads;
    const int block = blockIdx.x % sequence_blocks, rank = block % kPieceBlocks;
    const int count = pieces.strips_of(block);
    const int64_t token = (static_cast<int64_t>(block) * pieces.each + warp) * kRows, stride = sizes.stride();
    const int64_t origin = sizes.offset(bh) + token * stride;
    const int rows = static_cast<int>(min(sizes.tokens - token, static_cast<int64_t>(kRows)));
    const Strip strip{shared + warp * Strip::kBytes};
    const bool active = warp < count;
    if (active) {
        start_decays(strip, w + origin, stride, rows);
        start_tile(strip.r(0), r + origin, stride, rows);
        start_tile(strip.k(0), k + origin, stride, rows);
        PassingStrip values;
        values.load(v + origin, stride, rows);
        if (kFinish && lane < rows) prefetch(finish.gate + origin + lane * stride);
        values.store(strip.v());
    }
    start_constants<StripsShared, kFinish, true>(shared, base + head * kN, u + head * kN);
    wait_copies();
    __syncthreads();
    Left near{};
    if (active) {
        float* own = reinterpret_cast<float*>(shared + StripsShared::kDecays) + warp * kN;
        near = prepare_strip<W, kFinish>(strip, own, shared);
    }
    wait_for_previous_kernel();
    __syncthreads();

    const int columns = warp % kSweepWarps;
    StripState state{};
    if (pieces.count() > 1) {
        const int direction = warp / kSweepWarps;
        load_incoming(state, states, decays, sizes, pieces, bh, block, direction);
        sweep(state, shared, count, direction, columns, false);
    } else {
        const bool paired = pieces.paired(0);
        if (warp < kSweepWarps) {
            sweep(state, shared, count, rank, columns, paired);
            if (paired) state.store(states + pieces.state(rank, sizes.bh, bh, 0));
        }
        wait_for_cluster();
        if (warp < kSweepWarps) {
            state = StripState{};
            if (paired) state.load(states + pieces.state(1 - rank, sizes.bh, bh, 0));
            sweep(state, shared, count, 1 - rank, columns, false);
        }
    }
    __syncthreads();
    if (!active) return;

    Sum out[8] = {};
    add_product<false>(out, near, strip.v(), 0);
    Block y_blocks[kGroups];
    const bool first = g < rows, second = 8 + g < rows;
    const int64_t own = origin + (first ? g * stride : 0) + 4 * q;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const Sum pair[2] = {out[2 * group], out[2 * group + 1]};
        y_blocks[group] = as_block(pair);
        for (int i = 0; i < 4; ++i) {
            float x[4];
            load4(x, reinterpret_cast<const float*>(strip.results(i / 2, group) + i % 2 * 32));
            for (int j = 0; j < 4; ++j) y_blocks[group].x[i % 2 * 4 + j] += x[j];
        }
        if (!kFinish) store_block(y + own + group * kGroup, stride, y_blocks[group], first, second);
    }
    if (kFinish) finish(y_blocks, y, own, head * kN + 4 * q, stride, first, second);
}

}  // namespace wkv6
