// What inference on CUDA does in other steps than kernels/fused/fused_cpu_cuda.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "dispatch.h"

namespace vision_rwkv {
namespace {

using at::Tensor;

// Tokens at a time, so that what lies between the products stays in the L2 cache: a part of it, the rest being for what
// comes and goes. Not fewer than fill the device with a product's tiles.
constexpr int64_t kTile = 256, kFewestTokens = 2048;
double cache_part() { const char* x = std::getenv("VRWKV_PART"); return x ? atof(x) : 0.4; }

int64_t tokens_at_a_time(int64_t tokens, int64_t bytes_a_token) {
    int device = 0, cache = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    const auto most = std::max(kFewestTokens, static_cast<int64_t>(cache_part() * cache) / bytes_a_token);
    const int64_t parts = (tokens + most - 1) / most;
    return parts <= 1 ? tokens : ((tokens + parts - 1) / parts + kTile - 1) / kTile * kTile;
}

// x (B, T, C), key (D, C), value (E, D) -> (B, T, E).
Tensor squared_relu_mlp(const Tensor& x, const Tensor& key, const Tensor& value) {
    static const auto square = find<Tensor&(Tensor&)>("vision_rwkv::squared_relu_");
    const c10::cuda::CUDAGuard guard(x.device());
    TORCH_CHECK(x.dim() == 3, "squared_relu_mlp: x must have shape (B, T, C), got ", x.sizes());
    const auto dtype = x.scalar_type();
    const Tensor key_map = key.to(dtype).t(), value_map = value.to(dtype).t();
    const int64_t tokens = x.size(0) * x.size(1), hidden_channels = key.size(0);
    const Tensor out = at::empty({x.size(0), x.size(1), value.size(0)}, x.options());
    if (tokens == 0) return out;
    const Tensor from = x.reshape({tokens, x.size(2)}), to = out.view({tokens, value.size(0)});
    const int64_t step = tokens_at_a_time(tokens, hidden_channels * x.element_size());
    const Tensor hidden = at::empty({step, hidden_channels}, x.options());
    for (int64_t first = 0; first < tokens; first += step) {
        const int64_t count = std::min(step, tokens - first);
        Tensor some = hidden.narrow(0, 0, count), result = to.narrow(0, first, count);
        at::mm_out(some, from.narrow(0, first, count), key_map);
        square.call(some);
        at::mm_out(result, some, value_map);
    }
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) { m.impl("squared_relu_mlp", squared_relu_mlp); }

}  // namespace vision_rwkv
