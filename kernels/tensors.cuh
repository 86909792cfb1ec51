// What the dispatcher's CUDA entries share: layout of tensors, dtypes, the way to the implementation in PyTorch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

namespace rows {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxRows = int64_t{1} << 30;  // kernels count rows in 32 bits

inline bool is_aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// Contiguous, and where vectors can be read: 16-byte aligned.
inline Tensor aligned(const Tensor& x) {
    const Tensor y = x.contiguous();
    return is_aligned(y) ? y : y.clone();
}

// A parameter as the kernels take it: float32; undefined stays undefined.
inline Tensor parameter(const MaybeTensor& x) { return x && x->defined() ? aligned(x->to(at::kFloat)) : Tensor(); }

inline const float* floats(const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

inline Tensor new_floats(const Tensor& like, at::IntArrayRef sizes) {
    return at::empty(sizes, like.options().dtype(at::kFloat));
}

// Whether there are kernels for tokens of `x` and results (or branches) of `other`.
inline bool has_kernel(at::ScalarType x, at::ScalarType other) {
    const auto known = [](at::ScalarType t) { return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf; };
    return known(x) && known(other) && (x == at::kFloat || x == other);
}

template <int kVec>
using Vec = std::integral_constant<int, kVec>;

// Calls body(a value of the first type, of the second type, Vec<4 or 1>) for a pair that has_kernel.
template <typename Body>
void for_types(at::ScalarType x, at::ScalarType other, bool vectors, const Body& body) {
    const auto with = [&](auto a, auto b) { return vectors ? body(a, b, Vec<4>{}) : body(a, b, Vec<1>{}); };
    if (x == at::kBFloat16) return with(__nv_bfloat16{}, __nv_bfloat16{});
    if (x == at::kHalf) return with(__half{}, __half{});
    if (other == at::kBFloat16) return with(float{}, __nv_bfloat16{});
    if (other == at::kHalf) return with(float{}, __half{});
    return with(float{}, float{});
}

template <typename T>
const T* data(const Tensor& x) {
    return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& x) {
    return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// The implementation in PyTorch, which is registered for every device.
inline void call_pytorch(const char* name, torch::jit::Stack& stack) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
}

}  // namespace rows
