// The N x N states between chunks, in both directions.
//
// Of direction 0 (from the first token on) the state before chunk c, c >= 1, is in slot c - 1; of direction 1 (from the
// last token back) the state after chunk c, c <= chunks - 2, is in slot c. The set of (k, v) gives the states of the
// forward pass, the set of (r, gy) the gradients of the states of the other direction: the recurrence is the same.
#pragma once

#include "wkv6_cuda_common.cuh"

namespace wkv6 {

// A block of state_kernel is wider than the others': it mostly moves data.
constexpr int kStateWarps = 8, kStateThreads = 32 * kStateWarps;

template <typename T>
struct StateInputs {
    const T *left[2], *right[2];  // of each set: k and v, r and gy
};

// A state decays by hi + lo, which is exp of the chunk's sum of w to more than float32: over hundreds of chunks of slow
// decay a rounding error of each factor would add up.
__device__ inline float2 exact_decay(float log2_decay) {
    const float x = log2_decay / kLog2E;
    return x > -0.5f ? make_float2(1.f, expm1f(x)) : make_float2(expf(x), 0.f);
}

__device__ inline float decayed(float state, float2 decay) { return fmaf(state, decay.x, state * decay.y); }

// The product of two such decays.
__device__ inline float2 combined(float2 a, float2 b) {
    const float hi = a.x * b.x, lo = fmaf(a.x, b.y, fmaf(a.y, b.x, fmaf(a.x, b.x, -hi)));
    const float sum = hi + lo;
    return make_float2(sum, lo - (sum - hi));
}

template <bool kSplit>
__device__ inline void store_state_pair(unsigned char* unit, int pair, float x, float y) {
    const Pair packed = split<kSplit>(x, y);
    *reinterpret_cast<uint32_t*>(unit + 4 * pair) = packed.hi;
    if (kSplit) *reinterpret_cast<uint32_t*>(unit + 16 + 4 * pair) = packed.lo;
}

// For four tokens: each one's number becomes the sum of the log2 decays of those after it (kAfter) or before it.
template <bool kAfter, bool kRaw>
__device__ inline void exclusive_sums(float (&log_w)[4][4], float (&sum)[4], const LogDecay<kRaw>& decay) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int i = kAfter ? 3 - step : step;
        for (int j = 0; j < 4; ++j) {
            const float own = decay(log_w[i][j], j);
            log_w[i][j] = sum[j];
            sum[j] += own;
        }
    }
}

// What each chunk adds to the state at its far end. Block x: sequence and slot (kWalk: sequence), and, fastest, so that
// those who read the same tokens run together, set and direction: `kinds` of them. kWalk: one block walks over all
// chunks and writes final states; else it writes its chunk's own float32 sums and the chunk's decays, and scan_kernel
// goes on.
// Tokens past the last one have whatever decay; nothing passes over them.
template <typename T, typename W, bool kSplit, bool kWalk, bool kRaw>
__global__ void __launch_bounds__(kStateThreads, 3)
    state_kernel(StateInputs<T> in, const W* __restrict__ w, const float* __restrict__ base, Sizes sizes, int kinds,
                 unsigned char* states, float2* decays) {
    extern __shared__ __align__(128) unsigned char shared[];
    allow_next_kernel();
    const Tile left{shared}, right{shared + Tile::kBytes};
    float* totals = reinterpret_cast<float*>(shared + 2 * Tile::kBytes);  // of the 8 tokens that each warp loads
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 16, first = warp * 8 + lane / 16 * 4;
    const int strip = warp % 4, half = warp / 4;  // of the state: 16 rows, 32 columns
    const unsigned block = blockIdx.x / kinds, kind = blockIdx.x % kinds, slot_count = sizes.chunks - 1;
    const int direction = kind % 2, set = kind / 2;
    const int64_t slots = sizes.slots();
    const unsigned bh = kWalk ? block : block / slot_count;
    const int64_t stride = sizes.stride(), origin = sizes.offset(bh);
    const T *from_left = set ? in.left[1] : in.left[0], *from_right = set ? in.right[1] : in.right[0];
    states += (kind * sizes.bh + bh) * slots * kStateBytes;
    Sum state[4] = {};
    const LogDecay<kRaw> decay_of(base + bh % sizes.heads * kN + 4 * quad);

    for (int64_t step = 0; step < (kWalk ? slots : 1); ++step) {
        const int64_t at = kWalk ? step : block % slot_count, slot = kWalk && direction ? slots - 1 - at : at;
        const int64_t chunk = slot + direction, chunk_origin = origin + chunk * kChunk * stride;
        const int rows = static_cast<int>(min(sizes.tokens - chunk * kChunk, static_cast<int64_t>(kChunk)));
        const int64_t mine = chunk_origin + first * stride + 4 * quad;
        float log_w[4][4], x[4][4], sum[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) load4_or_zero(log_w[i], w + mine + i * stride, first + i < rows);
#pragma unroll
        for (int i = 0; i < 4; ++i) load4_or_zero(x[i], from_left + mine + i * stride, first + i < rows);
        Passing<kStateThreads> passing;
        passing.load(from_right + chunk_origin, stride, rows);
        passing.store<kSplit>(right);
        // Exclusive sums: of the tokens after (direction 0) or before (direction 1).
        if (direction == 0) {
            exclusive_sums<true>(log_w, sum, decay_of);
        } else {
            exclusive_sums<false>(log_w, sum, decay_of);
        }
        float beyond[4];
        for (int j = 0; j < 4; ++j) {
            const float other = shuffle_xor(sum[j], 16);
            beyond[j] = (lane < 16) == (direction == 0) ? other : 0.f;
            sum[j] += other;
        }
        if (lane < 16) store4(totals + warp * kN + 4 * quad, sum);
        __syncthreads();
#pragma unroll
        for (int other = 0; other < kStateWarps; ++other) {
            float y[4];
            load4(y, totals + other * kN + 4 * quad);
            for (int j = 0; j < 4; ++j) beyond[j] += (direction ? other < warp : other > warp) ? y[j] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) x[i][j] *= exp2_fast(log_w[i][j] + beyond[j]);
            store_quad<kSplit>(left, first + i, quad, x[i]);
        }
        __syncthreads();
        if (kWalk) {  // the chunk's decay of this lane's two rows
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int channel = channel_of_slot(strip * 16 + lane / 4 + 8 * i);
                float total = 0;
                for (int other = 0; other < kStateWarps; ++other) total += totals[other * kN + channel];
                const float2 decay = exact_decay(total);
                for (int n = 0; n < 4; ++n) {
                    for (int j = 2 * i; j < 2 * i + 2; ++j) state[n].x[j] = decayed(state[n].x[j], decay);
                }
            }
        } else if (set == 0 && threadIdx.x < kN && (direction == 0 || chunk == sizes.chunks - 1)) {
            const int channel = channel_of_slot(threadIdx.x);
            float total = 0;
            for (int other = 0; other < kStateWarps; ++other) total += totals[other * kN + channel];
            decays[(static_cast<int64_t>(bh) * sizes.chunks + chunk) * kN + threadIdx.x] = exact_decay(total);
        }
#pragma unroll
        for (int token = 0; token < kChunk; token += 16) {
            if (token >= rows) break;
            Left a;
            load_left<kSplit, true>(a, left, token, 2 * strip);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                Right b[2];
                load_right<kSplit, true>(b, right, token, 4 * half + 2 * n);
                multiply<kSplit>(state[2 * n], state[2 * n + 1], a, b[0], b[1]);
            }
        }
        unsigned char* out = states + slot * kStateBytes + (strip * 16 + lane / 4) * StateTile::kRowBytes;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned char* unit = out + 8 * i * StateTile::kRowBytes + (4 * half + n) * 32;
                const float a = state[n].x[2 * i], b = state[n].x[2 * i + 1];
                if (kWalk) {
                    store_state_pair<kSplit>(unit, lane % 4, a, b);
                } else {
                    reinterpret_cast<float2*>(unit)[lane % 4] = make_float2(a, b);
                }
            }
        }
        if (kWalk) __syncthreads();  // the next chunk overwrites the tiles and sums
    }
}

// Chunk sums to states, in place. A thread takes four numbers of a state over a run of chunks; kSegments threads share
// the chunks, so that a single long sequence is read with enough loads in flight, and exchange what their runs add up
// to.
template <bool kSplit, int kSegments>
__global__ void __launch_bounds__(kThreads)
    scan_kernel(unsigned char* states, const float2* __restrict__ decays, Sizes sizes) {
    constexpr int kRun = 16, kPieces = kN * kN / 4, kBlockPieces = kThreads / kSegments;
    __shared__ float4 ends[kSegments][kBlockPieces];
    __shared__ float2 products[kSegments][kBlockPieces];
    const int local = threadIdx.x % kBlockPieces, segment = threadIdx.x / kBlockPieces;
    const unsigned which = blockIdx.x / (kPieces / kBlockPieces), bh = which % static_cast<unsigned>(sizes.bh);
    const int piece = blockIdx.x % (kPieces / kBlockPieces) * kBlockPieces + local, row = piece / (kN / 4);
    const int direction = which / static_cast<unsigned>(sizes.bh) % 2;
    const int64_t slots = sizes.slots();
    const int run = static_cast<int>(min((slots + kSegments - 1) / kSegments, static_cast<int64_t>(kRun)));
    states += which * slots * kStateBytes;
    decays += static_cast<int64_t>(bh) * sizes.chunks * kN + row;
    wait_for_previous_kernel();
    float carry[4] = {};
    for (int64_t pass = 0; pass < slots; pass += run * kSegments) {
        const int64_t first = pass + segment * run;
        const auto slot_of = [&](int i) { return direction ? slots - 1 - first - i : first + i; };
        const auto exists = [&](int i) { return i < run && first + i < slots; };
        float x[kRun][4], state[4] = {};
        float2 decay[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (exists(i)) {
                load4(x[i], reinterpret_cast<const float*>(states + slot_of(i) * kStateBytes) + 4 * piece);
                decay[i] = decays[(slot_of(i) + direction) * kN];
            }
        }
        if (kSegments == 1) {
            for (int j = 0; j < 4; ++j) state[j] = carry[j];
            __syncwarp();  // two lanes share each unit of eight numbers, which is about to change its layout
        } else {
            float2 product = make_float2(1.f, 0.f);
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                if (exists(i)) {
                    for (int j = 0; j < 4; ++j) state[j] = decayed(state[j], decay[i]) + x[i][j];
                    product = combined(product, decay[i]);
                }
            }
            ends[segment][local] = make_float4(state[0], state[1], state[2], state[3]);
            products[segment][local] = product;
            __syncthreads();
            for (int other = 0; other < kSegments; ++other) {
                if (other == segment) {
                    for (int j = 0; j < 4; ++j) state[j] = carry[j];
                }
                const float4 end = ends[other][local];
                const float added[4] = {end.x, end.y, end.z, end.w};
                for (int j = 0; j < 4; ++j) carry[j] = decayed(carry[j], products[other][local]) + added[j];
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (exists(i)) {
                for (int j = 0; j < 4; ++j) state[j] = decayed(state[j], decay[i]) + x[i][j];
                unsigned char* unit = states + slot_of(i) * kStateBytes + piece / 2 * 32;
                const Pair a = split<kSplit>(state[0], state[1]), b = split<kSplit>(state[2], state[3]);
                *reinterpret_cast<uint2*>(unit + piece % 2 * 8) = make_uint2(a.hi, b.hi);
                if (kSplit) *reinterpret_cast<uint2*>(unit + 16 + piece % 2 * 8) = make_uint2(a.lo, b.lo);
            }
        }
        if (kSegments == 1) {
            for (int j = 0; j < 4; ++j) carry[j] = state[j];
        }
    }
}

}  // namespace wkv6
