// A block of VRWKV as one call, see README.md: for every device and for autograd, which see the operators it is made
// of.

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "fused/fused.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using c10::SymInt;
using MaybeTensor = std::optional<Tensor>;

constexpr int kSpatial = 3;  // mixes of the spatial mix: key, value, receptance; then those of the channel mix
constexpr int kMixes = 5, kMaps = 7, kNorms = 4;

struct Norm {
    MaybeTensor weight, bias;
    double eps;
};

// Where the tokens come from, and the dtype of matrix products.
struct How {
    SymInt height, width;
    int64_t pixels;
    double gamma;
    at::ScalarType dtype;
};

// Every map of its blend of the shifted tokens, normalised first where the norm has a weight.
std::vector<Tensor> mix_linear(const Tensor& x, at::TensorList mixes, at::TensorList maps, const Norm& norm,
                               const MaybeTensor& stats, const How& how) {
    static const auto op =
        find<std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList, const MaybeTensor&, const MaybeTensor&,
                                 const MaybeTensor&, double, SymInt, SymInt, int64_t, double, int64_t, at::ScalarType)>(
            "vision_rwkv::mix_linear");
    return op.call(x, mixes, maps, norm.weight, norm.bias, stats, norm.eps, how.height, how.width, how.pixels,
                   how.gamma, 1, how.dtype);
}

// The map of sigmoid(r) * bi_wkv(w / T, u / T, k, v); quiet: without gradients.
Tensor attention(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& r, const Tensor& map,
                 bool quiet) {
    if (quiet && k.is_cuda()) {
        static const auto fused =
            find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
                "vision_rwkv::gated_bi_wkv");
        return at::matmul(fused.call(w, u, k, v, r), map.t());
    }
    static const auto wkv =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::bi_wkv");
    static const auto gated = find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::gated_linear");
    const at::Scalar tokens(k.sym_size(1));
    return gated.call(r, wkv.call(w.div(tokens), u.div(tokens), k, v), map);
}

Tensor squared_relu_linear(const Tensor& x, const Tensor& map) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::squared_relu_linear");
    return op.call(x, map);
}

// x and the branch z, and the statistics of their sum for a norm with this eps.
std::tuple<Tensor, Tensor> residual(const Tensor& x, const Tensor& z, const MaybeTensor& gate, const Norm& norm,
                                    const MaybeTensor& gamma, const MaybeTensor& scale, std::optional<double> eps) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        const MaybeTensor&, double, std::optional<double>)>("vision_rwkv::residual");
    const Tensor sum = x.to(at::promote_types(x.scalar_type(), z.scalar_type()));
    return op.call(sum, z, gate, norm.weight, norm.bias, gamma, scale, norm.eps, eps);
}

// Whether autograd has to know of a call with these tensors.
bool recorded(std::initializer_list<at::TensorList> lists, std::initializer_list<const MaybeTensor*> others) {
    if (!at::GradMode::is_enabled()) return false;
    for (const at::TensorList list : lists)
        for (const Tensor& x : list)
            if (x.requires_grad()) return true;
    for (const MaybeTensor* x : others)
        if (x->has_value() && (*x)->requires_grad()) return true;
    return false;
}

// stats, eps1, eps2, next_eps: of the norms before the mixes, and of the next block's first; not with post_norm.
std::tuple<Tensor, Tensor> vrwkv_block(const Tensor& x, const MaybeTensor& stats, at::TensorList norms, double eps1,
                                       double eps2, std::optional<double> next_eps, bool post_norm,
                                       at::TensorList mixes, at::TensorList maps, const Tensor& w, const Tensor& u,
                                       const MaybeTensor& gamma1, const MaybeTensor& gamma2, const MaybeTensor& scale1,
                                       const MaybeTensor& scale2, SymInt height, SymInt width, int64_t pixels,
                                       double gamma, at::ScalarType dtype) {
    TORCH_CHECK(norms.size() == kNorms && mixes.size() == kMixes && maps.size() == kMaps, "vrwkv_block: expected ",
                kNorms, " tensors of norms, ", kMixes, " mixes and ", kMaps, " maps, got ", norms.size(), ", ",
                mixes.size(), " and ", maps.size());
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    std::vector<Tensor> cast;
    if (!recorded({x, norms, mixes, maps, w, u}, {&gamma1, &gamma2})) {
        below.emplace();
        cast = in_dtype(maps, dtype);
        maps = cast;
    }
    const Norm ln1{norms[0], norms[1], eps1}, ln2{norms[2], norms[3], eps2}, none{};
    const How how{height, width, pixels, gamma, dtype};

    const auto kvr =
        mix_linear(x, mixes.slice(0, kSpatial), maps.slice(0, kSpatial), post_norm ? none : ln1, stats, how);
    const Tensor z = attention(w, u, kvr[0], kvr[1], kvr[2], maps[3], below.has_value());
    const auto [middle, middle_stats] = residual(x, z, std::nullopt, post_norm ? ln1 : none, gamma1, scale1,
                                                 post_norm ? std::nullopt : std::optional(eps2));
    const auto kr = mix_linear(middle, mixes.slice(kSpatial), maps.slice(4, 2), post_norm ? none : ln2,
                               post_norm ? MaybeTensor() : middle_stats, how);
    return residual(middle, squared_relu_linear(kr[0], maps[6]), kr[1], post_norm ? ln2 : none, gamma2, scale2,
                    next_eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    m.def(
        "vrwkv_block(Tensor x, Tensor? stats, Tensor[] norms, float eps1, float eps2, float? next_eps, bool post_norm, "
        "Tensor[] mixes, Tensor[] maps, Tensor w, Tensor u, Tensor? gamma1, Tensor? gamma2, Tensor? scale1, "
        "Tensor? scale2, SymInt height, SymInt width, int pixels, float gamma, ScalarType dtype) -> (Tensor, Tensor)");
    m.impl("vrwkv_block", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(vrwkv_block));
}

}  // namespace vision_rwkv
