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

inline bool needs_cast(at::TensorList weights, at::ScalarType dtype) {
    for (const at::Tensor& weight : weights) {
        if (weight.scalar_type() != dtype) return true;
    }
    return false;
}

inline std::vector<at::Tensor> in_dtype(at::TensorList weights, at::ScalarType dtype) {
    return needs_cast(weights, dtype) ? cast_weights(weights, dtype, 0) : weights.vec();
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
        std::vector<at::Tensor> others = weights.slice(stacked).vec();
        if (needs_cast(weights, dtype)) {
            others = cast_weights(weights, dtype, stacked);
            stack = others[0];
            others.erase(others.begin());
        } else {
            stack = at::stack(weights.slice(0, stacked));
        }
        each = stack.unbind();
        each.insert(each.end(), others.begin(), others.end());
    }

    // x, (n, B, T, C), each by its map, as (n, B, T, D).
    at::Tensor apply(const at::Tensor& x) const {
        const at::Tensor out = at::empty({x.size(0), x.size(1), x.size(2), each[0].size(0)}, x.options());
        const at::Tensor from = x.flatten(1, 2);
        at::Tensor to = out.flatten(1, 2);
        if (stack.defined()) {
            at::bmm_out(to, from, stack.transpose(1, 2));
            return out;
        }
        for (int64_t i = 0; i < x.size(0); ++i) {
            at::Tensor part = to.select(0, i);
            at::mm_out(part, from.select(0, i), each[i].t());
        }
        return out;
    }

    // The gradients of x, given those of the products, g; they go to `out`, which must be contiguous.
    void input_gradients(const at::Tensor& g, const at::Tensor& out) const {
        if (stack.defined()) {
            at::Tensor to = out.view({out.size(0), out.size(1) * out.size(2), out.size(3)});
            at::bmm_out(to, g.flatten(1, 2), stack);
            return;
        }
        for (int64_t i = 0; i < g.size(0); ++i) input_gradient(g.select(0, i), each[i], out.select(0, i));
    }
};

// Where a product may leave its sums unrounded, as on CUDA, a float32 weight's gradient is not rounded in between.
inline bool leaves_unrounded(const at::Tensor& x, const at::Tensor& map) {
    return x.is_cuda() && map.scalar_type() == at::kFloat && x.element_size() == 2;
}

inline at::Tensor map_gradient(const at::Tensor& g, const at::Tensor& x, const at::Tensor& map) {
    const bool unrounded = leaves_unrounded(x, map);
    at::Tensor out = at::empty({g.size(2), x.size(2)}, unrounded ? map.options() : x.options());
    if (unrounded) {
        at::mm_out(out, rows(g).t(), rows(x), at::kFloat);
    } else {
        at::mm_out(out, rows(g).t(), rows(x));
    }
    return out.to(map.scalar_type());
}

// How many parts of their rows the weight gradients of `count` maps (D, C) are summed over first, so that one batched
// product fills a GPU: 0 where it would not, as it takes a block of threads for each 64 x 64 of a result.
inline int64_t gradient_parts(int64_t count, int64_t rows, int64_t d, int64_t c) {
    constexpr int64_t kFull = 128, kTile = 64;
    const int64_t blocks = count * ((d + kTile - 1) / kTile) * ((c + kTile - 1) / kTile);
    int64_t parts = 1;
    while (blocks * parts < kFull && rows % (2 * parts) == 0) parts *= 2;
    return blocks * parts < kFull ? 0 : parts;
}

// As map_gradient for maps of one shape and dtype, x (n, B, T, C), g (n, B, T, D): (n, D, C).
inline at::Tensor map_gradients(const at::Tensor& g, const at::Tensor& x, at::TensorList maps) {
    const int64_t count = g.size(0), rows = g.size(1) * g.size(2), d = g.size(3), c = x.size(3);
    const int64_t parts = leaves_unrounded(x, maps[0]) && rows > 0 ? gradient_parts(count, rows, d, c) : 0;
    if (parts == 0) {
        std::vector<at::Tensor> out;
        for (int64_t i = 0; i < count; ++i) out.push_back(map_gradient(g.select(0, i), x.select(0, i), maps[i]));
        return at::stack(out);
    }
    const at::Tensor g_parts = g.view({count * parts, rows / parts, d}),
                     x_parts = x.view({count * parts, rows / parts, c});
    const at::Tensor out = at::bmm(g_parts.transpose(1, 2), x_parts, at::kFloat).view({count, parts, d, c});
    return parts == 1 ? out.select(1, 0) : out.sum(1);
}

}  // namespace vision_rwkv
