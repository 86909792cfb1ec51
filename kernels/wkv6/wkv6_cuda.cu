// WKV6 on CUDA: the dispatcher's entries. 64 channels a head in float32, bfloat16 or float16 run on the kernels beside
// this file; other sizes and float64 on the PyTorch implementation.
#include "wkv6_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <initializer_list>
#include <tuple>

namespace wkv6 {

constexpr int64_t kN = 64;  // as in wkv6_cuda_common.cuh
constexpr int64_t kChunk = 64;

Workspace workspace(const Call& call, bool backward) {
    const int64_t chunks = (call.tokens + kChunk - 1) / kChunk, bh = call.batch * call.heads;
    return Workspace{(backward ? 4 : 2) * bh * (chunks - 1) * kN * kN, 2 * bh * chunks * kN, bh * chunks * kN};
}

namespace {

using at::Tensor;

// The kernels read 16 bytes at a time.
Tensor aligned(const Tensor& x) {
    const Tensor y = x.contiguous();
    return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? y.clone() : y;
}

bool has_kernel(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
    const auto dtype = r.scalar_type();
    const bool known = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
    return known && r.size(3) == kN && k.scalar_type() == dtype && v.scalar_type() == dtype &&
           w.scalar_type() != at::kDouble && u.scalar_type() != at::kDouble;
}

void check(const Tensor& r, std::initializer_list<std::reference_wrapper<const Tensor>> others, const Tensor& u) {
    TORCH_CHECK(r.dim() == 4, "wkv6: r must have shape (B, T, H, N), got ", r.sizes());
    for (const Tensor& x : others) {
        TORCH_CHECK(x.sizes() == r.sizes() && x.device() == r.device(), "wkv6: k, v, w and the gradient must have r's ",
                    "shape ", r.sizes(), " and device, got ", x.sizes(), " on ", x.device());
    }
    TORCH_CHECK(u.dim() == 2 && u.size(0) == r.size(2) && u.size(1) == r.size(3) && u.device() == r.device(),
                "wkv6: u must have shape (H, N) and r's device, got ", u.sizes(), " on ", u.device());
}

// The implementation in PyTorch, which is registered for every device.
void call_pytorch(const char* name, torch::jit::Stack& stack) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
}

// Tensors as the kernels take them, and the workspace.
struct Prepared {
    Prepared(const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
             const Tensor& gy_)
        : r(aligned(r_)), k(aligned(k_)), v(aligned(v_)), u(aligned(u_.to(at::kFloat))) {
        const bool keep = w_.scalar_type() == r.scalar_type();
        w = aligned(keep ? w_ : w_.to(at::kFloat));
        if (gy_.defined()) gy = aligned(gy_.to(r.scalar_type()));
        call.batch = r.size(0), call.tokens = r.size(1), call.heads = r.size(2);
        call.r = r.const_data_ptr(), call.k = k.const_data_ptr(), call.v = v.const_data_ptr();
        call.w = w.const_data_ptr(), call.u = u.const_data_ptr<float>();
        call.gy = gy.defined() ? gy.const_data_ptr() : nullptr;
        call.w_is_float = w.scalar_type() == at::kFloat;
        const Workspace sizes = workspace(call, gy.defined());
        const auto floats = r.options().dtype(at::kFloat);
        states = at::empty({sizes.states}, floats), decays = at::empty({sizes.decays}, floats);
        if (gy.defined()) u_parts = at::empty({sizes.u_parts}, floats);
        call.states = states.mutable_data_ptr<float>(), call.decays = decays.mutable_data_ptr<float>();
        call.stream = c10::cuda::getCurrentCUDAStream();
    }
    Tensor r, k, v, w, gy, u, states, decays, u_parts;
    Call call;
};

Tensor wkv6_cuda(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
    const c10::cuda::CUDAGuard guard(r.device());
    check(r, {k, v, w}, u);
    if (r.numel() == 0) return at::empty(r.sizes(), r.options());
    if (!has_kernel(r, k, v, w, u)) {
        torch::jit::Stack stack{r, k, v, w, u};
        call_pytorch("vision_rwkv::wkv6", stack);
        return stack[0].toTensor();
    }
    const Prepared in(r, k, v, w, u, Tensor());
    Tensor y = at::empty(r.sizes(), r.options());
    switch (r.scalar_type()) {
        case at::kFloat:
            forward<float>(in.call, y.mutable_data_ptr());
            break;
        case at::kBFloat16:
            forward<__nv_bfloat16>(in.call, y.mutable_data_ptr());
            break;
        default:
            forward<__half>(in.call, y.mutable_data_ptr());
    }
    return y;
}

// Values for every head and channel, as the kernels take them.
Tensor per_channel(const char* name, const Tensor& x, const Tensor& tokens) {
    TORCH_CHECK(x.numel() == tokens.size(2) && x.device() == tokens.device(), "gated_wkv6: ", name, " must have ",
                tokens.size(2), " values on ", tokens.device(), ", got ", x.sizes(), " on ", x.device());
    return aligned(x.to(at::kFloat));
}

Tensor gated_wkv6_cuda(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& raw, const Tensor& base,
                       const Tensor& u, const Tensor& gate, const Tensor& weight, const Tensor& bias, double eps) {
    const c10::cuda::CUDAGuard guard(r.device());
    TORCH_CHECK(r.dim() == 3 && u.dim() == 2 && r.size(2) == u.numel(),
                "gated_wkv6: expected r (B, T, C) and u (H, N) with C = H N, got ", r.sizes(), " and ", u.sizes());
    const auto heads = [&](const Tensor& x) {
        TORCH_CHECK(x.sizes() == r.sizes() && x.device() == r.device(), "gated_wkv6: k, v, raw and gate must have r's ",
                    "shape ", r.sizes(), " and device, got ", x.sizes(), " on ", x.device());
        return aligned(x).view({r.size(0), r.size(1), u.size(0), u.size(1)});
    };
    const Tensor y = at::empty(r.sizes(), r.options());
    if (r.numel() == 0) return y;
    const bool alike = raw.scalar_type() == r.scalar_type() && gate.scalar_type() == r.scalar_type();
    const Tensor r_ = heads(r), k_ = heads(k), v_ = heads(v), raw_ = heads(raw), gate_ = heads(gate);
    check(r_, {k_, v_, raw_}, u);
    if (!alike || !has_kernel(r_, k_, v_, raw_, u)) {
        torch::jit::Stack stack{r, k, v, raw, base, u, gate, weight, bias, eps};
        call_pytorch("vision_rwkv::gated_wkv6", stack);
        return stack[0].toTensor();
    }
    const Tensor base_ = per_channel("base", base, r), weight_ = per_channel("weight", weight, r),
                 bias_ = per_channel("bias", bias, r);
    const Prepared in(r_, k_, v_, raw_, u, Tensor());
    const Gating gating{gate_.const_data_ptr(), base_.const_data_ptr<float>(), weight_.const_data_ptr<float>(),
                        bias_.const_data_ptr<float>(), static_cast<float>(eps)};
    switch (r.scalar_type()) {
        case at::kFloat:
            gated<float>(in.call, gating, y.mutable_data_ptr());
            break;
        case at::kBFloat16:
            gated<__nv_bfloat16>(in.call, gating, y.mutable_data_ptr());
            break;
        default:
            gated<__half>(in.call, gating, y.mutable_data_ptr());
    }
    return y;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Writes gr, gk and gv, which are contiguous, aligned and of r's dtype; gw and gu come back.
std::tuple<Tensor, Tensor> run_backward(const Prepared& in, const Tensor& w, const Tensor& u, const Tensor& gr,
                                        const Tensor& gk, const Tensor& gv) {
    const Tensor gw = at::empty(in.w.sizes(), in.w.options()), gu = at::empty(in.u.sizes(), in.u.options());
    const Gradients out{gr.mutable_data_ptr(), gk.mutable_data_ptr(),        gv.mutable_data_ptr(),
                        gw.mutable_data_ptr(), gu.mutable_data_ptr<float>(), in.u_parts.mutable_data_ptr<float>()};
    switch (in.r.scalar_type()) {
        case at::kFloat:
            backward<float>(in.call, out);
            break;
        case at::kBFloat16:
            backward<__nv_bfloat16>(in.call, out);
            break;
        default:
            backward<__half>(in.call, out);
    }
    return {gw.to(w.scalar_type()), gu.to(u.scalar_type())};
}

Five wkv6_backward_cuda(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                        const Tensor& gy) {
    const c10::cuda::CUDAGuard guard(r.device());
    check(r, {k, v, w, gy}, u);
    const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
    if (r.numel() == 0) return Five(like(r), like(k), like(v), like(w), at::zeros_like(u));
    if (!has_kernel(r, k, v, w, u)) {
        torch::jit::Stack stack{r, k, v, w, u, gy};
        call_pytorch("vision_rwkv::wkv6_backward", stack);
        return Five(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor(),
                    stack[4].toTensor());
    }
    const Tensor gr = like(r), gk = like(k), gv = like(v);
    const auto [gw, gu] = run_backward(Prepared(r, k, v, w, u, gy), w, u, gr, gk, gv);
    return Five(gr, gk, gv, gw, gu);
}

std::tuple<Tensor, Tensor> wkv6_backward_into(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                              const Tensor& u, const Tensor& gy, Tensor& gr, Tensor& gk, Tensor& gv) {
    const c10::cuda::CUDAGuard guard(r.device());
    check(r, {k, v, w, gy, gr, gk, gv}, u);
    bool direct = r.numel() != 0 && has_kernel(r, k, v, w, u);
    for (const Tensor& x : {gr, gk, gv}) {
        direct = direct && x.scalar_type() == r.scalar_type() && x.is_contiguous() && aligned(x).is_same(x);
    }
    if (direct) return run_backward(Prepared(r, k, v, w, u, gy), w, u, gr, gk, gv);
    const auto [r_found, k_found, v_found, gw, gu] = wkv6_backward_cuda(r, k, v, w, u, gy);
    gr.copy_(r_found), gk.copy_(k_found), gv.copy_(v_found);
    return {gw, gu};
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("wkv6", wkv6_cuda);
    m.impl("gated_wkv6", gated_wkv6_cuda);
    m.impl("wkv6_backward", wkv6_backward_cuda);
    m.impl("wkv6_backward_", wkv6_backward_into);
}

}  // namespace wkv6
