// The forward kernels: the sums that each tile of a long sequence leaves for the others, and the outputs.
#pragma once

#include "bi_wkv/bi_wkv_cuda_fast.cuh"

namespace bi_wkv {

// How far a tile had come when the exact path took over some of its lanes: of the phases before `phase` its sums are
// there for the others, of `phase` only those of the lanes `exact`.
struct Resume {
    int phase;
    unsigned exact;
};
constexpr int kDone = 2;  // the phase of a tile that has been done

// A block's place: the tile number i is its turn-th one.
struct Place {
    unsigned i, turn;
    Resume resume;
};

// Goes over the block's tiles from a place on: calls fast(t, channel, turn, resume, next) for each; next() starts to
// copy a following tile, to be called as soon as all threads have read the present one for the last time. fast returns
// kDone, or the phase whose sums it could not leave. Stops behind the first tile with lanes out of range, or the last;
// returns what fast returned.
template <typename T, int kTensors, bool kBackwards, typename Fast>
__device__ inline int run_fast(const Problem& p, Place& place, Channel channel, Fast fast) {
    const auto at = [&](unsigned i) { return locate(p, kBackwards ? p.tiles - 1 - i : i); };
    Tile t = at(place.i);
    while (true) {
        const int phase = fast(t, channel, place.turn, place.resume, [&] {
            const unsigned ahead = p.plan.stages * gridDim.x, i = place.i + ahead;
            Copies<T, kTensors>{p}.start(p.tiles - place.i > ahead, kBackwards ? p.tiles - 1 - i : i,
                                         place.turn + p.plan.stages);
        });
        if (out_of_range()) return phase;
        place = {place.i + gridDim.x, place.turn + 1, {}};
        if (place.i >= p.tiles) return kDone;
        const unsigned slice = t.slice;
        t = at(place.i);
        if (t.slice != slice) channel = load_channel(p, t);
    }
}

// How the kernels begin that do not wait for other blocks. What they copy was there before the kernel before them.
template <typename LoadChannel, typename StartCopies>
__device__ inline void begin_alone(const Problem& p, LoadChannel load_channel, StartCopies start_copies) {
    for (int turn = 0; turn < p.plan.stages; ++turn) start_copies(turn);
    wait_for_previous_kernel();
    load_channel();
}

// All of the block's tiles; begin(load_channel, start_copies) has to call the first once, the other for each stage.
// exact(number, lanes, phase) leaves the sums of some lanes of a tile, or does them at last (kDone). It is called
// outside of the loop over the tiles, and nothing stays in registers meanwhile: they would be spilled in that loop.
template <typename T, int kTensors, bool kBackwards, typename Begin, typename Fast, typename Exact>
__device__ inline void for_each_tile(const Problem& p, Begin begin, Fast fast, Exact exact) {
    if constexpr (kExactOnly<T>) {
        begin([] {}, [](int) {});
        for (unsigned i = blockIdx.x; i < p.tiles; i += gridDim.x) exact(i, kAllLanes, kDone);
    } else {
        __shared__ Place stopped;
        const Copies<T, kTensors> copies{p};
        const auto number = [&](unsigned i) { return kBackwards ? p.tiles - 1 - i : i; };
        if (threadIdx.x == 0) out_of_range() = 0;
        copies.prepare();
        Channel channel;
        const auto start_copies = [&](int turn) {
            const unsigned i = blockIdx.x + turn * gridDim.x;
            copies.start(i < p.tiles, number(i), turn);
        };
        begin([&] { channel = load_channel(p, locate(p, number(blockIdx.x))); }, start_copies);
        Place place = {blockIdx.x, 0, {}};
        while (place.i < p.tiles) {
            const int phase = run_fast<T, kTensors, kBackwards>(p, place, channel, fast);
            const unsigned lanes = out_of_range();
            if (!lanes) return;
            if (threadIdx.x == 0) stopped = place;
            exact(number(place.i), lanes, phase);
            __syncthreads();
            place = stopped;
            if (phase == kDone) {
                place = {place.i + gridDim.x, place.turn + 1, {}};
            } else {
                place.resume = {phase, lanes};
            }
            __syncthreads();
            if (threadIdx.x == 0) out_of_range() = 0;
            __syncthreads();
            channel = load_channel(p, locate(p, number(min(place.i, p.tiles - 1))));
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads<true>, 8) sums_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, unsigned turn, const Resume&, auto next) -> int {
        const Copies<T, 2> copies{p};
        float e[kRow], ev[kRow];
        copies.wait(turn);
        read_row(copies.staged(turn, 0), e);
        read_row(copies.staged(turn, 1), ev);
        const float reference = choose_reference(t, copies.staged(turn, 0));
        keys_to_weights(t, reference, e);
#pragma unroll
        for (int j = 0; j < kRow; ++j) ev[j] *= e[j];
        Pair sums[2];
        key_sums(channel.decay, e, ev, sums);
        const bool in_range = channel.in_range && fabsf(reference) <= kLargestReference && within(sums[0], kLargest) &&
                              within(sums[1], kLargest);
        share(p, kForwardSums, channel.row_decay, sums, in_range);
        next();
        if (this_row() < 2) publish(p, t, kForwardSums, channel.row_decay, reference);
        if (this_row() == 0) *tile_reference(p, t) = reference;
        return kDone;
    };
    for_each_tile<T, 2, false>(
        p, [&](auto channel, auto copies) { begin_alone(p, channel, copies); }, fast,
        [&](unsigned i, unsigned lanes, int) { exact_sums<T>(p, i, lanes); });
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

// The sums of the other chunks that a kernel needs: none, of the forward, of both.
enum Others { kNone, kForward, kBoth };

// From a tile's place to what the other rows and tiles send to each of its rows: the first half of every kernel but
// sums_kernel. v: keeps the values if kKeepValues, else the weighted values. read_more: reads other tensors of the
// tile. shared: called when the rows' sums are there for all, before they are gathered.
template <typename T, int kTensors, Others kOthers, bool kKeepValues, typename ReadMore, typename AfterSharing>
__device__ inline void receive(const Problem& p, const Tile& t, const Channel& channel, unsigned turn, float (&e)[kRow],
                               float (&v)[kRow], float* reference, Pair (&in)[2], ReadMore read_more,
                               AfterSharing after_sharing) {
    const Copies<T, kTensors> copies{p};
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
    copies.wait(turn);
    if (kOthers != kNone && side < 2) {
        incoming(p, kForwardSums, side) = from_others[0];
        if constexpr (kOthers == kBoth) incoming(p, kAdjointSums, side) = from_others[1];
    }
    read_row(copies.staged(turn, 0), e);
    read_row(copies.staged(turn, 1), v);
    read_more(copies);
    if constexpr (kOthers == kNone) *reference = choose_reference(t, copies.staged(turn, 0));
    keys_to_weights(t, *reference, e);
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
    const Pair received = share(p, kForwardSums, channel.row_decay, sums, in_range);
    after_sharing();
    Pair beyond[2] = {};
    if constexpr (kOthers != kNone) beyond[0] = incoming(p, kForwardSums, 0), beyond[1] = incoming(p, kForwardSums, 1);
    gather_rows(p, kForwardSums, channel.row_decay, received, beyond, in);
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
    constexpr int kTensors = kGated ? 3 : 2;
    const auto fast = [&](const Tile& t, const Channel& channel, unsigned turn, const Resume&, auto next) -> int {
        float e[kRow], ev[kRow], reference;
        [[maybe_unused]] float gate[kGated ? kRow : 1];
        Pair in[2];
        const auto read_gate = [&](const auto& copies) {
            if constexpr (kGated) read_row(copies.staged(turn, 2), gate);
        };
        receive<T, kTensors, kMany ? kForward : kNone, false>(p, t, channel, turn, e, ev, &reference, in, read_gate,
                                                              next);
        outputs(channel, e, ev, in[0], in[1]);
        if constexpr (kGated) apply_gate(gate, ev);
        write_row<T>(p.call.y, p, t, ev);
        return kDone;
    };
    // The last tiles first: theirs are the tokens that sums_kernel left in the L2 cache.
    for_each_tile<T, kTensors, kMany>(
        p, [&](auto channel, auto copies) { begin_alone(p, channel, copies); }, fast,
        [&](unsigned i, unsigned lanes, int) { exact_outputs<T>(p, i, lanes); });
}

}  // namespace bi_wkv
