// A block of VRWKV6 as one call, see README.md: for every device and for autograd, which see the operators it is made
// of.

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "fused/fused.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using c10::SymInt;
using MaybeTensor = std::optional<Tensor>;

// Of the spatial mix, then of the channel mix; the fifth map of the spatial mix is that of its results.
constexpr size_t kSpatialMixes = 6, kMixes = 8, kInputs = 4, kSpatialMaps = 5, kMaps = 8, kNorms = 4;

struct LayerNorm {
    MaybeTensor weight, bias;
    double eps;
};

// Where the tokens come from, the dtype of matrix products, and, where autograd does not look on, the maps in it.
struct Manner {
    SymInt height, width;
    int64_t pixels;
    double gamma;
    int64_t heads;
    at::ScalarType dtype;
    const Maps* quiet;
};

// What comes after the inputs' maps: parameters of WKV6, and of the norm of its heads.
struct Heads {
    const Tensor &decay, &bonus, &weight, &bias;
    double eps;
};

// norm(wkv6(r, k, v, -exp(decay + raw))) * silu(gate), all (B, T, C).
Tensor attention(const Tensor& k, const Tensor& v, const Tensor& r, const Tensor& gate, const Tensor& raw,
                 const Heads& heads, const Manner& how) {
    if (how.quiet && k.is_cuda()) {
        static const auto gated =
            find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, const Tensor&, double)>("vision_rwkv::gated_wkv6");
        return gated.call(r, k, v, raw, heads.decay, heads.bonus, gate, heads.weight, heads.bias, heads.eps);
    }
    static const auto decays = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::log_decay");
    static const auto wkv =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::wkv6");
    static const auto norm_gate =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double, at::ScalarType)>(
            "vision_rwkv::norm_gate");
    // The sum over the tokens is not bounded, and float16 ends at 65504; the norm that follows takes any size.
    const auto inner = how.dtype == at::kHalf ? at::kFloat : how.dtype;
    const auto by_head = [&](const Tensor& x) { return x.unflatten(-1, heads.bonus.sizes()); };
    const Tensor w = decays.call(raw, heads.decay);
    const Tensor y =
        wkv.call(by_head(r.to(inner)), by_head(k.to(inner)), by_head(v.to(inner)), by_head(w), heads.bonus).flatten(2);
    return norm_gate.call(y, gate, heads.weight, heads.bias, how.heads, heads.eps, how.dtype);
}

// Key, value, receptance, gate and the raw decays, from tokens that are normalised first where the norm has a weight.
std::vector<Tensor> inputs_of(const Tensor& x, at::TensorList mixes, at::TensorList ranks, at::TensorList maps,
                              const LayerNorm& norm, const MaybeTensor& stats, const Manner& how) {
    if (how.quiet && x.is_cuda()) {
        static const auto measure = find<Tensor(const Tensor&, double)>("vision_rwkv::norm_stats");
        static const auto mix = find<std::tuple<Tensor, Tensor>(
            const Tensor&, at::TensorList, at::TensorList, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
            SymInt, SymInt, int64_t, double, int64_t, at::ScalarType)>("vision_rwkv::dynamic_mix");
        const MaybeTensor measured = norm.weight && !stats ? MaybeTensor(measure.call(x, norm.eps)) : stats;
        const auto [mixed, raw] = mix.call(x, mixes, ranks, norm.weight, norm.bias, measured, how.height, how.width,
                                           how.pixels, how.gamma, how.heads, how.dtype);
        const Tensor products = at::matmul(mixed.flatten(1, 2), how.quiet->stack.transpose(1, 2));
        std::vector<Tensor> out = products.view_symint(mixed.sym_sizes()).unbind();
        out.push_back(raw);
        return out;
    }
    static const auto op =
        find<std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList, at::TensorList, const MaybeTensor&,
                                 const MaybeTensor&, const MaybeTensor&, double, SymInt, SymInt, int64_t, double,
                                 int64_t, at::ScalarType)>("vision_rwkv::dynamic_linear");
    return op.call(x, mixes, ranks, maps, norm.weight, norm.bias, stats, norm.eps, how.height, how.width, how.pixels,
                   how.gamma, how.heads, how.dtype);
}

// What the spatial mix adds to the tokens.
Tensor spatial_mix(const Tensor& x, at::TensorList mixes, at::TensorList ranks, at::TensorList maps,
                   const LayerNorm& norm, const MaybeTensor& stats, const Heads& heads, const Manner& how) {
    const auto inputs = inputs_of(x, mixes, ranks, maps.slice(0, kInputs), norm, stats, how);
    const Tensor y = attention(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], heads, how);
    return at::matmul(y, maps[kInputs].to(how.dtype).t());
}

// The values and the receptance of the channel mix.
std::pair<Tensor, Tensor> channel_mix(const Tensor& x, at::TensorList mixes, at::TensorList maps, const LayerNorm& norm,
                                      const MaybeTensor& stats, const Manner& how) {
    if (how.quiet && x.is_cuda()) {
        static const auto mix =
            find<Tensor(const Tensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                        const MaybeTensor&, SymInt, SymInt, int64_t, double, int64_t, at::ScalarType)>(
                "vision_rwkv::q_shift");
        static const auto mlp =
            find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::squared_relu_mlp");
        const Tensor mixed = mix.call(x, mixes, std::nullopt, norm.weight, norm.bias, stats, how.height, how.width,
                                      how.pixels, how.gamma, how.heads, how.dtype);
        return {mlp.call(mixed.select(0, 0), maps[0], maps[2]), at::matmul(mixed.select(0, 1), maps[1].t())};
    }
    static const auto op =
        find<std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList, const MaybeTensor&, const MaybeTensor&,
                                 const MaybeTensor&, double, SymInt, SymInt, int64_t, double, int64_t, at::ScalarType)>(
            "vision_rwkv::mix_linear");
    static const auto squared = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::squared_relu_linear");
    const auto kr = op.call(x, mixes, maps.slice(0, 2), norm.weight, norm.bias, stats, norm.eps, how.height, how.width,
                            how.pixels, how.gamma, how.heads, how.dtype);
    return {squared.call(kr[0], maps[2]), kr[1]};
}

// x and the branch z, and the statistics of their sum for a norm with this eps.
std::tuple<Tensor, Tensor> residual(const Tensor& x, const Tensor& z, const MaybeTensor& gate, const LayerNorm& norm,
                                    const MaybeTensor& gamma, const MaybeTensor& scale, std::optional<double> eps) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        const MaybeTensor&, double, std::optional<double>)>("vision_rwkv::residual");
    const Tensor sum = x.to(at::promote_types(x.scalar_type(), z.scalar_type()));
    return op.call(sum, z, gate, norm.weight, norm.bias, gamma, scale, norm.eps, eps);
}

// Whether autograd has to know of a call with these tensors.
bool recorded(std::initializer_list<at::TensorList> lists) {
    if (!at::GradMode::is_enabled()) return false;
    for (const at::TensorList list : lists)
        for (const Tensor& x : list)
            if (x.requires_grad()) return true;
    return false;
}

// Arguments as those of vrwkv_block, and: ranks, the low-rank factors of mixes and decay; decay, bonus; the norm of the
// heads.
std::tuple<Tensor, Tensor> vrwkv6_block(const Tensor& x, const MaybeTensor& stats, at::TensorList norms, double eps1,
                                        double eps2, std::optional<double> next_eps, bool post_norm,
                                        at::TensorList mixes, at::TensorList maps, at::TensorList ranks,
                                        const Tensor& decay, const Tensor& bonus, const Tensor& head_weight,
                                        const Tensor& head_bias, double head_eps, const MaybeTensor& gamma1,
                                        const MaybeTensor& gamma2, const MaybeTensor& scale1, const MaybeTensor& scale2,
                                        SymInt height, SymInt width, int64_t pixels, double gamma,
                                        at::ScalarType dtype) {
    TORCH_CHECK(norms.size() == kNorms && mixes.size() == kMixes && maps.size() == kMaps, "vrwkv6_block: expected ",
                kNorms, " tensors of norms, ", kMixes, " mixes and ", kMaps, " maps, got ", norms.size(), ", ",
                mixes.size(), " and ", maps.size());
    TORCH_CHECK(bonus.dim() == 2, "vrwkv6_block: expected a bonus (H, N), got ", bonus.sizes());
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    std::optional<Maps> cast;
    const auto given = [](const MaybeTensor& gamma) { return gamma ? at::TensorList(*gamma) : at::TensorList(); };
    const bool quiet =
        !recorded({x, norms, mixes, maps, ranks, decay, bonus, head_weight, head_bias, given(gamma1), given(gamma2)});
    if (quiet) {
        below.emplace();
        cast.emplace(maps, dtype, kInputs);
        maps = cast->each;
    }
    const LayerNorm ln1{norms[0], norms[1], eps1}, ln2{norms[2], norms[3], eps2}, none{};
    const Manner how{height, width, pixels, gamma, bonus.size(0), dtype, quiet ? &*cast : nullptr};
    const Heads heads{decay, bonus, head_weight, head_bias, head_eps};

    const Tensor z = spatial_mix(x, mixes.slice(0, kSpatialMixes), ranks, maps.slice(0, kSpatialMaps),
                                 post_norm ? none : ln1, stats, heads, how);
    const auto [middle, middle_stats] = residual(x, z, std::nullopt, post_norm ? ln1 : none, gamma1, scale1,
                                                 post_norm ? std::nullopt : std::optional(eps2));
    const auto [values, r] = channel_mix(middle, mixes.slice(kSpatialMixes), maps.slice(kSpatialMaps),
                                         post_norm ? none : ln2, post_norm ? MaybeTensor() : middle_stats, how);
    return residual(middle, values, r, post_norm ? ln2 : none, gamma2, scale2, next_eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    m.def(
        "vrwkv6_block(Tensor x, Tensor? stats, Tensor[] norms, float eps1, float eps2, float? next_eps, bool "
        "post_norm, Tensor[] mixes, Tensor[] maps, Tensor[] ranks, Tensor decay, Tensor bonus, Tensor head_weight, "
        "Tensor head_bias, float head_eps, Tensor? gamma1, Tensor? gamma2, Tensor? scale1, Tensor? scale2, "
        "SymInt height, SymInt width, int pixels, float gamma, ScalarType dtype) -> (Tensor, Tensor)");
    m.impl("vrwkv6_block", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(vrwkv6_block));
}

}  // namespace vision_rwkv
