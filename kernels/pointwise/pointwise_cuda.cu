// The operators of vision_rwkv/ops/pointwise.py that go value by value on CUDA: float32, bfloat16, float16. float64 and
// mixed dtypes run on the implementation in PyTorch.
#include <limits>
#include <tuple>

#include "pointwise/pointwise_cuda.h"
#include "rows.cuh"

namespace pointwise {

struct Gate {
    __device__ void operator()(const float (&in)[2], float (&out)[1]) const { out[0] = sigmoid(in[0]) * in[1]; }
};

struct GateBackward {  // of g, r, y
    __device__ void operator()(const float (&in)[3], float (&out)[2]) const {
        const float s = sigmoid(in[1]);
        out[1] = in[0] * s;
        out[0] = out[1] * in[2] * (1.0f - s);
    }
};

struct SquaredRelu {
    float limit;
    __device__ void operator()(const float (&in)[1], float (&out)[1]) const {
        const float x = in[0] < 0.0f ? 0.0f : (in[0] > limit ? limit : in[0]);  // NaN stays
        out[0] = x * x;
    }
};

struct SquaredReluBackward {  // of g, x
    float limit;
    __device__ void operator()(const float (&in)[2], float (&out)[1]) const {
        out[0] = in[1] > limit ? 0.0f : 2.0f * in[0] * (in[1] < 0.0f ? 0.0f : in[1]);
    }
};

struct SquaredReluBoth {  // of g, x: the square too
    float limit;
    __device__ void operator()(const float (&in)[2], float (&out)[2]) const {
        const float x = in[1] < 0.0f ? 0.0f : (in[1] > limit ? limit : in[1]);
        out[0] = x * x;
        out[1] = in[1] > limit ? 0.0f : 2.0f * in[0] * x;
    }
};

struct GatedBackward {  // of g, r and what the gate left
    __device__ void operator()(const float (&in)[3], float (&out)[2]) const {
        const float s = sigmoid(in[1]);
        out[0] = in[0] * in[2] * (1.0f - s);
        out[1] = in[0] * s;
    }
};

template <int kIn, int kOut, typename T>
struct Pointers {
    const T* in[kIn];
    T* out[kOut];
};

template <int kIn, int kOut, typename T, typename Function>
__global__ void __launch_bounds__(kBlock) map(Function function, Pointers<kIn, kOut, T> at, int64_t count) {
    constexpr int kVec = 16 / sizeof(T);
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVec;
    if (first >= count) return;
    float in[kIn][kVec], out[kOut][kVec];
    const bool whole = first + kVec <= count;
#pragma unroll
    for (int i = 0; i < kIn; ++i) {
        if (whole) {
            load(at.in[i] + first, in[i]);
        } else {
            for (int j = 0; j < kVec; ++j) in[i][j] = first + j < count ? to_float(at.in[i][first + j]) : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        float values[kIn], results[kOut];
#pragma unroll
        for (int i = 0; i < kIn; ++i) values[i] = in[i][j];
        function(values, results);
#pragma unroll
        for (int i = 0; i < kOut; ++i) out[i][j] = results[i];
    }
#pragma unroll
    for (int i = 0; i < kOut; ++i) {
        if (whole) {
            store(at.out[i] + first, out[i]);
        } else {
            for (int j = 0; j < kVec && first + j < count; ++j) at.out[i][first + j] = from_float<T>(out[i][j]);
        }
    }
}

// Tensors of one shape and dtype through `function`; false where there is no kernel.
template <typename Function, size_t kIn, size_t kOut>
bool mapped(const Function& function, const Tensor (&in)[kIn], const Tensor (&out)[kOut]) {
    for (const Tensor& x : in) {
        if (x.scalar_type() != in[0].scalar_type() || !has_kernel(x.scalar_type(), x.scalar_type())) return false;
    }
    const int64_t count = in[0].numel();
    if (count == 0) return true;
    Tensor inputs[kIn];
    for (size_t i = 0; i < kIn; ++i) inputs[i] = aligned(in[i]);
    const auto run = [&](auto value) {
        using T = decltype(value);
        Pointers<kIn, kOut, T> at;
        for (size_t i = 0; i < kIn; ++i) at.in[i] = data<T>(inputs[i]);
        for (size_t i = 0; i < kOut; ++i) at.out[i] = mutable_data<T>(out[i]);
        const int64_t group = kBlock * (16 / sizeof(T)), blocks = (count + group - 1) / group;
        TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many values for one launch: ", count);
        map<kIn, kOut, T>
            <<<static_cast<int>(blocks), kBlock, 0, c10::cuda::getCurrentCUDAStream()>>>(function, at, count);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    switch (in[0].scalar_type()) {
        case at::kFloat:
            run(float{});
            break;
        case at::kBFloat16:
            run(__nv_bfloat16{});
            break;
        default:
            run(__half{});
    }
    return true;
}

Tensor gate_cuda(const Tensor& r, const Tensor& y) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_same("gate", r, y);
    const Tensor out = empty_like(y);
    if (mapped(Gate{}, {r, y}, {out})) return out;
    torch::jit::Stack stack{r, y};
    call_pytorch("vision_rwkv::gate", stack);
    return stack[0].toTensor();
}

std::tuple<Tensor, Tensor> gate_backward_cuda(const Tensor& g, const Tensor& r, const Tensor& y) {
    const c10::cuda::CUDAGuard guard(y.device());
    check_same("gate", r, y);
    check_same("gate", g, y);
    const Tensor gr = empty_like(r), gy = empty_like(y);
    if (mapped(GateBackward{}, {g, r, y}, {gr, gy})) return {gr, gy};
    torch::jit::Stack stack{g, r, y};
    call_pytorch("vision_rwkv::gate_backward", stack);
    return {stack[0].toTensor(), stack[1].toTensor()};
}

// As FLOAT16_SQUARE_MAX in pointwise.py.
float square_limit(const Tensor& x) {
    return x.scalar_type() == at::kHalf ? 255.0f : std::numeric_limits<float>::infinity();
}

Tensor squared_relu_cuda(const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor out = empty_like(x);
    if (mapped(SquaredRelu{square_limit(x)}, {x}, {out})) return out;
    torch::jit::Stack stack{x};
    call_pytorch("vision_rwkv::squared_relu", stack);
    return stack[0].toTensor();
}

Tensor& squared_relu_in_place(Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    if (!x.is_contiguous() || !is_aligned(x) || !mapped(SquaredRelu{square_limit(x)}, {x}, {x})) {
        x.copy_(squared_relu_cuda(x));
    }
    return x;
}

Tensor squared_relu_backward_cuda(const Tensor& g, const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_same("squared_relu", g, x);
    const Tensor out = empty_like(x);
    if (mapped(SquaredReluBackward{square_limit(x)}, {g, x}, {out})) return out;
    torch::jit::Stack stack{g, x};
    call_pytorch("vision_rwkv::squared_relu_backward", stack);
    return stack[0].toTensor();
}

// The gradient goes over g; the square comes back.
Tensor squared_relu_backward_in_place(Tensor& g, const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_same("squared_relu", g, x);
    const Tensor square = empty_like(x);
    if (g.is_contiguous() && is_aligned(g) && mapped(SquaredReluBoth{square_limit(x)}, {g, x}, {square, g})) {
        return square;
    }
    g.copy_(squared_relu_backward_cuda(g, x));
    return squared_relu_cuda(x);
}

// As gate_backward, from gated = sigmoid(r) * y. The gradient of r goes over g; that of y comes back.
Tensor gated_backward_in_place(Tensor& g, const Tensor& r, const Tensor& gated) {
    const c10::cuda::CUDAGuard guard(r.device());
    check_same("gate", r, gated);
    check_same("gate", g, gated);
    const Tensor gy = empty_like(gated);
    if (g.is_contiguous() && is_aligned(g) && mapped(GatedBackward{}, {g, r, gated}, {g, gy})) return gy;
    torch::jit::Stack stack{g, r, gated};
    call_pytorch("vision_rwkv::gated_backward_", stack);
    return stack[0].toTensor();
}

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("gate", gate_cuda);
    m.impl("gate_backward", gate_backward_cuda);
    m.impl("squared_relu", squared_relu_cuda);
    m.impl("squared_relu_", squared_relu_in_place);
    m.impl("squared_relu_backward", squared_relu_backward_cuda);
    m.impl("squared_relu_backward_", squared_relu_backward_in_place);
    m.impl("gated_backward_", gated_backward_in_place);
}

}  // namespace pointwise
