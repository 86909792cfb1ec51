// The data-dependent mixes of VRWKV6 on CUDA, in one pass over the tokens: results in bfloat16 and float16, low ranks
// of 32 and 64. Everything else runs on the implementation in PyTorch.
#include <array>
#include <tuple>

#include "dynamic_mix/dynamic_mix_team.cuh"
#include "dynamic_mix/dynamic_mix_warp.cuh"
#include "tensors.cuh"

namespace dynamic_mix {

constexpr int64_t kLowRanks = 4;

struct Where {
    int64_t height, width, pixels;
    double gamma;
    int64_t heads;
};

void check(const Tensor& x, at::TensorList mixes, at::TensorList ranks, const MaybeTensor& weight,
           const MaybeTensor& bias, const MaybeTensor& stats, const Where& where) {
    TORCH_CHECK(x.dim() == 3, "dynamic_mix: x must have shape (B, T, C), got ", x.sizes());
    const int64_t channels = x.size(2);
    TORCH_CHECK(where.height >= 0 && where.width >= 0 && where.height * where.width <= x.size(1),
                "dynamic_mix: x must have at least ", where.height, " * ", where.width, " tokens, got ", x.size(1));
    TORCH_CHECK(
        where.heads > 0 && channels % where.heads == 0 && where.gamma >= 0 && where.gamma <= 0.25 && where.pixels >= 0,
        "dynamic_mix: expected heads that divide the ", channels,
        " channels, gamma in [0, 1/4] and pixels of at least 0, got ", where.heads, ", ", where.gamma, " and ",
        where.pixels);
    TORCH_CHECK(mixes.size() == 1 + kMixes && ranks.size() == kLowRanks, "dynamic_mix: expected ", 1 + kMixes,
                " mixes and ", kLowRanks, " low-rank factors, got ", mixes.size(), " and ", ranks.size());
    const auto expect = [&](const Tensor& p, int64_t values) {
        TORCH_CHECK(p.numel() == values && p.device() == x.device(), "dynamic_mix: a parameter must have ", values,
                    " values on ", x.device(), ", got ", p.sizes(), " on ", p.device());
    };
    for (const Tensor& mix : mixes) expect(mix, channels);
    TORCH_CHECK(ranks[0].dim() == 2 && ranks[2].dim() == 2, "dynamic_mix: expected factors (C, 5 R) and (C, D), got ",
                ranks[0].sizes(), " and ", ranks[2].sizes());
    for (int i = 0; i < kLowRanks; ++i) expect(ranks[i], channels * ranks[i / 2 * 2].size(1));
    TORCH_CHECK(weight.has_value() == bias.has_value() && weight.has_value() == stats.has_value(),
                "dynamic_mix: expected weight, bias and stats, or none of them");
    if (weight) {
        expect(*weight, channels);
        expect(*bias, channels);
        expect(*stats, 2 * x.size(0) * x.size(1));
    }
}

bool runs_here(const Tensor& x, at::TensorList ranks, const Where& where, at::ScalarType dtype) {
    const int64_t dim = x.size(2) / where.heads;
    return has_kernel(x.scalar_type(), dtype) && dtype != at::kFloat && x.size(0) * x.size(1) <= kMaxRows &&
           ranks[0].size(1) == kMixes * kRank && ranks[2].size(1) == kDecayRank && dim % kGroup == 0 &&
           dim * where.gamma >= kGroup && static_cast<int64_t>(dim * where.gamma) % kGroup == 0 &&
           static_cast<int64_t>(dim * where.gamma) == dim * where.gamma;
}

// The factors in the order of the kernel's operands, in one buffer.
template <typename T>
Tensor packed(const std::array<Tensor, kLowRanks>& ranks, int channels, cudaStream_t stream) {
    const int sides[] = {kMixes * kRank, kMixes * kRank, kDecayRank, kDecayRank}, units = units_of(channels);
    int64_t total = 0;
    for (const int side : sides) total += static_cast<int64_t>(side) * units * kUnit;
    const Tensor buffer = at::empty({total}, ranks[0].options().dtype(at::kHalf));  // of either half precision
    auto* to = static_cast<uint4*>(buffer.mutable_data_ptr());
    Packings all;
    for (int i = 0; i < kPacked; ++i) {
        all.of[i] = {floats(ranks[i]), to, channels, sides[i], i % 2 == 0};
        to += static_cast<int64_t>(sides[i]) * units * kUnit / 8;
    }
    const dim3 grid((sides[0] / 16 * units * (kUnit / 16) * 32 + kBlock - 1) / kBlock, kPacked);
    pack_weights<T><<<grid, kBlock, 0, stream>>>(all);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return buffer;
}

// One block on each processor, unless there are fewer tiles: the warps or teams of the blocks share them.
template <typename X, typename T>
void launch(const Args& args, const X* x, const Tensor& weights, T* out, T* raw, cudaStream_t stream) {
    int device, processors, most;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const auto* packed = static_cast<const uint4*>(weights.const_data_ptr());
    const auto blocks = [&](int tile) { return std::min(processors, (args.rows + tile - 1) / tile); };
    constexpr int kBytes = sizeof(WarpShared<X>);
    if (units_of(args.channels) <= kMostUnits && kBytes <= most) {
        const auto kernel = mix_by_warps<X, T>;
        C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
        kernel<<<blocks(kTile), kWarpThreads, kBytes, stream>>>(args, x, packed, out, raw);
    } else {
        const auto kernel = mix_by_teams<X, T>;
        C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTeamBytes));
        kernel<<<blocks(kTeamTile), kTeamThreads, kTeamBytes, stream>>>(args, x, packed, out, raw);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> dynamic_mix_cuda(const Tensor& x_, at::TensorList mixes, at::TensorList ranks,
                                            const MaybeTensor& weight, const MaybeTensor& bias,
                                            const MaybeTensor& stats, int64_t height, int64_t width, int64_t pixels,
                                            double gamma, int64_t heads, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(x_.device());
    const Where where{height, width, pixels, gamma, heads};
    check(x_, mixes, ranks, weight, bias, stats, where);
    if (x_.numel() != 0 && !runs_here(x_, ranks, where, dtype)) {
        torch::jit::Stack stack{x_,     mixes.vec(), ranks.vec(), weight, bias,  stats,
                                height, width,       pixels,      gamma,  heads, static_cast<int64_t>(dtype)};
        call_pytorch("vision_rwkv::dynamic_mix", stack);
        return {stack[0].toTensor(), stack[1].toTensor()};
    }
    const Tensor x = aligned(x_);
    Tensor out = at::empty({kMixes - 1, x.size(0), x.size(1), x.size(2)}, x.options().dtype(dtype));
    Tensor raw = at::empty(x.sizes(), out.options());
    if (x.numel() == 0) return {out, raw};
    std::array<Tensor, 1 + kMixes> mix;
    std::array<Tensor, kLowRanks> factors;
    const Tensor weight_ = parameter(weight), bias_ = parameter(bias), stats_ = parameter(stats);
    const int64_t dim = x.size(2) / heads;
    Args args{};
    args.rows = static_cast<int>(x.size(0) * x.size(1)), args.channels = static_cast<int>(x.size(2));
    args.tokens = static_cast<int>(x.size(1)), args.height = static_cast<int>(height);
    args.width = static_cast<int>(width), args.dim = static_cast<int>(dim);
    // More than the map's sides is as good as past its border.
    args.pixels = static_cast<int>(std::min(pixels, std::max(height, width)));
    args.quarter = static_cast<int>(dim * gamma);
    args.by_tokens = Divisor::make(x.size(1)), args.by_width = Divisor::make(std::max<int64_t>(1, width));
    args.by_dim = Divisor::make(dim), args.by_quarter = Divisor::make(args.quarter);
    for (int i = 0; i <= kMixes; ++i) {
        mix[i] = parameter(mixes[i]);
        args.mix[i] = floats(mix[i]);
    }
    for (int i = 0; i < kLowRanks; ++i) factors[i] = parameter(ranks[i]);
    args.weight = floats(weight_), args.bias = floats(bias_), args.stats = floats(stats_);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const auto run = [&](auto token, auto result) {
        using X = decltype(token);
        using T = decltype(result);
        const Tensor weights = packed<T>(factors, args.channels, stream);
        launch<X, T>(args, data<X>(x), weights, mutable_data<T>(out), mutable_data<T>(raw), stream);
    };
    const bool wide = x.scalar_type() == at::kFloat;
    if (dtype == at::kBFloat16) {
        wide ? run(float{}, __nv_bfloat16{}) : run(__nv_bfloat16{}, __nv_bfloat16{});
    } else {
        wide ? run(float{}, __half{}) : run(__half{}, __half{});
    }
    return {out, raw};
}

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) { m.impl("dynamic_mix", dynamic_mix_cuda); }

}  // namespace dynamic_mix
