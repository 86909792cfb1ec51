// The kernels of pointwise_cuda_rows.cu; layout as in rows.cuh, formulas in README.md.
#pragma once

#include "rows.cuh"

namespace pointwise {

using namespace rows;

constexpr int kHead = 64;                            // channels of a head, for norm_gate
constexpr int kRowBuffer = 3 * kMaxThreads / kWarp;  // floats for row_sums

// 96 floats: what follows them in shared memory stays 16-byte aligned.
static_assert(kRowBuffer % 4 == 0, "");

struct RowArgs {
    int rows, tokens, channels;
    float eps, stats_eps;
    const float *weight, *bias, *gamma, *scale;  // null where not given; scale of each sample
};

template <int kVec>
__device__ __forceinline__ void load_or(const float* from, int channel, float otherwise, float (&to)[kVec]) {
    if (from) {
        load(from + channel, to);
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) to[j] = otherwise;
    }
}

template <int kVec>
__device__ __forceinline__ void clear_columns(float* mine, int slots, int channels) {
    for (int slot = 0; slot < slots; ++slot) {
        for (int j = 0; j < kVec; ++j) mine[slot * channels + j] = 0;
    }
}

// x + scale * gamma * norm(sigmoid(gate) * z), and mean and 1 / deviation of the sum where `stats` is given.
template <typename X, typename Z, int kVec>
__global__ void residual_rows(const RowArgs args, const X* x, const Z* z, const Z* gate, X* out, float* stats) {
    extern __shared__ float4 shared[];
    float* buffer = reinterpret_cast<float*>(shared);
    const int row = blockIdx.x * blockDim.y + threadIdx.y, channel = threadIdx.x * kVec;
    const bool on = row < args.rows && channel < args.channels;
    const int64_t at = static_cast<int64_t>(row) * args.channels + channel;
    float branch[kVec], sum[kVec], mean, rstd;
    if (on) {
        load(z + at, branch);
        load(x + at, sum);
        if (gate) {
            float r[kVec];
            load(gate + at, r);
#pragma unroll
            for (int j = 0; j < kVec; ++j) branch[j] *= sigmoid(r[j]);
        }
    }
    if (args.weight) {
        row_stats(branch, on, args.channels, args.eps, buffer, mean, rstd);
        if (on) {
            float weight[kVec], bias[kVec];
            load(args.weight + channel, weight);
            load(args.bias + channel, bias);
#pragma unroll
            for (int j = 0; j < kVec; ++j) branch[j] = (branch[j] - mean) * rstd * weight[j] + bias[j];
        }
    }
    if (on) {
        const float scale = args.scale ? args.scale[row / args.tokens] : 1.0f;
        float gamma[kVec];
        load_or(args.gamma, channel, 1.0f, gamma);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] += branch[j] * gamma[j] * scale;
        store(out + at, sum);
    }
    if (stats) {
        row_stats(sum, on, args.channels, args.stats_eps, buffer, mean, rstd);
        if (on && channel == 0) reinterpret_cast<float2*>(stats)[row] = make_float2(mean, rstd);
    }
}

// Columns: those of weight and bias if there is a norm, then that of gamma if there is one.
template <typename X, typename Z, int kVec>
__global__ void __launch_bounds__(kVec == 1 ? kMaxThreads : kBlock)
    residual_rows_backward(const RowArgs args, int rows_a_block, const X* g, const Z* z, const Z* gate, Z* gz, Z* ggate,
                           float* part) {
    extern __shared__ float4 shared[];
    float* buffer = reinterpret_cast<float*>(shared);
    float* columns = buffer + kRowBuffer;
    const int channel = threadIdx.x * kVec, norm_slots = args.weight ? 2 : 0;
    const int slots = norm_slots + (args.gamma ? 1 : 0);
    const bool active = channel < args.channels;
    float* mine = columns + threadIdx.y * slots * args.channels + channel;
    if (active) clear_columns<kVec>(mine, slots, args.channels);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_a_block;
    const int64_t last = min(first + rows_a_block, static_cast<int64_t>(args.rows));
    for (int64_t base = first; base < last; base += blockDim.y) {
        const int row = static_cast<int>(base) + threadIdx.y;
        const bool on = active && row < last;
        const int64_t at = static_cast<int64_t>(row) * args.channels + channel;
        float branch[kVec], unit[kVec], s[kVec], gn[kVec], weight[kVec], mean = 0, rstd = 1;
        if (on) {
            load(z + at, branch);
            load(g + at, gn);
            if (gate) load(gate + at, s);
            const float scale = args.scale ? args.scale[row / args.tokens] : 1.0f;
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                s[j] = gate ? sigmoid(s[j]) : 1.0f;
                branch[j] *= s[j];
                gn[j] *= scale;
            }
        }
        if (args.weight) row_stats(branch, on, args.channels, args.eps, buffer, mean, rstd);
        if (on) {
            float bias[kVec], gamma[kVec];
            load_or(args.weight, channel, 1.0f, weight);
            load_or(args.bias, channel, 0.0f, bias);
            load_or(args.gamma, channel, 1.0f, gamma);
            float change[kVec];
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                unit[j] = (branch[j] - mean) * rstd;  // the branch itself without a norm
                change[j] = gn[j] * (unit[j] * weight[j] + bias[j]);
                gn[j] *= gamma[j];
            }
            if (args.gamma) add_to_column(mine + norm_slots * args.channels, change);
        }
        if (args.weight) {
            float sums[2] = {0, 0};
            if (on) {
                float change[kVec];
#pragma unroll
                for (int j = 0; j < kVec; ++j) change[j] = gn[j] * unit[j];
                add_to_column(mine, change);
                add_to_column(mine + args.channels, gn);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    gn[j] *= weight[j];
                    sums[0] += gn[j];
                    sums[1] += gn[j] * unit[j];
                }
            }
            row_sums(sums, buffer);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                if (on) gn[j] = rstd * (gn[j] - (sums[0] + unit[j] * sums[1]) / args.channels);
            }
        }
        if (on) {
            if (gate) {
                float grad[kVec];  // branch is sigmoid(gate) z
#pragma unroll
                for (int j = 0; j < kVec; ++j) grad[j] = gn[j] * branch[j] * (1.0f - s[j]);
                store(ggate + at, grad);
            }
#pragma unroll
            for (int j = 0; j < kVec; ++j) gn[j] *= s[j];
            store(gz + at, gn);
        }
    }
    if (slots) write_columns(columns, slots * args.channels, part);
}

// -exp(base + raw); base is args.weight.
template <typename T, int kVec>
__global__ void log_decay_rows(const RowArgs args, const T* raw, float* out) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, channel = threadIdx.x * kVec;
    if (row >= args.rows || channel >= args.channels) return;
    const int64_t at = static_cast<int64_t>(row) * args.channels + channel;
    float values[kVec], base[kVec];
    load(raw + at, values);
    load(args.weight + channel, base);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = -expf(base[j] + values[j]);
    store(out + at, values);
}

// The gradient g w of raw, and its column sums, that of base.
template <typename T, int kVec>
__global__ void log_decay_rows_backward(const RowArgs args, int rows_a_block, const float* g, const float* w, T* graw,
                                        float* part) {
    extern __shared__ float4 shared[];
    float* columns = reinterpret_cast<float*>(shared) + kRowBuffer;
    const int channel = threadIdx.x * kVec;
    const bool active = channel < args.channels;
    float sum[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] = 0;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_a_block;
    const int64_t last = min(first + rows_a_block, static_cast<int64_t>(args.rows));
    for (int64_t row = first + threadIdx.y; active && row < last; row += blockDim.y) {
        float grad[kVec], decay[kVec];
        load(g + row * args.channels + channel, grad);
        load(w + row * args.channels + channel, decay);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            grad[j] *= decay[j];
            sum[j] += grad[j];
        }
        store(graw + row * args.channels + channel, grad);
    }
    if (active) store(columns + threadIdx.y * args.channels + channel, sum);
    write_columns(columns, args.channels, part);
}

// Sums over the threads of a head: 16 of 4 channels each. All threads of a warp must call it.
__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
    for (int lanes = kHead / 8; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// Normalises the four values of a thread within its head, in place; returns 1 / deviation.
__device__ __forceinline__ float normalise_head(float (&y)[4], float eps) {
    const float mean = head_sum(y[0] + y[1] + y[2] + y[3]) / kHead;
    float square = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        y[j] -= mean;
        square += y[j] * y[j];
    }
    const float rstd = rsqrtf(head_sum(square) / kHead + eps);
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] *= rstd;
    return rstd;
}

// (norm of y's heads * weight + bias) * silu(gate).
template <typename Y, typename G>
__global__ void norm_gate_rows(const RowArgs args, const Y* y, const G* gate, G* out) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, channel = threadIdx.x * 4;
    const bool on = row < args.rows && channel < args.channels;
    const int64_t at = static_cast<int64_t>(row) * args.channels + channel;
    float unit[4] = {0, 0, 0, 0};
    if (on) load(y + at, unit);
    normalise_head(unit, args.eps);
    if (!on) return;
    float factor[4], weight[4], bias[4];
    load(gate + at, factor);
    load(args.weight + channel, weight);
    load(args.bias + channel, bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) unit[j] = (unit[j] * weight[j] + bias[j]) * factor[j] * sigmoid(factor[j]);
    store(out + at, unit);
}

template <typename Y, typename G>
__global__ void __launch_bounds__(kBlock)
    norm_gate_rows_backward(const RowArgs args, int rows_a_block, const G* g, const Y* y, const G* gate, Y* gy,
                            G* ggate, float* part) {
    extern __shared__ float4 shared[];
    float* columns = reinterpret_cast<float*>(shared) + kRowBuffer;
    const int channel = threadIdx.x * 4;
    const bool active = channel < args.channels;
    float* mine = columns + threadIdx.y * 2 * args.channels + channel;
    float weight[4] = {0, 0, 0, 0}, bias[4];
    if (active) {
        clear_columns<4>(mine, 2, args.channels);
        load(args.weight + channel, weight);
        load(args.bias + channel, bias);
    }
    const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_a_block;
    const int64_t last = min(first + rows_a_block, static_cast<int64_t>(args.rows));
    for (int64_t base = first; base < last; base += blockDim.y) {
        const int row = static_cast<int>(base) + threadIdx.y;
        const bool on = active && row < last;
        const int64_t at = static_cast<int64_t>(row) * args.channels + channel;
        float unit[4] = {0, 0, 0, 0}, gn[4] = {0, 0, 0, 0}, factor[4] = {0, 0, 0, 0};
        if (on) {
            load(y + at, unit);
            load(g + at, gn);
            load(gate + at, factor);
        }
        const float rstd = normalise_head(unit, args.eps);
        float total = 0, along = 0;
        if (on) {
            float change[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float s = sigmoid(factor[j]), n = unit[j] * weight[j] + bias[j], grad = gn[j];
                gn[j] = grad * factor[j] * s;
                factor[j] = grad * n * s * (1.0f + factor[j] * (1.0f - s));
                change[j] = gn[j] * unit[j];
            }
            store(ggate + at, factor);
            add_to_column(mine, change);
            add_to_column(mine + args.channels, gn);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                gn[j] *= weight[j];
                total += gn[j];
                along += gn[j] * unit[j];
            }
        }
        total = head_sum(total) / kHead;
        along = head_sum(along) / kHead;
        if (on) {
#pragma unroll
            for (int j = 0; j < 4; ++j) gn[j] = rstd * (gn[j] - total - unit[j] * along);
            store(gy + at, gn);
        }
    }
    write_columns(columns, 2 * args.channels, part);
}

}  // namespace pointwise
