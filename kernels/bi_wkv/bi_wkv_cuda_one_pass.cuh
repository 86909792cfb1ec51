// One pass over long sequences: all tiles of a sequence are on chip at the same time. Each leaves its sums for the
// others, waits for theirs and goes on with its own tokens, which it still has in registers.
#pragma once

#include <cooperative_groups.h>

#include "bi_wkv/bi_wkv_cuda_backward.cuh"

namespace bi_wkv {

__device__ inline unsigned* arrivals(const Problem& p, const Tile& t, Phase phase) {
    return p.arrivals + (phase * p.call.batch + t.sample) * p.plan.slices + t.slice;
}

__device__ inline void add_release(unsigned* to) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(to) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* from) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// Leaves the tile's sums for the others; false if the exact path has to leave some of them first. To be called by all
// threads after share().
__device__ inline bool leave_sums(const Problem& p, const Tile& t, Phase phase, const Resume& resume, float row_decay,
                                  float base) {
    if (phase < resume.phase) return true;
    const unsigned exact = phase == resume.phase ? resume.exact : 0;
    if (out_of_range() & ~exact) return false;
    if (this_row() < 2) {
        if (!has_lane(exact)) publish(p, t, phase, row_decay, base);
        __syncwarp();
        if (threadIdx.x == 0) add_release(arrivals(p, t, phase));
    }
    return true;
}

// Waits for the sums of the sequence's other tiles and adds up what they send to this one, relative to base. in: what
// the tile's rows send to the thread's row; afterwards with what comes from beyond the tile.
__device__ inline void add_tiles(const Problem& p, const Tile& t, Phase phase, const Channel& channel, float base,
                                 float limit, Pair (&in)[2]) {
    const int rows = p.plan.rows, chunks = p.plan.chunks;
    const Shared shared = shared_parts(p);
    const double decay = channel_parameter<double>(p, p.call.w, p.call.w_type, t.channel()) * p.chunk_tokens;
    if (threadIdx.x % 32 == 0) {
        while (load_acquire(arrivals(p, t, phase)) < chunks) continue;
    }
    __syncwarp();
    Pair sums[2] = {};
    // Every rows-th tile, from the first on, on one side; the exponents of what it sends grow by step from one to the
    // next.
    const auto add_side = [&](int side, int first, int end, double exponent, double step) {
        Tile other = t;
        other.chunk = first;
        const State* from = tile_sums(p, other, phase, side);
        exponent -= base * kNats;
#pragma unroll 4
        for (int i = first; i < end; i += rows) {
            const double m = __ldcg(&from->m), x = __ldcg(&from->x), y = __ldcg(&from->y);
            const float scale = fast_exp2(static_cast<float>((m + exponent) * kLog2E));
            add(sums[side], scale, {static_cast<float>(x), static_cast<float>(y)});
            from += rows * kLanes;
            exponent += step;
        }
    };
    const int left = this_row(), right = t.chunk + 1 + this_row();
    add_side(0, left, t.chunk, -decay * (t.chunk - 1 - left), decay * rows);
    add_side(1, right, chunks, -decay * this_row(), -decay * rows);
    // Each of a warp's two rows keeps the sums of one side.
    const int side = this_row() % 2;
    const Pair sent = side == 0 ? sums[1] : sums[0], kept = side == 0 ? sums[0] : sums[1];
    shared.parts[(side * shared.count + this_row() / 2) * kLanes + this_lane()] = {
        kept.x + __shfl_xor_sync(~0u, sent.x, kLanes), kept.y + __shfl_xor_sync(~0u, sent.y, kLanes)};
    __syncthreads();
    if (this_row() < 2) {
        Pair all = {0, 0};
        for (int i = 0; i < shared.count; ++i) {
            add(all, 1, shared.parts[(this_row() * shared.count + i) * kLanes + this_lane()]);
        }
        if (!within(all, limit)) atomicOr(&out_of_range(), 1u << this_lane());
        incoming(p, phase, this_row()) = all;
    }
    __syncthreads();
#pragma unroll
    for (int from = 0; from < 2; ++from) {
        const int rows_between = from == 0 ? this_row() : rows - 1 - this_row();
        add(in[from], fast_exp2(-channel.w * (rows_between * kRow)), incoming(p, phase, from));
    }
}

// Sets the counters to zero, for all blocks.
__device__ inline void clear_arrivals(const Problem& p) {
    const unsigned counters = 2 * p.call.batch * p.plan.slices;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < counters; i += gridDim.x * blockDim.x) {
        p.arrivals[i] = 0;
    }
    cooperative_groups::this_grid().sync();
}

// A block takes its tiles in order, and no two of one sequence and slice: those of the first unfinished one are all
// under way, and nothing waits for what cannot come.

template <typename T, bool kGated>
__global__ void __launch_bounds__(kMaxThreads<false>, kGated ? 2 : 3)
    one_pass_output_kernel(const __grid_constant__ Problem p) {
    constexpr int kTensors = kGated ? 3 : 2;
    const auto fast = [&](const Tile& t, const Channel& channel, unsigned turn, const Resume& resume,
                          auto next) -> int {
        float e[kRow], ev[kRow], reference;
        [[maybe_unused]] float gate[kGated ? kRow : 1];
        Pair in[2];
        bool left;
        const auto read_gate = [&](const auto& copies) {
            if constexpr (kGated) read_row(copies.staged(turn, 2), gate);
        };
        receive<T, kTensors, kNone, false>(p, t, channel, turn, e, ev, &reference, in, read_gate, [&] {
            left = leave_sums(p, t, kForwardSums, resume, channel.row_decay, reference);
            if (left) next();
        });
        if (!left) return kForwardSums;
        add_tiles(p, t, kForwardSums, channel, reference, kLargest, in);
        outputs(channel, e, ev, in[0], in[1]);
        if constexpr (kGated) apply_gate(gate, ev);
        write_row<T>(p.call.y, p, t, ev);
        return kDone;
    };
    for_each_tile<T, kTensors, false>(
        p, [&] { clear_arrivals(p); }, fast,
        [&](unsigned i, unsigned lanes, int phase) {
            phase == kDone ? exact_outputs<T>(p, i, lanes) : exact_sums<T>(p, i, lanes);
        });
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads<false>, 2) one_pass_gradient_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, unsigned turn, const Resume& resume,
                          auto next) -> int {
        AdjointRow x;
        bool left;
        x.receive<T, kNone>(p, t, channel, turn,
                            [&] { left = leave_sums(p, t, kForwardSums, resume, channel.row_decay, x.reference); });
        if (!left) return kForwardSums;
        add_tiles(p, t, kForwardSums, channel, x.reference, kLargest, x.in);
        x.share_adjoints(p, channel);
        if (!leave_sums(p, t, kAdjointSums, resume, channel.row_decay, -x.reference)) return kAdjointSums;
        next();
        gather_rows(p, kAdjointSums, channel.row_decay, x.received, {}, x.adjoint);
        add_tiles(p, t, kAdjointSums, channel, -x.reference, kLargestAdjoint, x.adjoint);
        finish_gradients<T>(p, t, channel, x);
        return kDone;
    };
    for_each_tile<T, 3, false>(
        p, [&] { clear_arrivals(p); }, fast,
        [&](unsigned i, unsigned lanes, int phase) {
            if (phase == kForwardSums) exact_sums<T>(p, i, lanes);
            if (phase == kAdjointSums) exact_adjoint_sums<T>(p, i, lanes);
            if (phase == kDone) exact_gradients<T>(p, i, lanes);
        });
    allow_next_kernel();
}

}  // namespace bi_wkv
