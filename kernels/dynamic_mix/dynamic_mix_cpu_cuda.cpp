// The data-dependent mixes of vision_rwkv/ops/dynamic_mix.py, and the linear maps after them with recomputation, on CPU
// and CUDA: calls of the other operators and ATen's matrix products. What each computes is written down there.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "fused/fused.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of x, mixes, delta, weight, bias

constexpr size_t kMixCount = 6, kRankCount = 4, kMapCount = 4;

void check_counts(at::TensorList mixes, at::TensorList ranks) {
    TORCH_CHECK(mixes.size() == kMixCount && ranks.size() == kRankCount, "dynamic_mix: expected ", kMixCount,
                " mixes and ", kRankCount, " low-rank factors, got ", mixes.size(), " and ", ranks.size());
}

// A matrix product, or several: in float32 of half precision, so that it is not rounded. out= leaves autocast out of
// it.
Tensor wide_product(const Tensor& x, const Tensor& y) {
    const bool half = x.element_size() == 2, two = x.dim() == 2;
    if (half && x.is_cuda() && x.numel() > 0) return two ? at::mm(x, y, at::kFloat) : at::bmm(x, y, at::kFloat);
    const Tensor a = half ? x.to(at::kFloat) : x, b = half ? y.to(at::kFloat) : y;
    Tensor out = at::empty({0}, a.options());
    return two ? at::mm_out(out, a, b) : at::bmm_out(out, a, b);
}

// One call's arguments in the order of the schemas, and its steps.
struct Call {
    const Tensor& x;
    at::TensorList mixes_in, ranks_in;
    const MaybeTensor &weight, &bias;
    MaybeTensor stats;
    int64_t height, width, pixels;
    double gamma;
    int64_t heads;
    at::ScalarType dtype;
    // What the steps leave: the blend for the low ranks and tanh of its product, what they add to the mixes, the inputs
    // of decay, key, value, receptance and gate, and tanh of the decay's product. wide: before it is rounded to half
    // precision, of which too few digits of 1 - tanh^2 would be left.
    Tensors mixes, ranks;
    Tensor base, wide_z, z, delta, mixed, wide_t, t;

    // Mixes as q_shift takes them: how much of a token stays.
    void prepare() {
        check_counts(mixes_in, ranks_in);
        Tensors flat;
        for (const Tensor& mix : mixes_in) flat.push_back(mix.reshape({-1}));
        mixes = (1 - at::stack(flat)).unbind();
        ranks = in_dtype(ranks_in, dtype);
    }
    at::TensorList first() const { return at::TensorList(mixes).slice(0, 1); }
    at::TensorList others() const { return at::TensorList(mixes).slice(1); }

    Tensor shift(at::TensorList with, const MaybeTensor& off) const {
        static const auto op =
            find<Tensor(const Tensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                        const MaybeTensor&, c10::SymInt, c10::SymInt, int64_t, double, int64_t, at::ScalarType)>(
                "vision_rwkv::q_shift");
        return op.call(x, with, off, weight, bias, stats, height, width, pixels, gamma, heads, dtype);
    }

    Gradients shift_backward(const Tensor& g, at::TensorList with, const MaybeTensor& off) const {
        static const auto op =
            find<Gradients(const Tensor&, const Tensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&,
                           const MaybeTensor&, const MaybeTensor&, c10::SymInt, c10::SymInt, int64_t, double, int64_t)>(
                "vision_rwkv::q_shift_backward");
        return op.call(g, x, with, off, weight, bias, stats, height, width, pixels, gamma, heads);
    }

    // (M, 5 R) as (5, M, R).
    Tensor by_mix(const Tensor& low) const { return low.view({low.size(0), 5, low.size(1) / 5}).transpose(0, 1); }

    void run() {
        base = shift(first(), std::nullopt);
        wide_z = wide_product(rows(base[0]), ranks[0]).tanh_();
        z = wide_z.to(dtype);
        delta = at::bmm(by_mix(z), ranks[1]).view({5, x.size(0), x.size(1), x.size(2)});
        mixed = shift(others(), delta);
        wide_t = wide_product(rows(mixed[0]), ranks[2]).tanh_();
        t = wide_t.to(dtype);
    }
};

// Only what follows from the inputs: for devices and dtypes without a kernel of their own.
std::tuple<Tensor, Tensor> dynamic_mix(const Tensor& x, at::TensorList mixes, at::TensorList ranks,
                                       const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats,
                                       int64_t height, int64_t width, int64_t pixels, double gamma, int64_t heads,
                                       at::ScalarType dtype) {
    Call call{x, mixes, ranks, weight, bias, stats, height, width, pixels, gamma, heads, dtype, {}, {}};
    call.prepare();
    call.run();
    return {call.mixed.narrow(0, 1, kMapCount).clone(), at::mm(call.t, call.ranks[3]).view(x.sizes())};
}

MaybeTensor measured(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& stats, double eps) {
    static const auto op = find<Tensor(const Tensor&, double)>("vision_rwkv::norm_stats");
    return weight && !stats ? MaybeTensor(op.call(x, eps)) : stats;
}

Tensors dynamic_linear(const Tensor& x, at::TensorList mixes, at::TensorList ranks, at::TensorList maps_in,
                       const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats, double eps,
                       int64_t height, int64_t width, int64_t pixels, double gamma, int64_t heads,
                       at::ScalarType dtype) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, at::TensorList, at::TensorList, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        c10::SymInt, c10::SymInt, int64_t, double, int64_t, at::ScalarType)>("vision_rwkv::dynamic_mix");
    TORCH_CHECK(maps_in.size() == kMapCount, "dynamic_linear: expected ", kMapCount, " maps, got ", maps_in.size());
    const Tensors maps = in_dtype(maps_in, dtype);
    const auto [mixed, raw] = op.call(x, mixes, ranks, weight, bias, measured(x, weight, stats, eps), height, width,
                                      pixels, gamma, heads, dtype);
    Tensors out;
    for (size_t i = 0; i < kMapCount; ++i) out.push_back(apply_map(mixed.select(0, static_cast<int64_t>(i)), maps[i]));
    out.push_back(raw);
    return out;
}

// The gradient of a factor (D, C) of the product x (M, D) @ factor from that of the product.
Tensor factor_gradient(const Tensor& x, const Tensor& g, const Tensor& factor) {
    return map_gradient(x.unsqueeze(0), g.unsqueeze(0), factor);
}

// The steps of a call, backwards.
struct Backward {
    Call& call;
    at::TensorList maps;
    Tensors granks = Tensors(kRankCount), gmaps;

    // From the gradients of the maps' results to those of the maps and, in place, of their inputs.
    void through_maps(at::TensorList g) {
        const Tensors cast = in_dtype(maps, call.dtype);
        for (size_t i = 0; i < kMapCount; ++i) {
            const Tensor part = call.mixed.select(0, static_cast<int64_t>(1 + i));
            gmaps.push_back(map_gradient(g[i], part, maps[i]));
            input_gradient(g[i], cast[i], part);
        }
    }

    // The same for tanh(x @ down) @ up, where t is that tanh and g the gradient of the result, (M, C).
    void through_decay(const Tensor& g) {
        granks[3] = factor_gradient(call.t, g, call.ranks_in[3]);
        Tensor x = rows(call.mixed[0]);
        const Tensor inner = at::tanh_backward(wide_product(g, call.ranks[3].t()), call.wide_t).to(call.dtype);
        granks[2] = factor_gradient(x, inner, call.ranks_in[2]);
        at::mm_out(x, inner, call.ranks[2].t());
    }

    // And for the low ranks of the mixes.
    void through_mixes(const Tensor& gdelta) {
        const Tensor g = gdelta.flatten(1, 2);
        granks[1] = at::bmm(call.by_mix(call.z).transpose(1, 2), g).to(call.ranks_in[1].scalar_type());
        const Tensor gz = wide_product(g, call.ranks[1].transpose(1, 2)).transpose(0, 1).reshape(call.z.sizes());
        const Tensor inner = at::tanh_backward(gz, call.wide_z).to(call.dtype);
        Tensor x = rows(call.base[0]);
        granks[0] = factor_gradient(x, inner, call.ranks_in[0]);
        at::mm_out(x, inner, call.ranks[0].t());
    }
};

std::tuple<Tensor, Tensor, Tensors, Tensors, Tensor, Tensor> dynamic_linear_backward(
    at::TensorList g, const Tensor& x, at::TensorList mixes, at::TensorList ranks, at::TensorList maps,
    const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats_in, double eps, int64_t height,
    int64_t width, int64_t pixels, double gamma, int64_t heads, at::ScalarType dtype) {
    TORCH_CHECK(maps.size() == kMapCount && g.size() == kMapCount + 1, "dynamic_linear: expected ", kMapCount,
                " maps and ", kMapCount + 1, " gradients, got ", maps.size(), " and ", g.size());
    const MaybeTensor stats = measured(x, weight, stats_in, eps);
    Call call{x, mixes, ranks, weight, bias, stats, height, width, pixels, gamma, heads, dtype, {}, {}};
    call.prepare();
    call.run();
    Backward back{call, maps};
    back.through_maps(g.slice(0, kMapCount));
    back.through_decay(rows(g[kMapCount]));
    auto [gx, gothers, gdelta, gweight, gbias] = call.shift_backward(call.mixed, call.others(), call.delta);
    back.through_mixes(gdelta);
    const auto [gx_first, gfirst, none, gweight_first, gbias_first] =
        call.shift_backward(call.base, call.first(), std::nullopt);
    return {gx.add_(gx_first), at::cat({gfirst, gothers}).neg_(), back.granks,
            back.gmaps,        gweight.add_(gweight_first),       gbias.add_(gbias_first)};
}

void implement(torch::Library& m) {
    m.impl("dynamic_linear", dynamic_linear);
    m.impl("dynamic_linear_backward", dynamic_linear_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) {
    m.impl("dynamic_mix", dynamic_mix);
    implement(m);
}
TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) { implement(m); }

}  // namespace vision_rwkv
