// How a call is cut into tiles and launched; each dtype's file instantiates make_plan and run.
#pragma once

#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <limits>

#include "bi_wkv/bi_wkv_cuda_backward.cuh"

namespace bi_wkv {

constexpr int kFewestRows = 4;         // smaller tiles would mostly exchange sums
constexpr int kTilesPerProcessor = 2;  // of a long sequence, at least, if that leaves such tiles

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <typename T>
Plan make_plan(const Call& call) {
    int device = 0;
    Plan plan{};
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&plan.processors, cudaDevAttrMultiProcessorCount, device));
    plan.slices = static_cast<int>(divide_up(call.channels, kLanes));
    const bool many = call.tokens > kMaxRows * kRow;
    plan.rows = static_cast<int>(std::min<int64_t>(many ? kMaxRowsOfMany : kMaxRows, divide_up(call.tokens, kRow)));
    const auto chunks = [&](int rows) { return divide_up(call.tokens, int64_t(rows) * kRow); };
    const auto tiles = [&](int rows) { return call.batch * plan.slices * chunks(rows); };
    if (many) {
        while (plan.rows > kFewestRows && tiles(plan.rows) < kTilesPerProcessor * plan.processors) --plan.rows;
        const int64_t balanced = divide_up(divide_up(call.tokens, chunks(plan.rows)), kRow);
        plan.rows = static_cast<int>(std::max<int64_t>(kFewestRows, balanced));
    }
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    TORCH_CHECK(tiles(plan.rows) < kMost && call.tokens < kMost, "bi_wkv: the tensors are too large");
    plan.chunks = static_cast<int>(chunks(plan.rows));
    const int64_t of_tile = plan.chunks > 1 ? kLanes * ((call.backward ? 4 : 2) * sizeof(State) + sizeof(float)) : 0;
    plan.workspace = tiles(plan.rows) * (of_tile + (call.backward ? kReduceWidth * sizeof(SumType<T>) : 0));
    return plan;
}

template <typename T>
Problem make_problem(const Call& call, const Plan& plan, void* workspace) {
    Problem p{};
    p.call = call;
    p.plan = plan;
    p.tiles = static_cast<unsigned>(call.batch * plan.slices * plan.chunks);
    p.tokens = static_cast<unsigned>(call.tokens);
    p.channels = static_cast<unsigned>(call.channels);
    p.token_bytes = p.channels * sizeof(T);
    p.chunk_tokens = plan.rows * kRow;
    const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
    p.vectors = call.channels * sizeof(T) % 16 == 0 && aligned(call.k) && aligned(call.v) && aligned(call.r) &&
                aligned(call.gy);
    p.by_slices = Divisor::make(plan.slices);
    p.by_chunks = Divisor::make(plan.chunks);
    // Doubles come first: all are aligned.
    const int64_t lanes = int64_t(p.tiles) * kLanes;
    p.sums = static_cast<State*>(workspace);
    State* end = p.sums + (plan.chunks == 1 ? 0 : (call.backward ? 4 : 2) * lanes);
    p.partials = end;
    p.references = reinterpret_cast<float*>(static_cast<SumType<T>*>(p.partials) + (call.backward ? 2 * lanes : 0));
    return p;
}

// Launches one call's kernels in order.
class Launcher {
 public:
    explicit Launcher(const Problem& p) : p_(p) {
        int device = 0, major = 0;
        C10_CUDA_CHECK(cudaGetDevice(&device));
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        programmatic_ = major >= 9;
    }

    // A kernel that goes over all tiles, of so many tensors each: as many blocks as run at the same time.
    template <typename T>
    void tiles(void (*kernel)(Problem), int tensors) {
        const int threads = p_.plan.rows * kLanes;
        int shared = threads * kSharedRowBytes, resident = 0;
        if (!kExactOnly<T>) shared += kIncomingBytes + tensors * p_.plan.rows * Staged<T>::kRowBytes;
        constexpr int kSharedWithoutAsking = 48 * 1024;
        if (shared > kSharedWithoutAsking) {
            C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        }
        C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared));
        int64_t blocks = int64_t(std::max(resident, 1)) * p_.plan.processors;
        // All tiles of a block of one slice: it then has one set of decays.
        if (blocks > p_.plan.slices) blocks -= blocks % p_.plan.slices;
        launch(kernel, std::min<int64_t>(p_.tiles, blocks), threads, shared, p_);
    }

    template <typename T>
    void carry(Phase phase) {
        launch(carry_kernel<T>, 2 * p_.call.batch * p_.plan.slices, kCarryThreads, 0, p_, phase);
    }

    // Programmatic from the second kernel on: the first follows kernels that do not take part.
    template <typename... Arguments>
    void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int shared, Arguments... arguments) {
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = p_.call.stream;
        config.attrs = &early;
        config.numAttrs = programmatic_ && launched_++ > 0 ? 1 : 0;
        C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    }

 private:
    const Problem& p_;
    int launched_ = 0;
    bool programmatic_ = false;
};

template <typename T>
void run(const Call& call, const Plan& plan, void* workspace) {
    const Problem p = make_problem<T>(call, plan, workspace);
    Launcher launcher(p);
    const bool many = plan.chunks > 1;
    if (many) {
        launcher.tiles<T>(sums_kernel<T>, 2);
        launcher.carry<T>(kForwardSums);
    }
    if (!call.backward) {
        if (call.r) {
            launcher.tiles<T>(many ? output_kernel<T, true, true> : output_kernel<T, false, true>, 3);
        } else {
            launcher.tiles<T>(many ? output_kernel<T, true, false> : output_kernel<T, false, false>, 2);
        }
        return;
    }
    if (many) {
        launcher.tiles<T>(adjoint_sums_kernel<T>, 3);
        launcher.carry<T>(kAdjointSums);
    }
    launcher.tiles<T>(many ? gradient_kernel<T, true> : gradient_kernel<T, false>, 3);
    launcher.launch(reduce_kernel<T>, plan.slices, kReduceWidth * kReduceGroups, 0, p);
}

}  // namespace bi_wkv
