// What the WKV6 kernels share: sizes, layouts of tokens and states, decays within a chunk.
#pragma once

#include <cuda_fp16.h>

#include "wkv6_cuda_mma.cuh"

namespace wkv6 {

constexpr int kN = 64;      // channels of a head that these kernels serve
constexpr int kChunk = 64;  // tokens of a chunk: then one state is as large as one chunk of one tensor
constexpr int kRows = 16;   // tokens of a warp, the height of a matrix instruction
constexpr int kWarps = kChunk / kRows;
constexpr int kThreads = 32 * kWarps;
constexpr int kGroup = 16;  // channels taken at a time, the depth of a matrix instruction
constexpr int kGroups = kN / kGroup;
constexpr int kStateBytes = kN * kN * 4;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLeastLogDecay = -1e30f;  // finite, for sums may be multiplied by 0; its exponential is 0

// One call's sizes. Tensors are (batch, tokens, heads, kN), contiguous; bh counts batches and heads.
struct Sizes {
    int64_t bh, tokens;
    int heads, chunks;

    __host__ __device__ int64_t slots() const { return chunks - 1; }  // states of a sequence and direction
    __device__ int64_t stride() const { return static_cast<int64_t>(heads) * kN; }

    // Of a sequence's first token. Sequences are fewer than blocks, so 32 bits hold their number and divide fast.
    __device__ int64_t offset(unsigned at_bh) const {
        const unsigned head_count = heads, batch = at_bh / head_count;
        return (batch * tokens * head_count + at_bh % head_count) * kN;
    }
};

__device__ inline void load4(float (&x)[4], const float* p) {
    const float4 y = *reinterpret_cast<const float4*>(p);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}

__device__ inline void load4(float (&x)[4], const __nv_bfloat16* p) {
    const uint2 y = *reinterpret_cast<const uint2*>(p);
    x[0] = __uint_as_float(y.x << 16), x[1] = __uint_as_float(y.x & 0xffff0000u);
    x[2] = __uint_as_float(y.y << 16), x[3] = __uint_as_float(y.y & 0xffff0000u);
}

__device__ inline void load4(float (&x)[4], const __half* p) {
    const uint2 y = *reinterpret_cast<const uint2*>(p);
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&y.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&y.y));
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

__device__ inline void store4(float* p, const float (&x)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ inline void store4(__nv_bfloat16* p, const float (&x)[4]) {
    const Pair a = split<false>(x[0], x[1]), b = split<false>(x[2], x[3]);
    *reinterpret_cast<uint2*>(p) = make_uint2(a.hi, b.hi);
}

__device__ inline void store4(__half* p, const float (&x)[4]) {
    const __half2 a = __floats2half2_rn(x[0], x[1]), b = __floats2half2_rn(x[2], x[3]);
    *reinterpret_cast<uint2*>(p) =
        make_uint2(*reinterpret_cast<const uint32_t*>(&a), *reinterpret_cast<const uint32_t*>(&b));
}

template <typename T>
__device__ inline void load4_or_zero(float (&x)[4], const T* p, bool valid) {
    if (valid) {
        load4(x, p);
    } else {
        x[0] = x[1] = x[2] = x[3] = 0;
    }
}

// Channels are stored in slots, so that a lane's four columns of a matrix operand (2q, 2q + 1, 2q + 8, 2q + 9) are four
// neighbouring channels and load as one vector: channel 4q + j of a group of 16 sits in slot 2q + j % 2 + 8 (j / 2).
__device__ inline int channel_of_slot(int slot) {
    return (slot & ~15) + ((slot & 6) << 1) + ((slot & 8) >> 2) + (slot & 1);
}

// Layouts of shared memory: at(row, unit, part) is the address of eight slots of a row; part 0 is hi, 1 is lo. Units
// are permuted by the row so that the eight rows of a matrix lie in different banks.

// kChunk tokens x kN slots.
struct Tile {
    static constexpr int kPlane = kChunk * kN * 2, kBytes = 2 * kPlane;
    unsigned char* base;
    __device__ unsigned char* at(int row, int unit, int part) const {
        return base + part * kPlane + row * (kN * 2) + ((unit ^ (row & 7)) << 4);
    }
};

// kChunk tokens x kGroup slots.
struct GroupTile {
    static constexpr int kBytes = kChunk * kGroup * 4;
    unsigned char* base;
    __device__ unsigned char* at(int row, int unit, int part) const {
        return base + row * (kGroup * 4) + (((part * 2 + unit) ^ ((row >> 1) & 3)) << 4);
    }
};

// Rows of a state: 256 bytes each, in units of eight slots, hi then lo. In global memory the same without permutation.
struct StateTile {
    static constexpr int kRowBytes = kN * 4;
    unsigned char* base;
    __device__ unsigned char* at(int row, int unit, int part) const {
        return base + row * kRowBytes + ((unit * 2 + part) ^ (row & 7)) * 16;
    }
};

// The kGroup rows of a state that belong to a group, from global to shared memory by the whole block, asynchronously.
template <bool kSplit>
__device__ inline void copy_state(StateTile tile, const unsigned char* state, int group) {
    constexpr int kPieces = kSplit ? 16 : 8;  // of a row
    state += group * (kGroup * StateTile::kRowBytes) + threadIdx.x * (StateTile::kRowBytes / kPieces);
#pragma unroll
    for (int done = 0; done < kGroup * kPieces; done += kThreads) {
        const int i = done + threadIdx.x, row = i / kPieces;
        const int unit = i % kPieces / (kSplit ? 2 : 1), part = kSplit ? i % 2 : 0;
        copy_async<16>(tile.at(row, unit, part), state + done * (StateTile::kRowBytes / kPieces));
    }
}

// Operands from shared memory; `unit` is even.
//
// Right operands: rows of the layout are rows of the operand (kDown) or its columns. `out` gets the
// 16 x 16 operand of 16 rows and two units as two operands of 8 columns.
template <bool kSplit, bool kDown, typename Layout>
__device__ inline void load_right(Right (&out)[2], Layout from, int row, int unit) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    row += lane % 8 + 8 * (kDown ? matrix % 2 : matrix / 2);
    unit ^= kDown ? matrix / 2 : matrix % 2;
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
        uint32_t x[4];
        if (kDown) {
            load_matrices_transposed(x, from.at(row, unit, part));
        } else {
            load_matrices(x, from.at(row, unit, part));
        }
        for (int i = 0; i < 4; ++i) (part ? out[i / 2].lo : out[i / 2].hi)[i % 2] = x[i];
    }
}

// A left operand from shared memory; kDown: rows of the layout are columns of the operand.
template <bool kSplit, bool kDown, typename Layout>
__device__ inline void load_left(Left& out, Layout from, int row, int unit) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    row += lane % 8 + 8 * (kDown ? matrix / 2 : matrix % 2);
    unit ^= kDown ? matrix % 2 : matrix / 2;
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
        if (kDown) {
            load_matrices_transposed(part ? out.lo : out.hi, from.at(row, unit, part));
        } else {
            load_matrices(part ? out.lo : out.hi, from.at(row, unit, part));
        }
    }
}

// Four neighbouring channels of a token into a tile; `quad` = channel / 4.
template <bool kSplit>
__device__ inline void store_quad(Tile tile, int row, int quad, const float (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
        const Pair pair = split<kSplit>(x[2 * i], x[2 * i + 1]);
        const int unit = quad / 4 * 2 + i, byte = quad % 4 * 4;
        *reinterpret_cast<uint32_t*>(tile.at(row, unit, 0) + byte) = pair.hi;
        if (kSplit) *reinterpret_cast<uint32_t*>(tile.at(row, unit, 1) + byte) = pair.lo;
    }
}

// One tensor's chunk on its way from global memory to a tile, by kBlockThreads threads: loads are issued for several
// tensors before the first is stored. Zeros beyond the `rows` that exist.
template <int kBlockThreads>
struct Passing {
    static constexpr int kStep = kBlockThreads / 16, kLoads = kChunk / kStep;
    float x[kLoads][4];

    template <typename T>
    __device__ void load(const T* chunk, int64_t stride, int rows) {
        const int quad = threadIdx.x % 16, first = threadIdx.x / 16;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int row = first + kStep * i;
            load4_or_zero(x[i], chunk + row * stride + 4 * quad, row < rows);
        }
    }

    template <bool kSplit>
    __device__ void store(Tile tile) const {
        const int quad = threadIdx.x % 16, first = threadIdx.x / 16;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) store_quad<kSplit>(tile, first + kStep * i, quad, x[i]);
    }
};

// One group of channels of the 16 tokens of a warp: lane 4g + q holds channels 4q .. 4q + 3 of token g in 0 .. 3 and of
// token g + 8 in 4 .. 7. It is the layout of a left operand and, with two sums side by side, of a result.
struct Block {
    float x[8];
};

// Blocks of the next group on their way from global memory, in shared memory that only this thread uses.
template <typename T>
struct Coming {
    static constexpr int kBytes = kThreads * 8 * sizeof(T);
    unsigned char* base;

    __device__ void start(const T* token, int64_t stride, bool first, bool second) const {
        constexpr int kVector = 4 * sizeof(T);
        copy_async<kVector>(base + threadIdx.x * kVector, token, first);
        copy_async<kVector>(base + (kThreads + threadIdx.x) * kVector, token + (second ? 8 * stride : 0), second);
    }

    // After wait_copies.
    __device__ Block take() const {
        float a[4], b[4];
        load4(a, reinterpret_cast<const T*>(base) + threadIdx.x * 4);
        load4(b, reinterpret_cast<const T*>(base) + (kThreads + threadIdx.x) * 4);
        return Block{{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]}};
    }
};

template <typename T>
__device__ inline void load_block(Block& out, const T* token, int64_t stride, bool first, bool second) {
    float a[4], b[4];
    load4_or_zero(a, token, first);
    load4_or_zero(b, token + 8 * stride, second);
    out = Block{{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]}};
}

template <typename T>
__device__ inline void store_block(T* token, int64_t stride, const Block& block, bool first, bool second) {
    const float a[4] = {block.x[0], block.x[1], block.x[2], block.x[3]};
    const float b[4] = {block.x[4], block.x[5], block.x[6], block.x[7]};
    if (first) store4(token, a);
    if (second) store4(token + 8 * stride, b);
}

__device__ inline Block operator*(const Block& a, const Block& b) {
    Block c;
    for (int i = 0; i < 8; ++i) c.x[i] = a.x[i] * b.x[i];
    return c;
}

__device__ inline void add(Block& to, const Block& a) {
    for (int i = 0; i < 8; ++i) to.x[i] += a.x[i];
}

// to += a b
__device__ inline void add_product(Block& to, const Block& a, const Block& b) {
    for (int i = 0; i < 8; ++i) to.x[i] += a.x[i] * b.x[i];
}

template <bool kSplit>
__device__ inline Left as_left(const Block& block) {
    Left out;
    for (int i = 0; i < 4; ++i) {
        const int at = 4 * (i % 2) + 2 * (i / 2);
        const Pair pair = split<kSplit>(block.x[at], block.x[at + 1]);
        out.hi[i] = pair.hi, out.lo[i] = pair.lo;
    }
    return out;
}

// The same 16 x 16 numbers as right operands whose columns are the tokens: the first and the last eight.
__device__ inline Right as_right(const Left& a, int half) {
    return Right{{a.hi[half], a.hi[2 + half]}, {a.lo[half], a.lo[2 + half]}};
}

__device__ inline Block as_block(const Sum (&sums)[2]) {
    Block out;
    for (int i = 0; i < 8; ++i) out.x[i] = sums[i % 4 / 2].x[i / 4 * 2 + i % 2];
    return out;
}

// 16 x 16 sums as a left operand.
template <bool kSplit>
__device__ inline Left as_left(const Sum (&sums)[2]) {
    return as_left<kSplit>(as_block(sums));
}

template <bool kSplit>
__device__ inline void store_left(GroupTile tile, int row, const Left& a) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int at = row + lane / 4 + i % 2 * 8, byte = lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(tile.at(at, i / 2, 0) + byte) = a.hi[i];
        if (kSplit) *reinterpret_cast<uint32_t*>(tile.at(at, i / 2, 1) + byte) = a.lo[i];
    }
}

__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

__device__ inline float log2_decay(float w) { return max_or_nan(w * kLog2E, kLeastLogDecay); }

// The log2 decays of four neighbouring channels from what a call is given: their natural logarithms w or, kRaw, numbers
// whose exponential, after adding a base of the channel, is -w.
template <bool kRaw>
struct LogDecay {
    float base[kRaw ? 4 : 1];

    __device__ explicit LogDecay(const float* bases) {
        if constexpr (kRaw) {
            constexpr float kLog2OfLog2E = 0.5287663729448977f;
            load4(base, bases);
            for (int j = 0; j < 4; ++j) base[j] = fmaf(base[j], kLog2E, kLog2OfLog2E);
        }
    }

    __device__ float operator()(float given, int j) const {
        return kRaw ? max_or_nan(-exp2_fast(fmaf(given, kLog2E, base[kRaw ? j : 0])), kLeastLogDecay)
                    : log2_decay(given);
    }
};

// Decays within a chunk. A chunk is halved again and again: a pair of tokens meets at the level where a boundary first
// separates them, and its decay is the product of one factor for each token, which covers the tokens between it and
// that boundary. So no exponent is ever positive, none is a difference, and each level is a matrix product.
//
// Of each token, sums of log2 decays over the part of the chunk seen so far, of 1, 2, 4, 8, 16 tokens: over the part,
// over the tokens of it before this one, and after it. Factors are taken as the part grows, to hold few at a time.
struct DecaySums {
    Block sum, before, after;

    template <bool kRaw>
    __device__ DecaySums(const Block& w, const LogDecay<kRaw>& decay) : before{}, after{} {
        for (int i = 0; i < 8; ++i) sum.x[i] = decay(w.x[i], i % 4);
    }

    // From parts of kHalf tokens to twice that.
    template <int kHalf>
    __device__ void join() {
        if constexpr (kHalf == 8) {
            for (int i = 0; i < 4; ++i) {
                before.x[4 + i] += sum.x[i];
                after.x[i] += sum.x[4 + i];
            }
        } else {
            const float right = threadIdx.x % 32 / 4 & kHalf ? 1.f : 0.f, left = 1.f - right;
            for (int i = 0; i < 8; ++i) {
                const float other = shuffle_xor(sum.x[i], 4 * kHalf);
                before.x[i] = fmaf(right, other, before.x[i]);
                after.x[i] = fmaf(left, other, after.x[i]);
                sum.x[i] += other;
            }
        }
    }

    // The factors to the boundary between two parts of kHalf tokens.
    template <int kHalf>
    __device__ Block factor() const {
        const int g = threadIdx.x % 32 / 4;
        Block out;
        for (int i = 0; i < 8; ++i) {
            const bool right = kHalf == 8 ? i >= 4 : g & kHalf;
            out.x[i] = exp2_fast(right ? before.x[i] : after.x[i]);
        }
        return out;
    }

    // The same for the warps' 16 tokens and for halves of the chunk; to the chunk's first and last boundary.
    // totals: sums over each warp's tokens for this lane's channels, rows of kN.
    __device__ Block factor16(int warp) const {
        Block out;
        for (int i = 0; i < 8; ++i) out.x[i] = exp2_fast(warp & 1 ? before.x[i] : after.x[i]);
        return out;
    }

    __device__ Block factor32(int warp, const float* totals) const {
        const bool right_half = warp & 2, reaches_over = (warp & 1) == (warp >> 1);
        float sibling[4];
        load4(sibling, totals + (warp ^ 1) * kN);
        Block out;
        for (int i = 0; i < 8; ++i) {
            out.x[i] = exp2_fast((right_half ? before.x[i] : after.x[i]) + (reaches_over ? sibling[i % 4] : 0.f));
        }
        return out;
    }

    template <bool kBefore>
    __device__ Block factor_chunk(int warp, const float* totals) const {
        float beyond[4] = {};
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            float x[4];
            load4(x, totals + other * kN);
            for (int i = 0; i < 4; ++i) beyond[i] += (kBefore ? other < warp : other > warp) ? x[i] : 0.f;
        }
        Block out;
        for (int i = 0; i < 8; ++i) out.x[i] = exp2_fast((kBefore ? before.x[i] : after.x[i]) + beyond[i % 4]);
        return out;
    }
};

// What each thread loads to sum log2 decays: issued early, summed late.
struct PassingDecays {
    float x[8][4];

    template <typename W>
    __device__ void load(const W* chunk, int64_t stride, int rows) {
        const int quad = threadIdx.x % 16, first = threadIdx.x / 16 * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) load4_or_zero(x[i], chunk + (first + i) * stride + 4 * quad, first + i < rows);
    }

    // Sums over the 16 tokens of each warp, into kWarps rows of kN.
    template <bool kRaw>
    __device__ void store_totals(float* totals, const LogDecay<kRaw>& decay) const {
        float sum[4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 4; ++j) sum[j] += decay(x[i][j], j);
        }
        for (int j = 0; j < 4; ++j) sum[j] += shuffle_xor(sum[j], 16);
        if (threadIdx.x % 32 < 16) store4(totals + threadIdx.x / 32 * kN + threadIdx.x % 16 * 4, sum);
    }
};

}  // namespace wkv6
