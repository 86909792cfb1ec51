// What the layers share: weights in the dtype of matrix products.
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

}  // namespace vision_rwkv
