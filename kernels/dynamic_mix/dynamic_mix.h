// The steps of the data-dependent mixes, forth and back, by the other operators and ATen's matrix products: for
// `dynamic_linear` and for a block of VRWKV6, whose maps lie between.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "fused/fused.h"

namespace vision_rwkv {

// The operator: the inputs of key, value, receptance and gate, (4, B, T, C), and the raw decay.
inline std::tuple<at::Tensor, at::Tensor> call_dynamic_mix(
    const at::Tensor& x, at::TensorList mixes, at::TensorList ranks, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& stats, int64_t height, int64_t width,
    int64_t pixels, double gamma, int64_t heads, at::ScalarType dtype) {
    using Maybe = const std::optional<at::Tensor>&;
    static const auto op =
        find<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, at::TensorList, at::TensorList, Maybe, Maybe, Maybe,
                                                c10::SymInt, c10::SymInt, int64_t, double, int64_t, at::ScalarType)>(
            "vision_rwkv::dynamic_mix");
    return op.call(x, mixes, ranks, weight, bias, stats, height, width, pixels, gamma, heads, dtype);
}

// One call: the arguments of `dynamic_mix` in the order of its schema, and what `run` leaves.
struct DynamicMix {
    using Tensor = at::Tensor;
    using MaybeTensor = std::optional<Tensor>;
    using Tensors = std::vector<Tensor>;
    static constexpr size_t kMixCount = 6, kRankCount = 4;
    static constexpr int64_t kInputs = 4;  // after that of the decay

    const Tensor& x;
    at::TensorList mixes_in, ranks_in;
    const MaybeTensor &weight, &bias, &stats;
    int64_t height, width, pixels;
    double gamma;
    int64_t heads;
    at::ScalarType dtype;

    Tensors mixes, ranks;  // mixes as q_shift takes them: how much of a token stays

    // The blend for the low ranks and tanh of its product, what they add to the mixes, the inputs of decay, key, value,
    // receptance and gate, and tanh of the decay's product. wide: before it is rounded to half precision, of which too
    // few digits of 1 - tanh^2 would be left.
    Tensor base, wide_z, z, delta, mixed, wide_t, t;

    void run();

    // The inputs of key, value, receptance and gate, (4, B, T, C).
    Tensor inputs() const { return mixed.narrow(0, 1, kInputs); }

    // columns: the gradients of the mixes, then those of the norm's weight and bias if there is one, (n, C).
    struct Gradients {
        Tensor gx, columns;
        Tensors ranks;
    };

    // From the gradients of the inputs, which have been written over `inputs`, and of the raw decay, (B, T, C). `sum`
    // is added to the tokens'.
    Gradients backward(const Tensor& graw, const MaybeTensor& sum);

 private:
    at::TensorList first() const { return at::TensorList(mixes).slice(0, 1); }
    at::TensorList others() const { return at::TensorList(mixes).slice(1); }
    Tensor shift(at::TensorList with, const MaybeTensor& off) const;
    Tensor by_mix(const Tensor& low) const;
    void through_decay(const Tensor& graw, Tensors& granks);
    void through_mixes(const Tensor& gdelta, const Tensor& gbase, Tensors& granks);
    Gradients in_two_passes(const MaybeTensor& sum, Tensors granks);
    Gradients by_q_shift(const MaybeTensor& sum, Tensors granks);
};

}  // namespace vision_rwkv
