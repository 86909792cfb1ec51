// Kernels in which a warp has a row to itself, so that no sum along it needs a barrier: residuals, and a layer norm
// with what comes before and after it. A thread holds kParts vectors of kVec channels, a warp's vectors side by side.
#pragma once

#include "pointwise/pointwise_rows.cuh"
#include "tensors.cuh"

namespace pointwise {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// A thread's part of a row. Channels past the end are zero.
template <int kVec, int kParts>
struct WarpRow {
    float values[kParts][kVec];

    static __device__ __forceinline__ int channel(int part) { return (part * kWarp + threadIdx.x) * kVec; }

    template <typename T>
    __device__ __forceinline__ void read(const T* row, int channels) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) values[p][j] = 0;
            if (channel(p) < channels) load(row + channel(p), values[p]);
        }
    }

    template <typename T>
    __device__ __forceinline__ void write(T* row, int channels) const {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            if (channel(p) < channels) store(row + channel(p), values[p]);
        }
    }

    // Mean and 1 / deviation, in two passes over what the threads hold.
    __device__ __forceinline__ float2 stats(int channels, float eps) const {
        float total = 0, square = 0;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) total += values[p][j];
        }
        const float mean = warp_sum(total) / channels;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            if (channel(p) >= channels) continue;
#pragma unroll
            for (int j = 0; j < kVec; ++j) square += (values[p][j] - mean) * (values[p][j] - mean);
        }
        return make_float2(mean, rsqrtf(warp_sum(square) / channels + eps));
    }

    // To a layer norm of the row. Channels past the end stay zero, whatever the mean.
    __device__ __forceinline__ void normalise(const RowArgs& args) {
        const float2 found = stats(args.channels, args.eps);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            if (channel(p) >= args.channels) continue;
            float weight[kVec], bias[kVec];
            load(args.weight + channel(p), weight);
            load(args.bias + channel(p), bias);
#pragma unroll
            for (int j = 0; j < kVec; ++j) values[p][j] = (values[p][j] - found.x) * found.y * weight[j] + bias[j];
        }
    }

    // Writes the row's statistics where somebody wants them.
    __device__ __forceinline__ void write_stats(const RowArgs& args, int row, float* stats_out) const {
        if (!stats_out) return;
        const float2 found = stats(args.channels, args.stats_eps);
        if (threadIdx.x == 0) reinterpret_cast<float2*>(stats_out)[row] = found;
    }
};

// As residual_rows.
template <typename X, typename Z, int kVec, int kParts>
__global__ void __launch_bounds__(kBlock, kParts > 6 ? 2 : 3)
    residual_warps(const RowArgs args, const X* x, const Z* z, const Z* gate, X* out, float* stats) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= args.rows) return;
    const int64_t at = static_cast<int64_t>(row) * args.channels;
    WarpRow<kVec, kParts> sum, branch;
    branch.read(z + at, args.channels);
    sum.read(x + at, args.channels);
    if (gate) {
        WarpRow<kVec, kParts> r;
        r.read(gate + at, args.channels);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) branch.values[p][j] *= sigmoid(r.values[p][j]);
        }
    }
    if (args.weight) branch.normalise(args);
    const float scale = args.scale ? args.scale[row / args.tokens] : 1.0f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        const int channel = branch.channel(p);
        if (channel >= args.channels) continue;
        float gamma[kVec];
        load_or(args.gamma, channel, 1.0f, gamma);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum.values[p][j] += branch.values[p][j] * gamma[j] * scale;
    }
    sum.write(out + at, args.channels);
    sum.write_stats(args, row, stats);
}

// A layer norm of z + position, and the statistics of the result. position: (tokens, C), or null.
template <typename X, typename Z, int kVec, int kParts>
__global__ void __launch_bounds__(kBlock)
    norm_warps(const RowArgs args, const Z* z, const float* position, X* out, float* stats) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= args.rows) return;
    const int64_t at = static_cast<int64_t>(row) * args.channels;
    WarpRow<kVec, kParts> values;
    values.read(z + at, args.channels);
    if (position) {
        WarpRow<kVec, kParts> here;
        here.read(position + static_cast<int64_t>(row % args.tokens) * args.channels, args.channels);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) values.values[p][j] += here.values[p][j];
        }
    }
    values.normalise(args);
    values.write(out + at, args.channels);
    values.write_stats(args, row, stats);
}

// Calls body(Vec<kVec>, Vec<kParts>) for rows of so many channels, a multiple of four and at most 1024.
template <typename Body>
void for_warps(int channels, const Body& body) {
    if (channels <= 2 * 3 * kWarp) return body(Vec<2>{}, Vec<3>{});
    if (channels <= 4 * 3 * kWarp) return body(Vec<4>{}, Vec<3>{});
    if (channels <= 4 * 6 * kWarp) return body(Vec<4>{}, Vec<6>{});
    body(Vec<4>{}, Vec<8>{});
}

inline dim3 warp_grid(int rows) { return dim3((rows + kBlock / kWarp - 1) / (kBlock / kWarp)); }
inline dim3 warp_block() { return dim3(kWarp, kBlock / kWarp); }

}  // namespace pointwise
