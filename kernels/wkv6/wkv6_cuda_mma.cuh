// The hardware's warp instructions behind the WKV6 kernels, and float32 products made of bfloat16 ones.
//
// A float32 x is split into hi = bf16(x) and lo = bf16(x - hi), which keeps 16 bits of it, and a product of two such
// numbers is hi hi + hi lo + lo hi, summed in float32: a relative error of 4e-6 to 5e-6 in sums of random products, at
// a third of the bfloat16 rate, where TF32 alone would give 3e-4. With kSplit = false only hi is used: bfloat16
// products, for bfloat16 tensors.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "programmatic.cuh"

namespace wkv6 {

// Two neighbouring floats in two registers.
struct Pair {
    uint32_t hi, lo;
};

template <bool kSplit>
__device__ inline Pair split(float x, float y) {
    const __nv_bfloat162 hi = __floats2bfloat162_rn(x, y);
    Pair pair{*reinterpret_cast<const uint32_t*>(&hi), 0};
    if (kSplit) {
        const float rest_x = x - __uint_as_float(pair.hi << 16);
        const float rest_y = y - __uint_as_float(pair.hi & 0xffff0000u);
        const __nv_bfloat162 lo = __floats2bfloat162_rn(rest_x, rest_y);
        pair.lo = *reinterpret_cast<const uint32_t*>(&lo);
    }
    return pair;
}

// A 16 x 16 left operand. Lane 4g + q holds rows g and g + 8 and columns 2q, 2q + 1, 2q + 8, 2q + 9: register 0 is
// (g, 2q), 1 is (g + 8, 2q), 2 is (g, 2q + 8), 3 is (g + 8, 2q + 8), each with its right neighbour.
struct Left {
    uint32_t hi[4], lo[4];
};

// A 16 x 8 right operand: lane 4g + q holds column g and rows 2q, 2q + 1 in register 0, 2q + 8, 2q + 9 in register 1.
struct Right {
    uint32_t hi[2], lo[2];
};

// A 16 x 8 sum: lane 4g + q holds columns 2q, 2q + 1 of row g in 0 and 1, of row g + 8 in 2 and 3.
struct Sum {
    float x[4];
};

__device__ inline void mma_bf16(Sum& c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l passes the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// Transposes one 8 x 8 matrix of 16-bit numbers that a warp holds in its registers.
__device__ inline uint32_t transpose(uint32_t x) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
    return out;
}

// From global to shared memory without waiting; zeros where not valid.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? kBytes : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
}

__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Into the cache that all processors share.
__device__ inline void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Waits for kThreads of the block's threads, whole warps, that meet at a barrier: 0 is that of __syncthreads.
template <int kThreads>
__device__ inline void wait_for_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Waits for all threads of the cluster, which then see what each other has written. From compute capability 9.0 on.
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The larger one, NaN if either is.
__device__ inline float max_or_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// 2^x; relative error 2^-22, 0 far below 0 and infinite far above.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x; relative error 2^-23.
__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c += a b for two neighbouring results. They take turns, for a product has to wait for the one before it on its sum.
template <bool kSplit>
__device__ inline void multiply(Sum& c0, Sum& c1, const Left& a, const Right& b0, const Right& b1) {
    if (kSplit) {
        mma_bf16(c0, a.lo, b0.hi);
        mma_bf16(c1, a.lo, b1.hi);
        mma_bf16(c0, a.hi, b0.lo);
        mma_bf16(c1, a.hi, b1.lo);
    }
    mma_bf16(c0, a.hi, b0.hi);
    mma_bf16(c1, a.hi, b1.hi);
}

}  // namespace wkv6
