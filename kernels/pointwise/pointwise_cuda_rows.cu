// The operators of vision_rwkv/ops/pointwise.py that go token by token on CUDA: float32, bfloat16, float16. float64,
// mixed dtypes and rows too long for a block run on the implementation in PyTorch.
#include <algorithm>
#include <tuple>
#include <utility>

#include "pointwise/pointwise_cuda.h"
#include "pointwise/pointwise_rows.cuh"
#include "pointwise/pointwise_warps.cuh"
#include "rows.cuh"

namespace pointwise {

constexpr int kMaxShared = 48 * 1024;
constexpr int64_t kMaxChannels = 1024;  // one thread each where vectors do not fit
constexpr int kPersistent = 4;          // blocks a processor of kernels that sum over rows
constexpr int kOneGroup = 1 << 20;      // so many that each block has one group of rows

Tensor nothing(const Tensor& x) { return at::empty({0}, x.options()); }
bool given(const MaybeTensor& x) { return x && x->defined(); }

void check_channels(const char* op, const Tensor& x, const MaybeTensor& parameter) {
    TORCH_CHECK(!given(parameter) || (parameter->numel() == x.size(-1) && parameter->device() == x.device()), op,
                ": a parameter must have ", x.size(-1), " values on ", x.device(), ", got ",
                given(parameter) ? parameter->sizes() : x.sizes());
}

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
    m.impl("norm_tokens", norm_tokens_cuda);
    m.impl("residual", residual_cuda);
    m.impl("residual_backward", residual_backward_cuda);
    m.impl("log_decay", log_decay_cuda);
    m.impl("log_decay_backward", log_decay_backward_cuda);
    m.impl("norm_gate", norm_gate_cuda);
    m.impl("norm_gate_backward", norm_gate_backward_cuda);
    m.impl("norm_gate_backward_", norm_gate_backward_into);
}

}  // namespace pointwise
