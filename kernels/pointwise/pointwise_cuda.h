// What the operators of pointwise_cuda.cu and pointwise_cuda_rows.cu check and allocate.
#pragma once

#include "tensors.cuh"

namespace pointwise {

using namespace rows;

inline Tensor empty_like(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

inline void check_same(const char* op, const Tensor& x, const Tensor& y) {
    TORCH_CHECK(x.sizes() == y.sizes() && x.device() == y.device(), op,
                ": expected tensors of one shape and device, got ", x.sizes(), " on ", x.device(), " and ", y.sizes(),
                " on ", y.device());
}

}  // namespace pointwise
