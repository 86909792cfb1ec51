// The fast path's parts: plain float sums relative to one reference exponent a tile and channel, where the range of
// floats allows that.
#pragma once

#include "bi_wkv/bi_wkv_cuda_copy.cuh"

namespace bi_wkv {

// Beyond these limits (base-2 exponents) a channel of a tile takes the exact path. Within them a denominator is at
// least 2^-60, as it holds the reference's token, at most a tile's decay away, or is that token's own; or, where the
// weights grow with the distance, 2^-30. All sums stay below 2^125, and what underflows, such as the weight of a far
// lower key, is nothing.
constexpr float kDecaySpan = 60;   // of exp(-w) over a tile's tokens, either way
constexpr float kBonusSpan = 30;   // of u, either way
constexpr float kLargest = 1e13f;  // 2^43: of a row's sums and of what other tiles send, relative to the reference
constexpr float kLargestReference = 1e12f;  // beyond it exponents are rough, see bi_wkv_cuda_exact.cuh
constexpr float kLargestAdjoint = 1e30f;    // 2^100
constexpr float kTiny = 1e-36f;             // keeps the denominators of tokens that do not exist from being zero

// What one channel's parameters make of a tile.
struct Channel {
    float w;          // base 2
    float decay;      // of one token
    float row_decay;  // of kRow tokens
    float own;        // exp(u)
    bool in_range;
};

// Sums of two kinds, such as numerator and denominator.
struct Pair {
    float x, y;
};

__device__ inline void absorb(Pair& sum, float decay, float x, float y) {
    sum.x = fmaf(sum.x, decay, x);
    sum.y = fmaf(sum.y, decay, y);
}

__device__ inline void add(Pair& sum, float scale, const Pair& x) {
    sum.x = fmaf(scale, x.x, sum.x);
    sum.y = fmaf(scale, x.y, sum.y);
}

// False for NaN too.
__device__ inline bool within(const Pair& sum, float limit) { return fabsf(sum.x) <= limit && fabsf(sum.y) <= limit; }

// What the warps of a tile share, at the start of its shared memory. A warp has two rows.
struct Shared {
    Pair *warps[2], *incoming, *parts;  // warps: of each phase, [side][warp][kLanes]; incoming: [phase][side][kLanes]
    int count;                          // of warps
};
constexpr int kIncomingBytes = 4 * kLanes * sizeof(Pair);
static_assert(kSharedRowBytes >= 3 * sizeof(Pair));  // two phases and parts, a pair for each thread and of each

__device__ inline Shared shared_parts(const Problem& p) {
    const int threads = p.plan.rows * kLanes;
    Pair* warps = reinterpret_cast<Pair*>(shared_memory());
    Pair* incoming = reinterpret_cast<Pair*>(shared_memory() + kSharedRowBytes * threads);
    return {{warps, warps + threads}, incoming, warps + 2 * threads, p.plan.rows / 2};
}

template <typename T>
__device__ inline void read_row(Staged<T> from, float (&x)[kRow]) {
    const T* at = from.at(this_row() * kRow) + this_lane();
#pragma unroll
    for (int j = 0; j < kRow; ++j) x[j] = to_real(at[j * kLanes]);
}

template <typename T>
__device__ inline void write_row(void* to, const Problem& p, const Tile& t, const float (&x)[kRow]) {
    T* at = static_cast<T*>(to) + row_offset(p, t);
    if (t.channel() >= p.channels) return;
    if (t.left() >= kRow) {
#pragma unroll
        for (int j = 0; j < kRow; ++j) store(offset_by(at, j, p.token_bytes), x[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kRow; ++j) {
            if (j < t.left()) store(offset_by(at, j, p.token_bytes), x[j]);
        }
    }
}

__device__ inline Channel load_channel(const Problem& p, const Tile& t) {
    const float w = channel_parameter<float>(p, p.call.w, p.call.w_type, t.channel()) * static_cast<float>(kLog2E);
    const float u = channel_parameter<float>(p, p.call.u, p.call.u_type, t.channel()) * static_cast<float>(kLog2E);
    const bool in_range = fabsf(w) * p.chunk_tokens <= kDecaySpan && fabsf(u) <= kBonusSpan;
    return {w, fast_exp2(-w), fast_exp2(-kRow * w), fast_exp2(u), in_range};
}

// The exponent that a tile's weights are relative to: the largest of four of its keys. Any key near the others does,
// and the largest of a few is safe from single low ones.
template <typename T>
__device__ inline float choose_reference(const Tile& t, const Staged<T>& keys) {
    const auto key = [&](int i) { return to_real(keys.at((t.in_chunk - 1) * i / 4)[this_lane()]); };
    return fmaxf(fmaxf(key(0), key(1)), fmaxf(key(2), key(3))) * static_cast<float>(kLog2E);
}

// Keys to weights relative to the reference; tokens that do not exist weigh nothing.
__device__ inline void keys_to_weights(const Tile& t, float reference, float (&k)[kRow]) {
#pragma unroll
    for (int j = 0; j < kRow; ++j) k[j] = fast_exp2(fmaf(k[j], static_cast<float>(kLog2E), -reference));
    if (t.left() < kRow) {
#pragma unroll
        for (int j = 0; j < kRow; ++j) k[j] = j < t.left() ? k[j] : 0;
    }
}

// Hides from the compiler what x was. It likes to keep what it has once computed (products e v, powers of decays) from
// one pass to the next, in registers that the sums need; computing it again is cheaper.
__device__ inline void make_new(float& x) { asm volatile("" : "+f"(x)); }

__device__ inline void make_new(float (&x)[kRow]) {
#pragma unroll
    for (int j = 0; j < kRow; ++j) make_new(x[j]);
}

// Sums of e v and e over a thread's tokens, as seen right behind them (0) and right before them (1).
__device__ inline void key_sums(float decay, const float (&e)[kRow], const float (&ev)[kRow], Pair (&sums)[2]) {
    sums[0] = sums[1] = {0, 0};
#pragma unroll
    for (int j = 0; j < kRow; ++j) {
        absorb(sums[0], decay, ev[j], e[j]);
        absorb(sums[1], decay, ev[kRow - 1 - j], e[kRow - 1 - j]);
    }
}

// The lanes of the block's tile that are out of range; shared, and reset by for_each_tile.
__device__ inline unsigned& out_of_range() {
    __shared__ unsigned lanes;
    return lanes;
}

__device__ inline float of_partner(float x) { return __shfl_xor_sync(~0u, x, kLanes); }

// Puts each warp's sums, of both of its rows, where the others find them, and waits for theirs. Returns what the warp's
// other row sends to the thread's.
__device__ inline Pair share(const Problem& p, Phase phase, float row_decay, const Pair (&sums)[2], bool in_range) {
    const Shared shared = shared_parts(p);
    // The first row sends to the right and adds up both for those on the left, the second the other way round.
    const int side = 1 - this_row() % 2;
    const Pair sent = side == 1 ? sums[0] : sums[1];
    Pair both = side == 1 ? sums[1] : sums[0];
    const Pair received = {__shfl_xor_sync(~0u, sent.x, kLanes), __shfl_xor_sync(~0u, sent.y, kLanes)};
    add(both, row_decay, received);
    shared.warps[phase][(side * shared.count + this_row() / 2) * kLanes + this_lane()] = both;
    if (!in_range) atomicOr(&out_of_range(), 1u << this_lane());
    __syncthreads();
    return received;
}

// What `count` warps of one side send to what is behind them, from the warps' sums in shared memory; in: what comes
// from before them.
__device__ inline Pair gather_warps(const Problem& p, Phase phase, int side, int count, float row_decay, Pair in) {
    const Shared shared = shared_parts(p);
    const Pair* at = shared.warps[phase] + (side == 0 ? 0 : 2 * shared.count - 1) * kLanes + this_lane();
    const int step = side == 0 ? kLanes : -kLanes;
    const float decay = row_decay * row_decay;
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
        absorb(in, decay, at->x, at->y);
        at += step;
    }
    return in;
}

// What the other rows of the tile and what is beyond it send to the thread's row. received: by share().
__device__ inline void gather_rows(const Problem& p, Phase phase, float row_decay, const Pair& received,
                                   const Pair (&beyond)[2], Pair (&in)[2]) {
    const int warp = this_row() / 2, warps = p.plan.rows / 2;
    in[0] = gather_warps(p, phase, 0, warp, row_decay, beyond[0]);
    in[1] = gather_warps(p, phase, 1, warps - 1 - warp, row_decay, beyond[1]);
    if (this_row() % 2 == 1) {
        absorb(in[0], row_decay, received.x, received.y);
    } else {
        absorb(in[1], row_decay, received.x, received.y);
    }
}

// Leaves the tile's sums for the others; they are times 2^-base. To be called by the first warp after share().
__device__ inline void publish(const Problem& p, const Tile& t, Phase phase, float row_decay, float base) {
    const Pair all = gather_warps(p, phase, this_row(), p.plan.rows / 2, row_decay, {0, 0});
    *tile_sums(p, t, phase, this_row()) = {base * kNats, all.x, all.y};
}

// What the other tiles send to this one from one side, relative to base.
__device__ inline Pair load_incoming(const Problem& p, const Tile& t, Phase phase, int side, float base) {
    const State sent = *tile_sums(p, t, phase, side);
    const float scale = fast_exp2(static_cast<float>((sent.m - base * kNats) * kLog2E));
    return {static_cast<float>(sent.x) * scale, static_cast<float>(sent.y) * scale};
}

__device__ inline Pair& incoming(const Problem& p, Phase phase, int side) {
    return shared_parts(p).incoming[(phase * 2 + side) * kLanes + this_lane()];
}

}  // namespace bi_wkv
