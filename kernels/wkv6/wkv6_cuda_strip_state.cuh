// The states between the pieces of long bfloat16 sequences, for sequence_kernel.
#pragma once

#include "wkv6_cuda_strip.cuh"

namespace wkv6 {

constexpr int kStripStateWarps = 2 * kSweepWarps, kStripStateThreads = 32 * kStripStateWarps;

// As step 1 of sequence_kernel, for k alone.
template <typename W, bool kRaw>
__device__ inline void prepare_keys(Strip strip, float* decays, const unsigned char* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint4* all = reinterpret_cast<const uint4*>(shared + StripsShared::kPicksAt) + lane;
    const float* base = reinterpret_cast<const float*>(shared + StripsShared::kBase) + 4 * q;
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

// What each block's strips add to the state at its far end, in both directions, into the slots, and the blocks' decays.
// Block x: sequence and block.
template <typename W, bool kRaw>
__global__ void __launch_bounds__(kStripStateThreads, 3)
    strip_state_kernel(const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
                       const W* __restrict__ w, const float* __restrict__ base, Sizes sizes, Pieces pieces,
                       float4* states, float* decays) {
    extern __shared__ __align__(128) unsigned char shared[];
    allow_next_kernel();
    const int warp = threadIdx.x / 32, block = blockIdx.x % pieces.blocks, count = pieces.strips_of(block);
    const unsigned bh = blockIdx.x / pieces.blocks, head = bh % sizes.heads;
    const int64_t token = (static_cast<int64_t>(block) * pieces.each + warp) * kRows, stride = sizes.stride();
    const int64_t origin = sizes.offset(bh) + token * stride;
    const int rows = static_cast<int>(min(sizes.tokens - token, static_cast<int64_t>(kRows)));
    const Strip strip{shared + warp * Strip::kBytes};
    float* strip_decays = reinterpret_cast<float*>(shared + StripsShared::kDecays);
    if (warp < count) {
        start_decays(strip, w + origin, stride, rows);
        start_tile(strip.k(0), k + origin, stride, rows);
        PassingStrip values;
        values.load(v + origin, stride, rows);
        values.store(strip.v());
    }
    start_constants<kRaw, false>(shared, base + head * kN, nullptr);
    wait_copies();
    __syncthreads();
    if (warp < count) prepare_keys<W, kRaw>(strip, strip_decays + warp * kN, shared);
    __syncthreads();

    const int direction = warp / kSweepWarps, slot = block - direction;
    if (slot >= 0 && slot < pieces.slots()) {
        StripState state{};
#pragma unroll 1
        for (int step = 0; step < count; ++step) {
            const int at = direction ? count - 1 - step : step;
            const Strip next{shared + at * Strip::kBytes};
            state.pass(next.k(direction), next.v(), strip_decays + at * kN, warp % kSweepWarps);
        }
        state.store(states + pieces.state(direction, sizes.bh, bh, slot));
    }
    if (threadIdx.x < kN) {
        float decay = 1.f;
        for (int i = 0; i < count; ++i) decay *= strip_decays[i * kN + threadIdx.x];
        decays[(static_cast<int64_t>(bh) * pieces.blocks + block) * kN + threadIdx.x] = decay;
    }
}

// What the blocks add to the states between pieces, in place: a thread takes one number through all blocks of a
// sequence and direction.
static __global__ void __launch_bounds__(kThreads)
    strip_scan_kernel(float* states, const float* __restrict__ decays, Sizes sizes, Pieces pieces) {
    constexpr int kRun = 50, kNumbers = kN * kN;  // a run's loads are under way together
    const unsigned which = blockIdx.x / (kNumbers / kThreads), bh = which % static_cast<unsigned>(sizes.bh);
    const int direction = which / static_cast<unsigned>(sizes.bh), slots = pieces.slots();
    const int number = blockIdx.x % (kNumbers / kThreads) * kThreads + threadIdx.x;
    const int k_slot = number / 128 % 8 * 8 + number / 4 % 4 * 2 + number % 2;  // see StripState
    states += static_cast<int64_t>(which) * slots * kNumbers + number;
    decays += (static_cast<int64_t>(bh) * pieces.blocks + direction) * kN + k_slot;
    wait_for_previous_kernel();
    float state = 0;
    for (int first = 0; first < slots; first += kRun) {
        const auto slot_of = [&](int i) { return direction ? slots - 1 - first - i : first + i; };
        float x[kRun], decay[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (first + i < slots) {
                x[i] = states[static_cast<int64_t>(slot_of(i)) * kNumbers];
                decay[i] = decays[static_cast<int64_t>(slot_of(i)) * kN];
            }
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (first + i < slots) {
                state = fmaf(state, decay[i], x[i]);
                if (slot_of(i) % 2) states[static_cast<int64_t>(slot_of(i)) * kNumbers] = state;
            }
        }
    }
}

}  // namespace wkv6
