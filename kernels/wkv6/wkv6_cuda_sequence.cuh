// y of short bfloat16 sequences in one kernel, which reads every input once and keeps the states in registers.
//
// Two blocks share a sequence, in a cluster, and each holds its half of the tokens in shared memory, in strips of 16:
//
// 1. A warp takes a strip. It finds the scores within it (as output_kernel does, but with sums of log2 decays that are
//    matrix products with zeros and ones), and decays r and k to both of its ends.
// 2. A state passes from strip to strip in the registers of four warps, 16 of v's channels each: its product with r is
//    what a strip's tokens get from those before, then it decays and k^T v is added. A block first follows the
//    direction that starts at its end of the sequence, then the other one, from where its neighbour has arrived.
// 3. The strip's warp again: the scores times v, the results of both directions, and what follows.
#pragma once

#include "wkv6_cuda_output.cuh"

namespace wkv6 {

constexpr int kSequenceBlocks = 2;
constexpr int kStrips = 7;  // of a block, at most; so three blocks fit into the 228 KiB of a processor
constexpr int kSequenceThreads = 32 * kStrips;
constexpr int kSequenceTokens = kSequenceBlocks * kStrips * kRows;  // at most
constexpr int kSweepWarps = 4, kSweepThreads = 32 * kSweepWarps;

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
    // Of this lane for a group of channels, as a Block: two vectors, the second 32 further.
    __device__ float4* results(int direction, int group) const {
        return reinterpret_cast<float4*>(base + 2 * direction * StripTile::kBytes) + group * 64 + threadIdx.x % 32;
    }
};

// Matrices of zeros and ones, which pick the tokens that a sum of log2 decays runs over: rows are the tokens with the
// sum, columns those in it. The sums reach from a token to a boundary: the strip's first and last one, and those
// between its halves, quarters and eighths.
enum Picks { kToFirst, kToLast, kToHalf, kToQuarter, kToEighth, kPicks };

struct SequenceShared {
    static constexpr int kDecays = kStrips * Strip::kBytes;  // of each strip as a whole, by slot
    static constexpr int kPicksAt = kDecays + kStrips * kN * 4;
    static constexpr int kBase = kPicksAt + kPicks * 32 * 16;  // of the head, as u
    static constexpr int kBonus = kBase + kN * 4;
    static constexpr int kBytes = kBonus + kN * 4;
};

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

__device__ inline void start_tile(StripTile tile, const __nv_bfloat16* strip, int64_t stride, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
        const int row = i + lane / 8, unit = lane % 8;
        copy_async<16>(tile.at(row, unit), strip + (row < rows ? row * stride + 8 * unit : 0), row < rows);
    }
}

// Decays, into the tiles of direction 1.
__device__ inline void start_decays(Strip strip, const __nv_bfloat16* w, int64_t stride, int rows) {
    start_tile(strip.r(1), w, stride, rows);
}

__device__ inline void start_decays(Strip strip, const float* w, int64_t stride, int rows) {
    const int lane = threadIdx.x % 32, quad = lane % 16;
    const StripTile tile = quad & 2 ? strip.k(1) : strip.r(1);
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

template <typename W>
__device__ inline Block arrived_decays(Strip strip, const GroupPlace& place, int group) {
    if constexpr (sizeof(W) == sizeof(__nv_bfloat16)) {
        return as_block(place.load(strip.r(1), group));
    } else {
        const StripTile tile = threadIdx.x & 2 ? strip.k(1) : strip.r(1);
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

__device__ inline Block exp2_fast(const Block& x) {
    Block out;
    for (int i = 0; i < 8; ++i) out.x[i] = exp2_fast(x.x[i]);
    return out;
}

// Scores of each token with eight keys: those of its half of the strip, or kOther those of the other half. The depth of
// an instruction is twice the same eight slots, once for either half.
template <bool kOther>
__device__ inline void add_half_scores(Sum& scores, const Left& r, const Left& k) {
    for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {r.hi[i], 0, 0, r.hi[i + 1]};
        const uint32_t b[2] = {k.hi[i + kOther], k.hi[i + 1 - kOther]};
        mma_bf16(scores, a, b);
    }
}

// Step 1. Returns the scores within the strip, as a left operand. decays: of this strip; shared: all there is.
template <typename W, bool kRaw>
__device__ inline Left prepare_strip(Strip strip, float* decays, const unsigned char* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint4* all = reinterpret_cast<const uint4*>(shared + SequenceShared::kPicksAt) + lane;
    const float* base = reinterpret_cast<const float*>(shared + SequenceShared::kBase) + 4 * q;
    const float* bonus = reinterpret_cast<const float*>(shared + SequenceShared::kBonus) + 4 * q;
    const GroupPlace place;
    // By level. level8 has the scores with the other half, the others those with the same half.
    Sum level8{}, level4{}, level2{}, level1{};
    float self[2] = {};
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        const LogDecay<kRaw> decay(base + group * kGroup);
        float u[4];
        load4(u, bonus + group * kGroup);
        const Left r_arrived = place.load(strip.r(0), group), k_arrived = place.load(strip.k(0), group);
        Block log_decays = arrived_decays<W>(strip, place, group);
        __syncwarp();  // what has been read here is about to be overwritten
        add_half_scores<false>(level1, r_arrived, k_arrived);
        const Block r = as_block(r_arrived), k = as_block(k_arrived);
        for (int i = 0; i < 8; ++i) {
            log_decays.x[i] = decay(log_decays.x[i], i % 4);
            self[i / 4] += r.x[i] * k.x[i] * u[i % 4];
        }
        const DecayOperands d(log_decays);
        {
            const Block before = d.sums(all, kToFirst), decay_before = exp2_fast(before);
            place.store(strip.r(0), group, as_left<false>(r * decay_before));
            place.store(strip.k(1), group, as_left<false>(k * decay_before));
            if (g == 7) {  // the last token
                float2* sums = reinterpret_cast<float2*>(decays + group * kGroup) + q;
                const float *x = before.x + 4, *own = log_decays.x + 4;
                sums[0] = make_float2(x[0] + own[0], x[1] + own[1]);
                sums[4] = make_float2(x[2] + own[2], x[3] + own[3]);
            }
        }
        {
            const Block decay_after = exp2_fast(d.sums(all, kToLast));
            place.store(strip.r(1), group, as_left<false>(r * decay_after));
            place.store(strip.k(0), group, as_left<false>(k * decay_after));
        }
        {
            const Block to_half = exp2_fast(d.sums(all, kToHalf));
            add_half_scores<true>(level8, as_left<false>(r * to_half), as_left<false>(k * to_half));
        }
        {
            const Block to_quarter = exp2_fast(d.sums(all, kToQuarter));
            add_half_scores<false>(level4, as_left<false>(r * to_quarter), as_left<false>(k * to_quarter));
        }
        {
            const Block to_eighth = exp2_fast(d.sums(all, kToEighth));
            add_half_scores<false>(level2, as_left<false>(r * to_eighth), as_left<false>(k * to_eighth));
        }
    }
    __syncwarp();  // decays holds sums of all groups
    for (int i = lane; i < kN; i += 32) decays[i] = exp2_fast(decays[i]);
    for (float& x : self) x = row_sum(x);
    float near[4];
    for (int i = 0; i < 4; ++i) {
        const bool same_quarter = g / 4 == q / 2, same_pair = g / 2 == q, same = g % 2 == i % 2;
        const float in_pair = same ? self[i / 2] : level1.x[i];
        near[i] = !same_quarter ? level4.x[i] : !same_pair ? level2.x[i] : in_pair;
    }
    return Left{{split<false>(near[0], near[1]).hi, split<false>(level8.x[2], level8.x[3]).hi,
                 split<false>(level8.x[0], level8.x[1]).hi, split<false>(near[2], near[3]).hi},
                {}};
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

// Step 2, by kSweepWarps warps. last: whether the state has somewhere to go after the last strip.
__device__ inline void sweep(StripState& state, unsigned char* shared, int count, int direction, int columns,
                             bool last) {
    const float* decays = reinterpret_cast<const float*>(shared + SequenceShared::kDecays);
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
        const int at = direction ? count - 1 - step : step;
        const Strip strip{shared + at * Strip::kBytes};
        const Block y = state.results(strip.r(direction));
        if (last || step + 1 < count) state.pass(strip.k(direction), strip.v(), decays + at * kN, columns);
        wait_for_threads<kSweepThreads>(1);  // the tiles have been read
        float4* results = strip.results(direction, columns);
        results[0] = make_float4(y.x[0], y.x[1], y.x[2], y.x[3]);
        results[32] = make_float4(y.x[4], y.x[5], y.x[6], y.x[7]);
    }
}

// Block x: sequence and, fastest, half. `passed`: workspace, a state for each sequence and direction.
template <typename W, bool kFinish>
__global__ void __launch_bounds__(kSequenceThreads, 3)
    sequence_kernel(const __nv_bfloat16* __restrict__ r, const __nv_bfloat16* __restrict__ k,
                    const __nv_bfloat16* __restrict__ v, const W* __restrict__ w, const float* __restrict__ base,
                    const float* __restrict__ u, Sizes sizes, float4* passed, Finish<__nv_bfloat16> finish,
                    __nv_bfloat16* y) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int rank = blockIdx.x % kSequenceBlocks;
    const unsigned bh = blockIdx.x / kSequenceBlocks, head = bh % sizes.heads;
    const int tokens = static_cast<int>(sizes.tokens), all = (tokens + kRows - 1) / kRows, half = (all + 1) / 2;
    const int count = rank ? all - half : half, token = (rank * half + warp) * kRows, rows = min(tokens - token, kRows);
    const int64_t stride = sizes.stride(), origin = sizes.offset(bh) + token * stride;
    const Strip strip{shared + warp * Strip::kBytes};
    const bool active = warp < count;
    if (active) {
        start_decays(strip, w + origin, stride, rows);
        start_tile(strip.r(0), r + origin, stride, rows);
        start_tile(strip.k(0), k + origin, stride, rows);
        PassingStrip values;
        values.load(v + origin, stride, rows);
        if (kFinish && lane < rows) prefetch(finish.gate + origin + lane * stride);
        values.store(strip.v());
    }
    if (warp < kPicks) {
        reinterpret_cast<uint4*>(shared + SequenceShared::kPicksAt)[threadIdx.x] = picks(warp);
    }
    if (threadIdx.x < kN / 4) {
        const int at = 4 * threadIdx.x;
        if (kFinish) copy_async<16>(shared + SequenceShared::kBase + 4 * at, base + head * kN + at);
        copy_async<16>(shared + SequenceShared::kBonus + 4 * at, u + head * kN + at);
    }
    wait_copies();
    __syncthreads();
    Left near{};
    if (active) {
        float* decays = reinterpret_cast<float*>(shared + SequenceShared::kDecays) + warp * kN;
        near = prepare_strip<W, kFinish>(strip, decays, shared);
    }
    __syncthreads();

    const auto passed_by = [&](int direction) {
        return passed + ((bh * 2 + direction) * kSweepWarps + warp) * (32 * 8) + lane;
    };
    if (warp < kSweepWarps) {
        StripState state{};
        sweep(state, shared, count, rank, warp, true);
        state.store(passed_by(rank));
    }
    wait_for_cluster();
    if (warp < kSweepWarps) {
        StripState state;
        state.load(passed_by(1 - rank));
        sweep(state, shared, count, 1 - rank, warp, false);
    }
    __syncthreads();
    if (!active) return;

    Sum out[8] = {};
    add_product<false>(out, near, strip.v(), 0);
    Block y_blocks[kGroups];
    const bool first = g < rows, second = 8 + g < rows;
    const int64_t own = origin + (first ? g * stride : 0) + 4 * q;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const Sum pair[2] = {out[2 * group], out[2 * group + 1]};
        y_blocks[group] = as_block(pair);
        for (int i = 0; i < 4; ++i) {
            float x[4];
            load4(x, reinterpret_cast<const float*>(strip.results(i / 2, group) + i % 2 * 32));
            for (int j = 0; j < 4; ++j) y_blocks[group].x[i % 2 * 4 + j] += x[j];
        }
        if (!kFinish) store_block(y + own + group * kGroup, stride, y_blocks[group], first, second);
    }
    if (kFinish) finish(y_blocks, y, own, head * kN + 4 * q, stride, first, second);
}

}  // namespace wkv6
