// How a call is cut into tiles and launched; each dtype's file instantiates make_plan and run.
#pragma once

#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

#include "bi_wkv/bi_wkv_cuda_one_pass.cuh"

namespace bi_wkv {

constexpr int kFewestRows = 4;          // smaller tiles would mostly exchange sums
constexpr int kTilesPerProcessor = 2;   // of a long sequence, at least, if that leaves such tiles
constexpr int64_t kMostTogether = 128;  // tiles of a sequence in one pass: each reads the sums of all others

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

using Kernel = void (*)(Problem);

// Blocks that run at the same time. What CUDA answers is kept: asking takes a microsecond.
inline int64_t resident_blocks(Kernel kernel, const Plan& plan, int shared) {
    int device = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    static thread_local std::map<std::tuple<int, Kernel, int, int>, int64_t> known;
    const std::tuple key(device, kernel, plan.rows, shared);
    if (const auto place = known.find(key); place != known.end()) return place->second;
    cudaFuncAttributes allowed{};
    C10_CUDA_CHECK(cudaFuncGetAttributes(&allowed, kernel));
    if (shared > allowed.maxDynamicSharedSizeBytes) {  // 48 KB without asking
        C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
    int resident = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.rows * kLanes, shared));
    return known[key] = int64_t(resident) * plan.processors;
}

inline int tensors_of(const Call& call) { return call.backward || call.r ? 3 : 2; }

// Bytes of shared memory of a block that copies so many tensors.
template <typename T>
int shared_bytes(const Plan& plan, int tensors) {
    if (kExactOnly<T>) return plan.rows * kLanes * kSharedRowBytes;
    return plan.shared_before_stages + plan.stages * tensors * plan.rows * kRow * Staged<T>::kToken;
}

// How many tiles are copied ahead: two, if as many blocks run at the same time. Returns that number of blocks.
template <typename T>
int64_t plan_stages(const Call& call, Kernel kernel, Plan& plan) {
    plan.shared_before_stages = plan.rows * kLanes * kSharedRowBytes + kIncomingBytes;
    plan.stages = 1;
    const int64_t resident = resident_blocks(kernel, plan, shared_bytes<T>(plan, tensors_of(call)));
    plan.stages = kMostStages;
    const int shared = shared_bytes<T>(plan, tensors_of(call));
    if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
        resident_blocks(kernel, plan, shared) < resident) {
        plan.stages = 1;
    }
    return resident;
}

// The kernel that writes the results.
template <typename T>
Kernel last_kernel(const Call& call, bool many) {
    if (call.backward) return many ? gradient_kernel<T, true> : gradient_kernel<T, false>;
    if (call.r) return many ? output_kernel<T, true, true> : output_kernel<T, false, true>;
    return many ? output_kernel<T, true, false> : output_kernel<T, false, false>;
}

template <typename T>
Kernel one_pass_kernel(const Call& call) {
    if (call.backward) return one_pass_gradient_kernel<T>;
    return call.r ? one_pass_output_kernel<T, true> : one_pass_output_kernel<T, false>;
}

// Rows of a tile where sequences are cut into several and several kernels go over them: fewer than the most if there
// would be too few tiles.
inline int rows_of_many(const Call& call, const Plan& plan) {
    const auto chunks = [&](int rows) { return divide_up(call.tokens, rows * kRow); };
    int rows = kMaxRowsOfMany;
    while (rows > kFewestRows && call.batch * plan.slices * chunks(rows) < kTilesPerProcessor * plan.processors)
        rows -= 2;
    const int64_t balanced = 2 * divide_up(divide_up(call.tokens, chunks(rows)), 2 * kRow);
    return static_cast<int>(std::max<int64_t>(kFewestRows, balanced));
}

// Whether a long sequence's tiles can be on chip at the same time; then sets what the kernel needs for that. Of all
// sizes of a tile it takes the one with which the busiest processor has least to do, counted in rows: a tile's rows,
// the messages of the sequence, of which kMessages cost about as much as a row, and kWaiting rows of waiting each turn.
template <typename T>
bool plan_one_pass(const Call& call, Plan& plan) {
    if (!attribute(cudaDevAttrCooperativeLaunch)) return false;
    constexpr int64_t kMessages = 25, kWaiting = 8;
    int64_t least = std::numeric_limits<int64_t>::max();
    Plan best{};
    for (plan.rows = kMaxRows; plan.rows >= kFewestRows; plan.rows -= 2) {
        const int64_t chunks = divide_up(call.tokens, plan.rows * kRow), tiles = call.batch * plan.slices * chunks;
        const int64_t resident = plan_stages<T>(call, one_pass_kernel<T>(call), plan);
        if (chunks > std::min(resident, kMostTogether)) break;
        const int64_t turns = divide_up(tiles, resident);
        const int64_t work = plan.rows * kMessages + chunks,
                      cost = divide_up(tiles, plan.processors) * work + turns * kWaiting * kMessages;
        if (cost >= least) continue;
        least = cost;
        best = plan;
        while (best.slices % best.group != 0 || best.group * chunks > resident) --best.group;
        best.blocks = static_cast<int>(std::max(divide_up(tiles, turns), best.group * chunks));
    }
    plan = best.blocks > 0 ? best : plan;
    return best.blocks > 0;
}

template <typename T>
Plan make_plan(const Call& call) {
    Plan plan{};
    plan.processors = attribute(cudaDevAttrMultiProcessorCount);
    plan.group = plan.slices = static_cast<int>(divide_up(call.channels, kLanes));
    plan.stages = 1;
    const bool many = call.tokens > kMaxRows * kRow;
    plan.rows = static_cast<int>(std::min<int64_t>(kMaxRows, 2 * divide_up(call.tokens, 2 * kRow)));
    if constexpr (kExactOnly<T>) {
        if (many) plan.rows = rows_of_many(call, plan);
    } else if (!many) {
        plan_stages<T>(call, last_kernel<T>(call, false), plan);
    } else if (!plan_one_pass<T>(call, plan)) {
        plan.rows = rows_of_many(call, plan);
        plan_stages<T>(call, last_kernel<T>(call, true), plan);
    }
    const int64_t chunks = divide_up(call.tokens, plan.rows * kRow), tiles = call.batch * plan.slices * chunks;
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    TORCH_CHECK(tiles < kMost && call.tokens < kMost, "bi_wkv: the tensors are too large");
    plan.chunks = static_cast<int>(chunks);
    const int64_t of_tile = many ? kLanes * ((call.backward ? 4 : 2) * sizeof(State) + sizeof(float)) : 0;
    const int64_t messages = plan.blocks > 0 ? kLanes * (call.backward ? 4 : 2) * sizeof(Message) : 0;
    plan.workspace = tiles * (messages + of_tile + (call.backward ? kReduceWidth * sizeof(SumType<T>) : 0));
    return plan;
}

// How the copy engine finds a tile of a tensor.
template <typename T>
CUtensorMap tensor_map(const Call& call, const void* tensor, int tokens) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        C10_CUDA_CHECK(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
        TORCH_CHECK(found == cudaDriverEntryPointSuccess, "bi_wkv: the CUDA driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    const CUtensorMapDataType type = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[] = {cuuint64_t(call.channels), cuuint64_t(call.tokens), cuuint64_t(call.batch)};
    const cuuint64_t strides[] = {sizes[0] * sizeof(T), sizes[0] * sizes[1] * sizeof(T)};
    const cuuint32_t box[] = {kLanes, cuuint32_t(tokens), 1}, steps[] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result =
        encode(&map, type, 3, const_cast<void*>(tensor), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCH_CHECK(result == CUDA_SUCCESS, "bi_wkv: cuTensorMapEncodeTiled failed with error ", int(result));
    return map;
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
    if constexpr (!kExactOnly<T>) {
        if (p.vectors && attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
            const void* tensors[] = {call.k, call.v, call.backward ? call.gy : call.r};
            for (int i = 0; i < tensors_of(call); ++i) p.maps[i] = tensor_map<T>(call, tensors[i], p.chunk_tokens);
        }
    }
    p.by_group = Divisor::make(plan.group);
    p.by_chunks = Divisor::make(plan.chunks);
    p.by_groups = Divisor::make(plan.slices / plan.group);
    // The largest types come first: all are aligned.
    const int64_t lanes = int64_t(p.tiles) * kLanes, sums = (call.backward ? 4 : 2) * lanes;
    p.messages = static_cast<Message*>(workspace);
    p.sums = reinterpret_cast<State*>(p.messages + (plan.blocks == 0 ? 0 : sums));
    State* end = p.sums + (plan.chunks == 1 ? 0 : sums);
    p.partials = end;
    p.references = reinterpret_cast<float*>(static_cast<SumType<T>*>(p.partials) + (call.backward ? 2 * lanes : 0));
    return p;
}

// Launches one call's kernels in order.
class Launcher {
 public:
    explicit Launcher(const Problem& p) : p_(p) {}

    // A kernel that goes over all tiles, of so many tensors each: as many blocks as run at the same time.
    template <typename T>
    void tiles(Kernel kernel, int tensors) {
        const int shared = shared_bytes<T>(p_.plan, tensors);
        int64_t blocks = std::max<int64_t>(1, resident_blocks(kernel, p_.plan, shared));
        // All tiles of a block of one slice: it then has one set of decays.
        if (blocks > p_.plan.slices) blocks -= blocks % p_.plan.slices;
        launch(kernel, std::min<int64_t>(p_.tiles, blocks), p_.plan.rows * kLanes, shared, p_);
    }

    // The kernel whose blocks all have to run at the same time.
    template <typename T>
    void one_pass() {
        together_ = true;
        launch(one_pass_kernel<T>(p_.call), p_.plan.blocks, p_.plan.rows * kLanes,
               shared_bytes<T>(p_.plan, tensors_of(p_.call)), p_);
        together_ = false;
    }

    template <typename T>
    void carry(Phase phase) {
        launch(carry_kernel<T>, 2 * p_.call.batch * p_.plan.slices, kCarryThreads, 0, p_, phase);
    }

    // Programmatic from the second kernel on, on devices that know it: the first follows kernels that do not take part.
    template <typename... Arguments>
    void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int shared, Arguments... arguments) {
        cudaLaunchAttribute how{};
        if (together_) {
            how.id = cudaLaunchAttributeCooperative;
            how.val.cooperative = 1;
        } else {
            how.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            how.val.programmaticStreamSerializationAllowed = 1;
        }
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = p_.call.stream;
        config.attrs = &how;
        config.numAttrs = together_ || (programmatic_ && launched_ > 0) ? 1 : 0;
        ++launched_;
        C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    }

 private:
    const Problem& p_;
    int launched_ = 0;
    bool together_ = false, programmatic_ = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
};

template <typename T>
void run(const Call& call, const Plan& plan, void* workspace) {
    const Problem p = make_problem<T>(call, plan, workspace);
    Launcher launcher(p);
    if constexpr (!kExactOnly<T>) {
        if (plan.blocks > 0) {
            launcher.one_pass<T>();
            if (call.backward) launcher.launch(reduce_kernel<T>, plan.slices, kReduceWidth * kReduceGroups, 0, p);
            return;
        }
    }
    const bool many = plan.chunks > 1;
    if (many) {
        launcher.tiles<T>(sums_kernel<T>, 2);
        launcher.carry<T>(kForwardSums);
    }
    if (!call.backward) {
        return launcher.tiles<T>(last_kernel<T>(call, many), tensors_of(call));
    }
    if (many) {
        launcher.tiles<T>(adjoint_sums_kernel<T>, 3);
        launcher.carry<T>(kAdjointSums);
    }
    launcher.tiles<T>(last_kernel<T>(call, many), 3);
    launcher.launch(reduce_kernel<T>, plan.slices, kReduceWidth * kReduceGroups, 0, p);
}

}  // namespace bi_wkv
