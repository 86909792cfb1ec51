// Compiles the kernel file VRWKV_KERNEL once for each vector width, in the namespaces avx512, avx2 and baseline, and
// lets VRWKV_DISPATCH choose one at run time. No -march flag is needed, and the library runs on any x86-64 and on Arm.
//
// The width is the one that PyTorch chose for its own kernels: torch.backends.cpu.get_cpu_capability(), which the
// environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers. Standard headers must be included before
// this file, or their functions would be compiled for the widest processor.

#if defined(__x86_64__)

namespace {

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define VRWKV_VECTOR_BYTES 64
namespace avx512 {
#include "simd.h"
#include VRWKV_KERNEL
}  // namespace avx512
#undef VRWKV_VECTOR_BYTES
#undef VRWKV_INLINE
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define VRWKV_VECTOR_BYTES 32
namespace avx2 {
#include "simd.h"
#include VRWKV_KERNEL
}  // namespace avx2
#undef VRWKV_VECTOR_BYTES
#undef VRWKV_INLINE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace

#endif

namespace {

#define VRWKV_VECTOR_BYTES 16
namespace baseline {
#include "simd.h"
#include VRWKV_KERNEL
}  // namespace baseline

}  // namespace

#if defined(__x86_64__)
#define VRWKV_DISPATCH(function, ...)                                   \
    do {                                                                \
        static const std::string capability = at::get_cpu_capability(); \
        if (capability == "AVX512")                                     \
            avx512::function(__VA_ARGS__);                              \
        else if (capability == "AVX2")                                  \
            avx2::function(__VA_ARGS__);                                \
        else                                                            \
            baseline::function(__VA_ARGS__);                            \
    } while (0)
#else
#define VRWKV_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif
