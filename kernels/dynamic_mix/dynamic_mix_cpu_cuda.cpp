// The data-dependent mixes of vision_rwkv/ops/dynamic_mix.py, and the linear maps after them with recomputation, on CPU
// and CUDA. What each computes is written down there.

#include "dynamic_mix/dynamic_mix.h"

#include <torch/library.h>

#include "q_shift/q_shift.h"

namespace vision_rwkv {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

namespace {

// Matrix products: in float32 of half precision, so that they are not rounded. out= leaves autocast out of it.
void wide_product_out(Tensor out, const Tensor& x, const Tensor& y) {
    const bool half = x.element_size() == 2;
    if (half && x.is_cuda() && x.numel() > 0) {
        at::bmm_out(out, x, y, at::kFloat);
    } else {
        at::bmm_out(out, half ? x.to(at::kFloat) : x, half ? y.to(at::kFloat) : y);
    }
}

Tensor wide_product(const Tensor& x, const Tensor& y) {
    const Tensor out =
        at::empty({1, x.size(0), y.size(1)}, x.options().dtype(at::promote_types(x.scalar_type(), at::kFloat)));
    wide_product_out(out, x.unsqueeze(0), y.unsqueeze(0));
    return out[0];
}

// The gradient of a factor (D, C) of the product x (M, D) @ factor from that of the product.
Tensor factor_gradient(const Tensor& x, const Tensor& g, const Tensor& factor) {
    return map_gradient(x.unsqueeze(0), g.unsqueeze(0), factor);
}

// That of what tanh took, from that of its result.
Tensor tanh_gradient(const Tensor& g, const Tensor& wide_result, at::ScalarType dtype) {
    Tensor out = at::empty(g.sizes(), g.options().dtype(dtype));
    return at::tanh_backward_out(out, g, wide_result);
}

}  // namespace

// Forward
// --------------------------------------------------------------------------------------------------------------

Tensor DynamicMix::shift(at::TensorList with, const MaybeTensor& off) const {
    return q_shift(x, with, off, weight, bias, stats, height, width, pixels, gamma, heads, dtype);
}

// (M, 5 R) as (5, M, R).
Tensor DynamicMix::by_mix(const Tensor& low) const {
    return low.view({low.size(0), 1 + kInputs, low.size(1) / (1 + kInputs)}).transpose(0, 1);
}

void DynamicMix::run() {
    TORCH_CHECK(mixes_in.size() == kMixCount && ranks_in.size() == kRankCount, "dynamic_mix: expected ", kMixCount,
                " mixes and ", kRankCount, " low-rank factors, got ", mixes_in.size(), " and ", ranks_in.size());
    Tensors flat;
    for (const Tensor& mix : mixes_in) flat.push_back(mix.reshape({-1}));
    mixes = (1 - at::stack(flat)).unbind();
    ranks = in_dtype(ranks_in, dtype);
    base = shift(first(), std::nullopt);
    wide_z = wide_product(rows(base[0]), ranks[0]).tanh_();
    z = wide_z.to(dtype);
    delta = at::bmm(by_mix(z), ranks[1]).view({1 + kInputs, x.size(0), x.size(1), x.size(2)});
    mixed = shift(others(), delta);
    wide_t = wide_product(rows(mixed[0]), ranks[2]).tanh_();
    t = wide_t.to(dtype);
}

// Backward
// --------------------------------------------------------------------------------------------------------------

// Through tanh(x @ down) @ up, where t is that tanh: to the gradients of both factors and, in place, of x.
void DynamicMix::through_decay(const Tensor& graw, Tensors& granks) {
    const Tensor g = rows(graw);
    granks[3] = factor_gradient(t, g, ranks_in[3]);
    Tensor input = rows(mixed[0]);
    const Tensor inner = tanh_gradient(wide_product(g, ranks[3].t()), wide_t, dtype);
    granks[2] = factor_gradient(input, inner, ranks_in[2]);
    at::mm_out(input, inner, ranks[2].t());
}

// The same for the low ranks of the mixes; the gradient of the blend goes to `gbase`, which may lie over it.
void DynamicMix::through_mixes(const Tensor& gdelta, const Tensor& gbase, Tensors& granks) {
    const Tensor g = gdelta.flatten(1, 2);
    granks[1] = at::bmm(by_mix(z).transpose(1, 2), g).to(ranks_in[1].scalar_type());
    const Tensor gz = at::empty(z.sizes(), wide_z.options());
    wide_product_out(by_mix(gz), g, ranks[1].transpose(1, 2));
    const Tensor inner = tanh_gradient(gz, wide_z, dtype);
    granks[0] = factor_gradient(rows(base[0]), inner, ranks_in[0]);
    Tensor to = rows(gbase);
    at::mm_out(to, inner, ranks[0].t());
}

DynamicMix::Gradients DynamicMix::backward(const Tensor& graw, const MaybeTensor& sum) {
    Tensors granks(kRankCount);
    through_decay(graw, granks);
    return x.is_cuda() ? in_two_passes(sum, std::move(granks)) : by_q_shift(sum, std::move(granks));
}

// By the gradients of q_shift, once for the inputs and once for the blend.
DynamicMix::Gradients DynamicMix::by_q_shift(const MaybeTensor& sum, Tensors granks) {
    const auto back = [&](const Tensor& g, at::TensorList with, const MaybeTensor& off) {
        return q_shift_backward(g, x, with, off, weight, bias, stats, height, width, pixels, gamma, heads);
    };
    const auto [gx, gothers, gdelta, gweight, gbias] = back(mixed, others(), delta);
    through_mixes(gdelta, base[0], granks);
    const auto [gx_first, gfirst, none, gweight_first, gbias_first] = back(base, first(), std::nullopt);
    gx.add_(gx_first);
    if (sum) gx.add_(*sum);
    Tensor columns = at::cat({gfirst, gothers}).neg_();
    if (weight) columns = at::cat({columns, at::stack({gweight + gweight_first, gbias + gbias_first})});
    return {gx, columns, granks};
}

// A pass that takes each input's gradient apart into what stays and what goes to the neighbour, then one that shifts
// the sums of both, together with the gradient of the blend, and adds up.
DynamicMix::Gradients DynamicMix::in_two_passes(const MaybeTensor& sum, Tensors granks) {
    static const auto take_apart =
        find<Three(const Tensor&, const Tensor&, at::TensorList, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                   const MaybeTensor&, c10::SymInt, c10::SymInt, int64_t, double, int64_t)>(
            "vision_rwkv::q_shift_parts_backward");
    const auto [gdelta, parts, gothers] =
        take_apart.call(mixed, x, others(), delta, weight, bias, stats, height, width, pixels, gamma, heads);
    mixed = delta = Tensor();  // what is no longer needed makes room
    through_mixes(gdelta, parts[2], granks);
    const Tensor& like = mixes[0];
    const auto [gx, none, columns] =
        q_shift_residual_backward(parts, x, {at::ones_like(like), at::zeros_like(like), like}, weight, bias, stats,
                                  height, width, pixels, gamma, heads, sum, std::nullopt, std::nullopt);
    return {gx, at::cat({columns.narrow(0, 2, 1).neg(), gothers, columns.slice(0, 3)}), granks};
}

// The dispatcher's entries
// --------------------------------------------------------------------------------------------------------------

namespace {

// Only what follows from the inputs: for devices and dtypes without a kernel of their own.
std::tuple<Tensor, Tensor> dynamic_mix(const Tensor& x, at::TensorList mixes, at::TensorList ranks,
                                       const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats,
                                       int64_t height, int64_t width, int64_t pixels, double gamma, int64_t heads,
                                       at::ScalarType dtype) {
    DynamicMix mix{x, mixes, ranks, weight, bias, stats, height, width, pixels, gamma, heads, dtype};
    mix.run();
    return {mix.inputs().clone(), at::mm(mix.t, mix.ranks[3]).view(x.sizes())};
}

MaybeTensor measured(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& stats, double eps) {
    static const auto op = find<Tensor(const Tensor&, double)>("vision_rwkv::norm_stats");
    return weight && !stats ? MaybeTensor(op.call(x, eps)) : stats;
}

Tensors dynamic_linear(const Tensor& x, at::TensorList mixes, at::TensorList ranks, at::TensorList maps_in,
                       const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats, double eps,
                       int64_t height, int64_t width, int64_t pixels, double gamma, int64_t heads,
                       at::ScalarType dtype) {
    constexpr size_t kMaps = DynamicMix::kInputs;
    TORCH_CHECK(maps_in.size() == kMaps, "dynamic_linear: expected ", kMaps, " maps, got ", maps_in.size());
    const Tensors maps = in_dtype(maps_in, dtype);
    const auto [mixed, raw] = call_dynamic_mix(x, mixes, ranks, weight, bias, measured(x, weight, stats, eps), height,
                                               width, pixels, gamma, heads, dtype);
    Tensors out;
    for (size_t i = 0; i < kMaps; ++i) out.push_back(apply_map(mixed.select(0, static_cast<int64_t>(i)), maps[i]));
    out.push_back(raw);
    return out;
}

std::tuple<Tensor, Tensor, Tensors, Tensors, Tensor, Tensor> dynamic_linear_backward(
    at::TensorList g, const Tensor& x, at::TensorList mixes, at::TensorList ranks, at::TensorList maps,
    const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats_in, double eps, int64_t height,
    int64_t width, int64_t pixels, double gamma, int64_t heads, at::ScalarType dtype) {
    constexpr size_t kMaps = DynamicMix::kInputs;
    TORCH_CHECK(maps.size() == kMaps && g.size() == kMaps + 1, "dynamic_linear: expected ", kMaps, " maps and ",
                kMaps + 1, " gradients, got ", maps.size(), " and ", g.size());
    const MaybeTensor stats = measured(x, weight, stats_in, eps);
    DynamicMix mix{x, mixes, ranks, weight, bias, stats, height, width, pixels, gamma, heads, dtype};
    mix.run();
    const Tensors cast = in_dtype(maps, dtype), inputs = mix.inputs().unbind();
    Tensors gmaps;
    for (size_t i = 0; i < kMaps; ++i) {
        gmaps.push_back(map_gradient(g[i], inputs[i], maps[i]));
        input_gradient(g[i], cast[i], inputs[i]);
    }
    const auto [gx, columns, granks] = mix.backward(g[kMaps], std::nullopt);
    constexpr int64_t kMixes = DynamicMix::kMixCount;
    const auto of_norm = [&](int64_t i, const MaybeTensor& parameter) {
        if (!parameter) return at::empty({0}, x.options());
        return columns.select(0, kMixes + i).to(parameter->scalar_type()).clone();
    };
    return {gx,
            columns.narrow(0, 0, kMixes).to(mixes[0].scalar_type()),
            granks,
            gmaps,
            of_norm(0, weight),
            of_norm(1, bias)};
}

// For devices and dtypes without a kernel of their own.
Three q_shift_parts_backward(const Tensor& g, const Tensor& x, at::TensorList mixes, const Tensor& delta,
                             const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats,
                             int64_t height, int64_t width, int64_t pixels, double gamma, int64_t heads) {
    const auto wide = at::promote_types(g.scalar_type(), at::kFloat);
    const Tensor one = at::ones_like(mixes[0]), zero = at::zeros_like(mixes[0]);
    const Tensor both =
        q_shift(x, {one, zero}, std::nullopt, weight, bias, stats, height, width, pixels, gamma, heads, wide);
    const Tensor stays = at::stack(mixes).to(wide).view({-1, 1, 1, x.size(2)}) - delta, grad = g.to(wide);
    const Tensor gdelta = grad * (both[1] - both[0]), stay = (grad * stays).sum(0);
    const Tensor parts = at::empty({3, x.size(0), x.size(1), x.size(2)}, g.options());
    parts[0].copy_(stay);
    parts[1].copy_(grad.sum(0) - stay);
    return {gdelta.to(g.scalar_type()), parts, gdelta.sum({1, 2})};
}

void implement(torch::Library& m) {
    m.impl("dynamic_linear", dynamic_linear);
    m.impl("dynamic_linear_backward", dynamic_linear_backward);
}

}  // namespace

// The gradients of q_shift's results, of mixes with deltas, taken apart: those of the deltas as they are added to what
// goes; the sums over the mixes of what stays and of what goes, in the first two of three parts, of which the last is
// room for the caller; and the deltas' sums over all tokens, (mixes, C).
TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    m.def(
        "q_shift_parts_backward(Tensor g, Tensor x, Tensor[] mixes, Tensor delta, Tensor? weight, Tensor? bias, "
        "Tensor? stats, SymInt height, SymInt width, int pixels, float gamma, int heads) -> (Tensor, Tensor, Tensor)");
    m.impl("q_shift_parts_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(q_shift_parts_backward));
}

TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) {
    m.impl("dynamic_mix", dynamic_mix);
    implement(m);
}
TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) { implement(m); }

}  // namespace vision_rwkv
