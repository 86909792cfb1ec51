// One pass over long sequences: all tiles of a sequence are on chip at the same time. Each leaves its sums for the
// others, waits for theirs and goes on with its own tokens, which it still has in registers.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "bi_wkv/bi_wkv_cuda_backward.cuh"

namespace bi_wkv {

// Sends the tile's sums to the others; false if the exact path has to leave some of them first. To be called by all
// threads after share().
__device__ inline bool send_sums(const Problem& p, const Tile& t, Phase phase, const Resume& resume, float row_decay,
                                 float base) {
    if (phase < resume.phase) return true;
    const unsigned exact = phase == resume.phase ? resume.exact : 0;
    if (out_of_range() & ~exact) return false;
    const int side = this_row();
    if (side < 2) {
        Message* to = p.messages + sums_index(p, t, phase, side);
        if (has_lane(exact)) {
            __threadfence();
            send(to, {0, 0, 0, kInState});
        } else {
            const Pair all = gather_warps(p, phase, side, p.plan.rows / 2, row_decay, {0, 0});
            send(to, {base, all.x, all.y, kPlain});
        }
    }
    return true;
}

// A message that was not there yet or lies in a State, in the latter case times what brings it to 2^-base, `between`
// away. It is a function of its own so that its numbers take no registers elsewhere.
static __device__ __noinline__ Message await(const Message* from, const State* state, float base, float between) {
    Message x = look_for(from);
    while (x.kind == kMissing) x = look_for(from);
    if (x.kind == kInState) {
        __threadfence();
        const double exponent = state->m * kLog2E - base * (kNats * kLog2E) - between;
        const float scale = fast_exp2(static_cast<float>(exponent));
        x.x = static_cast<float>(state->x) * scale, x.y = static_cast<float>(state->y) * scale;
    }
    return x;
}

// Waits for the sums of the sequence's other tiles and adds up what they send to this one, relative to base. in: what
// the tile's rows send to the thread's row; afterwards with what comes from beyond the tile.
__device__ inline void add_tiles(const Problem& p, const Tile& t, Phase phase, const Channel& channel, float base,
                                 float limit, Pair (&in)[2]) {
    const int rows = p.plan.rows, row = this_row(), chunks = p.plan.chunks;
    const Shared shared = shared_parts(p);
    const float decay = channel.w * p.chunk_tokens;
    const int64_t at = sums_index(p, {t.sample, t.slice, 0}, phase, 0);
    const Message* messages = p.messages + at;
    Pair sums[2] = {};
    constexpr int kBatch = 4;  // messages asked for together
    // Each row takes every rows-th tile, the present one among them. Behind it, what is sent to the left counts.
    const auto index = [&](int chunk) { return unsigned(2 * chunk + (chunk > t.chunk)) * kLanes; };
    for (int begin = row; begin < chunks; begin += kBatch * rows) {
        Message x[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) x[j] = look_for(messages + index(min(begin + j * rows, chunks - 1)));
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const int chunk = begin + j * rows;
            const float away = chunk - t.chunk, between = fmaf(fabsf(away), decay, -decay);
            float scale = fast_exp2(x[j].base - base - between);
            if (x[j].kind != kPlain && chunk < chunks) {
                x[j] = await(messages + index(chunk), p.sums + at + index(chunk), base, between);
                scale = x[j].kind == kPlain ? fast_exp2(x[j].base - base - between) : 1;
            }
            add(sums[0], away < 0 ? scale : 0, {x[j].x, x[j].y});
            add(sums[1], away > 0 && chunk < chunks ? scale : 0, {x[j].x, x[j].y});
        }
    }
    // Each of a warp's two rows keeps the sums of one side.
    const int side = row % 2;
    const Pair sent = side == 0 ? sums[1] : sums[0], kept = side == 0 ? sums[0] : sums[1];
    shared.parts[(side * shared.count + row / 2) * kLanes + this_lane()] = {
        kept.x + __shfl_xor_sync(~0u, sent.x, kLanes), kept.y + __shfl_xor_sync(~0u, sent.y, kLanes)};
    __syncthreads();
    if (row < 2) {
        Pair all = {0, 0};
        for (int i = 0; i < shared.count; ++i) {
            add(all, 1, shared.parts[(row * shared.count + i) * kLanes + this_lane()]);
        }
        if (!within(all, limit)) atomicOr(&out_of_range(), 1u << this_lane());
        incoming(p, phase, row) = all;
    }
    __syncthreads();
#pragma unroll
    for (int from = 0; from < 2; ++from) {
        const int rows_between = from == 0 ? row : rows - 1 - row;
        add(in[from], fast_exp2(-channel.w * (rows_between * kRow)), incoming(p, phase, from));
    }
}

// No message is there yet.
__device__ inline void clear_messages(const Problem& p) {
    const int64_t count = int64_t(p.tiles) * (p.call.backward ? 4 : 2) * kLanes;
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = first; i < count; i += int64_t(gridDim.x) * blockDim.x) send(p.messages + i, {0, 0, 0, kMissing});
}

// For all blocks. Whatever is loaded while copies are under way comes behind them: the first come late, the others once
// the blocks know of each other.
template <typename LoadChannel, typename StartCopies>
__device__ inline void begin_together(const Problem& p, LoadChannel load_channel, StartCopies start_copies) {
    clear_messages(p);
    load_channel();
    const auto grid = cooperative_groups::this_grid();
    auto token = grid.barrier_arrive();
    start_copies(0);
    grid.barrier_wait(std::move(token));
    for (int turn = 1; turn < p.plan.stages; ++turn) start_copies(turn);
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
            left = send_sums(p, t, kForwardSums, resume, channel.row_decay, reference);
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
        p, [&](auto channel, auto copies) { begin_together(p, channel, copies); }, fast,
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
                            [&] { left = send_sums(p, t, kForwardSums, resume, channel.row_decay, x.reference); });
        if (!left) return kForwardSums;
        add_tiles(p, t, kForwardSums, channel, x.reference, kLargest, x.in);
        x.share_adjoints(p, channel);
        if (!send_sums(p, t, kAdjointSums, resume, channel.row_decay, -x.reference)) return kAdjointSums;
        next();
        gather_rows(p, kAdjointSums, channel.row_decay, x.received, {}, x.adjoint);
        add_tiles(p, t, kAdjointSums, channel, -x.reference, kLargestAdjoint, x.adjoint);
        finish_gradients<T>(p, t, channel, x);
        return kDone;
    };
    for_each_tile<T, 3, false>(
        p, [&](auto channel, auto copies) { begin_together(p, channel, copies); }, fast,
        [&](unsigned i, unsigned lanes, int phase) {
            if (phase == kForwardSums) exact_sums<T>(p, i, lanes);
            if (phase == kAdjointSums) exact_adjoint_sums<T>(p, i, lanes);
            if (phase == kDone) exact_gradients<T>(p, i, lanes);
        });
    allow_next_kernel();
}

}  // namespace bi_wkv
