// What the Bi-WKV kernels share: a tile's place, its way into shared memory, and the sums that tiles leave for others.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "bi_wkv/bi_wkv_cuda.h"
#include "divisor.cuh"
#include "programmatic.cuh"

namespace bi_wkv {

using rows::Divisor;

constexpr int kLanes = 16;  // channels of a tile: 64 bytes of a token in float32
constexpr int kRow = 16;    // tokens of a thread, in registers
constexpr int kGroup = 4;   // tokens between two kept states of a thread's scan; the others are made again
// Rows of a tile at most: where a tile is a whole sequence, and where sequences are cut into several. The smaller tiles
// are, the less blocks wait for their own threads; the larger, the more sequences take one kernel only.
constexpr int kMaxRows = 16, kMaxRowsOfMany = 8;
template <bool kMany>
constexpr int kMaxThreads = kLanes * (kMany ? kMaxRowsOfMany : kMaxRows);
constexpr double kLog2E = 1.4426950408889634074;
// A reference exponent in nats. The fast path takes keys times float(kLog2E), rounded, to base 2: of large keys that
// rounding counts, where chunks are merged whose exponents are the keys themselves.
constexpr double kNats = 1 / static_cast<double>(static_cast<float>(kLog2E));

enum Phase { kForwardSums, kAdjointSums };

// Two sums times exp(-m), with m an exponent near that of their largest term. In base e multiples of a float32 decay
// are exact in double, however large; the fast path's own exponents are in base 2.
struct State {
    double m, x, y;
};

// What a tile sends to one side in one pass: two sums times 2^-base, or the word that they lie in its State. It comes
// in one piece, so no other memory has to be waited for.
struct alignas(16) Message {
    float base, x, y;
    unsigned kind;
};
enum : unsigned { kMissing, kPlain, kInState };

// The arguments of a kernel.
struct Problem {
    CUtensorMap maps[3];  // k, v, and gy or r, in boxes of a tile; if `vectors`, from compute capability 9.0 on
    Call call;
    Plan plan;
    unsigned tiles, tokens, channels, token_bytes;
    int chunk_tokens;
    bool vectors;  // k, v, gy and r lie such that 16 bytes of a token can be copied at once
    Divisor by_group, by_chunks, by_groups;
    State* sums;  // (phase, sample, slice, chunk, side, kLanes): what a chunk sends, then what it gets; chunks > 1
    float* references;  // (sample, chunk, slice, kLanes): what a tile's weights are relative to, NaN for the exact path
    void* partials;     // (sample, chunk, slice, 2, kLanes): a tile's gw and gu; backward only
    Message* messages;  // like sums; one pass only
};

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline float to_real(__half x) { return __half2float(x); }
__device__ inline float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(float* to, double x) { *to = static_cast<float>(x); }
__device__ inline void store(double* to, double x) { *to = x; }
__device__ inline void store(__half* to, double x) { *to = __double2half(x); }
__device__ inline void store(__nv_bfloat16* to, double x) { *to = __double2bfloat16(x); }

template <typename T>
constexpr bool kExactOnly = std::is_same_v<T, double>;
template <typename T>
using SumType = std::conditional_t<kExactOnly<T>, double, float>;

// Real float: the parameter is not float64 (bi_wkv_cuda.cu runs such calls in float64).
template <typename Real>
__device__ inline Real load_parameter(const void* x, Dtype type, int64_t i) {
    switch (type) {
        case Dtype::kBFloat16:
            return to_real(static_cast<const __nv_bfloat16*>(x)[i]);
        case Dtype::kFloat16:
            return to_real(static_cast<const __half*>(x)[i]);
        case Dtype::kFloat64:
            if constexpr (std::is_same_v<Real, double>) return static_cast<const double*>(x)[i];
        default:
            return static_cast<const float*>(x)[i];
    }
}

// w or u of a channel, or an existing one near it.
template <typename Real>
__device__ inline Real channel_parameter(const Problem& p, const void* x, Dtype type, unsigned channel) {
    const Real value = load_parameter<Real>(x, type, min(channel, p.channels - 1));
    return p.call.over_tokens ? value / static_cast<Real>(p.tokens) : value;
}

__device__ inline void store_parameter(void* x, Dtype type, int64_t i, double value) {
    switch (type) {
        case Dtype::kFloat32:
            return store(static_cast<float*>(x) + i, value);
        case Dtype::kBFloat16:
            return store(static_cast<__nv_bfloat16*>(x) + i, value);
        case Dtype::kFloat16:
            return store(static_cast<__half*>(x) + i, value);
        default:
            return store(static_cast<double*>(x) + i, value);
    }
}

// 2^x and 1/x to about 1e-7 in one instruction; results below 1e-38 become zero.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline char* shared_memory() {
    extern __shared__ __align__(128) char bi_wkv_shared[];
    return bi_wkv_shared;
}

// A tile is rows * kRow tokens of kLanes channels of one sample; a thread has kRow tokens of one channel in it.
__device__ inline int this_row() { return threadIdx.x / kLanes; }
__device__ inline int this_lane() { return threadIdx.x % kLanes; }
constexpr unsigned kAllLanes = (1u << kLanes) - 1;
__device__ inline bool has_lane(unsigned lanes) { return lanes >> this_lane() & 1; }

struct Tile {
    unsigned sample, slice;
    int chunk, in_chunk;  // in_chunk: tokens of the chunk that exist
    int64_t at;           // offset of the chunk's first token and the slice's first channel

    // Tokens that exist from the thread's first one on: below 1, none of its tokens exist. Not clamped to 0..kRow:
    // ptxas 13.0 for sm_90 then gets "== kRow" wrong (VIMNMX.RELU with a predicate).
    __device__ int left() const { return in_chunk - this_row() * kRow; }
    __device__ unsigned channel() const { return slice * kLanes + this_lane(); }
};

// Neighbouring tiles are neighbouring slices of the same tokens, which share lines of memory. Then come the group's
// other tokens, the other groups, the other samples.
__device__ inline Tile locate(const Problem& p, unsigned number) {
    Tile t;
    const unsigned chunk = p.by_group.divide(number), group = p.by_chunks.divide(chunk);  // of all groups and samples
    t.sample = p.by_groups.divide(group);
    t.slice = (group - t.sample * p.by_groups.by) * p.by_group.by + (number - chunk * p.by_group.by);
    t.chunk = static_cast<int>(chunk - group * p.by_chunks.by);
    const unsigned token = t.chunk * p.chunk_tokens;
    t.in_chunk = static_cast<int>(min(unsigned(p.chunk_tokens), p.tokens - token));
    t.at = static_cast<int64_t>((uint64_t(t.sample) * p.tokens + token) * p.channels + t.slice * kLanes);
    return t;
}

// The offset of the thread's first token, for channels that exist.
__device__ inline int64_t row_offset(const Problem& p, const Tile& t) {
    return t.at + this_lane() + uint64_t(this_row() * kRow) * p.channels;
}

// A pointer `tokens` further; within a tile 32 bits hold the distance (bi_wkv_cuda.cu checks the channels).
template <typename T>
__device__ inline T* offset_by(T* from, unsigned tokens, unsigned token_bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + uint64_t(tokens) * token_bytes);
}

__device__ inline int64_t tile_index(const Problem& p, const Tile& t) {
    return (int64_t(t.sample) * p.plan.chunks + t.chunk) * p.plan.slices + t.slice;
}

__device__ inline int64_t sums_index(const Problem& p, const Tile& t, Phase phase, int side) {
    const int64_t sequence = (phase * p.call.batch + t.sample) * p.plan.slices + t.slice;
    return ((sequence * p.plan.chunks + t.chunk) * 2 + side) * kLanes + this_lane();
}

// Of the tile and this lane. side 0: from the tokens on the left to those on the right; side 1: the other way.
__device__ inline State* tile_sums(const Problem& p, const Tile& t, Phase phase, int side) {
    return p.sums + sums_index(p, t, phase, side);
}

// Writes and reads a message in one piece.
__device__ inline void send(Message* to, const Message& x) {
    unsigned __int128 bits;
    memcpy(&bits, &x, sizeof(x));
    asm volatile("st.relaxed.gpu.global.b128 [%0], %1;" ::"l"(to), "q"(bits) : "memory");
}

__device__ inline Message look_for(const Message* from) {
    unsigned __int128 bits;
    asm volatile("ld.relaxed.gpu.global.b128 %0, [%1];" : "=q"(bits) : "l"(from) : "memory");
    Message x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

__device__ inline float* tile_reference(const Problem& p, const Tile& t) {
    return p.references + tile_index(p, t) * kLanes + this_lane();
}

// The sum over the tile's rows of each thread's gw and gu, in a fixed order, to the tile's place in partials; of the
// lanes whose bits are set. Uses the start of the shared memory.
template <typename Sum>
__device__ inline void store_partials(const Problem& p, const Tile& t, Sum gw, Sum gu, unsigned lanes) {
    Sum* all = reinterpret_cast<Sum*>(shared_memory());
    __syncthreads();
    all[2 * threadIdx.x] = gw;
    all[2 * threadIdx.x + 1] = gu;
    __syncthreads();
    const int64_t tile = tile_index(p, t);
    for (int which = this_row(); which < 2; which += p.plan.rows) {  // row 0 sums gw, row 1 gu; a tile of one row both
        Sum sum = 0;
        for (int row = 0; row < p.plan.rows; ++row) sum += all[2 * (row * kLanes + this_lane()) + which];
        if (has_lane(lanes)) static_cast<Sum*>(p.partials)[(tile * 2 + which) * kLanes + this_lane()] = sum;
    }
}

}  // namespace bi_wkv
