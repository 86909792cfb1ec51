// The fast path's parts: plain float sums relative to one reference exponent a tile and channel, where the range of
// floats allows that.
#pragma once

#include "bi_wkv/bi_wkv_cuda_exact.cuh"

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

// A tile's shared memory. First what the rows share, 32 bytes a thread; the exact path has 48 there.
constexpr int kSharedRowBytes = 2 * sizeof(State);
static_assert(kSharedRowBytes >= 4 * sizeof(Pair));
constexpr int kIncomingBytes = 4 * kLanes * sizeof(Pair);

struct Shared {
    Pair *rows[2], *incoming;  // rows: of each phase, [2][threads]; incoming: [phase][side][kLanes]
    char* staged;
    int threads;
};

__device__ inline Shared shared_parts(const Problem& p) {
    const int threads = p.plan.rows * kLanes;
    Pair* rows = reinterpret_cast<Pair*>(shared_memory());
    Pair* incoming = reinterpret_cast<Pair*>(shared_memory() + kSharedRowBytes * threads);
    return {{rows, rows + 2 * threads}, incoming, reinterpret_cast<char*>(incoming + 4 * kLanes), threads};
}

template <typename T>
__device__ inline Staged<T> staged(const Problem& p, int tensor) {
    return {shared_parts(p).staged + tensor * p.plan.rows * Staged<T>::kRowBytes};
}

// Starts to copy the tensors that a kernel reads: k, v and, where there are three, gy or r.
template <typename T, int kTensors>
__device__ inline void start_copies(const Problem& p, const Tile& t) {
    const CopyPart<T> part(p, t);
    const void* third = p.call.backward ? p.call.gy : p.call.r;
    if (part.is_plain(p, t)) {
        part.start(staged<T>(p, 0), p.call.k, p);
        part.start(staged<T>(p, 1), p.call.v, p);
        if constexpr (kTensors == 3) part.start(staged<T>(p, 2), third, p);
    } else {
        part.template copy<true>(staged<T>(p, 0), p.call.k, p, t);
        part.template copy<false>(staged<T>(p, 1), p.call.v, p, t);
        if constexpr (kTensors == 3) part.template copy<false>(staged<T>(p, 2), third, p, t);
    }
}

template <typename T>
__device__ inline void read_row(Staged<T> from, float (&x)[kRow]) {
    const T* at = from.at(this_row(), 0) + this_lane();
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
// and the largest of a few is safe from single low ones. Only the first of the four exists in every tile.
template <typename T>
__device__ inline float choose_reference(const Problem& p) {
    const Staged<T> keys = staged<T>(p, 0);
    const auto key = [&](int i) { return to_real(keys.at(p.plan.rows / 4 * i, kRow / 4 * i)[this_lane()]); };
    return fmaxf(fmaxf(key(0), key(1)), fmaxf(key(2), key(3))) * static_cast<float>(kLog2E);
}

// Keys to weights relative to the reference.
__device__ inline void keys_to_weights(float reference, float (&k)[kRow]) {
#pragma unroll
    for (int j = 0; j < kRow; ++j) k[j] = fast_exp2(fmaf(k[j], static_cast<float>(kLog2E), -reference));
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

// Puts each row's sums where the others find them, and waits for theirs.
__device__ inline void share(Pair* of_rows, int threads, const Pair (&sums)[2], bool in_range) {
    of_rows[threadIdx.x] = sums[0];
    of_rows[threads + threadIdx.x] = sums[1];
    if (!in_range) atomicOr(&out_of_range(), 1u << this_lane());
    __syncthreads();
}

// What `count` rows of one side send to the row behind them, from the rows' sums in shared memory; in: what comes from
// before them.
__device__ inline Pair gather_rows(const Pair* of_rows, int rows, int side, int count, float row_decay, Pair in) {
    const int step = (side == 0 ? 1 : -1) * kLanes;
    const Pair* at = of_rows + (side == 0 ? 0 : rows * (2 * kLanes) - kLanes) + this_lane();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
        absorb(in, row_decay, at->x, at->y);
        at += step;
    }
    return in;
}

// Leaves the tile's sums for the others; they are times 2^-base. To be called by all threads after share().
__device__ inline void publish(const Problem& p, const Tile& t, Phase phase, const Pair* of_rows, float row_decay,
                               float base) {
    const int rows = p.plan.rows;
    for (int side = this_row(); side < 2; side += rows) {
        const Pair all = gather_rows(of_rows, rows, side, rows, row_decay, {0, 0});
        *tile_sums(p, t, phase, side) = {base * kNats, all.x, all.y};
    }
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
