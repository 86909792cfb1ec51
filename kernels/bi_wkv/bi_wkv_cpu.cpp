// Bi-WKV on the CPU: the operators vision_rwkv::bi_wkv and bi_wkv_backward, whose schemas vision_rwkv/ops defines.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bi_wkv/bi_wkv_args.h"
#include "bi_wkv/bi_wkv_exact.h"
#include "cpu_tensors.h"

#define VRWKV_KERNEL "bi_wkv/bi_wkv_cpu_kernel.h"
#include "simd_variants.h"

namespace vision_rwkv {
namespace {

using at::Tensor;

void check_shapes(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    TORCH_CHECK(k.dim() == 3, "bi_wkv: k must have shape (B, T, C), got ", k.sizes());
    TORCH_CHECK(v.sizes() == k.sizes(), "bi_wkv: v must have k's shape ", k.sizes(), ", got ", v.sizes());
    for (const Tensor& x : {w, u}) {
        TORCH_CHECK(x.dim() == 1 && x.size(0) == k.size(2), "bi_wkv: w and u must have shape (C,) with C = ", k.size(2),
                    ", got ", x.sizes());
    }
}

template <typename Real>
BiWkvArgs<Real> arguments(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    BiWkvArgs<Real> args{};
    args.batch = k.size(0);
    args.tokens = k.size(1);
    args.channels = k.size(2);
    args.w = data<Real>(w);
    args.u = data<Real>(u);
    args.k = data<Real>(k);
    args.v = data<Real>(v);
    return args;
}

Tensor forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    check_shapes(w, u, k, v);
    const at::ScalarType dtype = compute_dtype("bi_wkv", {w, u, k, v});
    Tensor y = at::empty(k.sizes(), k.options().dtype(dtype));
    if (k.numel() > 0) {
        const Tensor w_ = prepared(w, dtype), u_ = prepared(u, dtype), k_ = prepared(k, dtype), v_ = prepared(v, dtype);
        for_real(dtype, [&](auto real) {
            using Real = decltype(real);
            BiWkvArgs<Real> args = arguments<Real>(w_, u_, k_, v_);
            args.y = y.mutable_data_ptr<Real>();
            VRWKV_DISPATCH(run<Real>, args, false);
        });
    }
    return y.to(k.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                                    const Tensor& gy) {
    check_shapes(w, u, k, v);
    TORCH_CHECK(gy.sizes() == k.sizes(), "bi_wkv: gy must have k's shape ", k.sizes(), ", got ", gy.sizes());
    const at::ScalarType dtype = compute_dtype("bi_wkv", {w, u, k, v, gy});
    const at::TensorOptions options = k.options().dtype(dtype);
    Tensor gw = at::zeros(w.sizes(), options), gu = at::zeros(u.sizes(), options);
    Tensor gk = at::empty(k.sizes(), options), gv = at::empty(k.sizes(), options);
    if (k.numel() > 0) {
        const Tensor w_ = prepared(w, dtype), u_ = prepared(u, dtype), k_ = prepared(k, dtype), v_ = prepared(v, dtype),
                     gy_ = prepared(gy, dtype);
        for_real(dtype, [&](auto real) {
            using Real = decltype(real);
            BiWkvArgs<Real> args = arguments<Real>(w_, u_, k_, v_);
            args.gy = data<Real>(gy_);
            args.gw = gw.mutable_data_ptr<Real>();
            args.gu = gu.mutable_data_ptr<Real>();
            args.gk = gk.mutable_data_ptr<Real>();
            args.gv = gv.mutable_data_ptr<Real>();
            VRWKV_DISPATCH(run<Real>, args, true);
        });
    }
    return {gw.to(w.scalar_type()), gu.to(u.scalar_type()), gk.to(k.scalar_type()), gv.to(v.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) {
    m.impl("bi_wkv", forward);
    m.impl("bi_wkv_backward", backward);
}

}  // namespace vision_rwkv
