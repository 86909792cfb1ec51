// The states between the pieces of long bfloat16 sequences, for sequence_kernel.
#pragma once

#include "wkv6_cuda_strip.cuh"

namespace wkv6 {

constexpr int kStripStateWarps = 2 * kSweepWarps, kStripStateThreads = 32 * kStripStateWarps;

// A strip's tiles without r: k decayed to both ends, and v. Before, k arrives in that of direction 0, w in that of
// direction 1; of w in float32 half of the channels in one more.
template <typename W>
struct KeyStrip {
    static constexpr int kTiles = sizeof(W) == sizeof(float) ? 4 : 3, kBytes = kTiles * StripTile::kBytes;
    unsigned char* base;
    __device__ StripTile tile(int i) const { return StripTile{base + i * StripTile::kBytes}; }
    __device__ StripTile k(int direction) const { return tile(direction); }
    __device__ StripTile v() const { return tile(2); }
    __device__ StripTile w(int half) const { return half ? tile(3) : tile(1); }
};

template <typename W>
using StateShared = SharedOf<KeyStrip<W>>;

// As step 1 of sequence_kernel, for k alone.
template <typename W, bool kRaw>
__device__ inline void prepare_keys(KeyStrip<W> strip, float* decays, const unsigned char* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint4* all = reinterpret_cast<const uint4*>(shared + StateShared<W>::kPicksAt) + lane;
    const float* base = reinterpret_cast<const float*>(shared + StateShared<W>::kBase) + 4 * q;
    const GroupPlace place;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        const LogDecay<kRaw> decay(base + group * kGroup);
        const Block k = as_block(place.load(strip.k(0), group));
        Block log_decays = arrived_decays<W>(strip, place, group);
        __syncwarp();  // what has been read here is about to be overwritten
        for (int i = 0; i < 8; ++i) log_decays.x[i] = decay(log_decays.x[i], i % 4);
        const DecayOperands d(log_decays);
        const Block before = d.sums(all, kToFirst), after = d.sums(all, kToLast);
        place.store(strip.k(1), group, as_left<false>(k * exp2_fast(before)));
        place.store(strip.k(0), group, as_left<false>(k * exp2_fast(after)));
        if (g == 7) store_sums(decays, group, before, log_decays);
    }
    finish_decays(decays);
}

// What each piece's strips add to the state at its far end, in both directions, into the odd slots, and the decays of
// pieces and blocks. Of a piece's two blocks, a cluster, each adds up both directions; then the one from which a
// direction leaves the piece adds what the other one has of it. Block x: sequence, piece and, fastest, half of it.
template <typename W, bool kRaw>
__global__ void __launch_bounds__(kStripStateThreads, sizeof(W) == sizeof(float) ? 3 : 4)
    strip_state_kernel(const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
                       const W* __restrict__ w, const float* __restrict__ base, Sizes sizes, Pieces pieces,
                       float4* states, float* decays) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float all_decays[kN];
    allow_next_kernel();
    const int warp = threadIdx.x / 32;
    const unsigned sequence_blocks = pieces.count() * kPieceBlocks, bh = blockIdx.x / sequence_blocks;
    const unsigned head = bh % sizes.heads;
    const int block = blockIdx.x % sequence_blocks, rank = block % kPieceBlocks, piece = block / kPieceBlocks;
    const int count = pieces.strips_of(block);
    const int64_t token = (static_cast<int64_t>(block) * pieces.each + warp) * kRows, stride = sizes.stride();
    const int64_t origin = sizes.offset(bh) + token * stride;
    const int rows = static_cast<int>(min(sizes.tokens - token, static_cast<int64_t>(kRows)));
    const KeyStrip<W> strip{shared + warp * KeyStrip<W>::kBytes};
    float* strip_decays = reinterpret_cast<float*>(shared + StateShared<W>::kDecays);
    if (warp < count) {
        start_decays(strip, w + origin, stride, rows);
        start_tile(strip.k(0), k + origin, stride, rows);
        PassingStrip values;
        values.load(v + origin, stride, rows);
        values.store(strip.v());
    }
    start_constants<StateShared<W>, kRaw, false>(shared, base + head * kN, nullptr);
    wait_copies();
    __syncthreads();
    if (warp < count) prepare_keys<W, kRaw>(strip, strip_decays + warp * kN, shared);
    __syncthreads();

    float* block_decays = decays + pieces.block_decays(sizes.bh, bh, block);
    if (threadIdx.x < kN) {
        float decay = 1.f;
        for (int i = 0; i < count; ++i) decay *= strip_decays[i * kN + threadIdx.x];
        all_decays[threadIdx.x] = block_decays[threadIdx.x] = decay;
    }
    const int direction = warp / kSweepWarps, slot = block - direction;
    const bool paired = pieces.paired(piece), leaves = direction != rank;
    float4* between = states + pieces.state(direction, sizes.bh, bh, kPieceBlocks * piece);
    StripState state{};
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
        const int at = direction ? count - 1 - step : step;
        const KeyStrip<W> next{shared + at * KeyStrip<W>::kBytes};
        state.pass(next.k(direction), next.v(), strip_decays + at * kN, warp % kSweepWarps);
    }
    if (paired && !leaves) state.store(between);
    wait_for_cluster();
    if (leaves && slot >= 0 && slot < pieces.slots()) {
        if (paired) state.add(between, all_decays);
        state.store(states + pieces.state(direction, sizes.bh, bh, slot));
    }
    if (rank == 0 && threadIdx.x < kN) {
        const float others = __ldcg(block_decays + kN + threadIdx.x);
        decays[pieces.piece_decays(bh, piece) + threadIdx.x] = all_decays[threadIdx.x] * others;
    }
}

// What the pieces add to the states between them, in place: a thread takes one number through all pieces of a sequence
// and direction.
static __global__ void __launch_bounds__(kThreads)
    strip_scan_kernel(float* states, const float* __restrict__ decays, Sizes sizes, Pieces pieces) {
    constexpr int kRun = 37, kNumbers = kN * kN;  // a run's loads are under way together
    const unsigned which = blockIdx.x / (kNumbers / kThreads), bh = which % static_cast<unsigned>(sizes.bh);
    const int direction = which / static_cast<unsigned>(sizes.bh), count = pieces.count() - 1;
    const int number = blockIdx.x % (kNumbers / kThreads) * kThreads + threadIdx.x;
    const int k_slot = number / 128 % 8 * 8 + number / 4 % 4 * 2 + number % 2;  // see StripState
    states += (static_cast<int64_t>(which) * pieces.slots() + 1) * kNumbers + number;
    decays += pieces.piece_decays(bh, direction) + k_slot;
    wait_for_previous_kernel();
    float state = 0;
    for (int first = 0; first < count; first += kRun) {
        const auto between = [&](int i) { return direction ? count - 1 - first - i : first + i; };  // of two pieces
        const auto at = [&](int i) { return states + static_cast<int64_t>(between(i)) * (kPieceBlocks * kNumbers); };
        float x[kRun], decay[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (first + i < count) {
                x[i] = *at(i);
                decay[i] = decays[static_cast<int64_t>(between(i)) * kN];
            }
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (first + i < count) {
                state = fmaf(state, decay[i], x[i]);
                *at(i) = state;
            }
        }
    }
}

}  // namespace wkv6
