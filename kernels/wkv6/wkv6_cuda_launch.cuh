// Launches the WKV6 kernels; each dtype's file instantiates forward and backward.
#pragma once

#include <c10/cuda/CUDAException.h>

#include <limits>
#include <type_traits>

#include "wkv6_cuda.h"
#include "wkv6_cuda_gradient.cuh"
#include "wkv6_cuda_output.cuh"
#include "wkv6_cuda_sequence.cuh"
#include "wkv6_cuda_state.cuh"
#include "wkv6_cuda_strip_state.cuh"

namespace wkv6 {

// bfloat16 tensors need no more than bfloat16 products; float16 has more bits but not the range that sums need.
template <typename T>
constexpr bool kSplitFor = !std::is_same<T, __nv_bfloat16>::value;

// One block walks over all chunks of a sequence, which spares the scan's passes over the states, where there are
// sequences enough to fill the device several times.
constexpr int kWalkBlocksPerProcessor = 4;

// Shorter sequences are one chunk, which needs no states.
constexpr int64_t kLeastStripTokens = kChunk + 1;

// Below this many threads with 16 loads in flight each, several threads share each sequence's scan.
constexpr int kScanThreadsPerProcessor = 512;
constexpr int kScanSegments = 4;

inline Sizes sizes_of(const Call& call) {
    return Sizes{call.batch * call.heads, call.tokens, static_cast<int>(call.heads),
                 static_cast<int>((call.tokens + kChunk - 1) / kChunk)};
}

// Launches one call's kernels in order.
class Launcher {
 public:
    explicit Launcher(cudaStream_t stream) : stream_(stream) {
        int device, major, clusters;
        C10_CUDA_CHECK(cudaGetDevice(&device));
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
        programmatic_ = major >= 9;
        clusters_ = clusters;
    }

    int64_t processors() const { return processors_; }
    bool clusters() const { return clusters_; }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, Arguments... arguments) {
        in_clusters(1, kernel, blocks, threads, shared, arguments...);
    }

    // Programmatic from the second kernel on: the first follows kernels that do not take part.
    template <typename... Parameters, typename... Arguments>
    void in_clusters(int size, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                     Arguments... arguments) {
        TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "wkv6: too many tokens for one launch: ", blocks,
                    " blocks");
        constexpr int kSharedWithoutAsking = 48 * 1024;
        if (shared > kSharedWithoutAsking) {
            C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        }
        cudaLaunchAttribute attributes[2];
        int count = 0;
        if (programmatic_ && launched_++ > 0) {
            attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[count++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (size > 1) {
            attributes[count].id = cudaLaunchAttributeClusterDimension;
            auto& dimension = attributes[count++].val.clusterDim;
            dimension.x = size, dimension.y = dimension.z = 1;
        }
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = stream_;
        config.attrs = attributes;
        config.numAttrs = count;
        C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    }

 private:
    cudaStream_t stream_;
    int processors_ = 0, launched_ = 0;
    bool programmatic_ = false, clusters_ = false;
};

// The states of `sets` sets, each of both directions. base: not null if w is raw (kRaw).
template <typename T, typename W, bool kRaw = false>
void launch_states(Launcher& launch, const Call& call, const Sizes& sizes, int sets, const float* base = nullptr) {
    if (sizes.slots() == 0) return;
    constexpr bool kSplit = kSplitFor<T>;
    constexpr int kShared = 2 * Tile::kBytes + kStateWarps * kN * sizeof(float);
    const StateInputs<T> in{{static_cast<const T*>(call.k), static_cast<const T*>(call.r)},
                            {static_cast<const T*>(call.v), static_cast<const T*>(call.gy)}};
    const auto* w = static_cast<const W*>(call.w);
    auto* states = reinterpret_cast<unsigned char*>(call.states);
    auto* decays = reinterpret_cast<float2*>(call.decays);
    const int kinds = 2 * sets;
    const int64_t sequences = kinds * sizes.bh, scans = sequences * (kN * kN / 4);
    if (sequences >= kWalkBlocksPerProcessor * launch.processors()) {
        launch(state_kernel<T, W, kSplit, true, kRaw>, sequences, kStateThreads, kShared, in, w, base, sizes, kinds,
               states, decays);
        return;
    }
    launch(state_kernel<T, W, kSplit, false, kRaw>, sequences * sizes.slots(), kStateThreads, kShared, in, w, base,
           sizes, kinds, states, decays);
    if (scans >= kScanThreadsPerProcessor * launch.processors()) {
        launch(scan_kernel<kSplit, 1>, scans / kThreads, kThreads, 0, states, decays, sizes);
    } else {
        launch(scan_kernel<kSplit, kScanSegments>, scans * kScanSegments / kThreads, kThreads, 0, states, decays,
               sizes);
    }
}

template <typename T, typename W, bool kFinish = false>
void launch_output(Launcher& launch, const Call& call, const Sizes& sizes, const void* r, const void* k, const void* v,
                   const float* states, void* y, const float* base = nullptr, const Finish<T>& finish = {}) {
    launch(output_kernel<T, W, kSplitFor<T>, kFinish>, sizes.bh * sizes.chunks, kThreads, OutputShared<T, W>::kBytes,
           static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<const W*>(call.w),
           base, call.u, reinterpret_cast<const unsigned char*>(states), sizes, finish, static_cast<T*>(y));
}

// y of bfloat16 sequences by strips, if one piece holds each or there are pieces enough to fill the device. Returns
// whether it was that.
template <typename T, typename W, bool kFinish = false>
bool launch_strips(Launcher& launch, const Call& call, const Sizes& sizes, void* y, const float* base = nullptr,
                   const Finish<T>& finish = {}) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        const Pieces pieces(sizes.tokens);
        const bool few = pieces.count() > 1 && sizes.bh * pieces.count() < launch.processors();
        if (sizes.tokens < kLeastStripTokens || few || !launch.clusters()) return false;
        const auto *r = static_cast<const T*>(call.r), *k = static_cast<const T*>(call.k);
        const auto* v = static_cast<const T*>(call.v);
        const auto* w = static_cast<const W*>(call.w);
        auto* states = reinterpret_cast<float4*>(call.states);
        if (pieces.count() > 1) {
            launch.in_clusters(kPieceBlocks, strip_state_kernel<W, kFinish>, sizes.bh * pieces.count() * kPieceBlocks,
                               kStripStateThreads, StateShared<W>::kBytes, k, v, w, base, sizes, pieces, states,
                               call.decays);
            launch(strip_scan_kernel, 2 * sizes.bh * (kN * kN / kThreads), kThreads, 0, call.states, call.decays, sizes,
                   pieces);
        }
        launch.in_clusters(pieces.count() > 1 ? 1 : kPieceBlocks, sequence_kernel<W, kFinish>,
                           sizes.bh * pieces.count() * kPieceBlocks, kSequenceThreads, StripsShared::kBytes, r, k, v, w,
                           base, call.u, sizes, pieces, states, call.decays, finish, static_cast<T*>(y));
        return true;
    }
    return false;
}

template <typename T, typename W>
void launch_forward(const Call& call, void* y) {
    const Sizes sizes = sizes_of(call);
    Launcher launch(call.stream);
    if (launch_strips<T, W>(launch, call, sizes, y)) return;
    launch_states<T, W>(launch, call, sizes, 1);
    launch_output<T, W>(launch, call, sizes, call.r, call.k, call.v, call.states, y);
}

template <typename T, typename W>
void launch_backward(const Call& call, const Gradients& out) {
    const Sizes sizes = sizes_of(call);
    Launcher launch(call.stream);
    launch_states<T, W>(launch, call, sizes, 2);
    // The gradient of v is the output for keys r and values gy.
    const float* transposed = call.states + 2 * sizes.bh * sizes.slots() * kN * kN;
    launch_output<T, W>(launch, call, sizes, call.k, call.r, call.gy, transposed, out.v);
    launch(gradient_kernel<T, W, kSplitFor<T>>, sizes.bh * sizes.chunks, kThreads, GradientShared<T, W>::kBytes,
           static_cast<const T*>(call.r), static_cast<const T*>(call.k), static_cast<const T*>(call.v),
           static_cast<const W*>(call.w), call.u, static_cast<const T*>(call.gy),
           reinterpret_cast<const unsigned char*>(call.states), sizes, static_cast<T*>(out.r), static_cast<T*>(out.k),
           static_cast<W*>(out.w), out.u_parts);
    launch(bonus_kernel, call.heads * (kN / kBonusChannels), kBonusThreads, 0, out.u_parts, sizes, out.u);
}

template <typename T>
void forward(const Call& call, void* y) {
    call.w_is_float ? launch_forward<T, float>(call, y) : launch_forward<T, T>(call, y);
}

template <typename T>
void gated(const Call& call, const Gating& gating, void* y) {
    const Sizes sizes = sizes_of(call);
    Launcher launch(call.stream);
    const Finish<T> finish{static_cast<const T*>(gating.gate), gating.weight, gating.bias, gating.eps};
    if (launch_strips<T, T, true>(launch, call, sizes, y, gating.base, finish)) return;
    launch_states<T, T, true>(launch, call, sizes, 1, gating.base);
    launch_output<T, T, true>(launch, call, sizes, call.r, call.k, call.v, call.states, y, gating.base, finish);
}

template <typename T>
void backward(const Call& call, const Gradients& out) {
    call.w_is_float ? launch_backward<T, float>(call, out) : launch_backward<T, T>(call, out);
}

}  // namespace wkv6
