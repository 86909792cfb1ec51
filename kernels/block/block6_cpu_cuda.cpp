// The spatial mix of VRWKV6 for the passes of a block, see README.md, and its steps that write where they are told.

#include <torch/library.h>

#include <tuple>

#include "block/block_passes.h"
#include "dynamic_mix/dynamic_mix.h"

namespace vision_rwkv {
namespace block {
namespace {

// Data-dependent mixes, WKV6, and the norm of its heads with their gate. It keeps key, value, receptance and gate,
// (4, B, T, C), the decays, what comes out of WKV6, and that with its norm and gate.
struct Wkv6Mix {
    static constexpr const char* kBlock = "vrwkv6_block";
    static constexpr size_t kMixCount = DynamicMix::kMixCount, kMaps = DynamicMix::kInputs, kKept = 4;

    explicit Wkv6Mix(c10::ArrayRef<IValue> own)
        : ranks(own[0].toTensorVector()),
          decay(own[1].toTensor()),
          bonus(own[2].toTensor()),
          weight(own[3].toTensor()),
          bias(own[4].toTensor()),
          eps(own[5].toDouble()) {
        TORCH_CHECK(bonus.dim() == 2, "vrwkv6_block: expected a bonus (H, N), got ", bonus.sizes());
    }

    int64_t heads() const { return bonus.size(0); }

    // norm(wkv6(r, k, v, -exp(decay + raw))) * silu(gate).
    Tensor forward(const Call& call, const Maps& maps, const MaybeTensor& stats, Tensors* kept) const {
        static const auto fused =
            find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, const Tensor&, double)>("vision_rwkv::gated_wkv6");
        static const auto decays = find<Tensor(const Tensor&, const Tensor&)>("vision_rwkv::log_decay");
        static const auto wkv = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
            "vision_rwkv::wkv6");
        static const auto norm_gate =
            find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double, at::ScalarType)>(
                "vision_rwkv::norm_gate");
        Tensor kvrg, raw;
        {
            const auto [inputs, found] =
                call_dynamic_mix(call.x, call.mixes(0), ranks, call.ln[0].weight, call.ln[0].bias, stats, call.height,
                                 call.width, call.pixels, call.gamma, heads(), call.dtype);
            kvrg = maps.apply(inputs), raw = found;
        }
        const Tensor k = kvrg[0], v = kvrg[1], r = kvrg[2], gate = kvrg[3];
        if (!kept && k.is_cuda()) return fused.call(r, k, v, raw, decay, bonus, gate, weight, bias, eps);
        const Tensor w = decays.call(raw, decay);
        const Tensor y = wkv.call(for_wkv(r), for_wkv(k), for_wkv(v), by_head(w), bonus).flatten(2);
        const Tensor gated = norm_gate.call(y, gate, weight, bias, heads(), eps, call.dtype);
        if (kept) *kept = {kvrg, w, y, gated};
        return gated;
    }

    SpatialGradients backward(const Call& call, const CastMaps& maps, const Tensors& kept, const MaybeTensor& stats,
                              const Tensor& gz, const Tensor& sum) const {
        SpatialGradients out;
        auto [g, graw] = through_heads(call, maps, kept, gz, out);
        DynamicMix mix{call.x,      call.mixes(0), ranks,       call.ln[0].weight, call.ln[0].bias, stats,
                       call.height, call.width,    call.pixels, call.gamma,        heads(),         call.dtype};
        mix.run();
        out.gspatial = map_gradients(g, mix.inputs(), call.spatial_maps());
        maps.spatial.input_gradients(g, mix.inputs());
        g = Tensor();  // what is no longer needed makes room
        DynamicMix::Gradients found = mix.backward(graw, sum.to(call.x.scalar_type()));
        out.gx = found.gx, out.columns = found.columns;
        out.others.insert(out.others.begin(), found.ranks.begin(), found.ranks.end());
        return out;
    }

 private:
    // From the gradient of the mix's result to those of key, value, receptance and gate, (4, B, T, C), and of the raw
    // decays; `out` gets those of the output map, of decay, bonus, and the norm.
    std::tuple<Tensor, Tensor> through_heads(const Call& call, const CastMaps& maps, const Tensors& kept,
                                             const Tensor& gz, SpatialGradients& out) const {
        static const auto of_norm =
            find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double,
                       Tensor&)>("vision_rwkv::norm_gate_backward_");
        static const auto of_wkv = find<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const Tensor&, Tensor&, Tensor&, Tensor&)>("vision_rwkv::wkv6_backward_");
        static const auto of_decay =
            find<Two(const Tensor&, const Tensor&, at::ScalarType)>("vision_rwkv::log_decay_backward");
        const Tensor &kvrg = kept[0], &w = kept[1], &y = kept[2], &gated = kept[3];
        const Tensor g = at::empty(kvrg.sizes(), kvrg.options());
        Tensor gk = by_head(g[0]), gv = by_head(g[1]), gr = by_head(g[2]), ggate = g[3];
        const Tensor ggated = g[0];  // until the key's is there
        out.goutput = map_gradient(gz, gated, call.map(kOutput));
        input_gradient(gz, maps.map(kOutput), ggated);
        const auto [gy, gweight, gbias] = of_norm.call(ggated, y, kvrg[3], weight, bias, heads(), eps, ggate);
        const auto [gw, gbonus] = of_wkv.call(for_wkv(kvrg[2]), for_wkv(kvrg[0]), for_wkv(kvrg[1]), by_head(w), bonus,
                                              by_head(gy), gr, gk, gv);
        const auto [graw, gdecay] = of_decay.call(gw.flatten(2), w, call.dtype);
        out.others = {gdecay.view(decay.sizes()).to(decay.scalar_type()), gbonus, gweight, gbias};
        return {g, graw};
    }

    using Two = std::tuple<Tensor, Tensor>;
    using Three = std::tuple<Tensor, Tensor, Tensor>;

    Tensor by_head(const Tensor& x) const { return x.unflatten(-1, bonus.sizes()); }

    // The sum over the tokens is not bounded, and float16 ends at 65504; the norm that follows takes any size.
    Tensor for_wkv(const Tensor& x) const { return by_head(x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x); }

    Tensors ranks;
    Tensor decay, bonus, weight, bias;
    double eps;
};

// For devices without kernels of their own.

std::tuple<Tensor, Tensor> wkv6_backward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                         const Tensor& u, const Tensor& gy, Tensor& gr, Tensor& gk, Tensor& gv) {
    static const auto op =
        find<Five(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
            "vision_rwkv::wkv6_backward");
    const auto [r_found, k_found, v_found, gw, gu] = op.call(r, k, v, w, u, gy);
    gr.copy_(r_found), gk.copy_(k_found), gv.copy_(v_found);
    return {gw, gu};
}

std::tuple<Tensor, Tensor, Tensor> norm_gate_backward(const Tensor& g, const Tensor& y, const Tensor& gate,
                                                      const Tensor& weight, const Tensor& bias, int64_t heads,
                                                      double eps, Tensor& ggate) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
        "vision_rwkv::norm_gate_backward");
    const auto [gy, gate_found, gweight, gbias] = op.call(g, y, gate, weight, bias, heads, eps);
    ggate.copy_(gate_found);
    return {gy, gweight, gbias};
}

}  // namespace
}  // namespace block

// ranks: the low-rank factors of mixes and decay; decay, bonus: of WKV6; then the norm of its heads.
TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    block::define<block::Wkv6Mix>(m,
                                  "Tensor[] ranks, Tensor decay, Tensor bonus, Tensor head_weight, Tensor head_bias, "
                                  "float head_eps");
    m.def(
        "wkv6_backward_(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor gy, Tensor(a!) gr, Tensor(b!) gk, "
        "Tensor(c!) gv) -> (Tensor, Tensor)");
    m.def(
        "norm_gate_backward_(Tensor g, Tensor y, Tensor gate, Tensor weight, Tensor bias, int heads, float eps, "
        "Tensor(a!) ggate) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vision_rwkv, CompositeExplicitAutograd, m) {
    m.impl("wkv6_backward_", block::wkv6_backward);
    m.impl("norm_gate_backward_", block::norm_gate_backward);
}

}  // namespace vision_rwkv
