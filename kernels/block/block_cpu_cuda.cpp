// The spatial mix of VRWKV for the passes of a block, see README.md, and the steps of a block that have no other home.

#include <torch/library.h>

#include <tuple>
#include <utility>

#include "block/block_passes.h"

namespace vision_rwkv {
namespace block {
namespace {

Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::bi_wkv");
    const at::Scalar tokens(k.size(1));
    return op.call(w.div(tokens), u.div(tokens), k, v);
}

Tensor gate(const Tensor& r, const Tensor& y) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::gate");
    return op.call(r, y);
}

// Bi-WKV and its gate. It keeps key, value and receptance, (3, B, T, C), and what comes out of Bi-WKV, on CUDA gated.
struct BiWkvMix {
    static constexpr const char* kBlock = "vrwkv_block";
    static constexpr size_t kMixCount = 3, kMaps = 3, kKept = 2;

    explicit BiWkvMix(c10::ArrayRef<IValue> own) : w(own[0].toTensor()), u(own[1].toTensor()) {}

    static int64_t heads() { return 1; }

    // sigmoid(r) * bi_wkv(w / T, u / T, k, v).
    Tensor forward(const Call& call, const Maps& maps, const MaybeTensor& stats, Tensors* kept) const {
        const Tensor kvr = maps.apply(mixed(call, 0, call.x, stats, heads()));
        const Tensor k = kvr[0], v = kvr[1], r = kvr[2];
        Tensor y, gated;
        if (kvr.is_cuda()) {
            static const auto fused =
                find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
                    "vision_rwkv::gated_bi_wkv");
            y = gated = fused.call(w, u, k, v, r);
        } else {
            y = bi_wkv(w, u, k, v);
            gated = gate(r, y);
        }
        if (kept) *kept = {kvr, y};
        return gated;
    }

    SpatialGradients backward(const Call& call, const CastMaps& maps, const Tensors& kept, const MaybeTensor& stats,
                              const Tensor& gz, const Tensor& sum) const {
        static const auto op =
            find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            Tensor&, Tensor&)>("vision_rwkv::bi_wkv_backward_");
        SpatialGradients out;
        const Tensor& kvr = kept[0];
        const Tensor g = at::empty(kvr.sizes(), kvr.options());
        Tensor gk = g[0], gv = g[1], gr = g[2];
        const Tensor gy = gate_gradients(call, maps, kvr[2], kept[1], gz, gr, out.goutput);
        const auto [gw, gu] = op.call(w, u, kvr[0], kvr[1], gy, gk, gv);
        out.others = {gw, gu};
        const Tensor blends = mixed(call, 0, call.x, stats, heads());
        out.gspatial = map_gradients(g, blends, call.spatial_maps());
        maps.spatial.input_gradients(g, blends);
        std::tie(out.gx, std::ignore, out.columns) =
            mixed_backward(call, 0, blends, call.x, stats, heads(), sum, std::nullopt, std::nullopt);
        return out;
    }

 private:
    // That of what Bi-WKV returned; `gr` becomes that of the receptance, `gmap` that of the output map.
    static Tensor gate_gradients(const Call& call, const CastMaps& maps, const Tensor& r, const Tensor& y,
                                 const Tensor& gz, Tensor& gr, Tensor& gmap) {
        static const auto of_y =
            find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::gate_backward");
        static const auto of_gated =
            find<Tensor(Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::gated_backward_");
        const bool gated = y.is_cuda();
        gmap = map_gradient(gz, gated ? y : gate(r, y), call.map(kOutput));
        input_gradient(gz, maps.map(kOutput), gr);
        if (gated) return of_gated.call(gr, r, y);
        const auto [found, gy] = of_y.call(gr, r, y);
        gr.copy_(found);
        return gy;
    }

    Tensor w, u;
};

// For devices without kernels of their own.

std::tuple<Tensor, Tensor, Tensor> shift_residual_backward(const Tensor& g, const Tensor& x, at::TensorList mixes,
                                                           const MaybeTensor& weight, const MaybeTensor& bias,
                                                           const MaybeTensor& stats, int64_t height, int64_t width,
                                                           int64_t pixels, double gamma, int64_t heads,
                                                           const MaybeTensor& sum, const MaybeTensor& scale,
                                                           std::optional<at::ScalarType> branch) {
    auto [gx, gmixes, none, gweight, gbias] =
        q_shift_backward(g, x, mixes, std::nullopt, weight, bias, stats, height, width, pixels, gamma, heads);
    if (sum) gx.add_(*sum);
    Tensor gbranch = branch ? gx : at::empty({0}, x.options());
    if (branch && scale) gbranch = gx * scale->to(gx.scalar_type()).view({-1, 1, 1});
    if (branch) gbranch = gbranch.to(*branch);
    const Tensor columns = stats ? at::cat({gmixes, gweight.unsqueeze(0), gbias.unsqueeze(0)}) : gmixes;
    return {gx, gbranch, columns};
}

Tensor squared_relu_backward(Tensor& g, const Tensor& x) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::squared_relu_backward");
    g.copy_(op.call(g, x));
    return squared(x, true);
}

Tensor gated_backward(Tensor& g, const Tensor& r, const Tensor& gated) {
    const auto wide = at::promote_types(r.scalar_type(), at::kFloat);
    const Tensor s = r.to(wide).sigmoid(), wide_g = g.to(wide);
    const Tensor gy = (wide_g * s).to(gated.scalar_type());
    g.copy_(wide_g * gated * (1 - s));
    return gy;
}

std::tuple<Tensor, Tensor> bi_wkv_backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                           const Tensor& gy, Tensor& gk, Tensor& gv) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::bi_wkv_backward");
    const at::Scalar tokens(k.size(1));
    const auto [gw, gu, k_found, v_found] = op.call(w.div(tokens), u.div(tokens), k, v, gy);
    gk.copy_(k_found), gv.copy_(v_found);
    return {gw.div(tokens), gu.div(tokens)};
}

}  // namespace
}  // namespace block

// stats, eps1, eps2, next_eps: of the norms before the mixes, and of the next block's first; not with post_norm. Those
// with `kept` and `_backward` are for the gradient, see kernels/autograd; the last four are steps of it. Of
// bi_wkv_backward_, w and u are to be divided by the number of tokens.
TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    block::define<block::BiWkvMix>(m, "Tensor w, Tensor u");
    m.def(
        "q_shift_residual_backward(Tensor g, Tensor x, Tensor[] mixes, Tensor? weight, Tensor? bias, Tensor? stats, "
        "SymInt height, SymInt width, int pixels, float gamma, int heads, Tensor? sum, Tensor? scale, ScalarType? "
        "branch) -> (Tensor, Tensor, Tensor)");
    m.def("squared_relu_backward_(Tensor(a!) g, Tensor x) -> Tensor");
    m.def("gated_backward_(Tensor(a!) g, Tensor r, Tensor gated) -> Tensor");
    m.def(
        "bi_wkv_backward_(Tensor w, Tensor u, Tensor k, Tensor v, Tensor gy, Tensor(a!) gk, Tensor(b!) gv) -> "
        "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vision_rwkv, CompositeExplicitAutograd, m) {
    m.impl("q_shift_residual_backward", block::shift_residual_backward);
    m.impl("squared_relu_backward_", block::squared_relu_backward);
    m.impl("gated_backward_", block::gated_backward);
    m.impl("bi_wkv_backward_", block::bi_wkv_backward);
}

}  // namespace vision_rwkv
