// The forward kernels: the sums that each tile of a long sequence leaves for the others, and the outputs.
#pragma once

#include "bi_wkv/bi_wkv_cuda_fast.cuh"

namespace bi_wkv {

// Goes over the block's tiles from the i-th on: calls fast(t, channel, next) for each, whose copies are on their way to
// shared memory; next() starts to copy those of the following tile, to be called as soon as all threads have read the
// present ones. Stops after the first tile with lanes out of range, and returns its i; p.tiles or more if there is
// none.
template <typename T, int kTensors, bool kBackwards, typename Fast>
__device__ inline unsigned run_fast(const Problem& p, unsigned i, Fast fast) {
    const auto at = [&](unsigned n) { return locate(p, kBackwards ? p.tiles - 1 - n : n); };
    Tile t = at(i);
    start_copies<T, kTensors>(p, t);
    Channel channel = load_channel(p, t);
    wait_for_previous_kernel();
    while (true) {
        fast(t, channel, [&] {
            if (p.tiles - i > gridDim.x) start_copies<T, kTensors>(p, at(i + gridDim.x));
        });
        if (out_of_range()) return i;
        i += gridDim.x;
        if (i >= p.tiles) return i;
        const unsigned slice = t.slice;
        t = at(i);
        if (t.slice != slice) channel = load_channel(p, t);
    }
}

// All of the block's tiles; exact(number, lanes) does again those lanes of a tile that are out of range. It is called
// outside of the loop over the tiles, and nothing stays in registers meanwhile: they would be spilled in that loop,
// where a load from local memory waits for all copies before it.
template <typename T, int kTensors, bool kBackwards, typename Fast, typename Exact>
__device__ inline void for_each_tile(const Problem& p, Fast fast, Exact exact) {
    if constexpr (kExactOnly<T>) {
        wait_for_previous_kernel();
        for (unsigned i = blockIdx.x; i < p.tiles; i += gridDim.x) exact(i, kAllLanes);
    } else {
        __shared__ unsigned stopped;
        if (threadIdx.x == 0) out_of_range() = 0;
        for (unsigned i = blockIdx.x; i < p.tiles; i = stopped + gridDim.x) {
            i = run_fast<T, kTensors, kBackwards>(p, i, fast);
            if (i >= p.tiles) return;
            if (threadIdx.x == 0) stopped = i;
            wait_for_copies();
            exact(kBackwards ? p.tiles - 1 - i : i, out_of_range());
            if (threadIdx.x == 0) out_of_range() = 0;
            __syncthreads();
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads<true>, 8) sums_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, auto next) {
        const Shared shared = shared_parts(p);
        float e[kRow], ev[kRow];
        wait_for_copies();
        __syncthreads();
        read_row(staged<T>(p, 0), e);
        read_row(staged<T>(p, 1), ev);
        const float reference = choose_reference<T>(p);
        keys_to_weights(reference, e);
#pragma unroll
        for (int j = 0; j < kRow; ++j) ev[j] *= e[j];
        Pair sums[2];
        key_sums(channel.decay, e, ev, sums);
        const bool in_range = channel.in_range && fabsf(reference) <= kLargestReference && within(sums[0], kLargest) &&
                              within(sums[1], kLargest);
        share(shared.rows[0], shared.threads, sums, in_range);
        next();
        publish(p, t, kForwardSums, shared.rows[0], channel.row_decay, reference);
        if (this_row() == 0) *tile_reference(p, t) = reference;
    };
    for_each_tile<T, 2, false>(p, fast, [&](unsigned i, unsigned lanes) { exact_sums<T>(p, i, lanes); });
}

// Turns what each chunk of a sequence sends into what it gets. A block takes one side of one sample and slice; for each
// lane several threads share the chunks.
constexpr int kCarryParts = 32, kCarryThreads = kLanes * kCarryParts;

template <typename T>
__device__ inline State add_chunk(const State& in, double decay, const State& sent) {
    const double m = in.m - decay, top = fmax(m, sent.m);
    if (top == -INFINITY) return sent;
    double of_in, of_sent;
    if constexpr (kExactOnly<T>) {
        of_in = exp(m - top), of_sent = exp(sent.m - top);
    } else {
        of_in = fast_exp2(static_cast<float>((m - top) * kLog2E));
        of_sent = fast_exp2(static_cast<float>((sent.m - top) * kLog2E));
    }
    return {top, of_in * in.x + of_sent * sent.x, of_in * in.y + of_sent * sent.y};
}

template <typename T>
__global__ void __launch_bounds__(kCarryThreads) carry_kernel(const __grid_constant__ Problem p, Phase phase) {
    __shared__ State totals[kCarryThreads];
    Tile t{};
    const int side = blockIdx.x % 2, part = this_row(), chunks = p.plan.chunks;
    t.sample = blockIdx.x / 2 / p.plan.slices, t.slice = blockIdx.x / 2 % p.plan.slices;
    const double w = channel_parameter<double>(p, p.call.w, p.call.w_type, t.channel());
    const int length = (chunks + kCarryParts - 1) / kCarryParts;
    // Counted from where the sums come from.
    const int first = min(part * length, chunks), end = min(first + length, chunks);
    const auto at = [&](int i) {
        t.chunk = side == 0 ? i : chunks - 1 - i;
        return tile_sums(p, t, phase, side);
    };
    wait_for_previous_kernel();
    const double decay = w * p.chunk_tokens;
    State in = empty_state();
    // Several loads are under way before the first is needed.
    const auto for_each_chunk = [&](auto use) {
        constexpr int kBatch = 4;
        for (int i = first; i < end; i += kBatch) {
            State sent[kBatch];
#pragma unroll
            for (int j = 0; j < kBatch; ++j) sent[j] = *at(min(i + j, end - 1));
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                if (i + j < end) use(i + j, sent[j]);
            }
        }
    };
    for_each_chunk([&](int, const State& sent) { in = add_chunk<T>(in, decay, sent); });
    // What the parts up to each one send behind it, in steps of twice as many parts. Only a part behind which there are
    // no chunks may be shorter than `length`.
    for (int parts = 1; parts < kCarryParts; parts *= 2) {
        totals[threadIdx.x] = in;
        __syncthreads();
        if (part >= parts) in = add_chunk<T>(totals[threadIdx.x - parts * kLanes], decay * length * parts, in);
        __syncthreads();
    }
    totals[threadIdx.x] = in;
    __syncthreads();
    in = part > 0 ? totals[threadIdx.x - kLanes] : empty_state();
    for_each_chunk([&](int i, const State& sent) {
        *at(i) = in;
        in = add_chunk<T>(in, decay, sent);
    });
}

// y of a thread, left in ev, from what the other rows send.
__device__ inline void outputs(const Channel& channel, const float (&e)[kRow], float (&ev)[kRow], Pair left,
                               Pair right) {
    // From the right, keep each group's state; from the left, make the group's states again and use them.
    Pair kept[kRow / kGroup];
#pragma unroll
    for (int g = kRow / kGroup - 1; g >= 0; --g) {
        kept[g] = right;
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) absorb(right, channel.decay, ev[g * kGroup + j], e[g * kGroup + j]);
    }
#pragma unroll
    for (int g = 0; g < kRow / kGroup; ++g) {
        Pair after[kGroup];
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) {
            after[j] = kept[g];
            absorb(kept[g], channel.decay, ev[g * kGroup + j], e[g * kGroup + j]);
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const int i = g * kGroup + j;
            const float numerator = fmaf(channel.own, ev[i], left.x + after[j].x);
            const float denominator = fmaf(channel.own, e[i], left.y + after[j].y);
            absorb(left, channel.decay, ev[i], e[i]);
            ev[i] = numerator * fast_reciprocal(denominator);
        }
    }
}

// The tile's rows on one side of the thread's.
__device__ inline int rows_before(const Problem& p, int side) {
    return side == 0 ? this_row() : p.plan.rows - 1 - this_row();
}

// The sums of the other chunks that a kernel needs: none, of the forward, of both.
enum Others { kNone, kForward, kBoth };

// From a tile's place to what the other rows and tiles send to each of its rows: the first half of every kernel but
// sums_kernel. v: keeps the values if kKeepValues, else the weighted values. read_more: reads other tensors of the tile
// before next() is called.
template <typename T, Others kOthers, bool kKeepValues, typename ReadMore, typename Next>
__device__ inline void receive(const Problem& p, const Tile& t, const Channel& channel, float (&e)[kRow],
                               float (&v)[kRow], float* reference, Pair (&in)[2], ReadMore read_more, Next next) {
    const Shared shared = shared_parts(p);
    bool in_range = channel.in_range;
    // One row of threads loads what comes from each side. Others still read the last tile's until the barrier.
    const int side = this_row();
    Pair from_others[2] = {};
    if constexpr (kOthers != kNone) {
        *reference = *tile_reference(p, t);
        if (side < 2) {
            from_others[0] = load_incoming(p, t, kForwardSums, side, *reference);
            in_range = in_range && within(from_others[0], kLargest);
            if constexpr (kOthers == kBoth) {
                from_others[1] = load_incoming(p, t, kAdjointSums, side, -*reference);
                in_range = in_range && within(from_others[1], kLargestAdjoint);
            }
        }
    }
    wait_for_copies();
    __syncthreads();
    if (kOthers != kNone && side < 2) {
        incoming(p, kForwardSums, side) = from_others[0];
        if constexpr (kOthers == kBoth) incoming(p, kAdjointSums, side) = from_others[1];
    }
    read_row(staged<T>(p, 0), e);
    read_row(staged<T>(p, 1), v);
    read_more();
    if constexpr (kOthers == kNone) *reference = choose_reference<T>(p);
    keys_to_weights(*reference, e);
    Pair sums[2];
    if constexpr (kKeepValues) {
        float ev[kRow];
#pragma unroll
        for (int j = 0; j < kRow; ++j) ev[j] = e[j] * v[j];
        key_sums(channel.decay, e, ev, sums);
        make_new(v);
    } else {
#pragma unroll
        for (int j = 0; j < kRow; ++j) v[j] *= e[j];
        key_sums(channel.decay, e, v, sums);
    }
    in_range =
        in_range && fabsf(*reference) <= kLargestReference && within(sums[0], kLargest) && within(sums[1], kLargest);
    share(shared.rows[0], shared.threads, sums, in_range);
    next();
#pragma unroll
    for (int from = 0; from < 2; ++from) {
        const Pair beyond = kOthers == kNone ? Pair{0, 0} : incoming(p, kForwardSums, from);
        in[from] = gather_rows(shared.rows[0], p.plan.rows, from, rows_before(p, from), channel.row_decay, beyond);
    }
}

__device__ inline void apply_gate(const float (&r)[kRow], float (&y)[kRow]) {
#pragma unroll
    for (int j = 0; j < kRow; ++j) y[j] *= fast_reciprocal(1 + fast_exp2(-static_cast<float>(kLog2E) * r[j]));
}

// Gates keep a row of r in registers, for which fewer blocks have room.
constexpr int output_blocks(bool many, bool gated) { return many ? (gated ? 5 : 6) : (gated ? 2 : 3); }

template <typename T, bool kMany, bool kGated>
__global__ void __launch_bounds__(kMaxThreads<kMany>, output_blocks(kMany, kGated))
    output_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, auto next) {
        float e[kRow], ev[kRow], reference;
        [[maybe_unused]] float gate[kGated ? kRow : 1];
        Pair in[2];
        constexpr Others kOthers = kMany ? kForward : kNone;
        const auto read_gate = [&] {
            if constexpr (kGated) read_row(staged<T>(p, 2), gate);
        };
        receive<T, kOthers, false>(p, t, channel, e, ev, &reference, in, read_gate, next);
        outputs(channel, e, ev, in[0], in[1]);
        if constexpr (kGated) apply_gate(gate, ev);
        write_row<T>(p.call.y, p, t, ev);
    };
    // The last tiles first: theirs are the tokens that sums_kernel left in the L2 cache.
    for_each_tile<T, kGated ? 3 : 2, kMany>(p, fast,
                                            [&](unsigned i, unsigned lanes) { exact_outputs<T>(p, i, lanes); });
}

}  // namespace bi_wkv
