// The gradient of Q-Shift for any number of mixes, with or without deltas.
//
// The normalised token gets what its own results and those of the token that took it give. A thread has
// kRows tokens at a time, and asks for all it reads of them before it uses any; what is not there is read at the token
// itself, and dropped. Each block adds up the gradients of mixes, weight and bias over its rows, in shared memory, into
// `part`.
#pragma once

#include "q_shift/q_shift_cuda_common.cuh"

namespace q_shift {

constexpr int kRows = 2;                                     // of a thread at a time
constexpr int kRowBuffer = 2 * kRows * kMaxThreads / kWarp;  // floats for row_sums
static_assert(sizeof(float) * (kRowBuffer + (kMixes + 2) * kMaxThreads) <= 48 * 1024, "shared memory of a block");

// A thread's tokens of one round.
template <int kVec>
struct Tokens {
    bool on[kRows], taken[kRows];
    int64_t here[kRows], there[kRows];  // the first channel in x, or in the gradient of one mix: own, of the taker
    float unit[kRows][kVec], apart[kRows][kVec], rstd[kRows], gn[kRows][kVec];
};

// Gradients of some of the mixes as they are read, and what is taken off the mixes.
template <typename G, int kVec, bool kDelta>
struct Upstream {
    static constexpr int kCount = kDelta ? 2 : 3;
    Pack<G, kVec> own[kCount][kRows], takers[kCount][kRows];
    Pack<G, kVec> own_delta[kDelta ? kCount : 1][kRows], takers_delta[kDelta ? kCount : 1][kRows];

    __device__ __forceinline__ void read(const Args& args, const G* g, const G* delta, int first,
                                         const Tokens<kVec>& tokens) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (first + i >= args.mixes) break;
            const int64_t plane = static_cast<int64_t>(first + i) * args.rows * args.channels;
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
                own[i][k] = *reinterpret_cast<const Pack<G, kVec>*>(g + plane + tokens.here[k]);
                takers[i][k] = *reinterpret_cast<const Pack<G, kVec>*>(g + plane + tokens.there[k]);
                if constexpr (kDelta) {
                    own_delta[i][k] = *reinterpret_cast<const Pack<G, kVec>*>(delta + plane + tokens.here[k]);
                    takers_delta[i][k] = *reinterpret_cast<const Pack<G, kVec>*>(delta + plane + tokens.there[k]);
                }
            }
        }
    }

    // Adds to the tokens' gradients; `change` becomes the sum of the mix's gradient over the tokens.
    __device__ __forceinline__ void use(int i, const float (&mix)[kVec], Tokens<kVec>& tokens, float (&change)[kVec],
                                        G* gdelta) const {
#pragma unroll
        for (int j = 0; j < kVec; ++j) change[j] = 0;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            float off[kVec];
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float grad = tokens.on[k] ? to_float(own[i][k].values[j]) : 0.0f;
                const float taker = tokens.taken[k] ? to_float(takers[i][k].values[j]) : 0.0f;
                float own_mix = mix[j], taker_mix = mix[j];
                if constexpr (kDelta) {
                    own_mix -= to_float(own_delta[i][k].values[j]);
                    taker_mix -= to_float(takers_delta[i][k].values[j]);
                }
                tokens.gn[k][j] += grad * own_mix + taker * (1.0f - taker_mix);
                off[j] = -grad * tokens.apart[k][j];
                change[j] -= off[j];
            }
            if (kDelta && tokens.on[k]) store(gdelta + tokens.here[k], off);
        }
    }
};

// The tokens of a round, from `row` on in steps of the block's rows: places first, then what is read, then the rest.
template <typename X, int kVec, typename Read>
__device__ __forceinline__ void start(const Args& args, const X* x, int64_t row, int64_t last, const Step& step,
                                      int channel, bool active, Tokens<kVec>& tokens, const Read& read_gradients) {
    Pack<X, kVec> own[kRows], far[kRows];
    float2 stats[kRows], far_stats[kRows];
    bool inside[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        const int here = static_cast<int>(min(row + k * blockDim.y, last - 1));
        const Neighbours found = args.place.neighbours(here, step);
        const int source = here + (found.source ? found.offset : 0), taker = here - (found.taker ? found.offset : 0);
        inside[k] = found.source;
        tokens.on[k] = active && row + k * blockDim.y < last;
        tokens.taken[k] = tokens.on[k] && found.taker;
        tokens.here[k] = static_cast<int64_t>(here) * args.channels + channel;
        tokens.there[k] = static_cast<int64_t>(taker) * args.channels + channel;
        own[k] = *reinterpret_cast<const Pack<X, kVec>*>(x + tokens.here[k]);
        far[k] = *reinterpret_cast<const Pack<X, kVec>*>(x + static_cast<int64_t>(source) * args.channels + channel);
        const float2* all = reinterpret_cast<const float2*>(args.stats);
        stats[k] = all ? all[here] : make_float2(0, 1);
        far_stats[k] = all ? all[source] : make_float2(0, 1);
    }
    read_gradients();
    float weight[kVec], bias[kVec];
    load_parameter(args.weight, channel, 1.0f, weight);
    load_parameter(args.bias, channel, 0.0f, bias);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        tokens.rstd[k] = stats[k].y;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            tokens.unit[k][j] = (to_float(own[k].values[j]) - stats[k].x) * stats[k].y;
            const float unit = (to_float(far[k].values[j]) - far_stats[k].x) * far_stats[k].y;
            tokens.apart[k][j] = tokens.unit[k][j] * weight[j] + bias[j] - (inside[k] ? unit * weight[j] + bias[j] : 0);
            tokens.gn[k][j] = 0;
        }
    }
}

// From the gradients of the normalised tokens to those of the tokens; those of weight and bias are added to `mine`.
template <int kVec>
__device__ __forceinline__ void norm_backward(const Args& args, int channel, bool active, Tokens<kVec>& tokens,
                                              float* mine, float* buffer) {
    float weight[kVec], gweight[kVec] = {}, gbias[kVec] = {}, sums[2 * kRows] = {};
    load_parameter(args.weight, channel, 1.0f, weight);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            gweight[j] += tokens.gn[k][j] * tokens.unit[k][j];
            gbias[j] += tokens.gn[k][j];
            tokens.gn[k][j] *= weight[j];
            sums[2 * k] += tokens.gn[k][j];
            sums[2 * k + 1] += tokens.gn[k][j] * tokens.unit[k][j];
        }
    }
    if (active) {
        add_to_column(mine, gweight);
        add_to_column(mine + args.channels, gbias);
    }
    row_sums(sums, buffer);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        const float mean = sums[2 * k] / args.channels, along = sums[2 * k + 1] / args.channels;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            tokens.gn[k][j] = tokens.rstd[k] * (tokens.gn[k][j] - mean - tokens.unit[k][j] * along);
        }
    }
}

template <typename X, typename G, int kVec, bool kDelta>
__global__ void __launch_bounds__(kVec == 1 ? kMaxThreads : kBlock, kVec == 1 ? 1 : 2)
    mix_tokens_backward(const Args args, int64_t rows_a_block, const G* __restrict__ g, const X* __restrict__ x,
                        const G* __restrict__ delta, X* __restrict__ gx, G* __restrict__ gdelta, float* part) {
    extern __shared__ float4 shared[];
    float* buffer = reinterpret_cast<float*>(shared);
    float* columns = buffer + kRowBuffer;
    const bool active = threadIdx.x * kVec < args.channels;
    const int channel = active ? threadIdx.x * kVec : 0, slots = args.mixes + (args.stats ? 2 : 0);
    const int64_t plane = static_cast<int64_t>(args.rows) * args.channels;
    float* mine = columns + threadIdx.y * slots * args.channels + channel;
    if (active) {
        const float zeros[kVec] = {};
        for (int slot = 0; slot < slots; ++slot) store(mine + slot * args.channels, zeros);
    }
    const Step step = args.place.step(channel);
    const int64_t first = blockIdx.x * rows_a_block;
    const int64_t last = min(first + rows_a_block, static_cast<int64_t>(args.rows));
    for (int64_t base = first; base < last; base += kRows * blockDim.y) {
        Tokens<kVec> tokens;
        Upstream<G, kVec, kDelta> upstream;
        start(args, x, base + threadIdx.y, last, step, channel, active, tokens,
              [&] { upstream.read(args, g, delta, 0, tokens); });
        for (int i = 0; i < args.mixes; i += upstream.kCount) {
            if (i) upstream.read(args, g, delta, i, tokens);
#pragma unroll
            for (int j = 0; j < upstream.kCount; ++j) {
                if (i + j >= args.mixes) break;
                float mix[kVec], change[kVec];
                load(args.mix[i + j] + channel, mix);
                upstream.use(j, mix, tokens, change, kDelta ? gdelta + (i + j) * plane : nullptr);
                if (active) add_to_column(mine + (i + j) * args.channels, change);
            }
        }
        if (args.stats) norm_backward(args, channel, active, tokens, mine + args.mixes * args.channels, buffer);
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            if (tokens.on[k]) store(gx + tokens.here[k], tokens.gn[k]);
        }
    }
    write_columns(columns, slots * args.channels, part);
}

}  // namespace q_shift
