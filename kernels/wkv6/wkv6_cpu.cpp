// WKV6 on the CPU: the operators vision_rwkv::wkv6 and wkv6_backward, whose schemas vision_rwkv/ops defines.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu_tensors.h"
#include "wkv6/wkv6_args.h"

#define VRWKV_KERNEL "wkv6/wkv6_cpu_kernel.h"
#include "simd_variants.h"

namespace vision_rwkv {
namespace {

using at::Tensor;

void check_shapes(const Tensor& r, std::initializer_list<Tensor> others, const Tensor& u) {
    TORCH_CHECK(r.dim() == 4, "wkv6: r must have shape (B, T, H, N), got ", r.sizes());
    for (const Tensor& x : others) {
        TORCH_CHECK(x.sizes() == r.sizes(), "wkv6: every tensor but u must have r's shape ", r.sizes(), ", got ",
                    x.sizes());
    }
    TORCH_CHECK(u.dim() == 2 && u.size(0) == r.size(2) && u.size(1) == r.size(3),
                "wkv6: u must have shape (H, N) as in r, ", r.sizes(), ", got ", u.sizes());
}

// Contiguous in `dtype`, the last dimension filled up with zeros to a multiple of kHeadMultiple.
Tensor padded(const Tensor& x, at::ScalarType dtype) {
    const int64_t missing = (kHeadMultiple - x.size(-1) % kHeadMultiple) % kHeadMultiple;
    return prepared(missing > 0 ? at::constant_pad_nd(x.to(dtype), {0, missing}) : x, dtype);
}

// Undoes `padded`.
Tensor result(const Tensor& x, const Tensor& like) {
    return x.narrow(-1, 0, like.size(-1)).to(like.scalar_type()).contiguous();
}

// The inputs as the kernels want them; keeps them alive.
template <typename Real>
struct Inputs {
    Tensor r, k, v, w, u;

    Inputs(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, at::ScalarType dtype)
        : r(padded(r, dtype)), k(padded(k, dtype)), v(padded(v, dtype)), w(padded(w, dtype)), u(padded(u, dtype)) {}

    Wkv6Args<Real> args() const {
        Wkv6Args<Real> a{};
        a.batch = r.size(0);
        a.tokens = r.size(1);
        a.heads = r.size(2);
        a.width = r.size(3);
        a.r = data<Real>(r);
        a.k = data<Real>(k);
        a.v = data<Real>(v);
        a.w = data<Real>(w);
        a.u = data<Real>(u);
        return a;
    }
};

Tensor forward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
    check_shapes(r, {k, v, w}, u);
    const at::ScalarType dtype = compute_dtype("wkv6", {r, k, v, w, u});
    if (r.numel() == 0) return at::empty(r.sizes(), r.options());
    Tensor y;
    for_real(dtype, [&](auto real) {
        using Real = decltype(real);
        const Inputs<Real> inputs(r, k, v, w, u, dtype);
        y = at::empty_like(inputs.r);
        Wkv6Args<Real> args = inputs.args();
        args.y = y.mutable_data_ptr<Real>();
        VRWKV_DISPATCH(write_output<Real>, args);
    });
    return result(y, r);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& r, const Tensor& k, const Tensor& v,
                                                            const Tensor& w, const Tensor& u, const Tensor& gy) {
    check_shapes(r, {k, v, w, gy}, u);
    const at::ScalarType dtype = compute_dtype("wkv6", {r, k, v, w, u, gy});
    if (r.numel() == 0) {
        return {at::empty(r.sizes(), r.options()), at::empty(k.sizes(), k.options()), at::empty(v.sizes(), v.options()),
                at::empty(w.sizes(), w.options()), at::zeros(u.sizes(), u.options())};
    }
    Tensor gr, gk, gv, gw, gu;
    for_real(dtype, [&](auto real) {
        using Real = decltype(real);
        const Inputs<Real> inputs(r, k, v, w, u, dtype);
        const Tensor gy_ = padded(gy, dtype);
        for (Tensor* x : {&gr, &gk, &gv, &gw}) *x = at::empty_like(inputs.r);
        gu = at::empty({r.size(0), r.size(2), inputs.r.size(3)}, r.options().dtype(at::kDouble));
        Wkv6Args<Real> args = inputs.args();
        args.gy = data<Real>(gy_);
        args.gr = gr.mutable_data_ptr<Real>();
        args.gk = gk.mutable_data_ptr<Real>();
        args.gw = gw.mutable_data_ptr<Real>();
        args.gu = gu.mutable_data_ptr<double>();
        VRWKV_DISPATCH(write_gradients<Real>, args);
        // The weight of token i at token t is symmetric but for r_t and k_i: gv is the output with these exchanged.
        std::swap(args.r, args.k);
        args.v = args.gy;
        args.y = gv.mutable_data_ptr<Real>();
        VRWKV_DISPATCH(write_output<Real>, args);
    });
    return {result(gr, r), result(gk, k), result(gv, v), result(gw, w), result(gu.sum(0), u)};
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) {
    m.impl("wkv6", forward);
    m.impl("wkv6_backward", backward);
}

}  // namespace vision_rwkv
