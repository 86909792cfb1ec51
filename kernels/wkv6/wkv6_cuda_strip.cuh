// Strips of 16 tokens, a warp each, and the states that pass over them: what the forward kernels for bfloat16 tensors
// share.
#pragma once

#include "wkv6_cuda_common.cuh"

namespace wkv6 {

constexpr int kStrips = 7;  // of a block, at most; so three blocks fit into the 228 KiB of a processor
constexpr int kPieceBlocks = 2;
constexpr int kSweepWarps = 4, kSweepThreads = 32 * kSweepWarps;
constexpr int kStateVectors = kN * kN / 4;

// How a sequence is cut: into strips, `each` of them to a block (fewer in the last one), and two blocks to a piece, a
// cluster. A workspace has slots for the states between blocks: slot i of direction 0 is for the state after block i,
// of direction 1 for that before block i + 1. Those between pieces are in odd slots; where a piece has a second block,
// its blocks leave each other in the even slot between them what they arrive at, from the piece's end or, of several
// pieces, from nothing. rank: of a block in its piece.
struct Pieces {
    int strips, each, blocks;

    explicit Pieces(int64_t tokens) : strips(static_cast<int>((tokens + kRows - 1) / kRows)) {
        const int pieces = (strips + kPieceBlocks * kStrips - 1) / (kPieceBlocks * kStrips);
        each = (strips + kPieceBlocks * pieces - 1) / (kPieceBlocks * pieces);
        blocks = (strips + each - 1) / each;
    }

    __host__ __device__ int count() const { return (blocks + 1) / kPieceBlocks; }
    __host__ __device__ int slots() const { return blocks - 1; }
    __device__ int strips_of(int block) const { return max(min(strips - block * each, each), 0); }
    __device__ bool paired(int piece) const { return kPieceBlocks * piece < slots(); }  // has a second block
    // A piece's decays in a workspace, and behind those of all pieces a block's.
    __device__ int64_t piece_decays(int64_t sequence, int piece) const { return (sequence * count() + piece) * kN; }
    __device__ int64_t block_decays(int64_t sequences, int64_t sequence, int block) const {
        return (sequences * count() + sequence * kPieceBlocks * count() + block) * kN;
    }
    // In vectors, `sequences` in all; a warp and lane of a sweep has its own eight.
    __device__ int64_t state(int direction, int64_t sequences, int64_t sequence, int slot) const {
        return ((direction * sequences + sequence) * slots() + slot) * kStateVectors +
               threadIdx.x / 32 % kSweepWarps * (kStateVectors / kSweepWarps) + threadIdx.x % 32;
    }
};

// 16 tokens x kN slots of bfloat16. The eight rows of a matrix lie in different banks, and so do pairs of units of the
// first and of the last four rows. Rows eight apart are permuted alike.
struct StripTile {
    static constexpr int kRowBytes = kN * 2, kBytes = kRows * kRowBytes, kEightRows = 8 * kRowBytes;
    unsigned char* base;
    __device__ static int offset(int row, int unit) {
        return row * kRowBytes + ((unit ^ ((row & 3) << 1 | (row >> 2 & 1))) << 4);
    }
    __device__ unsigned char* at(int row, int unit, int = 0) const { return base + offset(row, unit); }
};

// A strip's tiles: for each direction r, decayed from where the state comes in, and k, decayed to where it goes out;
// and v. Once used, those of a direction make room for its results.
//
// Before, the inputs arrive there, channels in order: r and k in the tiles of direction 0, w in those of direction 1.
// The 32 bytes of a token's group of channels lie where the four lanes that take them later put what they made of them.
struct Strip {
    static constexpr int kBytes = 5 * StripTile::kBytes;
    unsigned char* base;
    __device__ StripTile r(int direction) const { return StripTile{base + 2 * direction * StripTile::kBytes}; }
    __device__ StripTile k(int direction) const { return StripTile{base + (2 * direction + 1) * StripTile::kBytes}; }
    __device__ StripTile v() const { return StripTile{base + 4 * StripTile::kBytes}; }
    __device__ StripTile w(int half) const { return half ? k(1) : r(1); }  // float32 fills both
    // Of this lane for a group of channels, as a Block: two vectors, the second 32 further.
    __device__ float4* results(int direction, int group) const {
        return reinterpret_cast<float4*>(base + 2 * direction * StripTile::kBytes) + group * 64 + threadIdx.x % 32;
    }
};

// Matrices of zeros and ones, which pick the tokens that a sum of log2 decays runs over: rows are the tokens with the
// sum, columns those in it. The sums reach from a token to a boundary: the strip's first and last one, and those
// between its halves, quarters and eighths.
enum Picks { kToFirst, kToLast, kToHalf, kToQuarter, kToEighth, kPicks };

template <typename AnyStrip>
struct SharedOf {
    static constexpr int kDecays = kStrips * AnyStrip::kBytes;  // of each strip as a whole, by slot
    static constexpr int kPicksAt = kDecays + kStrips * kN * 4;
    static constexpr int kBase = kPicksAt + kPicks * 32 * 16;  // of the head, as u
    static constexpr int kBonus = kBase + kN * 4;
    static constexpr int kBytes = kBonus + kN * 4;
};
using StripsShared = SharedOf<Strip>;

// This lane's part of a matrix as a left operand.
__device__ inline uint4 picks(int which) {
    const auto picked = [&](int t, int i) {
        if (which == kToFirst) return i < t;
        if (which == kToLast) return i > t;
        const int part = which == kToHalf ? 8 : which == kToQuarter ? 4 : 2;  // tokens on either side
        const int boundary = (t & ~(2 * part - 1)) + part;
        return t & part ? boundary <= i && i < t : t < i && i < boundary;
    };
    const int lane = threadIdx.x % 32;
    uint32_t x[4];
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
        x[i] = (picked(row, column) ? 0x3f80 : 0) | (picked(row, column + 1) ? 0x3f800000 : 0);
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}

// The matrices and, on their way, the head's base and u.
template <typename Shared, bool kBase, bool kBonus>
__device__ inline void start_constants(unsigned char* shared, const float* base, const float* u) {
    if (threadIdx.x < kPicks * 32) {
        reinterpret_cast<uint4*>(shared + Shared::kPicksAt)[threadIdx.x] = picks(threadIdx.x / 32);
    }
    if (threadIdx.x < kN / 4) {
        const int at = 4 * threadIdx.x;
        if (kBase) copy_async<16>(shared + Shared::kBase + 4 * at, base + at);
        if (kBonus) copy_async<16>(shared + Shared::kBonus + 4 * at, u + at);
    }
}

__device__ inline void start_tile(StripTile tile, const __nv_bfloat16* strip, int64_t stride, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
        const int row = i + lane / 8, unit = lane % 8;
        copy_async<16>(tile.at(row, unit), strip + (row < rows ? row * stride + 8 * unit : 0), row < rows);
    }
}

template <typename AnyStrip>
__device__ inline void start_decays(AnyStrip strip, const __nv_bfloat16* w, int64_t stride, int rows) {
    start_tile(strip.w(0), w, stride, rows);
}

template <typename AnyStrip>
__device__ inline void start_decays(AnyStrip strip, const float* w, int64_t stride, int rows) {
    const int lane = threadIdx.x % 32, quad = lane % 16;
    const StripTile tile = strip.w(quad / 2 % 2);
#pragma unroll
    for (int i = 0; i < kRows; i += 2) {
        const int row = i + lane / 16;
        copy_async<16>(tile.at(row, quad / 4 * 2 + quad % 2), w + (row < rows ? row * stride + 4 * quad : 0),
                       row < rows);
    }
}

// v on its way to its tile, where it lies in slots.
struct PassingStrip {
    static constexpr int kLoads = kRows / 2;
    uint2 x[kLoads];

    // Half a warp's row: the two halves store to different banks.
    __device__ static int row_of(int i) { return i % 4 + i / 4 * 8 + threadIdx.x % 32 / 16 * 4; }

    __device__ void load(const __nv_bfloat16* strip, int64_t stride, int rows) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int row = row_of(i);
            x[i] = make_uint2(0, 0);
            if (row < rows) x[i] = *reinterpret_cast<const uint2*>(strip + row * stride + threadIdx.x % 16 * 4);
        }
    }

    __device__ void store(StripTile tile) const {
        const int quad = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            *reinterpret_cast<uint32_t*>(tile.at(row_of(i), quad / 4 * 2) + quad % 4 * 4) = x[i].x;
            *reinterpret_cast<uint32_t*>(tile.at(row_of(i), quad / 4 * 2 + 1) + quad % 4 * 4) = x[i].y;
        }
    }
};

// Where this lane finds its part of a group of channels in a tile: as they arrive, and as slots. Offsets for the first
// group; for the others they differ in bits 5 and 6.
struct GroupPlace {
    int arrived, floats, slots;

    __device__ GroupPlace() {
        const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        arrived = StripTile::offset(g, q / 2) + q % 2 * 8;
        floats = StripTile::offset(g, q % 2);
        slots = StripTile::offset(g, 0) + 4 * q;
    }

    __device__ Left load(StripTile tile, int group) const {
        const unsigned char* at = tile.base + (arrived ^ group << 5);
        const uint2 a = *reinterpret_cast<const uint2*>(at);
        const uint2 b = *reinterpret_cast<const uint2*>(at + StripTile::kEightRows);
        return Left{{a.x, b.x, a.y, b.y}, {}};
    }

    __device__ void store(StripTile tile, int group, const Left& a) const {
        unsigned char *at = tile.base + (slots ^ group << 5), *next = tile.base + (slots ^ group << 5 ^ 16);
        *reinterpret_cast<uint32_t*>(at) = a.hi[0];
        *reinterpret_cast<uint32_t*>(at + StripTile::kEightRows) = a.hi[1];
        *reinterpret_cast<uint32_t*>(next) = a.hi[2];
        *reinterpret_cast<uint32_t*>(next + StripTile::kEightRows) = a.hi[3];
    }
};

// The inverse of as_left<false>.
__device__ inline Block as_block(const Left& a) {
    Block out;
    for (int i = 0; i < 4; ++i) {
        const int at = 4 * (i % 2) + 2 * (i / 2);
        out.x[at] = __uint_as_float(a.hi[i] << 16), out.x[at + 1] = __uint_as_float(a.hi[i] & 0xffff0000u);
    }
    return out;
}

template <typename W, typename AnyStrip>
__device__ inline Block arrived_decays(AnyStrip strip, const GroupPlace& place, int group) {
    if constexpr (sizeof(W) == sizeof(__nv_bfloat16)) {
        return as_block(place.load(strip.w(0), group));
    } else {
        const StripTile tile = strip.w(threadIdx.x / 2 % 2);
        const unsigned char* at = tile.base + (place.floats ^ group << 5);
        float a[4], b[4];
        load4(a, reinterpret_cast<const float*>(at));
        load4(b, reinterpret_cast<const float*>(at + StripTile::kEightRows));
        return Block{{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]}};
    }
}

// A group's log2 decays as right operands, with the tokens down: hi + lo, for the sums are exponents.
struct DecayOperands {
    Right of[2];

    __device__ explicit DecayOperands(const Block& log_decays) {
        const Left a = as_left<true>(log_decays);
        for (int i = 0; i < 4; ++i) {
            of[i / 2].hi[i % 2] = transpose(a.hi[i]);
            of[i / 2].lo[i % 2] = transpose(a.lo[i]);
        }
    }

    // Of each token, over those that a matrix picks. all: this lane's parts of the matrices.
    __device__ Block sums(const uint4* all, int which) const {
        const uint4 x = all[which * 32];
        const uint32_t picked[4] = {x.x, x.y, x.z, x.w};
        Sum out[2] = {};
        mma_bf16(out[0], picked, of[0].lo);
        mma_bf16(out[1], picked, of[1].lo);
        mma_bf16(out[0], picked, of[0].hi);
        mma_bf16(out[1], picked, of[1].hi);
        return as_block(out);
    }
};

// A group's sums over the whole strip, from its last token's: of those before, and its own. By the lanes that hold it.
__device__ inline void store_sums(float* sums, int group, const Block& before, const Block& own) {
    float2* to = reinterpret_cast<float2*>(sums + group * kGroup) + threadIdx.x % 4;
    to[0] = make_float2(before.x[4] + own.x[4], before.x[5] + own.x[5]);
    to[4] = make_float2(before.x[6] + own.x[6], before.x[7] + own.x[7]);
}

// A strip's sums, of all groups, to its decays, by its warp.
__device__ inline void finish_decays(float* sums) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kN; i += 32) sums[threadIdx.x % 32 + i] = exp2_fast(sums[threadIdx.x % 32 + i]);
}

__device__ inline Block exp2_fast(const Block& x) {
    Block out;
    for (int i = 0; i < 8; ++i) out.x[i] = exp2_fast(x.x[i]);
    return out;
}

// 16 of v's slots (rows) of a state x its kN slots of k. As a sum of the one product it is a right operand of the
// other.
struct StripState {
    Sum of[8];

    __device__ void store(float4* to) const {
        for (int i = 0; i < 8; ++i) {
            __stcg(to + 32 * i, make_float4(of[i].x[0], of[i].x[1], of[i].x[2], of[i].x[3]));
        }
    }

    __device__ void load(const float4* from) {
        for (int i = 0; i < 8; ++i) {
            const float4 x = __ldcg(from + 32 * i);
            of[i] = Sum{{x.x, x.y, x.z, x.w}};
        }
    }

    // Adds a state that passes over what this one is of. decays: of all of that, any kind of memory.
    __device__ void add(const float4* from, const float* decays) {
        for (int i = 0; i < 8; ++i) {
            const float4 x = __ldcg(from + 32 * i);
            const float2 decay = reinterpret_cast<const float2*>(decays + 8 * i)[threadIdx.x % 4];
            of[i].x[0] = fmaf(x.x, decay.x, of[i].x[0]), of[i].x[1] = fmaf(x.y, decay.y, of[i].x[1]);
            of[i].x[2] = fmaf(x.z, decay.x, of[i].x[2]), of[i].x[3] = fmaf(x.w, decay.y, of[i].x[3]);
        }
    }

    __device__ Block results(StripTile r) const {
        Sum y[2] = {};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            Left a;
            Right b[2];
            load_left<false, false>(a, r, 0, i);
            for (int j = 0; j < 2; ++j) {
                b[j].hi[0] = split<false>(of[i].x[2 * j], of[i].x[2 * j + 1]).hi;
                b[j].hi[1] = split<false>(of[i + 1].x[2 * j], of[i + 1].x[2 * j + 1]).hi;
            }
            multiply<false>(y[0], y[1], a, b[0], b[1]);
        }
        return as_block(y);
    }

    __device__ void pass(StripTile k, StripTile v, const float* decays, int columns) {
        const int q = threadIdx.x % 4;
        Left values;
        load_left<false, true>(values, v, 0, 2 * columns);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            for (int j = i; j < i + 2; ++j) {
                const float2 decay = reinterpret_cast<const float2*>(decays + 8 * j)[q];
                of[j].x[0] *= decay.x, of[j].x[1] *= decay.y, of[j].x[2] *= decay.x, of[j].x[3] *= decay.y;
            }
            Right b[2];
            load_right<false, true>(b, k, 0, i);
            multiply<false>(of[i], of[i + 1], values, b[0], b[1]);
        }
    }
};

}  // namespace wkv6
