// A block of VRWKV as one call, see README.md: for every device, by the operators it is made of.

#include "block/block.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "dispatch.h"
#include "fused/fused.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

struct Norm {
    MaybeTensor weight, bias;
    double eps = 0;
};

// One call. Of the norms, `ln` come before the mixes, `branch` after them.
struct Call {
    explicit Call(c10::ArrayRef<IValue> given)
        : x(given[kX].toTensor()),
          stats(given[kStats].toOptional<Tensor>()),
          mixes(given[kMixes].toTensorVector()),
          maps(given[kMaps].toTensorVector()),
          w(given[kW].toTensor()),
          u(given[kU].toTensor()),
          gammas{given[kGamma1].toOptional<Tensor>(), given[kGamma2].toOptional<Tensor>()},
          scales{given[kScale1].toOptional<Tensor>(), given[kScale2].toOptional<Tensor>()},
          next_eps(given[kNextEps].toOptional<double>()),
          height(given[kHeight].toSymInt().guard_int(__FILE__, __LINE__)),
          width(given[kWidth].toSymInt().guard_int(__FILE__, __LINE__)),
          pixels(given[kPixels].toInt()),
          gamma(given[kGamma].toDouble()),
          dtype(given[kDtype].toScalarType()),
          post_norm(given[kPostNorm].toBool()) {
        const Tensors norms = given[kNorms].toTensorVector();
        TORCH_CHECK(norms.size() == kNormCount && mixes.size() == kMixCount && maps.size() == kMapCount,
                    "vrwkv_block: expected ", kNormCount, " tensors of norms, ", kMixCount, " mixes and ", kMapCount,
                    " maps, got ", norms.size(), ", ", mixes.size(), " and ", maps.size());
        TORCH_CHECK(x.dim() == 3, "vrwkv_block: x must have shape (B, T, C), got ", x.sizes());
        std::array<Norm, 2>& given_norms = post_norm ? branch : ln;
        for (size_t half = 0; half < 2; ++half) {
            Norm& norm = given_norms[half];
            norm.weight = norms[2 * half], norm.bias = norms[2 * half + 1];
            norm.eps = given[half ? kEps2 : kEps1].toDouble();
        }
    }

    // The mixes of the spatial mix (0) or the channel mix (1).
    at::TensorList mixes_of(int half) const {
        const at::TensorList all(mixes);
        return half ? all.slice(kSpatial) : all.slice(0, kSpatial);
    }
    bool keeps_branch() const { return post_norm || gammas[0]; }

    Tensor x;
    MaybeTensor stats;
    Tensors mixes, maps;
    Tensor w, u;
    std::array<MaybeTensor, 2> gammas, scales;
    std::optional<double> next_eps;
    int64_t height, width, pixels;
    double gamma;
    at::ScalarType dtype;
    bool post_norm;
    std::array<Norm, 2> ln, branch;
};

// What the backward pass needs. kvr: key, value and receptance, (3, B, T, C). y: what comes out of Bi-WKV, on CUDA with
// its gate. z: the first branch, where `keeps_branch`. stats: of x, unless they were given, and of the middle; not with
// post_norm.
struct Kept {
    Tensor kvr, y, middle, hidden, receptance, values, z;
    std::array<MaybeTensor, 2> stats;

    Tensors list(const Call& call) const {
        Tensors out{kvr, y, middle, hidden, receptance, values};
        if (call.keeps_branch()) out.push_back(z);
        if (stats[1]) out.push_back(*stats[1]);
        if (stats[0] && !call.stats) out.push_back(*stats[0]);
        return out;
    }

    static Kept read(const Call& call, const Tensors& from) {
        Kept out;
        size_t next = 0;
        for (Tensor* to : {&out.kvr, &out.y, &out.middle, &out.hidden, &out.receptance, &out.values})
            *to = from[next++];
        if (call.keeps_branch()) out.z = from[next++];
        if (!call.post_norm) {
            out.stats[1] = from[next++];
            out.stats[0] = call.stats ? *call.stats : from[next++];
        }
        return out;
    }
};

// The operators a block is made of
// --------------------------------------------------------------------------------------------------------------

Tensor mixed(const Call& call, int half, const Tensor& x, const MaybeTensor& stats) {
    static const auto op =
        find<Tensor(const Tensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                    const MaybeTensor&, c10::SymInt, c10::SymInt, int64_t, double, int64_t, at::ScalarType)>(
            "vision_rwkv::q_shift");
    const Norm& ln = call.ln[half];
    return op.call(x, call.mixes_of(half), std::nullopt, ln.weight, ln.bias, stats, call.height, call.width,
                   call.pixels, call.gamma, 1, call.dtype);
}

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

// x and the branch z of a half, and the statistics of their sum for a norm with this eps.
std::tuple<Tensor, Tensor> residual(const Call& call, int half, const Tensor& x, const Tensor& z,
                                    const MaybeTensor& gate, std::optional<double> eps) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        const MaybeTensor&, double, std::optional<double>)>("vision_rwkv::residual");
    const Tensor sum = x.to(at::promote_types(x.scalar_type(), z.scalar_type()));
    const Norm& norm = call.branch[half];
    return op.call(sum, z, gate, norm.weight, norm.bias, call.gammas[half], call.scales[half], norm.eps, eps);
}

// Forward
// --------------------------------------------------------------------------------------------------------------

// sigmoid(r) * bi_wkv(w / T, u / T, k, v), and what `Kept` has of it.
std::pair<Tensor, Tensor> attention(const Call& call, const Tensor& k, const Tensor& v, const Tensor& r) {
    if (!k.is_cuda()) {
        const Tensor y = bi_wkv(call.w, call.u, k, v);
        return {gate(r, y), y};
    }
    static const auto fused = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
        "vision_rwkv::gated_bi_wkv");
    const Tensor gated = fused.call(call.w, call.u, k, v, r);
    return {gated, gated};
}

// The squares, in place where there is a kernel for that and nobody needs what was squared.
Tensor squared(Tensor hidden, bool keep) {
    if (!keep && hidden.is_cuda()) {
        static const auto in_place = find<Tensor&(Tensor&)>("vision_rwkv::squared_relu_");
        return in_place.call(hidden);
    }
    static const auto op = find<Tensor(const Tensor&)>("vision_rwkv::squared_relu");
    return op.call(hidden);
}

// The tokens and their statistics; `kept` only where it is asked for, so that memory is given back early.
std::tuple<Tensor, Tensor> forward(const Call& call, Kept* kept) {
    static const auto norm_stats = find<Tensor(const Tensor&, double)>("vision_rwkv::norm_stats");
    const Maps all(call.maps, call.dtype, kSpatial);
    const Tensors& maps = all.each;
    std::array<MaybeTensor, 2> stats;
    if (!call.post_norm) stats[0] = call.stats ? *call.stats : norm_stats.call(call.x, call.ln[0].eps);
    Tensor z;
    {
        const Tensor kvr = all.apply(mixed(call, 0, call.x, stats[0]));
        const auto [gated, y] = attention(call, kvr[0], kvr[1], kvr[2]);
        z = apply_map(gated, maps[kOutput]);
        if (kept) kept->kvr = kvr, kept->y = y, kept->z = z;
    }
    const auto [middle, middle_stats] =
        residual(call, 0, call.x, z, std::nullopt, call.post_norm ? std::nullopt : std::optional(call.ln[1].eps));
    z = Tensor();
    if (!call.post_norm) stats[1] = middle_stats;
    Tensor hidden, receptance;
    {
        const Tensor blends = mixed(call, 1, middle, stats[1]);
        hidden = apply_map(blends.select(0, 0), maps[kKey]);
        receptance = apply_map(blends.select(0, 1), maps[kReceptance]);
    }
    const Tensor values = apply_map(squared(hidden, kept != nullptr), maps[kValue]);
    if (kept) {
        kept->middle = middle, kept->hidden = hidden, kept->receptance = receptance, kept->values = values;
        kept->stats = stats;
    }
    return residual(call, 1, middle, values, receptance, call.next_eps);
}

// Backward
// --------------------------------------------------------------------------------------------------------------

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of the branch, its gate, weight and bias of its norm, and gamma; those of what is not there are empty.
Five residual_backward(const Call& call, int half, const Tensor& g, const Tensor& z, const MaybeTensor& gate) {
    static const auto op =
        find<Five(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                  const MaybeTensor&, const MaybeTensor&, double)>("vision_rwkv::residual_backward");
    const Norm& norm = call.branch[half];
    return op.call(g, z, gate, norm.weight, norm.bias, call.gammas[half], call.scales[half], norm.eps);
}

// The gradient of a half's tokens, given those of its blends, and of the sum that the tokens are in besides; what the
// branch before them gets of it where `branch` is a dtype; and the columns, see BlockGradient.
std::tuple<Tensor, Tensor, Tensor> mixed_backward(const Call& call, int half, const Tensor& g, const Tensor& x,
                                                  const MaybeTensor& stats, const Tensor& sum, const MaybeTensor& scale,
                                                  std::optional<at::ScalarType> branch) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        c10::SymInt, c10::SymInt, int64_t, double, const Tensor&, const MaybeTensor&, std::optional<at::ScalarType>)>(
        "vision_rwkv::q_shift_residual_backward");
    const Norm& ln = call.ln[half];
    return op.call(g, x, call.mixes_of(half), ln.weight, ln.bias, stats, call.height, call.width, call.pixels,
                   call.gamma, sum.to(x.scalar_type()), scale, branch);
}

// Takes one call's gradients, the channel mix first.
struct Backward {
    Backward(const Call& call_, const Kept& kept_)
        : call(call_),
          kept(kept_),
          k(kept.kvr[0]),
          v(kept.kvr[1]),
          r(kept.kvr[2]),
          all(call.maps, call.dtype, kSpatial),
          maps(all.each),
          gmaps(kMapCount) {}

    // The gradient of a map, given that of its results; `input` becomes its own gradient.
    void through_map(int i, const Tensor& g, const Tensor& input) {
        gmaps[i] = map_gradient(g, input, call.maps[i]);
        input_gradient(g, maps[i], input);
    }

    // The gradients of the channel mix's blends, from those of its values and receptance.
    Tensor channel_blends(const Tensor& gvalues, const Tensor& greceptance) {
        static const auto op = find<Tensor(Tensor&, const Tensor&)>("vision_rwkv::squared_relu_backward_");
        Tensor ghidden = at::empty(kept.hidden.sizes(), kept.hidden.options());
        input_gradient(gvalues, maps[kValue], ghidden);
        gmaps[kValue] = map_gradient(gvalues, op.call(ghidden, kept.hidden), call.maps[kValue]);
        const Tensor blends = mixed(call, 1, kept.middle, kept.stats[1]);
        through_map(kKey, ghidden, blends.select(0, 0));
        through_map(kReceptance, greceptance, blends.select(0, 1));
        return blends;
    }

    // Those of the spatial mix's, from that of its output; and gw and gu.
    Tensor spatial_blends(const Tensor& gz) {
        static const auto op =
            find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            Tensor&, Tensor&)>("vision_rwkv::bi_wkv_backward_");
        const Tensor g = at::empty(kept.kvr.sizes(), kept.kvr.options());
        Tensor gk = g[0], gv = g[1], gr = g[2];
        const Tensor gy = gate_gradients(gz, gr);
        std::tie(gw, gu) = op.call(call.w, call.u, k, v, gy, gk, gv);
        const Tensor blends = mixed(call, 0, call.x, kept.stats[0]);
        gspatial = map_gradients(g, blends, at::TensorList(call.maps).slice(0, kSpatial));
        all.input_gradients(g, blends);
        return blends;
    }

    Tensors run(const Tensor& g) {
        const auto [gvalues, greceptance, gweight2, gbias2, ggamma2] =
            residual_backward(call, 1, g, kept.values, kept.receptance);
        const bool whole = call.keeps_branch(), as_is = !whole && !call.scales[0] && call.dtype == g.scalar_type();
        const auto branch = whole || as_is ? std::nullopt : std::optional(call.dtype);
        auto [gmiddle, gz, columns2] = mixed_backward(call, 1, channel_blends(gvalues, greceptance), kept.middle,
                                                      kept.stats[1], g, call.scales[0], branch);
        Tensor gweight1, gbias1, ggamma1;
        if (whole) {
            std::tie(gz, std::ignore, gweight1, gbias1, ggamma1) =
                residual_backward(call, 0, gmiddle, kept.z, std::nullopt);
        }
        const Tensor gblends = spatial_blends(as_is ? gmiddle : gz);
        const auto [gx, none, columns1] =
            mixed_backward(call, 0, gblends, call.x, kept.stats[0], gmiddle, std::nullopt, std::nullopt);
        Tensors out{gx, columns1, columns2, gw, gu, gspatial};
        out.insert(out.end(), gmaps.begin() + kSpatial, gmaps.end());
        if (call.post_norm) out.insert(out.end(), {gweight1, gbias1, gweight2, gbias2});
        if (call.gammas[0]) out.push_back(ggamma1);
        if (call.gammas[1]) out.push_back(ggamma2);
        return out;
    }

 private:
    // That of what Bi-WKV returned; `gr` becomes that of the receptance.
    Tensor gate_gradients(const Tensor& gz, Tensor& gr) {
        static const auto of_y =
            find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::gate_backward");
        static const auto of_gated =
            find<Tensor(Tensor&, const Tensor&, const Tensor&)>("vision_rwkv::gated_backward_");
        const bool gated = kept.y.is_cuda();
        const Tensor input = gated ? kept.y : gate(r, kept.y);
        gmaps[kOutput] = map_gradient(gz, input, call.maps[kOutput]);
        input_gradient(gz, maps[kOutput], gr);
        if (gated) return of_gated.call(gr, r, kept.y);
        const auto [found, gy] = of_y.call(gr, r, kept.y);
        gr.copy_(found);
        return gy;
    }

    const Call& call;
    const Kept& kept;
    const Tensor k, v, r;
    const Maps all;
    const Tensors& maps;
    Tensors gmaps;
    Tensor gw, gu, gspatial;
};

// The dispatcher's entries
// --------------------------------------------------------------------------------------------------------------

c10::ArrayRef<IValue> arguments(const OperatorHandle& op, const Stack& stack) {
    return torch::jit::last(stack, op.schema().arguments().size());
}

template <typename... Results>
void leave(const OperatorHandle& op, Stack* stack, Results&&... results) {
    torch::jit::drop(*stack, op.schema().arguments().size());
    torch::jit::push(*stack, std::forward<Results>(results)...);
}

void block(const OperatorHandle& op, Stack* stack) {
    auto [x, stats] = forward(Call(arguments(op, *stack)), nullptr);
    leave(op, stack, std::move(x), std::move(stats));
}

void block_kept(const OperatorHandle& op, Stack* stack) {
    const Call call(arguments(op, *stack));
    Kept kept;
    const auto [x, stats] = forward(call, &kept);
    Tensors out{x, stats};
    for (const Tensor& tensor : kept.list(call)) out.push_back(tensor);
    leave(op, stack, std::move(out));
}

void block_backward(const OperatorHandle& op, Stack* stack) {
    const auto given = arguments(op, *stack);
    const Call call(given.slice(1, kBlockArguments));
    const Kept kept = Kept::read(call, given[1 + kBlockArguments].toTensorVector());
    Tensors out = Backward(call, kept).run(given[0].toTensor());
    leave(op, stack, std::move(out));
}

// For devices without kernels of their own.

std::tuple<Tensor, Tensor, Tensor> q_shift_residual_backward(const Tensor& g, const Tensor& x, at::TensorList mixes,
                                                             const MaybeTensor& weight, const MaybeTensor& bias,
                                                             const MaybeTensor& stats, int64_t height, int64_t width,
                                                             int64_t pixels, double gamma, const Tensor& sum,
                                                             const MaybeTensor& scale,
                                                             std::optional<at::ScalarType> branch) {
    static const auto op =
        find<Five(const Tensor&, const Tensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&,
                  const MaybeTensor&, const MaybeTensor&, c10::SymInt, c10::SymInt, int64_t, double, int64_t)>(
            "vision_rwkv::q_shift_backward");
    auto [gx, gmixes, none, gweight, gbias] =
        op.call(g, x, mixes, std::nullopt, weight, bias, stats, height, width, pixels, gamma, 1);
    gx.add_(sum);
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

const std::string ARGUMENTS =
    "Tensor x, Tensor? stats, Tensor[] norms, float eps1, float eps2, float? next_eps, bool post_norm, Tensor[] mixes, "
    "Tensor[] maps, Tensor w, Tensor u, Tensor? gamma1, Tensor? gamma2, Tensor? scale1, Tensor? scale2, SymInt height, "
    "SymInt width, int pixels, float gamma, ScalarType dtype";

}  // namespace

// stats, eps1, eps2, next_eps: of the norms before the mixes, and of the next block's first; not with post_norm. Those
// with `kept` and `_backward` are for the gradient, see kernels/autograd; the last four are steps of it. Of
// bi_wkv_backward_, w and u are to be divided by the number of tokens.
TORCH_LIBRARY_FRAGMENT(vision_rwkv, m) {
    m.def(("vrwkv_block(" + ARGUMENTS + ") -> (Tensor, Tensor)").c_str());
    m.def(("vrwkv_block_kept(" + ARGUMENTS + ") -> Tensor[]").c_str());
    m.def(("vrwkv_block_backward(Tensor g, " + ARGUMENTS + ", Tensor[] kept) -> Tensor[]").c_str());
    m.def(
        "q_shift_residual_backward(Tensor g, Tensor x, Tensor[] mixes, Tensor? weight, Tensor? bias, Tensor? stats, "
        "SymInt height, SymInt width, int pixels, float gamma, Tensor sum, Tensor? scale, ScalarType? branch) -> "
        "(Tensor, Tensor, Tensor)");
    m.def("squared_relu_backward_(Tensor(a!) g, Tensor x) -> Tensor");
    m.def("gated_backward_(Tensor(a!) g, Tensor r, Tensor gated) -> Tensor");
    m.def(
        "bi_wkv_backward_(Tensor w, Tensor u, Tensor k, Tensor v, Tensor gy, Tensor(a!) gk, Tensor(b!) gv) -> "
        "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vision_rwkv, CompositeExplicitAutograd, m) {
    m.impl("vrwkv_block", torch::CppFunction::makeFromBoxedFunction<&block>());
    m.impl("vrwkv_block_kept", torch::CppFunction::makeFromBoxedFunction<&block_kept>());
    m.impl("vrwkv_block_backward", torch::CppFunction::makeFromBoxedFunction<&block_backward>());
    m.impl("q_shift_residual_backward", q_shift_residual_backward);
    m.impl("squared_relu_backward_", squared_relu_backward);
    m.impl("gated_backward_", gated_backward);
    m.impl("bi_wkv_backward_", bi_wkv_backward);
}

}  // namespace vision_rwkv
