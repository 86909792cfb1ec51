// What the CPU kernels share on the side of tensors: dtypes and layout.
#pragma once

#include <ATen/ATen.h>

namespace vision_rwkv {

// What sums are kept in: float64 if any input is float64, else float32. Checks devices and dtypes on the way.
inline at::ScalarType compute_dtype(const char* op, std::initializer_list<at::Tensor> tensors) {
    at::ScalarType dtype = at::kFloat;
    for (const at::Tensor& x : tensors) {
        TORCH_CHECK(x.device().is_cpu(), op, ": every tensor must be on the CPU, got one on ", x.device());
        TORCH_CHECK(at::isFloatingType(x.scalar_type()), op, ": every tensor must be of a floating dtype, got ",
                    x.scalar_type());
        if (x.scalar_type() == at::kDouble) dtype = at::kDouble;
    }
    return dtype;
}

// Contiguous in `dtype`; the same tensor where it is so already.
inline at::Tensor prepared(const at::Tensor& x, at::ScalarType dtype) { return x.to(dtype).contiguous(); }

// By the untyped accessor: newer versions of Clang mangle the name of the typed one as no GCC-built PyTorch does.
template <typename Real>
const Real* data(const at::Tensor& x) {
    return static_cast<const Real*>(x.const_data_ptr());
}

// Runs `body` with a template parameter `Real` of float or double.
template <typename Body>
void for_real(at::ScalarType dtype, const Body& body) {
    if (dtype == at::kDouble) {
        body(double{});
    } else {
        body(float{});
    }
}

}  // namespace vision_rwkv
