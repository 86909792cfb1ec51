// Those operators of vision_rwkv/ops/pointwise.py that inference spends time on, on the CPU, in one pass each: float32
// and float64. Half precision and the gradients run on the implementation in PyTorch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"
#include "pointwise/pointwise_args.h"

#define VRWKV_KERNEL "pointwise/pointwise_cpu_kernel.h"
#include "simd_variants.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 14;  // values that are worth a thread

// The implementation in PyTorch, which is registered for every device.
void call_pytorch(const char* name, torch::jit::Stack& stack) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
}

bool is_real(const Tensor& x) { return x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble; }

bool alike(const Tensor& x, const MaybeTensor& y) {
    return !y || (y->scalar_type() == x.scalar_type() && y->sizes() == x.sizes() && y->device() == x.device());
}

Tensor gate(const Tensor& r, const Tensor& y) {
    if (!is_real(y) || !alike(y, r)) {
        torch::jit::Stack stack{r, y};
        call_pytorch("vision_rwkv::gate", stack);
        return stack[0].toTensor();
    }
    const Tensor r_ = r.contiguous(), y_ = y.contiguous();
    Tensor out = at::empty(y.sizes(), y.options());
    for_real(y.scalar_type(), [&](auto real) {
        using Real = decltype(real);
        Real* const to = out.mutable_data_ptr<Real>();
        at::parallel_for(0, y.numel(), kGrain, [&](int64_t begin, int64_t end) {
            VRWKV_DISPATCH(gate_values<Real>, data<Real>(r_) + begin, data<Real>(y_) + begin, to + begin, end - begin);
        });
    });
    return out;
}

Tensor squared_relu(const Tensor& x) {
    if (!is_real(x)) {
        torch::jit::Stack stack{x};
        call_pytorch("vision_rwkv::squared_relu", stack);
        return stack[0].toTensor();
    }
    const Tensor x_ = x.contiguous();
    Tensor out = at::empty(x.sizes(), x.options());
    for_real(x.scalar_type(), [&](auto real) {
        using Real = decltype(real);
        Real* const to = out.mutable_data_ptr<Real>();
        at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
            VRWKV_DISPATCH(square_values<Real>, data<Real>(x_) + begin, to + begin, end - begin);
        });
    });
    return out;
}

std::tuple<Tensor, Tensor> residual(const Tensor& x, const Tensor& z, const MaybeTensor& gate_,
                                    const MaybeTensor& weight_, const MaybeTensor& bias_, const MaybeTensor& gamma_,
                                    const MaybeTensor& scale_, double eps, std::optional<double> stats_eps) {
    if (!is_real(x) || x.dim() != 3 || x.numel() == 0 || !alike(x, z) || !alike(x, gate_)) {
        torch::jit::Stack stack{x, z, gate_, weight_, bias_, gamma_, scale_, eps, stats_eps};
        call_pytorch("vision_rwkv::residual", stack);
        return {stack[0].toTensor(), stack[1].toTensor()};
    }
    TORCH_CHECK(weight_.has_value() == bias_.has_value(), "residual: expected weight and bias, or neither");
    for (const MaybeTensor* p : {&weight_, &bias_, &gamma_}) {
        TORCH_CHECK(!*p || (*p)->numel() == x.size(2), "residual: a parameter must have ", x.size(2), " values");
    }
    TORCH_CHECK(!scale_ || scale_->numel() == x.size(0), "residual: scale must have ", x.size(0), " values");
    const auto dtype = x.scalar_type();
    const auto taken = [&](const MaybeTensor& y) { return y ? prepared(*y, dtype) : Tensor(); };
    const Tensor x_ = x.contiguous(), z_ = z.contiguous(), r = taken(gate_), weight = taken(weight_),
                 bias = taken(bias_), gamma = taken(gamma_), scale = taken(scale_);
    Tensor out = at::empty(x.sizes(), x.options());
    Tensor stats = stats_eps ? at::empty({x.size(0), x.size(1), 2}, x.options()) : at::empty({0}, x.options());
    for_real(dtype, [&](auto real) {
        using Real = decltype(real);
        const auto pointer = [](const Tensor& y) { return y.defined() ? data<Real>(y) : nullptr; };
        ResidualArgs<Real> args{};
        args.tokens = x.size(1), args.channels = x.size(2), args.x = data<Real>(x_), args.z = data<Real>(z_);
        args.gate = pointer(r), args.weight = pointer(weight), args.bias = pointer(bias);
        args.gamma = pointer(gamma), args.scale = pointer(scale), args.eps = eps;
        args.stats_eps = stats_eps.value_or(0), args.out = out.mutable_data_ptr<Real>();
        args.stats = stats_eps ? stats.mutable_data_ptr<Real>() : nullptr;
        const int64_t grain = std::max<int64_t>(1, kGrain / args.channels);
        at::parallel_for(0, x.size(0) * x.size(1), grain, [&](int64_t begin, int64_t end) {
            std::vector<Real> branch(args.channels);
            VRWKV_DISPATCH(residual_rows<Real>, args, begin, end, branch.data());
        });
    });
    return {out, stats};
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) {
    m.impl("gate", gate);
    m.impl("squared_relu", squared_relu);
    m.impl("residual", residual);
}

}  // namespace vision_rwkv
