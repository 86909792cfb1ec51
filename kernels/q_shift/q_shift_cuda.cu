// Q-Shift with its mixes on CUDA, and the statistics of the norm in front: float32, bfloat16, float16. float64 and rows
// too long for a block run on the implementation in PyTorch.
#include <array>
#include <tuple>

#include "q_shift/q_shift_cuda_backward.cuh"
#include "q_shift/q_shift_cuda_common.cuh"
#include "q_shift/q_shift_cuda_parts.cuh"
#include "q_shift/q_shift_cuda_teams.cuh"
#include "tensors.cuh"

namespace q_shift {

constexpr int kTokens = 4;  // of a thread in the forward pass, in flight together

// The mixes of a row: `mix`, less delta where there is one.
template <int kVec, typename D>
__device__ __forceinline__ void load_mix(const float (&mix)[kVec], const D* delta, int64_t at, float (&to)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = 0;
    if (delta) load(delta + at, to);
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = mix[j] - to[j];
}

template <typename X, typename Out, int kVec>
__global__ void __launch_bounds__(kBlock) mix_tokens(const Args args, const X* x, const Out* delta, Out* out) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * kVec;
    if (channel >= args.channels) return;
    const Step step = args.place.step(channel);
    float weight[kVec], bias[kVec], own[kTokens][kVec], far[kTokens][kVec];
    load_parameter(args.weight, channel, 1.0f, weight);
    load_parameter(args.bias, channel, 0.0f, bias);
    const int first = blockIdx.x * blockDim.y * kTokens + threadIdx.y;
    // All that is read of the tokens is asked for before any of it is used. What is not there is read elsewhere, and
    // dropped.
    Pack<X, kVec> here[kTokens], there[kTokens];
    float2 stats[kTokens], far_stats[kTokens];
    bool inside[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const int row = min(first + k * static_cast<int>(blockDim.y), args.rows - 1);
        const Neighbours found = args.place.neighbours(row, step);
        const int source = row + (found.source ? found.offset : 0);
        inside[k] = found.source;
        here[k] = *reinterpret_cast<const Pack<X, kVec>*>(x + static_cast<int64_t>(row) * args.channels + channel);
        there[k] = *reinterpret_cast<const Pack<X, kVec>*>(x + static_cast<int64_t>(source) * args.channels + channel);
        const float2* all = reinterpret_cast<const float2*>(args.stats);
        stats[k] = all ? all[row] : make_float2(0, 1);
        far_stats[k] = all ? all[source] : make_float2(0, 1);
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            own[k][j] = (to_float(here[k].values[j]) - stats[k].x) * stats[k].y * weight[j] + bias[j];
            const float unit = (to_float(there[k].values[j]) - far_stats[k].x) * far_stats[k].y;
            far[k][j] = inside[k] ? unit * weight[j] + bias[j] : 0.0f;
        }
    }
    for (int i = 0; i < args.mixes; ++i) {
        float constant[kVec], mix[kVec], result[kVec];
        load(args.mix[i] + channel, constant);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const int row = first + k * blockDim.y;
            if (row >= args.rows) continue;
            const int64_t at = (static_cast<int64_t>(i) * args.rows + row) * args.channels + channel;
            load_mix(constant, delta, at, mix);
#pragma unroll
            for (int j = 0; j < kVec; ++j) result[j] = own[k][j] * mix[j] + far[k][j] * (1.0f - mix[j]);
            store(out + at, result);
        }
    }
}

template <typename X, int kVec>
__global__ void token_stats(int rows, int channels, float eps, const X* x, float* stats) {
    __shared__ float buffer[kRowBuffer];
    const int row = blockIdx.x * blockDim.y + threadIdx.y, channel = threadIdx.x * kVec;
    const bool active = row < rows && channel < channels;
    float values[kVec], mean, rstd;
    if (active) load(x + static_cast<int64_t>(row) * channels + channel, values);
    row_stats(values, active, channels, eps, buffer, mean, rstd);
    if (active && channel == 0) reinterpret_cast<float2*>(stats)[row] = make_float2(mean, rstd);
}

// The dispatcher's entries
// ---------------------------------------------------------------------------------------------

struct Input {
    Input(const Tensor& x_, at::TensorList mixes_, const MaybeTensor& delta_, const MaybeTensor& weight_,
          const MaybeTensor& bias_, const MaybeTensor& stats_, int64_t height, int64_t width, int64_t pixels,
          double gamma, int64_t heads)
        : x(aligned(x_)), weight(parameter(weight_)), bias(parameter(bias_)), stats(parameter(stats_)) {
        if (delta_ && delta_->defined()) delta = aligned(*delta_);
        const int64_t channels = x.size(2), dim = channels / heads;
        args.rows = static_cast<int>(x.size(0) * x.size(1)), args.channels = static_cast<int>(channels);
        args.mixes = static_cast<int>(mixes_.size());
        // More than the map's sides is as good as past its border.
        const int64_t clipped = std::min(pixels, std::max(height, width));
        args.place = Place{static_cast<int>(x.size(1)),
                           static_cast<int>(height),
                           static_cast<int>(width),
                           static_cast<int>(clipped),
                           static_cast<int>(dim),
                           {},
                           Divisor::make(std::max<int64_t>(1, x.size(1))),
                           Divisor::make(std::max<int64_t>(1, width))};
        vectors = dim % 4 == 0;
        for (int i = 0; i < 4; ++i) {
            args.place.borders[i] = static_cast<int>(dim * gamma * (i + 1));
            vectors = vectors && args.place.borders[i] % 4 == 0;
        }
        for (size_t i = 0; i < mixes_.size(); ++i) {
            mixes[i] = parameter(mixes_[i]);
            args.mix[i] = floats(mixes[i]);
        }
        args.weight = floats(weight), args.bias = floats(bias), args.stats = floats(stats);
    }
    Tensor x, delta, weight, bias, stats;
    std::array<Tensor, kMixes> mixes;
    Args args{};
    bool vectors;  // four channels at a time take the same neighbour
};

void check(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
           const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width, int64_t pixels,
           double gamma, int64_t heads) {
    TORCH_CHECK(x.dim() == 3, "q_shift: x must have shape (B, T, C), got ", x.sizes());
    TORCH_CHECK(height >= 0 && width >= 0 && height * width <= x.size(1), "q_shift: x must have at least ", height,
                " * ", width, " tokens, got ", x.size(1));
    TORCH_CHECK(heads > 0 && x.size(2) % heads == 0, "q_shift: the ", x.size(2),
                " channels must be a multiple of the heads, got ", heads);
    TORCH_CHECK(gamma >= 0 && gamma <= 0.25 && pixels >= 0,
                "q_shift: gamma must be in [0, 1/4] and pixels at least 0, got ", gamma, " and ", pixels);
    TORCH_CHECK(!mixes.empty(), "q_shift: expected at least one mix");
    const auto per_channel = [&](const Tensor& p) {
        TORCH_CHECK(p.numel() == x.size(2) && p.device() == x.device(), "q_shift: a parameter must have ", x.size(2),
                    " values on ", x.device(), ", got ", p.sizes(), " on ", p.device());
    };
    for (const Tensor& mix : mixes) per_channel(mix);
    if (weight) per_channel(*weight);
    if (bias) per_channel(*bias);
    if (stats) {
        TORCH_CHECK(weight && bias && stats->numel() == 2 * x.size(0) * x.size(1) && stats->device() == x.device(),
                    "q_shift: stats must have shape (B, T, 2), and weight and bias beside them, got ", stats->sizes());
    }
    if (delta) {
        TORCH_CHECK(delta->dim() == 4 && delta->size(0) == static_cast<int64_t>(mixes.size()) &&
                        delta->sizes().slice(1) == x.sizes() && delta->device() == x.device(),
                    "q_shift: delta must have shape (mixes, B, T, C), got ", delta->sizes());
    }
}

void check_gradient(const Tensor& g, const Tensor& x, at::TensorList mixes) {
    TORCH_CHECK(g.dim() == 4 && g.size(0) == static_cast<int64_t>(mixes.size()) && g.sizes().slice(1) == x.sizes() &&
                    g.device() == x.device(),
                "q_shift: the gradient must have shape (mixes, B, T, C), got ", g.sizes());
}

bool runs_here(const Tensor& x, at::ScalarType other, at::TensorList mixes, const MaybeTensor& delta) {
    return has_kernel(x.scalar_type(), other) && (!delta || delta->scalar_type() == other) && mixes.size() <= kMixes &&
           x.size(0) * x.size(1) <= kMaxRows && x.size(2) <= kMaxThreads;
}

torch::jit::Stack stack_of(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
                           const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width,
                           int64_t pixels, double gamma, int64_t heads) {
    return {x, mixes.vec(), delta, weight, bias, stats, height, width, pixels, gamma, heads};
}

Tensor q_shift_cuda(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
                    const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width, int64_t pixels,
                    double gamma, int64_t heads, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(x.device());
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    if (x.numel() != 0 && !runs_here(x, dtype, mixes, delta)) {
        auto stack = stack_of(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
        stack.emplace_back(static_cast<int64_t>(dtype));
        call_pytorch("vision_rwkv::q_shift", stack);
        return stack[0].toTensor();
    }
    Tensor out =
        at::empty({static_cast<int64_t>(mixes.size()), x.size(0), x.size(1), x.size(2)}, x.options().dtype(dtype));
    if (x.numel() == 0) return out;
    const Input in(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    for_types(x.scalar_type(), dtype, in.vectors, [&](auto token, auto result, auto vec) {
        using X = decltype(token);
        using Out = decltype(result);
        const int vectors = in.args.channels / vec;
        const int threads = std::min(vectors, kBlock), lines = kBlock / threads, group = lines * kTokens;
        const dim3 grid((in.args.rows + group - 1) / group, (vectors + threads - 1) / threads);
        mix_tokens<X, Out, vec><<<grid, dim3(threads, lines), 0, c10::cuda::getCurrentCUDAStream()>>>(
            in.args, data<X>(in.x), data<Out>(in.delta), mutable_data<Out>(out));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return out;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Runs the kernel on as many blocks as the device holds at a time; `columns` (slots, C) get the parameters' sums.
template <typename X, typename G, int kVec, bool kDelta>
void launch_backward(const Input& in, const Tensor& g, const Tensor& gx, const Tensor& gdelta, const Tensor& columns) {
    const auto kernel = mix_tokens_backward<X, G, kVec, kDelta>;
    const Layout block = layout(in.args.rows, in.args.channels, kVec, 1);
    const size_t bytes = sizeof(float) * (kRowBuffer + block.threads_y * columns.numel());
    int resident = 0;
    C10_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, block.threads_x * block.threads_y, bytes));
    const Layout how = layout(in.args.rows, in.args.channels, kVec, std::max(resident, 1), kRows);
    const Tensor part = new_floats(columns, {how.blocks, columns.numel()});
    const auto stream = c10::cuda::getCurrentCUDAStream();
    kernel<<<how.blocks, how.block(), bytes, stream>>>(
        in.args, how.rows_a_block, data<G>(g), data<X>(in.x), data<G>(in.delta), mutable_data<X>(gx),
        kDelta ? mutable_data<G>(gdelta) : nullptr, part.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch_sum_parts(part.const_data_ptr<float>(), how.blocks, columns.numel(), columns.mutable_data_ptr<float>(),
                     stream);
}

// The gradients of mixes, weight and bias from the sums of all blocks, (slots, C).
Five gradients(const Tensor& gx, const Tensor& gdelta, const Tensor& columns, at::TensorList mixes,
               const MaybeTensor& weight, const MaybeTensor& bias) {
    const int64_t count = static_cast<int64_t>(mixes.size());
    const Tensor gmixes = columns.narrow(0, 0, count).to(mixes[0].scalar_type());
    if (columns.size(0) == count)
        return Five(gx, gmixes, gdelta, at::empty({0}, gx.options()), at::empty({0}, gx.options()));
    return Five(gx, gmixes, gdelta, columns.select(0, count).to(weight->scalar_type()).clone(),
                columns.select(0, count + 1).to(bias->scalar_type()).clone());
}

Five q_shift_backward_cuda(const Tensor& g, const Tensor& x, at::TensorList mixes, const MaybeTensor& delta,
                           const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats, int64_t height,
                           int64_t width, int64_t pixels, double gamma, int64_t heads) {
    const c10::cuda::CUDAGuard guard(x.device());
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    check_gradient(g, x, mixes);
    const int64_t channels = x.size(2), slots = static_cast<int64_t>(mixes.size()) + (stats ? 2 : 0);
    if (x.numel() != 0 && !runs_here(x, g.scalar_type(), mixes, delta)) {
        auto stack = stack_of(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
        stack.insert(stack.begin(), g);
        call_pytorch("vision_rwkv::q_shift_backward", stack);
        return Five(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor(),
                    stack[4].toTensor());
    }
    const Tensor gx = at::empty(x.sizes(), x.options());
    const Tensor gdelta = delta ? at::empty(g.sizes(), g.options()) : at::empty({0}, x.options());
    const Tensor columns = new_floats(x, {slots, channels});
    if (x.numel() == 0) return gradients(gx, gdelta, columns.zero_(), mixes, weight, bias);
    const Input in(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    const Tensor grad = aligned(g);
    for_types(x.scalar_type(), g.scalar_type(), in.vectors, [&](auto token, auto result, auto vec) {
        using X = decltype(token);
        using G = decltype(result);
        const auto launch = in.delta.defined() ? launch_backward<X, G, vec, true> : launch_backward<X, G, vec, false>;
        launch(in, grad, gx, gdelta, columns);
    });
    return gradients(gx, gdelta, columns, mixes, weight, bias);
}

// Whether a team's threads can take pairs of channels with one neighbour each, and there is a kernel for the rest.
bool fits_teams(const Input& in, at::ScalarType x, at::ScalarType g, std::optional<at::ScalarType> branch) {
    bool pairs = in.args.channels % 2 == 0;
    for (const int border : in.args.place.borders) pairs = pairs && border % 2 == 0;
    return pairs && has_kernel(x, g) && (in.args.mixes == 2 || in.args.mixes == 3) && in.args.rows <= kMaxRows &&
           static_cast<int64_t>(in.args.place.tokens) * in.args.channels <= kMaxRows &&
           in.args.channels <= kMaxThreads && branch.value_or(g) == g;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three q_shift_residual_backward_cuda(const Tensor& g, const Tensor& x, at::TensorList mixes, const MaybeTensor& weight,
                                     const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width,
                                     int64_t pixels, double gamma, int64_t heads, const MaybeTensor& sum,
                                     const MaybeTensor& scale, std::optional<at::ScalarType> branch) {
    const c10::cuda::CUDAGuard guard(x.device());
    check(x, mixes, {}, weight, bias, stats, height, width, pixels, gamma, heads);
    check_gradient(g, x, mixes);
    TORCH_CHECK(
        !sum || (sum->sizes() == x.sizes() && sum->scalar_type() == x.scalar_type() && sum->device() == x.device()),
        "q_shift: the sum's gradient must be like x, ", x.sizes(), ", got ", sum ? sum->sizes() : x.sizes());
    const Input in(x, mixes, {}, weight, bias, stats, height, width, pixels, gamma, heads);
    if (x.numel() == 0 || !fits_teams(in, x.scalar_type(), g.scalar_type(), branch)) {
        torch::jit::Stack stack{g,     x,      mixes.vec(), weight, bias, stats, height,
                                width, pixels, gamma,       heads,  sum,  scale};
        stack.push_back(branch ? at::IValue(static_cast<int64_t>(*branch)) : at::IValue());
        call_pytorch("vision_rwkv::q_shift_residual_backward", stack);
        return Three(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor());
    }
    const Tensor gx = at::empty(x.sizes(), x.options());
    const Tensor gbranch = branch ? at::empty(x.sizes(), g.options()) : at::empty({0}, g.options());
    const Tensor columns = new_floats(x, {in.args.mixes + (stats ? 2 : 0), x.size(2)});
    const Tensor grad = aligned(g), sum_in = sum ? aligned(*sum) : Tensor(), scales = parameter(scale);
    for_types(x.scalar_type(), g.scalar_type(), true, [&](auto token, auto result, auto) {
        using X = decltype(token);
        using G = decltype(result);
        const TeamTensors<X, G> at{data<G>(grad),  data<X>(in.x),       data<X>(sum_in),
                                   floats(scales), mutable_data<X>(gx), branch ? mutable_data<G>(gbranch) : nullptr};
        const auto launch = in.args.mixes == 2 ? launch_teams<X, G, 2> : launch_teams<X, G, 3>;
        launch(in.args, at, columns);
    });
    return {gx, gbranch, columns};
}

constexpr int kDynamicMixes = 5;  // of VRWKV6, the only ones with deltas

Three q_shift_parts_backward_cuda(const Tensor& g, const Tensor& x, at::TensorList mixes, const Tensor& delta,
                                  const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats,
                                  int64_t height, int64_t width, int64_t pixels, double gamma, int64_t heads) {
    const c10::cuda::CUDAGuard guard(x.device());
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    check_gradient(g, x, mixes);
    if (x.numel() == 0 || mixes.size() != kDynamicMixes || !runs_here(x, g.scalar_type(), mixes, delta)) {
        torch::jit::Stack stack{g, x, mixes.vec(), delta, weight, bias, stats, height, width, pixels, gamma, heads};
        call_pytorch("vision_rwkv::q_shift_parts_backward", stack);
        return Three(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor());
    }
    const Input in(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    const Tensor grad = aligned(g), gdelta = at::empty(g.sizes(), g.options());
    const Tensor parts = at::empty({3, x.size(0), x.size(1), x.size(2)}, g.options());
    const Tensor columns = new_floats(x, {kDynamicMixes, x.size(2)});
    for_types(x.scalar_type(), g.scalar_type(), in.vectors, [&](auto token, auto result, auto vec) {
        using X = decltype(token);
        using G = decltype(result);
        const PartTensors<X, G> at{data<G>(grad), data<G>(in.delta), data<X>(in.x), mutable_data<G>(gdelta),
                                   mutable_data<G>(parts)};
        launch_parts<X, G, vec, kDynamicMixes>(in.args, at, columns);
    });
    return {gdelta, parts, columns};
}

Tensor norm_stats_cuda(const Tensor& x, double eps) {
    const c10::cuda::CUDAGuard guard(x.device());
    const int64_t channels = x.dim() ? x.size(-1) : 0, rows = channels ? x.numel() / channels : 0;
    const bool vectors = channels % 4 == 0;
    if (!has_kernel(x.scalar_type(), x.scalar_type()) || rows > kMaxRows || !fits(channels, vectors ? 4 : 1)) {
        torch::jit::Stack stack{x, eps};
        call_pytorch("vision_rwkv::norm_stats", stack);
        return stack[0].toTensor();
    }
    auto sizes = x.sizes().vec();
    sizes.back() = 2;
    Tensor stats = new_floats(x, sizes);
    if (rows == 0) return stats;
    const Tensor in = aligned(x);
    for_types(x.scalar_type(), x.scalar_type(), vectors, [&](auto token, auto, auto vec) {
        using X = decltype(token);
        const Layout how = layout(rows, channels, vec, 1 << 20);
        token_stats<X, vec><<<how.blocks, how.block(), 0, c10::cuda::getCurrentCUDAStream()>>>(
            static_cast<int>(rows), static_cast<int>(channels), static_cast<float>(eps), data<X>(in),
            stats.mutable_data_ptr<float>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return stats;
}

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("q_shift", q_shift_cuda);
    m.impl("q_shift_backward", q_shift_backward_cuda);
    m.impl("q_shift_parts_backward", q_shift_parts_backward_cuda);
    m.impl("q_shift_residual_backward", q_shift_residual_backward_cuda);
    m.impl("norm_stats", norm_stats_cuda);
}

}  // namespace q_shift
