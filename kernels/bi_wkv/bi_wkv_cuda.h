// What the Bi-WKV kernels of one dtype offer to bi_wkv_cuda.cu. Pointers are to device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bi_wkv {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

// One call. Tensors are contiguous: k, v, y, r, gy, gk, gv (batch, tokens, channels) of the kernels' dtype, w, u, gw,
// gu (channels,) of their own. With r the forward is gated: y comes times sigmoid(r). over_tokens: w and u are to be
// divided by the number of tokens.
struct Call {
    int64_t batch, tokens, channels;
    const void *w, *u, *k, *v, *r, *gy;
    Dtype w_type, u_type;
    void *y, *gk, *gv, *gw, *gu;
    bool backward, over_tokens;
    cudaStream_t stream;
};

// How a call is cut into tiles, see "CUDA plan" in README.md.
struct Plan {
    int rows;                  // of a tile, kRow tokens each
    int chunks;                // tiles along the tokens
    int slices;                // tiles along the channels
    int group;                 // slices of which all tiles come before those of others; divides `slices`
    int blocks;                // of a kernel that takes long sequences in one pass; 0: several kernels
    int stages;                // tiles that are copied ahead
    int shared_before_stages;  // bytes of a block's shared memory before them
    int processors;            // of the device
    int64_t workspace;         // bytes
};

template <typename T>
Plan make_plan(const Call& call);

template <typename T>
void run(const Call& call, const Plan& plan, void* workspace);

}  // namespace bi_wkv
