// What the CUDA kernels over tokens (rows of channels) share: vectors, block layout, sums along rows and columns.
//
// A row belongs to blockDim.x threads, a multiple of a warp, of which thread i holds the channels from i * kVec on;
// a block has blockDim.y rows at a time. Sums are taken in a fixed order: every run gives the same bits.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rows {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
    T values[kVec];
};

template <int kVec, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[kVec]) {
    const Pack<T, kVec> pack = *reinterpret_cast<const Pack<T, kVec>*>(from);
#pragma unroll
    for (int i = 0; i < kVec; ++i) to[i] = to_float(pack.values[i]);
}

template <int kVec, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kVec]) {
    Pack<T, kVec> pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.values[i] = from_float<T>(from[i]);
    *reinterpret_cast<Pack<T, kVec>*>(to) = pack;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a row
constexpr int kBlock = 256;        // threads of a block that holds several rows

// Sums of kCount values over the threads of each row; every thread gets them. All threads of the block must call it.
// buffer: kMaxThreads / kWarp * kCount floats of shared memory.
template <int kCount>
__device__ void row_sums(float (&values)[kCount], float* buffer) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) values[i] += __shfl_xor_sync(~0u, values[i], lanes);
    }
    const int warps = blockDim.x / kWarp;
    if (warps == 1) return;  // a row is one warp
    float* mine = buffer + threadIdx.y * warps * kCount;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) mine[threadIdx.x / kWarp * kCount + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values[i] = 0;
        for (int warp = 0; warp < warps; ++warp) values[i] += mine[warp * kCount + i];
    }
    __syncthreads();  // the buffer may be written again
}

// Mean and 1 / deviation of a row, two passes over what its threads hold.
template <int kVec>
__device__ void row_stats(const float (&x)[kVec], bool active, int channels, float eps, float* buffer, float& mean,
                          float& rstd) {
    float total[1] = {0};
#pragma unroll
    for (int i = 0; i < kVec; ++i) total[0] += active ? x[i] : 0.0f;
    row_sums(total, buffer);
    mean = total[0] / channels;
    total[0] = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) total[0] += active ? (x[i] - mean) * (x[i] - mean) : 0.0f;
    row_sums(total, buffer);
    rstd = rsqrtf(total[0] / channels + eps);
}

// How a kernel over rows is launched; persistent kernels take `blocks` blocks, each a contiguous run of rows.
struct Layout {
    int threads_x, threads_y;
    int blocks;
    int64_t rows_a_block;  // a multiple of threads_y * rows_a_thread
    dim3 block() const { return dim3(threads_x, threads_y); }
};

inline bool fits(int64_t channels, int vec) { return (channels + vec - 1) / vec <= kMaxThreads; }

inline Layout layout(int64_t rows, int64_t channels, int vec, int blocks_a_processor, int rows_a_thread = 1) {
    int device = 0, processors = 1;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    Layout out;
    out.threads_x = static_cast<int>(((channels + vec - 1) / vec + kWarp - 1) / kWarp * kWarp);
    out.threads_y = out.threads_x >= kBlock ? 1 : kBlock / out.threads_x;
    const int64_t most = static_cast<int64_t>(processors) * blocks_a_processor;
    const int64_t group = static_cast<int64_t>(out.threads_y) * rows_a_thread, groups = (rows + group - 1) / group;
    const int64_t groups_a_block = (groups + most - 1) / most;
    out.blocks = static_cast<int>((groups + groups_a_block - 1) / groups_a_block);
    out.rows_a_block = groups_a_block * group;
    return out;
}

// out[column] = the sum over `parts` rows of part (parts, columns), in a fixed order.
constexpr int kSumThreadsY = 32;
__global__ static void sum_parts(const float* part, int parts, int columns, float* out) {
    __shared__ float sums[kSumThreadsY][kWarp];
    const int column = blockIdx.x * kWarp + threadIdx.x;
    float sum = 0;
    if (column < columns) {
#pragma unroll 8
        for (int row = threadIdx.y; row < parts; row += kSumThreadsY) {
            sum += part[static_cast<int64_t>(row) * columns + column];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        for (int y = 1; y < kSumThreadsY; ++y) sum += sums[y][threadIdx.x];
        out[column] = sum;
    }
}

inline void launch_sum_parts(const float* part, int parts, int64_t columns, float* out, cudaStream_t stream) {
    const int blocks = static_cast<int>((columns + kWarp - 1) / kWarp);
    sum_parts<<<blocks, dim3(kWarp, kSumThreadsY), 0, stream>>>(part, parts, static_cast<int>(columns), out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Adds to the sums of a thread's channels, which are in shared memory.
template <int kVec>
__device__ __forceinline__ void add_to_column(float* column, const float (&values)[kVec]) {
    float sums[kVec];
    load(column, sums);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += values[i];
    store(column, sums);
}

// part[blockIdx.x][value] = the sum of columns[y][value] over the rows y that a block has at a time.
__device__ inline void write_columns(const float* columns, int values, float* part) {
    __syncthreads();
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = thread; i < values; i += threads) {
        float sum = 0;
        for (unsigned y = 0; y < blockDim.y; ++y) sum += columns[static_cast<int64_t>(y) * values + i];
        part[static_cast<int64_t>(blockIdx.x) * values + i] = sum;
    }
}

}  // namespace rows
