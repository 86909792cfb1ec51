// The layers of vision_rwkv/ops/fused.py, on CPU and CUDA: they call the other operators and ATen's matrix products,
// and are here so that a layer costs one call from Python. What each computes is written down there.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "fused/fused.h"
#include "q_shift/q_shift.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

Tensor gate(const Tensor& r, const Tensor& y) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::gate");
    return op.call(r, y);
}

Tensor squared_relu(const Tensor& x) {
    static const auto op = find<Tensor(const Tensor&)>("vision_rwkv::squared_relu");
    return op.call(x);
}

Tensor norm_stats(const Tensor& x, double eps) {
    static const auto op = find<Tensor(const Tensor&, double)>("vision_rwkv::norm_stats");
    return op.call(x, eps);
}

// Arguments of mix_linear and its backward in the order of their schemas.
struct Mix {
    const Tensor& x;
    at::TensorList mixes;
    const MaybeTensor &weight, &bias;
    MaybeTensor stats;
    int64_t height, width, pixels;
    double gamma;
    int64_t heads;

    void measure(double eps) {
        if (weight && !stats) stats = norm_stats(x, eps);
    }

    Tensor forward(at::ScalarType dtype) const {
        return q_shift(x, mixes, std::nullopt, weight, bias, stats, height, width, pixels, gamma, heads, dtype);
    }

    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& g) const {
        return q_shift_backward(g, x, mixes, std::nullopt, weight, bias, stats, height, width, pixels, gamma, heads);
    }
};

void check_counts(at::TensorList mixes, at::TensorList maps) {
    TORCH_CHECK(mixes.size() == maps.size(), "mix_linear: expected a map for each of the ", mixes.size(),
                " mixes, got ", maps.size());
}

std::vector<Tensor> mix_linear(const Tensor& x, at::TensorList mixes, at::TensorList maps_in, const MaybeTensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& stats, double eps, int64_t height,
                               int64_t width, int64_t pixels, double gamma, int64_t heads, at::ScalarType dtype) {
    check_counts(mixes, maps_in);
    const std::vector<Tensor> maps = in_dtype(maps_in, dtype);
    Mix mix{x, mixes, weight, bias, stats, height, width, pixels, gamma, heads};
    mix.measure(eps);
    const Tensor mixed = mix.forward(dtype);
    std::vector<Tensor> out;
    for (size_t i = 0; i < maps.size(); ++i)
        out.push_back(apply_map(mixed.select(0, static_cast<int64_t>(i)), maps[i]));
    return out;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor> mix_linear_backward(
    at::TensorList g, const Tensor& x, at::TensorList mixes, at::TensorList maps, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& stats, double eps, int64_t height, int64_t width, int64_t pixels,
    double gamma, int64_t heads, at::ScalarType dtype) {
    check_counts(mixes, maps);
    TORCH_CHECK(g.size() == maps.size(), "mix_linear: expected ", maps.size(), " gradients, got ", g.size());
    Mix mix{x, mixes, weight, bias, stats, height, width, pixels, gamma, heads};
    mix.measure(eps);
    const Tensor mixed = mix.forward(dtype);
    const std::vector<Tensor> cast = in_dtype(maps, dtype);
    std::vector<Tensor> gmaps;
    for (size_t i = 0; i < maps.size(); ++i) {
        const Tensor part = mixed.select(0, static_cast<int64_t>(i));
        gmaps.push_back(map_gradient(g[i], part, maps[i]));
        input_gradient(g[i], cast[i], part);  // in place of the input, which is no longer needed
    }
    auto [gx, gmixes, none, gweight, gbias] = mix.backward(mixed);
    return {gx, gmixes, gmaps, gweight, gbias};
}

Tensor gated_linear(const Tensor& r, const Tensor& y, const Tensor& map) { return apply_map(gate(r, y), map); }

std::tuple<Tensor, Tensor, Tensor> gated_linear_backward(const Tensor& g, const Tensor& r, const Tensor& y,
                                                         const Tensor& map) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::gate_backward");
    const Tensor x = gate(r, y).contiguous(), gmap = map_gradient(g, x, map);
    input_gradient(g, map, x);
    const auto [gr, gy] = op.call(x, r, y);
    return {gr, gy, gmap};
}

Tensor squared_relu_linear(const Tensor& x, const Tensor& map) { return apply_map(squared_relu(x), map); }

std::tuple<Tensor, Tensor> squared_relu_linear_backward(const Tensor& g, const Tensor& x, const Tensor& map) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::squared_relu_backward");
    const Tensor squared = squared_relu(x).contiguous(), gmap = map_gradient(g, squared, map);
    input_gradient(g, map, squared);
    return {op.call(squared, x), gmap};
}

// The square is taken in place where there is a kernel for that.
Tensor squared_relu_mlp(const Tensor& x, const Tensor& key, const Tensor& value) {
    if (!x.is_cuda()) return squared_relu_linear(apply_map(x, key), value);
    static const auto square = find<Tensor&(Tensor&)>("vision_rwkv::squared_relu_");
    Tensor hidden = apply_map(x, key);
    return apply_map(square.call(hidden), value);
}

std::vector<Tensor> cast_each(at::TensorList weights, at::ScalarType dtype, int64_t stacked) {
    TORCH_CHECK(0 <= stacked && stacked <= static_cast<int64_t>(weights.size()),
                "cast_weights: expected stacked from 0 to ", weights.size(), ", the number of weights, got ", stacked);
    std::vector<Tensor> out;
    if (stacked > 0) out.push_back(at::stack(weights.slice(0, stacked)).to(dtype));
    for (const Tensor& weight : weights.slice(stacked)) out.push_back(weight.to(dtype));
    return out;
}

void implement(torch::Library& m) {
    m.impl("mix_linear", mix_linear);
    m.impl("mix_linear_backward", mix_linear_backward);
    m.impl("gated_linear", gated_linear);
    m.impl("gated_linear_backward", gated_linear_backward);
    m.impl("squared_relu_linear", squared_relu_linear);
    m.impl("squared_relu_linear_backward", squared_relu_linear_backward);
    m.impl("squared_relu_mlp", squared_relu_mlp);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    m.def("cast_weights(Tensor[] weights, ScalarType dtype, int stacked=0) -> Tensor[]");
    m.impl("cast_weights", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(cast_each));
}
TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) { implement(m); }

}  // namespace vision_rwkv
