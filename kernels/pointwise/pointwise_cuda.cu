// The operators of vision_rwkv/ops/pointwise.py on CUDA: float32, bfloat16, float16. float64, mixed dtypes and rows too
// long for a block run on the implementation in PyTorch.
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "divisor.cuh"
#include "pointwise/pointwise_rows.cuh"
#include "pointwise/pointwise_warps.cuh"
#include "rows.cuh"
#include "tensors.cuh"

namespace pointwise {

using namespace rows;

constexpr int kMaxShared = 48 * 1024;
constexpr int64_t kMaxChannels = 1024;  // one thread each where vectors do not fit
constexpr int kPersistent = 4;          // blocks a processor of kernels that sum over rows
constexpr int kOneGroup = 1 << 20;      // so many that each block has one group of rows

Tensor empty_like(const Tensor& x) { return at::empty(x.sizes(), x.options()); }
Tensor nothing(const Tensor& x) { return at::empty({0}, x.options()); }
bool given(const MaybeTensor& x) { return x && x->defined(); }

void check_same(const char* op, const Tensor& x, const Tensor& y) {
    TORCH_CHECK(x.sizes() == y.sizes() && x.device() == y.device(), op,
                ": expected tensors of one shape and device, got ", x.sizes(), " on ", x.device(), " and ", y.sizes(),
                " on ", y.device());
}

void check_channels(const char* op, const Tensor& x, const MaybeTensor& parameter) {
    TORCH_CHECK(!given(parameter) || (parameter->numel() == x.size(-1) && parameter->device() == x.device()), op,
                ": a parameter must have ", x.size(-1), " values on ", x.device(), ", got ",
                given(parameter) ? parameter->sizes() : x.sizes());
}

// Value by value
// -------------------------------------------------------------------------------------------------------

struct Gate {
    __device__ void operator()(const float (&in)[2], float (&out)[1]) const { out[0] = sigmoid(in[0]) * in[1]; }
};

struct GateBackward {  // of g, r, y
    __device__ void operator()(const float (&in)[3], float (&out)[2]) const {
        const float s = sigmoid(in[1]);
        out[1] = in[0] * s;
        out[0] = out[1] * in[2] * (1.0f - s);
    }
};

struct SquaredRelu {
    float limit;
    __device__ void operator()(const float (&in)[1], float (&out)[1]) const {
        const float x = in[0] < 0.0f ? 0.0f : (in[0] > limit ? limit : in[0]);  // NaN stays
        out[0] = x * x;
    }
};

struct SquaredReluBackward {  // of g, x
    float limit;
    __device__ void operator()(const float (&in)[2], float (&out)[1]) const {
        out[0] = in[1] > limit ? 0.0f : 2.0f * in[0] * (in[1] < 0.0f ? 0.0f : in[1]);
    }
};

struct SquaredReluBoth {  // of g, x: the square too
    float limit;
    __device__ void operator()(const float (&in)[2], float (&out)[2]) const {
        const float x = in[1] < 0.0f ? 0.0f : (in[1] > limit ? limit : in[1]);
        out[0] = x * x;
        out[1] = in[1] > limit ? 0.0f : 2.0f * in[0] * x;
    }
};

struct GatedBackward {  // of g, r and what the gate left
    __device__ void operator()(const float (&in)[3], float (&out)[2]) const {
        const float s = sigmoid(in[1]);
        out[0] = in[0] * in[2] * (1.0f - s);
        out[1] = in[0] * s;
    }
};

template <int kIn, int kOut, typename T>
struct Pointers {
    const T* in[kIn];
    T* out[kOut];
};

template <int kIn, int kOut, typename T, typename Function>
__global__ void __launch_bounds__(kBlock) map(Function function, Pointers<kIn, kOut, T> at, int64_t count) {
    constexpr int kVec = 16 / sizeof(T);
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVec;
    if (first >= count) return;
    float in[kIn][kVec], out[kOut][kVec];
    const bool whole = first + kVec <= count;
#pragma unroll
    for (int i = 0; i < kIn; ++i) {
        if (whole) {
            load(at.in[i] + first, in[i]);
        } else {
            for (int j = 0; j < kVec; ++j) in[i][j] = first + j < count ? to_float(at.in[i][first + j]) : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        float values[kIn], results[kOut];
#pragma unroll
        for (int i = 0; i < kIn; ++i) values[i] = in[i][j];
        function(values, results);
#pragma unroll
        for (int i = 0; i < kOut; ++i) out[i][j] = results[i];
    }
#pragma unroll
    for (int i = 0; i < kOut; ++i) {
        if (whole) {
            store(at.out[i] + first, out[i]);
        } else {
            for (int j = 0; j < kVec && first + j < count; ++j) at.out[i][first + j] = from_float<T>(out[i][j]);
        }
    }
}

// Tensors of one shape and dtype through `function`; false where there is no kernel.
template <typename Function, size_t kIn, size_t kOut>
bool mapped(const Function& function, const Tensor (&in)[kIn], const Tensor (&out)[kOut]) {
    for (const Tensor& x : in) {
        if (x.scalar_type() != in[0].scalar_type() || !has_kernel(x.scalar_type(), x.scalar_type())) return false;
    }
    const int64_t count = in[0].numel();
    if (count == 0) return true;
    Tensor inputs[kIn];
    for (size_t i = 0; i < kIn; ++i) inputs[i] = aligned(in[i]);
    const auto run = [&](auto value) {
        using T = decltype(value);
        Pointers<kIn, kOut, T> at;
        for (size_t i = 0; i < kIn; ++i) at.in[i] = data<T>(inputs[i]);
        for (size_t i = 0; i < kOut; ++i) at.out[i] = mutable_data<T>(out[i]);
        const int64_t group = kBlock * (16 / sizeof(T)), blocks = (count + group - 1) / group;
        TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many values for one launch: ", count);
        map<kIn, kOut, T>
            <<<static_cast<int>(blocks), kBlock, 0, c10::cuda::getCurrentCUDAStream()>>>(function, at, count);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    switch (in[0].scalar_type()) {
        case at::kFloat:
            run(float{});
            break;
        case at::kBFloat16:
            run(__nv_bfloat16{});
            break;
        default:
            run(__half{});
    }
    return true;
}

Tensor gate_cuda(const Tensor& r, const Tensor& y) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_same("gate", r, y);
    const Tensor out = empty_like(y);
    if (mapped(Gate{}, {r, y}, {out})) return out;
    torch::jit::Stack stack{r, y};
    call_pytorch("vision_rwkv::gate", stack);
    return stack[0].toTensor();
}

std::tuple<Tensor, Tensor> gate_backward_cuda(const Tensor& g, const Tensor& r, const Tensor& y) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_same("gate", r, y);
    check_same("gate", g, y);
    const Tensor gr = empty_like(r), gy = empty_like(y);
    if (mapped(GateBackward{}, {g, r, y}, {gr, gy})) return {gr, gy};
    torch::jit::Stack stack{g, r, y};
    call_pytorch("vision_rwkv::gate_backward", stack);
    return {stack[0].toTensor(), stack[1].toTensor()};
}

// As FLOAT16_SQUARE_MAX in pointwise.py.
float square_limit(const Tensor& x) {
    return x.scalar_type() == at::kHalf ? 255.0f : std::numeric_limits<float>::infinity();
}

Tensor squared_relu_cuda(const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor out = empty_like(x);
    if (mapped(SquaredRelu{square_limit(x)}, {x}, {out})) return out;
    torch::jit::Stack stack{x};
    call_pytorch("vision_rwkv::squared_relu", stack);
    return stack[0].toTensor();
}

Tensor& squared_relu_in_place(Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    if (!x.is_contiguous() || !is_aligned(x) || !mapped(SquaredRelu{square_limit(x)}, {x}, {x})) {
        x.copy_(squared_relu_cuda(x));
    }
    return x;
}

Tensor squared_relu_backward_cuda(const Tensor& g, const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_same("squared_relu", g, x);
    const Tensor out = empty_like(x);
    if (mapped(SquaredReluBackward{square_limit(x)}, {g, x}, {out})) return out;
    torch::jit::Stack stack{g, x};
    call_pytorch("vision_rwkv::squared_relu_backward", stack);
    return stack[0].toTensor();
}

// The gradient goes over g; the square comes back.
Tensor squared_relu_backward_in_place(Tensor& g, const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_same("squared_relu", g, x);
    const Tensor square = empty_like(x);
    if (g.is_contiguous() && is_aligned(g) && mapped(SquaredReluBoth{square_limit(x)}, {g, x}, {square, g})) {
        return square;
    }
    g.copy_(squared_relu_backward_cuda(g, x));
    return squared_relu_cuda(x);
}

// As gate_backward, from gated = sigmoid(r) * y. The gradient of r goes over g; that of y comes back.
Tensor gated_backward_in_place(Tensor& g, const Tensor& r, const Tensor& gated) {
    const c10::cuda::CUDAGuard guard(r.device());
    check_same("gate", r, gated);
    check_same("gate", g, gated);
    const Tensor gy = empty_like(gated);
    if (g.is_contiguous() && is_aligned(g) && mapped(GatedBackward{}, {g, r, gated}, {g, gy})) return gy;
    torch::jit::Stack stack{g, r, gated};
    call_pytorch("vision_rwkv::gated_backward_", stack);
    return stack[0].toTensor();
}

// Weights
// -------------------------------------------------------------------------------------------------------

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

// Patches
// -------------------------------------------------------------------------------------------------------

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

// Token by token
// -------------------------------------------------------------------------------------------------------

bool rows_fit(const Tensor& x, int64_t slots) {
    return x.dim() == 3 && x.size(2) <= kMaxChannels && x.size(0) * x.size(1) <= kMaxRows &&
           static_cast<int64_t>(sizeof(float)) * (kRowBuffer + slots * x.size(2)) <= kMaxShared;
}

// Launches kernel(how, shared bytes, part) over the rows of x and adds up `part`: the sums (slots, C) over all rows.
template <typename Launch>
Tensor over_rows(const Tensor& x, int vec, int64_t slots, const Launch& launch) {
    const int64_t channels = x.size(2);
    Layout how = layout(x.size(0) * x.size(1), channels, vec, slots ? kPersistent : kOneGroup);
    const auto bytes = [&] { return sizeof(float) * (kRowBuffer + how.threads_y * slots * channels); };
    while (how.threads_y > 1 && bytes() > kMaxShared) how.threads_y /= 2;  // rows_a_block stays a multiple
    const Tensor sums = new_floats(x, {slots, channels});
    const Tensor part = new_floats(x, {slots ? how.blocks : 0, slots, channels});
    const auto stream = c10::cuda::getCurrentCUDAStream();
    launch(how, bytes(), part.mutable_data_ptr<float>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (slots) {
        launch_sum_parts(part.const_data_ptr<float>(), how.blocks, slots * channels, sums.mutable_data_ptr<float>(),
                         stream);
    }
    return sums;
}

// A row of sums as the gradient of a parameter.
Tensor gradient(const Tensor& sums, int64_t slot, const Tensor& parameter) {
    const Tensor sum = sums.select(0, slot);
    return (sum.scalar_type() == parameter.scalar_type() ? sum.clone() : sum.to(parameter.scalar_type()))
        .view(parameter.sizes());
}

struct Branch {
    Branch(const Tensor& z_, const MaybeTensor& gate_, const MaybeTensor& weight_, const MaybeTensor& bias_,
           const MaybeTensor& gamma_, const MaybeTensor& scale_, double eps)
        : z(aligned(z_)),
          weight(parameter(weight_)),
          bias(parameter(bias_)),
          gamma(parameter(gamma_)),
          scale(parameter(scale_)) {
        if (given(gate_)) gate = aligned(*gate_);
        args.rows = static_cast<int>(z.size(0) * z.size(1)), args.tokens = static_cast<int>(z.size(1));
        args.channels = static_cast<int>(z.size(2)), args.eps = static_cast<float>(eps);
        args.weight = floats(weight), args.bias = floats(bias), args.gamma = floats(gamma), args.scale = floats(scale);
    }
    Tensor z, gate, weight, bias, gamma, scale;
    RowArgs args{};
};

void check_branch(const Tensor& x, const Tensor& z, const MaybeTensor& gate, const MaybeTensor& weight,
                  const MaybeTensor& bias, const MaybeTensor& gamma, const MaybeTensor& scale) {
    TORCH_CHECK(x.dim() == 3, "residual: x must have shape (B, T, C), got ", x.sizes());
    check_same("residual", x, z);
    if (given(gate)) check_same("residual", x, *gate);
    TORCH_CHECK(given(weight) == given(bias), "residual: expected weight and bias, or neither");
    for (const MaybeTensor* p : {&weight, &bias, &gamma}) check_channels("residual", x, *p);
    TORCH_CHECK(!given(scale) || (scale->numel() == x.size(0) && scale->device() == x.device()),
                "residual: scale must have ", x.size(0), " values on ", x.device());
}

bool branch_runs_here(const Tensor& x, const Tensor& z, const MaybeTensor& gate, int64_t slots) {
    return has_kernel(x.scalar_type(), z.scalar_type()) && rows_fit(x, slots) &&
           (!given(gate) || gate->scalar_type() == z.scalar_type());
}

std::tuple<Tensor, Tensor> residual_cuda(const Tensor& x, const Tensor& z, const MaybeTensor& gate,
                                         const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& gamma,
                                         const MaybeTensor& scale, double eps, std::optional<double> stats_eps) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_branch(x, z, gate, weight, bias, gamma, scale);
    if (x.numel() != 0 && !branch_runs_here(x, z, gate, 0)) {
        torch::jit::Stack stack{x, z, gate, weight, bias, gamma, scale, eps, stats_eps};
        call_pytorch("vision_rwkv::residual", stack);
        return {stack[0].toTensor(), stack[1].toTensor()};
    }
    const Tensor out = empty_like(x);
    const Tensor stats = stats_eps ? new_floats(x, {x.size(0), x.size(1), 2}) : nothing(x);
    if (x.numel() == 0) return {out, stats};
    Branch in(z, gate, weight, bias, gamma, scale, eps);
    in.args.stats_eps = static_cast<float>(stats_eps.value_or(0.0));
    const Tensor stream_in = aligned(x);
    for_types(x.scalar_type(), z.scalar_type(), x.size(2) % 4 == 0, [&](auto token, auto branch, auto vec) {
        using X = decltype(token);
        using Z = decltype(branch);
        float* stats_out = stats_eps ? mutable_data<float>(stats) : nullptr;
        if constexpr (vec == 4) {
            for_warps(in.args.channels, [&](auto width, auto parts) {
                residual_warps<X, Z, width, parts>
                    <<<warp_grid(in.args.rows), warp_block(), 0, c10::cuda::getCurrentCUDAStream()>>>(
                        in.args, data<X>(stream_in), data<Z>(in.z), data<Z>(in.gate), mutable_data<X>(out), stats_out);
            });
            C10_CUDA_KERNEL_LAUNCH_CHECK();
        } else {
            over_rows(x, vec, 0, [&](const Layout& how, size_t bytes, float*, cudaStream_t stream) {
                residual_rows<X, Z, vec><<<how.blocks, how.block(), bytes, stream>>>(
                    in.args, data<X>(stream_in), data<Z>(in.z), data<Z>(in.gate), mutable_data<X>(out), stats_out);
            });
        }
    });
    return {out, stats};
}

std::tuple<Tensor, Tensor> norm_tokens_cuda(const Tensor& z, const MaybeTensor& position, const Tensor& weight,
                                            const Tensor& bias, double eps, std::optional<double> stats_eps,
                                            at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(z.device());
    TORCH_CHECK(z.dim() == 3, "norm_tokens: z must have shape (B, T, C), got ", z.sizes());
    check_channels("norm_tokens", z, weight);
    check_channels("norm_tokens", z, bias);
    TORCH_CHECK(!given(position) || (position->numel() == z.size(1) * z.size(2) && position->device() == z.device()),
                "norm_tokens: position must have shape (1, T, C), got ",
                given(position) ? position->sizes() : z.sizes());
    if (z.numel() == 0 || !has_kernel(dtype, z.scalar_type()) || !rows_fit(z, 0) || z.size(2) % 4 != 0) {
        torch::jit::Stack stack{z, position, weight, bias, eps, stats_eps, static_cast<int64_t>(dtype)};
        call_pytorch("vision_rwkv::norm_tokens", stack);
        return {stack[0].toTensor(), stack[1].toTensor()};
    }
    const Tensor out = at::empty(z.sizes(), z.options().dtype(dtype));
    const Tensor stats = stats_eps ? new_floats(z, {z.size(0), z.size(1), 2}) : nothing(out);
    Branch in(z, {}, weight, bias, {}, {}, eps);
    in.args.stats_eps = static_cast<float>(stats_eps.value_or(0.0));
    const Tensor positions = parameter(position);
    for_types(dtype, z.scalar_type(), true, [&](auto token, auto branch, auto) {
        using X = decltype(token);
        using Z = decltype(branch);
        for_warps(in.args.channels, [&](auto width, auto parts) {
            norm_warps<X, Z, width, parts>
                <<<warp_grid(in.args.rows), warp_block(), 0, c10::cuda::getCurrentCUDAStream()>>>(
                    in.args, data<Z>(in.z), floats(positions), mutable_data<X>(out),
                    stats_eps ? mutable_data<float>(stats) : nullptr);
        });
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {out, stats};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five residual_backward_cuda(const Tensor& g, const Tensor& z, const MaybeTensor& gate, const MaybeTensor& weight,
                            const MaybeTensor& bias, const MaybeTensor& gamma, const MaybeTensor& scale, double eps) {
    const c10::cuda::CUDAGuard guard(g.device());
    check_branch(g, z, gate, weight, bias, gamma, scale);
    const int64_t slots = (given(weight) ? 2 : 0) + (given(gamma) ? 1 : 0);
    if (g.numel() != 0 && !branch_runs_here(g, z, gate, slots)) {
        torch::jit::Stack stack{g, z, gate, weight, bias, gamma, scale, eps};
        call_pytorch("vision_rwkv::residual_backward", stack);
        return Five(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor(),
                    stack[4].toTensor());
    }
    const Tensor gz = empty_like(z), ggate = given(gate) ? empty_like(*gate) : nothing(z);
    Tensor sums;
    if (g.numel() == 0) {
        sums = new_floats(g, {slots, g.size(2)}).zero_();
    } else {
        const Branch in(z, gate, weight, bias, gamma, scale, eps);
        const Tensor grad = aligned(g);
        for_types(g.scalar_type(), z.scalar_type(), g.size(2) % 4 == 0, [&](auto token, auto branch, auto vec) {
            using X = decltype(token);
            using Z = decltype(branch);
            sums = over_rows(g, vec, slots, [&](const Layout& how, size_t bytes, float* part, cudaStream_t stream) {
                residual_rows_backward<X, Z, vec><<<how.blocks, how.block(), bytes, stream>>>(
                    in.args, static_cast<int>(how.rows_a_block), data<X>(grad), data<Z>(in.z), data<Z>(in.gate),
                    mutable_data<Z>(gz), given(gate) ? mutable_data<Z>(ggate) : nullptr, part);
            });
        });
    }
    const int64_t gamma_slot = given(weight) ? 2 : 0;
    return Five(gz, ggate, given(weight) ? gradient(sums, 0, *weight) : nothing(z),
                given(bias) ? gradient(sums, 1, *bias) : nothing(z),
                given(gamma) ? gradient(sums, gamma_slot, *gamma) : nothing(z));
}

Tensor log_decay_cuda(const Tensor& raw, const Tensor& base) {
    const c10::cuda::CUDAGuard guard(raw.device());
    check_channels("log_decay", raw, base);
    if (!has_kernel(raw.scalar_type(), raw.scalar_type()) || base.scalar_type() == at::kDouble || !rows_fit(raw, 0)) {
        torch::jit::Stack stack{raw, base};
        call_pytorch("vision_rwkv::log_decay", stack);
        return stack[0].toTensor();
    }
    const Tensor out = new_floats(raw, raw.sizes());
    if (raw.numel() == 0) return out;
    const Branch in(raw, {}, base, {}, {}, {}, 0);
    for_types(raw.scalar_type(), raw.scalar_type(), raw.size(2) % 4 == 0, [&](auto, auto value, auto vec) {
        using T = decltype(value);
        over_rows(raw, vec, 0, [&](const Layout& how, size_t bytes, float*, cudaStream_t stream) {
            log_decay_rows<T, vec>
                <<<how.blocks, how.block(), bytes, stream>>>(in.args, data<T>(in.z), mutable_data<float>(out));
        });
    });
    return out;
}

std::tuple<Tensor, Tensor> log_decay_backward_cuda(const Tensor& g, const Tensor& w, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(w.device());
    check_same("log_decay", g, w);
    if (w.scalar_type() != at::kFloat || g.scalar_type() != at::kFloat || !has_kernel(dtype, dtype) ||
        !rows_fit(w, 1)) {
        torch::jit::Stack stack{g, w, static_cast<int64_t>(dtype)};
        call_pytorch("vision_rwkv::log_decay_backward", stack);
        return {stack[0].toTensor(), stack[1].toTensor()};
    }
    const Tensor graw = at::empty(w.sizes(), w.options().dtype(dtype));
    if (w.numel() == 0) return {graw, new_floats(w, {w.size(2)}).zero_()};
    const Branch in(w, {}, {}, {}, {}, {}, 0);
    const Tensor grad = aligned(g);
    Tensor sums;
    for_types(dtype, dtype, w.size(2) % 4 == 0, [&](auto, auto value, auto vec) {
        using T = decltype(value);
        sums = over_rows(w, vec, 1, [&](const Layout& how, size_t bytes, float* part, cudaStream_t stream) {
            log_decay_rows_backward<T, vec><<<how.blocks, how.block(), bytes, stream>>>(
                in.args, static_cast<int>(how.rows_a_block), data<float>(grad), data<float>(in.z),
                mutable_data<T>(graw), part);
        });
    });
    return {graw, sums.view({w.size(2)})};
}

void check_heads(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias, int64_t heads) {
    TORCH_CHECK(y.dim() == 3 && heads > 0 && y.size(2) % heads == 0,
                "norm_gate: y must have shape (B, T, C), C a multiple of the heads, got ", y.sizes());
    check_same("norm_gate", y, gate);
    check_channels("norm_gate", y, weight);
    check_channels("norm_gate", y, bias);
}

bool heads_run_here(const Tensor& y, const Tensor& gate, int64_t heads) {
    return has_kernel(y.scalar_type(), gate.scalar_type()) && rows_fit(y, 2) && y.size(2) == heads * kHead;
}

Tensor norm_gate_cuda(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias, int64_t heads,
                      double eps, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_heads(y, gate, weight, bias, heads);
    if (!heads_run_here(y, gate, heads) || dtype != gate.scalar_type()) {
        torch::jit::Stack stack{y, gate, weight, bias, heads, eps, static_cast<int64_t>(dtype)};
        call_pytorch("vision_rwkv::norm_gate", stack);
        return stack[0].toTensor();
    }
    const Tensor out = empty_like(gate);
    if (y.numel() == 0) return out;
    const Branch in(y, gate, weight, bias, {}, {}, eps);
    for_types(y.scalar_type(), gate.scalar_type(), true, [&](auto value, auto factor, auto) {
        using Y = decltype(value);
        using G = decltype(factor);
        over_rows(y, 4, 0, [&](const Layout& how, size_t bytes, float*, cudaStream_t stream) {
            norm_gate_rows<Y, G><<<how.blocks, how.block(), bytes, stream>>>(in.args, data<Y>(in.z), data<G>(in.gate),
                                                                             mutable_data<G>(out));
        });
    });
    return out;
}

bool heads_backward_runs_here(const Tensor& g, const Tensor& y, const Tensor& gate, int64_t heads) {
    return heads_run_here(y, gate, heads) && g.scalar_type() == gate.scalar_type();
}

// The gradient of the gate goes to ggate, which is contiguous, aligned and of its dtype.
std::tuple<Tensor, Tensor, Tensor> run_norm_gate_backward(const Tensor& g, const Tensor& y, const Tensor& gate,
                                                          const Tensor& weight, const Tensor& bias, double eps,
                                                          const Tensor& ggate) {
    const Tensor gy = empty_like(y);
    Tensor sums;
    if (y.numel() == 0) {
        sums = new_floats(y, {2, y.size(2)}).zero_();
    } else {
        const Branch in(y, gate, weight, bias, {}, {}, eps);
        const Tensor grad = aligned(g);
        for_types(y.scalar_type(), gate.scalar_type(), true, [&](auto value, auto factor, auto) {
            using Y = decltype(value);
            using G = decltype(factor);
            sums = over_rows(y, 4, 2, [&](const Layout& how, size_t bytes, float* part, cudaStream_t stream) {
                norm_gate_rows_backward<Y, G><<<how.blocks, how.block(), bytes, stream>>>(
                    in.args, static_cast<int>(how.rows_a_block), data<G>(grad), data<Y>(in.z), data<G>(in.gate),
                    mutable_data<Y>(gy), mutable_data<G>(ggate), part);
            });
        });
    }
    return {gy, gradient(sums, 0, weight), gradient(sums, 1, bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_gate_backward_cuda(const Tensor& g, const Tensor& y, const Tensor& gate,
                                                                   const Tensor& weight, const Tensor& bias,
                                                                   int64_t heads, double eps) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_heads(y, gate, weight, bias, heads);
    check_same("norm_gate", g, y);
    if (!heads_backward_runs_here(g, y, gate, heads)) {
        torch::jit::Stack stack{g, y, gate, weight, bias, heads, eps};
        call_pytorch("vision_rwkv::norm_gate_backward", stack);
        return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor()};
    }
    const Tensor ggate = empty_like(gate);
    const auto [gy, gweight, gbias] = run_norm_gate_backward(g, y, gate, weight, bias, eps, ggate);
    return {gy, ggate, gweight, gbias};
}

std::tuple<Tensor, Tensor, Tensor> norm_gate_backward_into(const Tensor& g, const Tensor& y, const Tensor& gate,
                                                           const Tensor& weight, const Tensor& bias, int64_t heads,
                                                           double eps, Tensor& ggate) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_heads(y, gate, weight, bias, heads);
    check_same("norm_gate", g, y);
    check_same("norm_gate", ggate, gate);
    if (heads_backward_runs_here(g, y, gate, heads) && ggate.scalar_type() == gate.scalar_type() &&
        ggate.is_contiguous() && is_aligned(ggate)) {
        return run_norm_gate_backward(g, y, gate, weight, bias, eps, ggate);
    }
    const auto [gy, found, gweight, gbias] = norm_gate_backward_cuda(g, y, gate, weight, bias, heads, eps);
    ggate.copy_(found);
    return {gy, gweight, gbias};
}

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("cast_weights", cast_weights_cuda);
    m.impl("gate", gate_cuda);
    m.impl("gate_backward", gate_backward_cuda);
    m.impl("squared_relu", squared_relu_cuda);
    m.impl("squared_relu_", squared_relu_in_place);
    m.impl("squared_relu_backward", squared_relu_backward_cuda);
    m.impl("squared_relu_backward_", squared_relu_backward_in_place);
    m.impl("gated_backward_", gated_backward_in_place);
    m.impl("norm_tokens", norm_tokens_cuda);
    m.impl("patches", patches_cuda);
    m.impl("residual", residual_cuda);
    m.impl("residual_backward", residual_backward_cuda);
    m.impl("log_decay", log_decay_cuda);
    m.impl("log_decay_backward", log_decay_backward_cuda);
    m.impl("norm_gate", norm_gate_cuda);
    m.impl("norm_gate_backward", norm_gate_backward_cuda);
    m.impl("norm_gate_backward_", norm_gate_backward_into);
}

}  // namespace pointwise
