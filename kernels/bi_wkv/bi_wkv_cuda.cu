// Bi-WKV on CUDA: the dispatcher's entries.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <tuple>

#include "bi_wkv/bi_wkv_cuda.h"

namespace bi_wkv {
namespace {

using at::Tensor;

Dtype dtype_of(const Tensor& x, const char* name) {
    switch (x.scalar_type()) {
        case at::kFloat:
            return Dtype::kFloat32;
        case at::kBFloat16:
            return Dtype::kBFloat16;
        case at::kHalf:
            return Dtype::kFloat16;
        case at::kDouble:
            return Dtype::kFloat64;
        default:
            TORCH_CHECK(false, "bi_wkv: ", name, " must be float32, bfloat16, float16 or float64, got ",
                        x.scalar_type());
    }
}

void check(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    TORCH_CHECK(k.dim() == 3, "bi_wkv: k must have shape (B, T, C), got ", k.sizes());
    TORCH_CHECK(v.sizes() == k.sizes() && v.device() == k.device(), "bi_wkv: v must have k's shape ", k.sizes(),
                " and device, got ", v.sizes(), " on ", v.device());
    // Within a tile the kernels count in 32 bits.
    TORCH_CHECK(k.size(2) <= (1 << 24), "bi_wkv: more than 2^24 channels are not supported, got ", k.size(2));
    for (const Tensor* x : {&w, &u}) {
        TORCH_CHECK(x->dim() == 1 && x->size(0) == k.size(2) && x->device() == k.device(),
                    "bi_wkv: w and u must have shape (", k.size(2), ",) and k's device, got ", x->sizes(), " on ",
                    x->device());
    }
}

// What k, v and gy are read as: k's dtype, but float64 if anything is.
at::ScalarType tensor_dtype(std::initializer_list<const Tensor*> inputs, const Tensor& k) {
    for (const Tensor* x : inputs) {
        if (x->scalar_type() == at::kDouble) return at::kDouble;
    }
    return k.scalar_type();
}

Call new_call(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    Call call{};
    call.batch = k.size(0);
    call.tokens = k.size(1);
    call.channels = k.size(2);
    call.w = w.const_data_ptr();
    call.u = u.const_data_ptr();
    call.k = k.const_data_ptr();
    call.v = v.const_data_ptr();
    call.w_type = dtype_of(w, "w");
    call.u_type = dtype_of(u, "u");
    call.stream = c10::cuda::getCurrentCUDAStream(k.get_device()).stream();
    return call;
}

template <typename T>
void plan_and_run(const Call& call, const Tensor& k) {
    const Plan plan = make_plan<T>(call);
    const Tensor workspace = at::empty({plan.workspace}, k.options().dtype(at::kByte));
    run<T>(call, plan, workspace.mutable_data_ptr());
}

void launch(const Call& call, const Tensor& k) {
    switch (dtype_of(k, "k")) {
        case Dtype::kFloat32:
            return plan_and_run<float>(call, k);
        case Dtype::kBFloat16:
            return plan_and_run<__nv_bfloat16>(call, k);
        case Dtype::kFloat16:
            return plan_and_run<__half>(call, k);
        case Dtype::kFloat64:
            return plan_and_run<double>(call, k);
    }
}

void check_like_k(const Tensor& x, const char* name, const Tensor& k) {
    TORCH_CHECK(x.sizes() == k.sizes() && x.device() == k.device(), "bi_wkv: ", name, " must have k's shape ",
                k.sizes(), " and device, got ", x.sizes(), " on ", x.device());
}

// r: of a gated forward, or null.
Tensor run_forward(const Tensor& w_in, const Tensor& u_in, const Tensor& k_in, const Tensor& v_in, const Tensor* r_in) {
    check(w_in, u_in, k_in, v_in);
    if (r_in) check_like_k(*r_in, "r", k_in);
    const c10::cuda::CUDAGuard guard(k_in.device());
    const at::ScalarType dtype = tensor_dtype({&w_in, &u_in, &k_in, &v_in}, k_in);
    const Tensor w = w_in.contiguous(), u = u_in.contiguous();
    const Tensor k = k_in.to(dtype).contiguous(), v = v_in.to(dtype).contiguous();
    const Tensor r = r_in ? r_in->to(dtype).contiguous() : Tensor();
    const Tensor y = at::empty(k.sizes(), k.options());
    if (k.numel() > 0) {
        Call call = new_call(w, u, k, v);
        call.y = y.mutable_data_ptr();
        if (r_in) call.r = r.const_data_ptr(), call.over_tokens = true;
        launch(call, k);
    }
    return y.to(k_in.scalar_type());
}

Tensor forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    return run_forward(w, u, k, v, nullptr);
}

Tensor gated(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& r) {
    return run_forward(w, u, k, v, &r);
}

// Writes gk and gv, which are contiguous and of the dtype that k, v and gy are read as; gw and gu come back.
std::tuple<Tensor, Tensor> run_backward(const Tensor& w_in, const Tensor& u_in, const Tensor& k_in, const Tensor& v_in,
                                        const Tensor& gy_in, bool over_tokens, const Tensor& gk, const Tensor& gv) {
    const auto as_read = [&](const Tensor& x) { return x.to(gk.scalar_type()).contiguous(); };
    const Tensor w = w_in.contiguous(), u = u_in.contiguous();
    const Tensor k = as_read(k_in), v = as_read(v_in), gy = as_read(gy_in);
    if (k.numel() == 0) return {at::zeros_like(w), at::zeros_like(u)};
    const Tensor gw = at::empty(w.sizes(), w.options()), gu = at::empty(u.sizes(), u.options());
    Call call = new_call(w, u, k, v);
    call.backward = true, call.over_tokens = over_tokens;
    call.gy = gy.const_data_ptr();
    call.gk = gk.mutable_data_ptr();
    call.gv = gv.mutable_data_ptr();
    call.gw = gw.mutable_data_ptr();
    call.gu = gu.mutable_data_ptr();
    launch(call, k);
    return {gw, gu};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                                    const Tensor& gy) {
    check(w, u, k, v);
    check_like_k(gy, "gy", k);
    const c10::cuda::CUDAGuard guard(k.device());
    const auto options = k.options().dtype(tensor_dtype({&w, &u, &k, &v, &gy}, k));
    const Tensor gk = at::empty(k.sizes(), options), gv = at::empty(k.sizes(), options);
    const auto [gw, gu] = run_backward(w, u, k, v, gy, false, gk, gv);
    return {gw, gu, gk.to(k.scalar_type()), gv.to(v.scalar_type())};
}

// For w and u over the number of tokens.
std::tuple<Tensor, Tensor> backward_into(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                         const Tensor& gy, Tensor& gk, Tensor& gv) {
    check(w, u, k, v);
    check_like_k(gy, "gy", k);
    check_like_k(gk, "gk", k);
    check_like_k(gv, "gv", k);
    const c10::cuda::CUDAGuard guard(k.device());
    const at::ScalarType dtype = tensor_dtype({&w, &u, &k, &v, &gy}, k);
    const auto fits = [&](const Tensor& x) { return x.is_contiguous() && x.scalar_type() == dtype; };
    if (fits(gk) && fits(gv)) return run_backward(w, u, k, v, gy, true, gk, gv);
    const auto options = k.options().dtype(dtype);
    const Tensor k_part = at::empty(k.sizes(), options), v_part = at::empty(k.sizes(), options);
    const auto found = run_backward(w, u, k, v, gy, true, k_part, v_part);
    gk.copy_(k_part), gv.copy_(v_part);
    return found;
}

}  // namespace
}  // namespace bi_wkv

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("bi_wkv", bi_wkv::forward);
    m.impl("gated_bi_wkv", bi_wkv::gated);
    m.impl("bi_wkv_backward", bi_wkv::backward);
    m.impl("bi_wkv_backward_", bi_wkv::backward_into);
}
