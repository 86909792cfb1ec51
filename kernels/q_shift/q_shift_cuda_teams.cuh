// The gradient of Q-Shift with its mixes as a block of VRWKV needs it: two or three mixes, without deltas, together
// with the gradient that the tokens get from the residual beside it.
//
// A team of warps has a row at a time, and each thread of it three pairs of channels: their sums over the rows stay in
// registers, and a row of up to 192 channels needs no barrier. Where a source or taker is not there the row itself is
// read, and dropped. Sums over the rows of a block go to `part`, (slots, C): the mixes' gradients, then those of weight
// and bias. Everything is added up in a fixed order.
#pragma once

#include "q_shift/q_shift_cuda_common.cuh"
#include "tensors.cuh"

namespace q_shift {

constexpr int kPair = 2, kParts = 3;                   // channels of a vector, vectors of a thread
constexpr int kWarpChannels = kWarp * kPair * kParts;  // of a team's warp
constexpr int kNormSlots = 2;                          // weight and bias

template <typename X, typename G>
struct TeamTensors {
    const G* g;          // (mixes, rows, C)
    const X *x, *sum;    // (rows, C); sum null for 0
    const float* scale;  // of each sample's branch; null for 1
    X* gx;
    G* gbranch;  // null where nobody wants it
};

// Sums of two values over the threads of a team. buffer: two floats a warp, twice, so that one barrier a row is enough.
template <int kWarps>
__device__ __forceinline__ void team_sums(float& a, float& b, float2* buffer) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        a += __shfl_xor_sync(~0u, a, lanes);
        b += __shfl_xor_sync(~0u, b, lanes);
    }
    const int warps = kWarps ? kWarps : blockDim.x / kWarp;
    if (warps == 1) return;
    float2* mine = buffer + threadIdx.y * warps;
    if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = make_float2(a, b);
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(warps * kWarp) : "memory");
    a = b = 0;
    for (int warp = 0; warp < warps; ++warp) a += mine[warp].x, b += mine[warp].y;
}

// Which neighbours a row has: bit d is set if there is one in direction d, see Place::step. A channel of direction d is
// taken from the other side, that of d ^ 1. Tokens past the map are their own neighbours.
struct Around {
    unsigned there;
    bool map;

    __device__ static Around of(const Place& place, int row) {
        const int position = row - static_cast<int>(place.by_tokens.divide(row)) * place.tokens;
        if (position >= place.height * place.width) return {~0u, false};
        const int y = static_cast<int>(place.by_width.divide(position)), x = position - y * place.width;
        const unsigned left = x >= place.pixels, right = x + place.pixels < place.width;
        const unsigned above = y >= place.pixels, below = y + place.pixels < place.height;
        return {left | right << 1 | above << 2 | below << 3 | 1u << kStay, true};
    }
    __device__ bool has(int direction) const { return there >> direction & 1; }
};

// What a thread knows of a vector of its channels.
struct Vector {
    int channel, direction, opposite, distance;  // distance in values, from a row to its source
    bool active;
};

// A row as a thread reads it: all at once, before any of it is used.
template <typename X, typename G, int kCount>
struct TeamRow {
    Pack<X, kPair> own[kParts], far[kParts], sum[kParts];
    Pack<G, kPair> g[kCount][kParts], takers[kCount][kParts];
    float2 stats, far_stats[kParts];
    bool source[kParts], taker[kParts];

    __device__ __forceinline__ void read(const Args& args, const TeamTensors<X, G>& at, int row, int channels,
                                         const Vector (&vectors)[kParts], const int (&offsets)[kParts]) {
        const float2* all = reinterpret_cast<const float2*>(args.stats);
        const int64_t plane = static_cast<int64_t>(args.rows) * channels, start = static_cast<int64_t>(row) * channels;
        const Around around = Around::of(args.place, row);
        const auto x = [](const X* from) { return *reinterpret_cast<const Pack<X, kPair>*>(from); };
        const auto grad = [](const G* from) { return *reinterpret_cast<const Pack<G, kPair>*>(from); };
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            source[p] = around.has(vectors[p].direction), taker[p] = around.has(vectors[p].opposite);
            const int to_source = around.map && source[p] ? vectors[p].distance : 0;
            const int to_taker = around.map && taker[p] ? -vectors[p].distance : 0;
            const int64_t here = start + vectors[p].channel;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                g[i][p] = grad(at.g + i * plane + here);
                takers[i][p] = grad(at.g + i * plane + here + to_taker);
            }
            own[p] = x(at.x + here), far[p] = x(at.x + here + to_source);
            sum[p] = at.sum ? x(at.sum + here) : Pack<X, kPair>{};
            far_stats[p] = all ? all[row + (to_source ? offsets[p] : 0)] : make_float2(0, 1);
        }
        stats = all ? all[row] : make_float2(0, 1);
    }
};

template <int kCount>
struct Columns {
    float sums[kCount + kNormSlots][kParts][kPair];
};

// parameters: mixes, weight and bias, (kCount + 2, C), in shared memory.
template <int kWarps, typename X, typename G, int kCount>
__device__ __forceinline__ void team_row(const Args& args, const TeamTensors<X, G>& at, int row, int channels,
                                         const Vector (&vectors)[kParts], const int (&offsets)[kParts],
                                         const float* parameters, Columns<kCount>& columns, float2* buffer) {
    TeamRow<X, G, kCount> in;
    in.read(args, at, row, channels, vectors, offsets);
    float unit[kParts][kPair], gn[kParts][kPair], total = 0, along = 0;
    const float shift = -in.stats.x * in.stats.y;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        const float* from = parameters + vectors[p].channel;
        float weight[kPair], bias[kPair], apart[kPair];
        load(from + kCount * channels, weight);
        load(from + (kCount + 1) * channels, bias);
        const float far_shift = -in.far_stats[p].x * in.far_stats[p].y;
#pragma unroll
        for (int j = 0; j < kPair; ++j) {
            unit[p][j] = to_float(in.own[p].values[j]) * in.stats.y + shift;
            const float far = to_float(in.far[p].values[j]) * in.far_stats[p].y + far_shift;
            apart[j] = (unit[p][j] - (in.source[p] ? far : 0.0f)) * weight[j] + (in.source[p] ? 0.0f : bias[j]);
            gn[p][j] = 0;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            float mix[kPair];
            load(from + i * channels, mix);
#pragma unroll
            for (int j = 0; j < kPair; ++j) {
                const float own = vectors[p].active ? to_float(in.g[i][p].values[j]) : 0.0f;
                const float taker = vectors[p].active && in.taker[p] ? to_float(in.takers[i][p].values[j]) : 0.0f;
                gn[p][j] += taker + (own - taker) * mix[j];
                columns.sums[i][p][j] += own * apart[j];
            }
        }
#pragma unroll
        for (int j = 0; j < kPair; ++j) {
            columns.sums[kCount][p][j] += gn[p][j] * unit[p][j];
            columns.sums[kCount + 1][p][j] += gn[p][j];
            gn[p][j] *= weight[j];
            total += gn[p][j];
            along += gn[p][j] * unit[p][j];
        }
    }
    if (args.stats) {
        team_sums<kWarps>(total, along, buffer);
        const float inverse = 1.0f / channels;
        total *= inverse, along *= inverse;
    } else {
        total = along = 0;
    }
    const float scale = at.scale ? at.scale[args.place.by_tokens.divide(row)] : 1.0f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        if (!vectors[p].active) continue;
        float branch[kPair];
#pragma unroll
        for (int j = 0; j < kPair; ++j) {
            gn[p][j] = in.stats.y * (gn[p][j] - total - unit[p][j] * along) + to_float(in.sum[p].values[j]);
            branch[j] = gn[p][j] * scale;
        }
        const int64_t here = static_cast<int64_t>(row) * channels + vectors[p].channel;
        store(at.gx + here, gn[p]);
        if (at.gbranch) store(at.gbranch + here, branch);
    }
}

// Block (threads of a team, teams); shared memory: parameters, a team's columns each, two buffers for sums. kWarps: of
// a team, if its threads are all in use; else 0.
template <typename X, typename G, int kCount, int kWarps>
__global__ void __launch_bounds__(kBlock, 2)
    mix_rows_backward(const Args args, const TeamTensors<X, G> at, int64_t rows_a_block, float* part) {
    constexpr int kSlots = kCount + kNormSlots;
    extern __shared__ float4 shared[];
    const int channels = kWarps ? kWarps * kWarpChannels : args.channels, width = kWarps ? kWarps * kWarp : blockDim.x;
    float* parameters = reinterpret_cast<float*>(shared);
    float* sums = parameters + kSlots * channels;
    float2* buffers = reinterpret_cast<float2*>(sums + blockDim.y * kSlots * channels);
    const int thread = threadIdx.y * width + threadIdx.x, threads = width * blockDim.y;
    for (int i = thread; i < channels; i += threads) {
#pragma unroll
        for (int m = 0; m < kCount; ++m) parameters[m * channels + i] = args.mix[m][i];
        parameters[kCount * channels + i] = args.weight ? args.weight[i] : 1.0f;
        parameters[(kCount + 1) * channels + i] = args.bias ? args.bias[i] : 0.0f;
    }
    __syncthreads();
    Vector vectors[kParts];
    int offsets[kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        const int channel = (threadIdx.x + p * width) * kPair;
        const bool active = kWarps || channel < channels;
        const int direction = args.place.direction(active ? channel : 0);
        offsets[p] = args.place.step_of(direction).offset;
        vectors[p] = {active ? channel : 0, direction, direction == kStay ? kStay : direction ^ 1,
                      offsets[p] * channels, active};
    }
    Columns<kCount> columns = {};
    const int first = static_cast<int>(blockIdx.x * rows_a_block);
    const int last = static_cast<int>(min(first + rows_a_block, static_cast<int64_t>(args.rows)));
    int round = 0;
    for (int row = first + threadIdx.y; row < last; row += blockDim.y, round ^= 1) {
        team_row<kWarps>(args, at, row, channels, vectors, offsets, parameters, columns,
                         buffers + round * (threads / kWarp));
    }
    float* mine = sums + threadIdx.y * kSlots * channels;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        if (!vectors[p].active) continue;
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
            store(mine + slot * channels + vectors[p].channel, columns.sums[slot][p]);
    }
    __syncthreads();
    const int wanted = (args.stats ? kSlots : kCount) * channels;
    for (int i = thread; i < wanted; i += threads) {
        float total = 0;
        for (unsigned team = 0; team < blockDim.y; ++team) total += sums[team * kSlots * channels + i];
        part[static_cast<int64_t>(blockIdx.x) * wanted + i] = total;
    }
}

template <typename X, typename G>
using TeamKernel = void (*)(Args, TeamTensors<X, G>, int64_t, float*);

// Of the sizes of the models, and of any other.
template <typename X, typename G, int kCount>
TeamKernel<X, G> team_kernel(int channels) {
    if constexpr (std::is_same_v<X, float>) {
        if (channels == kWarpChannels) return mix_rows_backward<X, G, kCount, 1>;
        if (channels == 2 * kWarpChannels) return mix_rows_backward<X, G, kCount, 2>;
        if (channels == 4 * kWarpChannels) return mix_rows_backward<X, G, kCount, 4>;
    }
    return mix_rows_backward<X, G, kCount, 0>;
}

// As many blocks as the device holds at a time; columns (slots, C) gets the sums.
template <typename X, typename G, int kCount>
void launch_teams(const Args& args, const TeamTensors<X, G>& at, const Tensor& columns) {
    const TeamKernel<X, G> kernel = team_kernel<X, G, kCount>(args.channels);
    const int warps = (args.channels + kWarpChannels - 1) / kWarpChannels, threads = warps * kWarp;
    const dim3 block(threads, kBlock / threads);
    const size_t floats = (block.y + 1) * (kCount + kNormSlots) * args.channels;
    const size_t bytes = sizeof(float) * floats + 2 * sizeof(float2) * block.y * warps;
    int device = 0, processors = 1, resident = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, block.x * block.y, bytes));
    const int64_t most = static_cast<int64_t>(processors) * (resident > 0 ? resident : 1);
    const int64_t rows_a_block = (args.rows + most - 1) / most;
    const int blocks = static_cast<int>((args.rows + rows_a_block - 1) / rows_a_block);
    const Tensor part = new_floats(columns, {blocks, columns.numel()});
    const auto stream = c10::cuda::getCurrentCUDAStream();
    kernel<<<blocks, block, bytes, stream>>>(args, at, rows_a_block, part.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch_sum_parts(part.const_data_ptr<float>(), blocks, columns.numel(), columns.mutable_data_ptr<float>(), stream);
}

}  // namespace q_shift
