// What the layers share with the block: weights in the dtype of matrix products, and those products.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "dispatch.h"

namespace vision_rwkv {

// The first `stacked` of the weights, of one shape, as one tensor, if any, then the others: all in `dtype`, by one
// kernel on a GPU. Below autograd only.
inline std::vector<at::Tensor> cast_weights(at::TensorList weights, at::ScalarType dtype, int64_t stacked) {
    static const auto op =
        find<std::vector<at::Tensor>(at::TensorList, at::ScalarType, int64_t)>("vision_rwkv::cast_weights");
    return op.call(weights, dtype, stacked);
}

inline std::vector<at::Tensor> in_dtype(at::TensorList weights, at::ScalarType dtype) {
    for (const at::Tensor& weight : weights) {
        if (weight.scalar_type() != dtype) return cast_weights(weights, dtype, 0);
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

// Maps of one shape side by side, where a GPU multiplies by all of them at once: of few channels a product alone does
// not fill it.
struct Maps {
    std::vector<at::Tensor> each;
    at::Tensor stack;  // of the first ones, (n, D, C), on a GPU; what `each` has of them are views of it

    Maps(at::TensorList weights, at::ScalarType dtype, int64_t stacked) {
        if (!weights[0].is_cuda()) {
            each = in_dtype(weights, dtype);
            return;
        }
        const std::vector<at::Tensor> cast = cast_weights(weights, dtype, stacked);
        stack = cast[0];
        each = stack.unbind();
        each.insert(each.end(), cast.begin() + 1, cast.end());
    }

    // x, (n, B, T, C), each by its map, as (n, B, T, D).
    at::Tensor apply(const at::Tensor& x) const {
        const int64_t count = x.size(0), tokens = x.size(1) * x.size(2), channels = x.size(3);
        const at::Tensor out = at::empty({count, x.size(1), x.size(2), each[0].size(0)}, x.options());
        const at::Tensor from = x.view({count, tokens, channels});
        at::Tensor to = out.view({count, tokens, out.size(3)});
        if (stack.defined()) {
            at::bmm_out(to, from, stack.transpose(1, 2));
            return out;
        }
        for (int64_t i = 0; i < count; ++i) {
            at::Tensor part = to.select(0, i);
            at::mm_out(part, from.select(0, i), each[i].t());
        }
        return out;
    }
};

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
