// Calls of Q-Shift's operators from C++; arguments in the order of their schemas.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace vision_rwkv {

inline at::Tensor q_shift(const at::Tensor& x, at::TensorList mixes, const std::optional<at::Tensor>& delta,
                          const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& stats, int64_t height, int64_t width, int64_t pixels,
                          double gamma, int64_t heads, at::ScalarType dtype) {
    using Maybe = const std::optional<at::Tensor>&;
    static const auto op =
        find<at::Tensor(const at::Tensor&, at::TensorList, Maybe, Maybe, Maybe, Maybe, c10::SymInt, c10::SymInt,
                        int64_t, double, int64_t, at::ScalarType)>("vision_rwkv::q_shift");
    return op.call(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads, dtype);
}

// Gradients of x, mixes, delta, weight and bias.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> q_shift_backward(
    const at::Tensor& g, const at::Tensor& x, at::TensorList mixes, const std::optional<at::Tensor>& delta,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& stats, int64_t height, int64_t width, int64_t pixels, double gamma,
    int64_t heads) {
    using Maybe = const std::optional<at::Tensor>&;
    static const auto op = find<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, at::TensorList, Maybe, Maybe, Maybe, Maybe, c10::SymInt, c10::SymInt,
        int64_t, double, int64_t)>("vision_rwkv::q_shift_backward");
    return op.call(g, x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
}

// The gradient of x with `sum` added, that of the branch before it where `branch` is a dtype, and those of the mixes
// and of the norm's weight and bias, (n, C).
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> q_shift_residual_backward(
    const at::Tensor& g, const at::Tensor& x, at::TensorList mixes, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& stats, int64_t height, int64_t width,
    int64_t pixels, double gamma, int64_t heads, const std::optional<at::Tensor>& sum,
    const std::optional<at::Tensor>& scale, std::optional<at::ScalarType> branch) {
    using Maybe = const std::optional<at::Tensor>&;
    static const auto op = find<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, at::TensorList, Maybe, Maybe, Maybe, c10::SymInt, c10::SymInt, int64_t,
        double, int64_t, Maybe, Maybe, std::optional<at::ScalarType>)>("vision_rwkv::q_shift_residual_backward");
    return op.call(g, x, mixes, weight, bias, stats, height, width, pixels, gamma, heads, sum, scale, branch);
}

}  // namespace vision_rwkv
