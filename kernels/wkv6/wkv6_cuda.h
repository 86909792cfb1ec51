// What the WKV6 kernels of one dtype offer to wkv6_cuda.cu. Pointers are to device memory, 16-byte aligned.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace wkv6 {

// Tensors of T are (batch, tokens, heads, 64), contiguous; w and gw are of T, or float32 if w_is_float.
struct Call {
    int64_t batch, tokens, heads;
    const void *r, *k, *v, *w, *gy;  // gy: backward only
    const float* u;                  // (heads, 64)
    bool w_is_float;
    float *states, *decays;  // workspace
    cudaStream_t stream;
};

// For results (norm of y's heads * weight + bias) * silu(gate) and decays exp(-exp(base + w)); parameters (heads, 64).
struct Gating {
    const void* gate;  // as r
    const float *base, *weight, *bias;
    float eps;
};

struct Gradients {
    void *r, *k, *v, *w;
    float *u, *u_parts;  // u_parts: workspace
};

// Numbers of floats that the workspaces hold.
struct Workspace {
    int64_t states, decays, u_parts;
};
Workspace workspace(const Call& call, bool backward);

template <typename T>
void forward(const Call& call, void* y);

// w must be of T.
template <typename T>
void gated(const Call& call, const Gating& gating, void* y);

template <typename T>
void backward(const Call& call, const Gradients& out);

}  // namespace wkv6
