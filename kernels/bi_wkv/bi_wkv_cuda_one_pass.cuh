// One pass over long sequences: all tiles of a sequence are on chip at the same time. Each leaves its sums for the
// others, waits for theirs and goes on with its own tokens, which it still has in registers.
#pragma once

#include <cooperative_groups.h>

#include "bi_wkv/bi_wkv_cuda_backward.cuh"

namespace bi_wkv {

// How far a tile had come when the exact path took over some of its lanes: of the phases before `phase` its sums are
// there for the others, of `phase` only those of the lanes `exact`.
struct Resume {
    int phase;
    unsigned exact;
};
constexpr int kDone = 2;  // the phase of a tile that has been done

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
        const Pair all =
            gather_rows(shared_parts(p).rows[phase], p.plan.rows, this_row(), p.plan.rows, row_decay, {0, 0});
        if (!has_lane(exact)) *tile_sums(p, t, phase, this_row()) = {base * kNats, all.x, all.y};
        __syncwarp();
        if (threadIdx.x == 0) add_release(arrivals(p, t, phase));
    }
    return true;
}

// Waits for the sums of the sequence's other tiles and adds up what they send to this one, relative to base. in: what
// the tile's rows send to the thread's row; afterwards with what comes from beyond the tile.
__device__ inline void add_tiles(const Problem& p, const Tile& t, Phase phase, const Channel& channel, float base,
                                 float limit, Pair (&in)[2]) {
    const int rows = p.plan.rows, chunks = p.plan.chunks, warps = rows / 2;
    const double w = channel_parameter<double>(p, p.call.w, p.call.w_type, t.channel());
    const State* sent =
        p.sums + (int64_t(phase) * p.tiles + (int64_t(t.sample) * chunks) * p.plan.slices + t.slice) * (2 * kLanes) +
        this_lane();
    if (threadIdx.x % 32 == 0) {
        while (load_acquire(arrivals(p, t, phase)) < chunks) continue;
    }
    __syncwarp();
    Pair sums[2] = {};
    const auto add_tile = [&](int chunk, int side, int between) {
        const State* from = sent + (int64_t(chunk) * p.plan.slices * 2 + side) * kLanes;
        const double m = __ldcg(&from->m), x = __ldcg(&from->x), y = __ldcg(&from->y);
        const double exponent = m - w * (between * p.chunk_tokens) - base * kNats;
        add(sums[side], fast_exp2(static_cast<float>(exponent * kLog2E)),
            {static_cast<float>(x), static_cast<float>(y)});
    };
#pragma unroll 4
    for (int i = this_row(); i < t.chunk; i += rows) add_tile(i, 0, t.chunk - 1 - i);
#pragma unroll 4
    for (int i = t.chunk + 1 + this_row(); i < chunks; i += rows) add_tile(i, 1, i - t.chunk - 1);
    // A warp has two rows: each keeps the sums of one side.
    Pair* parts = shared_parts(p).rows[1] + 2 * shared_parts(p).threads;  // [side][warp][kLanes]
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        sums[side].x += __shfl_xor_sync(~0u, sums[side].x, kLanes);
        sums[side].y += __shfl_xor_sync(~0u, sums[side].y, kLanes);
    }
    const int side = this_row() % 2;
    parts[(side * warps + this_row() / 2) * kLanes + this_lane()] = side == 0 ? sums[0] : sums[1];
    __syncthreads();
    if (this_row() < 2) {
        Pair all = {0, 0};
        for (int i = 0; i < warps; ++i) add(all, 1, parts[(this_row() * warps + i) * kLanes + this_lane()]);
        if (!within(all, limit)) atomicOr(&out_of_range(), 1u << this_lane());
        incoming(p, phase, this_row()) = all;
    }
    __syncthreads();
#pragma unroll
    for (int from = 0; from < 2; ++from) {
        add(in[from], fast_exp2(-channel.w * (rows_before(p, from) * kRow)), incoming(p, phase, from));
    }
}

// Goes over the block's tiles from the i-th on as run_fast does. fast(t, channel, resume, next) returns the phase whose
// sums it could not leave, or kDone. Stops after the first tile with lanes out of range; *phase: where.
template <typename T, int kTensors, typename Begin, typename Fast>
__device__ inline unsigned run_together(const Problem& p, unsigned i, Resume resume, int* phase, Begin begin,
                                        Fast fast) {
    Tile t = locate(p, i);
    start_copies<T, kTensors>(p, t);
    Channel channel = load_channel(p, t);
    begin();
    while (true) {
        *phase = fast(t, channel, resume, [&] {
            if (p.tiles - i > gridDim.x) start_copies<T, kTensors>(p, locate(p, i + gridDim.x));
        });
        if (out_of_range()) return i;
        resume = {};
        i += gridDim.x;
        if (i >= p.tiles) return i;
        t = locate(p, i);
        channel = load_channel(p, t);
    }
}

// All of the block's tiles; exact(number, lanes, phase) leaves the sums of some lanes of a tile, or does them at last
// (kDone). A block takes its tiles in order, and no two tiles of a sequence and slice, so that those of the first
// unfinished one are all under way: nothing waits for what cannot come.
template <typename T, int kTensors, typename Fast, typename Exact>
__device__ inline void for_each_tile_together(const Problem& p, Fast fast, Exact exact) {
    __shared__ unsigned stopped_at;
    __shared__ int stopped_in;
    if (threadIdx.x == 0) out_of_range() = 0;
    const unsigned counters = 2 * p.call.batch * p.plan.slices;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < counters; i += gridDim.x * blockDim.x)
        p.arrivals[i] = 0;
    Resume resume{};
    for (unsigned i = blockIdx.x; i < p.tiles;) {
        int phase;
        i = run_together<T, kTensors>(
            p, i, resume, &phase,
            [&] {
                const bool first = i == blockIdx.x && resume.phase == 0 && resume.exact == 0;
                if (first) cooperative_groups::this_grid().sync();  // all counters are zero
            },
            fast);
        if (i >= p.tiles) return;
        if (threadIdx.x == 0) stopped_at = i, stopped_in = phase;
        wait_for_copies();
        __syncthreads();
        resume = {phase, out_of_range()};
        exact(i, resume.exact, phase);
        __syncthreads();
        if (threadIdx.x == 0) out_of_range() = 0;
        __syncthreads();
        i = stopped_at;
        if (stopped_in == kDone) i += gridDim.x, resume = {};
    }
}

template <typename T, bool kGated>
__global__ void __launch_bounds__(kMaxThreads<false>, kGated ? 2 : 3)
    one_pass_output_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, const Resume& resume, auto next) -> int {
        float e[kRow], ev[kRow], reference;
        [[maybe_unused]] float gate[kGated ? kRow : 1];
        Pair in[2];
        bool left;
        const auto read_gate = [&] {
            if constexpr (kGated) read_row(staged<T>(p, 2), gate);
        };
        receive<T, kNone, false>(p, t, channel, e, ev, &reference, in, read_gate, [&] {
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
    for_each_tile_together<T, kGated ? 3 : 2>(p, fast, [&](unsigned i, unsigned lanes, int phase) {
        phase == kDone ? exact_outputs<T>(p, i, lanes) : exact_sums<T>(p, i, lanes);
    });
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads<false>, 2) one_pass_gradient_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, const Resume& resume, auto next) -> int {
        AdjointRow x;
        bool left;
        receive<T, kNone, true>(
            p, t, channel, x.e, x.v, &x.reference, x.in, [&] { read_row(staged<T>(p, 2), x.a); },
            [&] {
                left = leave_sums(p, t, kForwardSums, resume, channel.row_decay, x.reference);
                if (left) next();
            });
        if (!left) return kForwardSums;
        add_tiles(p, t, kForwardSums, channel, x.reference, kLargest, x.in);
        x.share_adjoints(p, channel);
        if (!leave_sums(p, t, kAdjointSums, resume, channel.row_decay, -x.reference)) return kAdjointSums;
        x.gather_adjoints(p, channel, {});
        add_tiles(p, t, kAdjointSums, channel, -x.reference, kLargestAdjoint, x.adjoint);
        finish_gradients<T>(p, t, channel, x);
        return kDone;
    };
    for_each_tile_together<T, 3>(p, fast, [&](unsigned i, unsigned lanes, int phase) {
        if (phase == kForwardSums) exact_sums<T>(p, i, lanes);
        if (phase == kAdjointSums) exact_adjoint_sums<T>(p, i, lanes);
        if (phase == kDone) exact_gradients<T>(p, i, lanes);
    });
    allow_next_kernel();
}

}  // namespace bi_wkv
