// What matrix products take, on CUDA: weights in their dtype, and an image's patches. Other dtypes and sizes run on the
// implementation in PyTorch.
#include <vector>

#include "divisor.cuh"
#include "rows.cuh"
#include "tensors.cuh"

namespace pointwise {

using namespace rows;

constexpr int kMostWeights = 8, kCastValues = 8;  // of a launch; of a thread

struct CastArgs {
    const float* from[kMostWeights];
    void* to[kMostWeights];
    int64_t sizes[kMostWeights];
    int first_blocks[kMostWeights + 1];  // a block serves one weight
};

template <typename T>
__global__ void cast_blocks(const __grid_constant__ CastArgs args) {
    int i = 0;
    while (static_cast<int>(blockIdx.x) >= args.first_blocks[i + 1]) ++i;
    const int64_t block = blockIdx.x - args.first_blocks[i];
    const int64_t at = (block * kBlock + threadIdx.x) * kCastValues;
    const float* from = args.from[i];
    T* to = static_cast<T*>(args.to[i]);
    if (at + kCastValues <= args.sizes[i]) {
        float values[kCastValues];
        load(from + at, values);
        store(to + at, values);
    } else {
        for (int64_t j = at; j < args.sizes[i]; ++j) to[j] = from_float<T>(from[j]);
    }
}

std::vector<Tensor> cast_weights_cuda(at::TensorList weights, at::ScalarType dtype, int64_t stacked) {
    CastArgs args{};
    bool one_launch = weights.size() <= kMostWeights && (dtype == at::kBFloat16 || dtype == at::kHalf);
    for (size_t i = 0; i < weights.size() && one_launch; ++i) {
        const Tensor& weight = weights[i];
        one_launch = weight.scalar_type() == at::kFloat && weight.is_contiguous() &&
                     reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % (kCastValues * sizeof(float)) == 0 &&
                     weight.device() == weights[0].device() &&
                     (static_cast<int64_t>(i) >= stacked ||
                      (weight.sizes() == weights[0].sizes() && weight.numel() % kCastValues == 0));
    }
    if (!one_launch || stacked < 0 || stacked > static_cast<int64_t>(weights.size())) {
        torch::jit::Stack stack{weights.vec(), static_cast<int64_t>(dtype), stacked};
        call_pytorch("vision_rwkv::cast_weights", stack);
        return stack[0].toTensorVector();
    }
    const c10::cuda::CUDAGuard guard(weights[0].device());
    std::vector<Tensor> out;
    const auto add = [&](at::IntArrayRef sizes) {
        out.push_back(at::empty(sizes, weights[0].options().dtype(dtype)));
        return static_cast<char*>(out.back().mutable_data_ptr());
    };
    char* stack = nullptr;
    if (stacked > 0) {
        at::DimVector sizes{stacked};
        sizes.append(weights[0].sizes().begin(), weights[0].sizes().end());
        stack = add(sizes);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
        const bool inside = static_cast<int64_t>(i) < stacked;
        args.from[i] = weights[i].const_data_ptr<float>();
        args.to[i] = inside ? stack + i * weights[0].nbytes() / 2 : add(weights[i].sizes());
        args.sizes[i] = weights[i].numel();
        const int64_t values = kBlock * kCastValues;
        args.first_blocks[i + 1] = args.first_blocks[i] + static_cast<int>((args.sizes[i] + values - 1) / values);
    }
    const int blocks = args.first_blocks[weights.size()];
    if (blocks == 0) return out;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (dtype == at::kHalf) {
        cast_blocks<__half><<<blocks, kBlock, 0, stream>>>(args);
    } else {
        cast_blocks<__nv_bfloat16><<<blocks, kBlock, 0, stream>>>(args);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

constexpr int kPixels = 8;  // of a thread, in a patch's row

struct PatchArgs {
    unsigned groups;                                                  // of kPixels, in all patches
    int64_t height, width;                                            // in pixels
    Divisor by_patch, by_row, by_side, by_patches, by_patches_a_row;  // groups of a patch and of its row; and so on
    int channels, side;
};

// (B, channels, height, width) -> (B, patches, channels * side * side), each patch channel by channel, row by row.
template <typename X, typename Out>
__global__ void __launch_bounds__(kBlock) order_patches(const PatchArgs args, const X* x, Out* out) {
    const unsigned group = blockIdx.x * kBlock + threadIdx.x;
    if (group >= args.groups) return;
    const unsigned patch = args.by_patch.divide(group), in_patch = group - patch * args.by_patch.by;
    const unsigned line = args.by_row.divide(in_patch), column = (in_patch - line * args.by_row.by) * kPixels;
    const unsigned channel = args.by_side.divide(line), row = line - channel * args.side;
    const unsigned sample = args.by_patches.divide(patch), place = patch - sample * args.by_patches.by;
    const unsigned above = args.by_patches_a_row.divide(place), left = place - above * args.by_patches_a_row.by;
    const int64_t plane = static_cast<int64_t>(sample) * args.channels + channel;
    float values[kPixels];
    load(x + (plane * args.height + above * args.side + row) * args.width + left * args.side + column, values);
    store(out + static_cast<int64_t>(group) * kPixels, values);
}

Tensor patches_cuda(const Tensor& x, int64_t side, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(x.device());
    TORCH_CHECK(x.dim() == 4 && side > 0 && x.size(2) % side == 0 && x.size(3) % side == 0,
                "patches: x must have shape (B, C, H, W), H and W multiples of ", side, ", got ", x.sizes());
    const int64_t groups = x.numel() / kPixels;
    if (!has_kernel(x.scalar_type(), dtype) || side % kPixels != 0 || groups == 0 || groups > kMaxRows) {
        torch::jit::Stack stack{x, side, static_cast<int64_t>(dtype)};
        call_pytorch("vision_rwkv::patches", stack);
        return stack[0].toTensor();
    }
    const int64_t down = x.size(2) / side, across = x.size(3) / side, values = x.size(1) * side * side;
    const Tensor in = aligned(x), out = at::empty({x.size(0), down * across, values}, x.options().dtype(dtype));
    PatchArgs args{};
    args.groups = static_cast<unsigned>(groups), args.height = x.size(2), args.width = x.size(3);
    args.by_patch = Divisor::make(values / kPixels), args.by_row = Divisor::make(side / kPixels);
    args.by_side = Divisor::make(side), args.by_patches = Divisor::make(down * across);
    args.by_patches_a_row = Divisor::make(across);
    args.channels = static_cast<int>(x.size(1)), args.side = static_cast<int>(side);
    for_types(x.scalar_type(), dtype, false, [&](auto pixel, auto result, auto) {
        using X = decltype(pixel);
        using Out = decltype(result);
        order_patches<X, Out><<<(args.groups + kBlock - 1) / kBlock, kBlock, 0, c10::cuda::getCurrentCUDAStream()>>>(
            args, data<X>(in), mutable_data<Out>(out));
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("cast_weights", cast_weights_cuda);
    m.impl("patches", patches_cuda);
}

}  // namespace pointwise
