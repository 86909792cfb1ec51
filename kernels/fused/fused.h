// What the layers share with the block: weights in the dtype of matrix products, and those products.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "dispatch.h"

namespace vision_rwkv {

// All of the weights in `dtype`, by one kernel on a GPU. Below autograd only.
inline std::vector<at::Tensor> in_dtype(at::TensorList weights, at::ScalarType dtype) {
    static const auto op = find<std::vector<at::Tensor>(at::TensorList, at::ScalarType)>("vision_rwkv::cast_weights");
    for (const at::Tensor& weight : weights) {
        if (weight.scalar_type() != dtype) return op.call(weights, dtype);
    }
    return weights.vec();
}

// Products. x is (B, T, C), map (D, C) in any dtype; out= leaves autocast out of it.

inline at::Tensor rows(const at::Tensor& x) { return x.reshape({x.size(0) * x.size(1), x.size(2)}); }

inline at::Tensor apply_map(const at::Tensor& x, const at::Tensor& map) {
    const at::Tensor out = at::empty({x.size(0), x.size(1), map.size(0)}, x.options());
    at::Tensor to = rows(out);
    at::mm_out(to, rows(x), map.to(x.scalar_type()).t());
    return out;
}

// Writes to `out`, which must be contiguous: of another tensor, rows() are a copy.
inline void input_gradient(const at::Tensor& g, const at::Tensor& map, const at::Tensor& out) {
    TORCH_INTERNAL_ASSERT(out.is_contiguous());
    at::Tensor to = rows(out);
    at::mm_out(to, rows(g), map.to(g.scalar_type()));
}

// Where a product may leave its sums unrounded, as on CUDA, a float32 weight's gradient is not rounded in between.
inline at::Tensor map_gradient(const at::Tensor& g, const at::Tensor& x, const at::Tensor& map) {
    const bool unrounded = x.is_cuda() && map.scalar_type() == at::kFloat && x.element_size() == 2;
    at::Tensor out = at::empty({g.size(2), x.size(2)}, unrounded ? map.options() : x.options());
    if (unrounded) {
        at::mm_out(out, rows(g).t(), rows(x), at::kFloat);
    } else {
        at::mm_out(out, rows(g).t(), rows(x));
    }
    return out.to(map.scalar_type());
}

}  // namespace vision_rwkv
