// The passes of a block, by the operators it is made of: all that VRWKV and VRWKV6 share. A spatial mix `Mix` has
//
//     static constexpr const char* kBlock;                    the operator of a block with it
//     static constexpr size_t kMixCount, kMaps, kKept;        of its mixes, of its tokens' maps, of what it keeps
//     Mix(arguments);                                         those of its own
//     int64_t heads() const;                                  groups of channels for Q-Shift
//     Tensor forward(call, maps, stats, kept) const;          what the output map takes; `kept`, if any, gets kKept
//     SpatialGradients backward(call, maps, kept, stats, gz, sum) const;     of its output gz, see below
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block/block.h"
#include "dispatch.h"
#include "fused/fused.h"
#include "q_shift/q_shift.h"

namespace vision_rwkv {
namespace block {

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
    Call(const char* name, c10::ArrayRef<IValue> given, size_t spatial_mixes, size_t spatial_maps)
        : x(given[kX].toTensor()),
          stats(given[kStats].toOptional<Tensor>()),
          gammas{last(given, kGamma1).toOptional<Tensor>(), last(given, kGamma2).toOptional<Tensor>()},
          scales{last(given, kScale1).toOptional<Tensor>(), last(given, kScale2).toOptional<Tensor>()},
          next_eps(given[kNextEps].toOptional<double>()),
          height(last(given, kHeight).toSymInt().guard_int(__FILE__, __LINE__)),
          width(last(given, kWidth).toSymInt().guard_int(__FILE__, __LINE__)),
          pixels(last(given, kPixels).toInt()),
          gamma(last(given, kGamma).toDouble()),
          dtype(last(given, kDtype).toScalarType()),
          post_norm(given[kPostNorm].toBool()),
          mixes_(given[kMixes].toTensorVector()),
          maps_(given[kMaps].toTensorVector()),
          spatial_mixes_(spatial_mixes),
          spatial_maps_(spatial_maps) {
        const Tensors norms = given[kNorms].toTensorVector();
        const size_t mixes = spatial_mixes + kChannelMixes, maps = spatial_maps + kMapsAfter;
        TORCH_CHECK(norms.size() == kNormCount && mixes_.size() == mixes && maps_.size() == maps, name, ": expected ",
                    kNormCount, " tensors of norms, ", mixes, " mixes and ", maps, " maps, got ", norms.size(), ", ",
                    mixes_.size(), " and ", maps_.size());
        TORCH_CHECK(x.dim() == 3, name, ": x must have shape (B, T, C), got ", x.sizes());
        std::array<Norm, 2>& given_norms = post_norm ? branch : ln;
        for (size_t half = 0; half < 2; ++half) {
            Norm& norm = given_norms[half];
            norm.weight = norms[2 * half], norm.bias = norms[2 * half + 1];
            norm.eps = given[half ? kEps2 : kEps1].toDouble();
        }
    }

    // The mixes of the spatial mix (0) or the channel mix (1).
    at::TensorList mixes(int half) const {
        const at::TensorList all(mixes_);
        return half ? all.slice(spatial_mixes_) : all.slice(0, spatial_mixes_);
    }
    at::TensorList all_maps() const { return maps_; }
    at::TensorList spatial_maps() const { return all_maps().slice(0, spatial_maps_); }
    const Tensor& map(MapAfter which) const { return maps_[spatial_maps_ + which]; }
    bool keeps_branch() const { return post_norm || gammas[0]; }

    Tensor x;
    MaybeTensor stats;
    std::array<MaybeTensor, 2> gammas, scales;
    std::optional<double> next_eps;
    int64_t height, width, pixels;
    double gamma;
    at::ScalarType dtype;
    bool post_norm;
    std::array<Norm, 2> ln, branch;

 private:
    Tensors mixes_, maps_;
    size_t spatial_mixes_, spatial_maps_;
};

// A call's maps in the dtype of products.
struct CastMaps {
    explicit CastMaps(const Call& call)
        : spatial(call.all_maps(), call.dtype, static_cast<int64_t>(call.spatial_maps().size())),
          after_(call.spatial_maps().size()) {}
    const Tensor& map(MapAfter which) const { return spatial.each[after_ + which]; }

    Maps spatial;

 private:
    size_t after_;
};

// What the backward pass needs. spatial: of the spatial mix. z: the first branch, where `keeps_branch`. stats: of x,
// unless they were given, and of the middle; not with post_norm.
struct Kept {
    Tensors spatial;
    Tensor middle, hidden, receptance, values, z;
    std::array<MaybeTensor, 2> stats;

    Tensors list(const Call& call) const {
        Tensors out = spatial;
        out.insert(out.end(), {middle, hidden, receptance, values});
        if (call.keeps_branch()) out.push_back(z);
        if (stats[1]) out.push_back(*stats[1]);
        if (stats[0] && !call.stats) out.push_back(*stats[0]);
        return out;
    }

    static Kept read(const Call& call, size_t spatial, const Tensors& from) {
        Kept out;
        out.spatial.assign(from.begin(), from.begin() + static_cast<int64_t>(spatial));
        size_t next = spatial;
        for (Tensor* to : {&out.middle, &out.hidden, &out.receptance, &out.values}) *to = from[next++];
        if (call.keeps_branch()) out.z = from[next++];
        if (!call.post_norm) {
            out.stats[1] = from[next++];
            out.stats[0] = call.stats ? *call.stats : from[next++];
        }
        return out;
    }
};

// gx: of the tokens, with what they get besides, `sum`. others: of the mix's own arguments.
struct SpatialGradients {
    Tensor gx, columns, gspatial, goutput;
    Tensors others;
};

// The operators a block is made of
// --------------------------------------------------------------------------------------------------------------

inline Tensor mixed(const Call& call, int half, const Tensor& x, const MaybeTensor& stats, int64_t heads) {
    const Norm& ln = call.ln[half];
    return q_shift(x, call.mixes(half), std::nullopt, ln.weight, ln.bias, stats, call.height, call.width, call.pixels,
                   call.gamma, heads, call.dtype);
}

// The gradient of a half's tokens, given those of its blends, and of the sum that the tokens are in besides; what the
// branch before them gets of it where `branch` is a dtype; and the columns, see BlockGradient.
inline std::tuple<Tensor, Tensor, Tensor> mixed_backward(const Call& call, int half, const Tensor& g, const Tensor& x,
                                                         const MaybeTensor& stats, int64_t heads, const Tensor& sum,
                                                         const MaybeTensor& scale,
                                                         std::optional<at::ScalarType> branch) {
    const Norm& ln = call.ln[half];
    return q_shift_residual_backward(g, x, call.mixes(half), ln.weight, ln.bias, stats, call.height, call.width,
                                     call.pixels, call.gamma, heads, sum.to(x.scalar_type()), scale, branch);
}

// x and the branch z of a half, and the statistics of their sum for a norm with this eps.
inline std::tuple<Tensor, Tensor> residual(const Call& call, int half, const Tensor& x, const Tensor& z,
                                           const MaybeTensor& gate, std::optional<double> eps) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        const MaybeTensor&, double, std::optional<double>)>("vision_rwkv::residual");
    const Tensor sum = x.to(at::promote_types(x.scalar_type(), z.scalar_type()));
    const Norm& norm = call.branch[half];
    return op.call(sum, z, gate, norm.weight, norm.bias, call.gammas[half], call.scales[half], norm.eps, eps);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of the branch, its gate, weight and bias of its norm, and gamma; those of what is not there are empty.
inline Five residual_backward(const Call& call, int half, const Tensor& g, const Tensor& z, const MaybeTensor& gate) {
    static const auto op =
        find<Five(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                  const MaybeTensor&, const MaybeTensor&, double)>("vision_rwkv::residual_backward");
    const Norm& norm = call.branch[half];
    return op.call(g, z, gate, norm.weight, norm.bias, call.gammas[half], call.scales[half], norm.eps);
}

// The squares, in place where there is a kernel for that and nobody needs what was squared.
inline Tensor squared(Tensor hidden, bool keep) {
    if (!keep && hidden.is_cuda()) {
        static const auto in_place = find<Tensor&(Tensor&)>("vision_rwkv::squared_relu_");
        return in_place.call(hidden);
    }
    static const auto op = find<Tensor(const Tensor&)>("vision_rwkv::squared_relu");
    return op.call(hidden);
}

// Forward
// --------------------------------------------------------------------------------------------------------------

// The tokens and their statistics; `kept` only where it is asked for, so that memory is given back early.
template <typename Mix>
std::tuple<Tensor, Tensor> forward(const Call& call, const Mix& mix, Kept* kept) {
    static const auto norm_stats = find<Tensor(const Tensor&, double)>("vision_rwkv::norm_stats");
    const CastMaps maps(call);
    std::array<MaybeTensor, 2> stats;
    if (!call.post_norm) stats[0] = call.stats ? *call.stats : norm_stats.call(call.x, call.ln[0].eps);
    Tensor z = apply_map(mix.forward(call, maps.spatial, stats[0], kept ? &kept->spatial : nullptr), maps.map(kOutput));
    if (kept) kept->z = z;
    const auto [middle, middle_stats] =
        residual(call, 0, call.x, z, std::nullopt, call.post_norm ? std::nullopt : std::optional(call.ln[1].eps));
    z = Tensor();
    if (!call.post_norm) stats[1] = middle_stats;
    Tensor hidden, receptance;
    {
        const Tensor blends = mixed(call, 1, middle, stats[1], mix.heads());
        hidden = apply_map(blends.select(0, 0), maps.map(kKey));
        receptance = apply_map(blends.select(0, 1), maps.map(kReceptance));
    }
    const Tensor values = apply_map(squared(hidden, kept != nullptr), maps.map(kValue));
    if (kept) {
        kept->middle = middle, kept->hidden = hidden, kept->receptance = receptance, kept->values = values;
        kept->stats = stats;
    }
    return residual(call, 1, middle, values, receptance, call.next_eps);
}

// Backward
// --------------------------------------------------------------------------------------------------------------

// Takes one call's gradients, the channel mix first.
template <typename Mix>
struct Backward {
    const Call& call;
    const Mix& mix;
    const Kept& kept;
    CastMaps maps = CastMaps(call);
    std::array<Tensor, kMapsAfter> gmaps = {};

    // The gradient of a map, given that of its results; `input` becomes its own gradient.
    void through_map(MapAfter i, const Tensor& g, const Tensor& input) {
        gmaps[i] = map_gradient(g, input, call.map(i));
        input_gradient(g, maps.map(i), input);
    }

    // The gradients of the channel mix's blends, from those of its values and receptance.
    Tensor channel_blends(const Tensor& gvalues, const Tensor& greceptance) {
        static const auto op = find<Tensor(Tensor&, const Tensor&)>("vision_rwkv::squared_relu_backward_");
        Tensor ghidden = at::empty(kept.hidden.sizes(), kept.hidden.options());
        input_gradient(gvalues, maps.map(kValue), ghidden);
        gmaps[kValue] = map_gradient(gvalues, op.call(ghidden, kept.hidden), call.map(kValue));
        const Tensor blends = mixed(call, 1, kept.middle, kept.stats[1], mix.heads());
        through_map(kKey, ghidden, blends.select(0, 0));
        through_map(kReceptance, greceptance, blends.select(0, 1));
        return blends;
    }

    // Through the channel mix: the gradients of its tokens, of the branch before it where `branch` is a dtype, and the
    // columns; `of_branch` gets those of the norm's weight and bias and of gamma.
    std::tuple<Tensor, Tensor, Tensor> through_channels(const Tensor& g, std::optional<at::ScalarType> branch,
                                                        std::array<Tensor, 3>& of_branch) {
        const auto [gvalues, greceptance, gweight, gbias, ggamma] =
            residual_backward(call, 1, g, kept.values, kept.receptance);
        of_branch = {gweight, gbias, ggamma};
        return mixed_backward(call, 1, channel_blends(gvalues, greceptance), kept.middle, kept.stats[1], mix.heads(), g,
                              call.scales[0], branch);
    }

    Tensors run(const Tensor& g) {
        std::array<std::array<Tensor, 3>, 2> of_branch;
        const bool whole = call.keeps_branch(), as_is = !whole && !call.scales[0] && call.dtype == g.scalar_type();
        auto [gmiddle, gz, columns2] =
            through_channels(g, whole || as_is ? std::nullopt : std::optional(call.dtype), of_branch[1]);
        if (whole) {
            auto& [gweight, gbias, ggamma] = of_branch[0];
            std::tie(gz, std::ignore, gweight, gbias, ggamma) =
                residual_backward(call, 0, gmiddle, kept.z, std::nullopt);
        }
        const SpatialGradients spatial =
            mix.backward(call, maps, kept.spatial, kept.stats[0], as_is ? gmiddle : gz, gmiddle);
        gmaps[kOutput] = spatial.goutput;
        Tensors out{spatial.gx, spatial.columns, columns2, spatial.gspatial};
        out.insert(out.end(), gmaps.begin(), gmaps.end());
        out.insert(out.end(), spatial.others.begin(), spatial.others.end());
        for (const auto& [gweight, gbias, ggamma] : of_branch)
            if (call.post_norm) out.insert(out.end(), {gweight, gbias});
        for (size_t half = 0; half < 2; ++half)
            if (call.gammas[half]) out.push_back(of_branch[half][2]);
        return out;
    }
};

// The dispatcher's entries
// --------------------------------------------------------------------------------------------------------------

template <typename Mix>
struct Entries {
    static Call call_of(c10::ArrayRef<IValue> given) { return Call(Mix::kBlock, given, Mix::kMixCount, Mix::kMaps); }

    template <typename... Results>
    static void leave(const OperatorHandle& op, Stack* stack, Results&&... results) {
        torch::jit::drop(*stack, op.schema().arguments().size());
        torch::jit::push(*stack, std::forward<Results>(results)...);
    }

    static c10::ArrayRef<IValue> arguments(const OperatorHandle& op, const Stack& stack) {
        return torch::jit::last(stack, op.schema().arguments().size());
    }

    static void plain(const OperatorHandle& op, Stack* stack) {
        const auto given = arguments(op, *stack);
        auto [x, stats] = forward(call_of(given), Mix(of_spatial_mix(given)), nullptr);
        leave(op, stack, std::move(x), std::move(stats));
    }

    static void with_kept(const OperatorHandle& op, Stack* stack) {
        const auto given = arguments(op, *stack);
        const Call call = call_of(given);
        Kept kept;
        const auto [x, stats] = forward(call, Mix(of_spatial_mix(given)), &kept);
        Tensors out{x, stats};
        for (const Tensor& tensor : kept.list(call)) out.push_back(tensor);
        leave(op, stack, std::move(out));
    }

    static void backward(const OperatorHandle& op, Stack* stack) {
        const auto all = arguments(op, *stack), given = all.slice(1, all.size() - 2);
        const Call call = call_of(given);
        const Kept kept = Kept::read(call, Mix::kKept, all.back().toTensorVector());
        const Mix mix(of_spatial_mix(given));
        Tensors out = Backward<Mix>{call, mix, kept}.run(all[0].toTensor());
        leave(op, stack, std::move(out));
    }
};

// The operators of a block, and those with `_kept` and `_backward`; `own`: what the spatial mix takes beside what every
// block does.
template <typename Mix>
void define(torch::Library& m, const std::string& own) {
    const std::string name = Mix::kBlock;
    const std::string arguments =
        "Tensor x, Tensor? stats, Tensor[] norms, float eps1, float eps2, float? next_eps, bool post_norm, Tensor[] "
        "mixes, Tensor[] maps, " +
        own +
        ", Tensor? gamma1, Tensor? gamma2, Tensor? scale1, Tensor? scale2, SymInt height, SymInt width, int pixels, "
        "float gamma, ScalarType dtype";
    m.def((name + "(" + arguments + ") -> (Tensor, Tensor)").c_str());
    m.def((name + "_kept(" + arguments + ") -> Tensor[]").c_str());
    m.def((name + "_backward(Tensor g, " + arguments + ", Tensor[] kept) -> Tensor[]").c_str());
    const auto implement = [&](const std::string& op, auto function) {
        m.impl(op.c_str(), c10::DispatchKey::CompositeExplicitAutograd, std::move(function));
    };
    implement(name, torch::CppFunction::makeFromBoxedFunction<&Entries<Mix>::plain>());
    implement(name + "_kept", torch::CppFunction::makeFromBoxedFunction<&Entries<Mix>::with_kept>());
    implement(name + "_backward", torch::CppFunction::makeFromBoxedFunction<&Entries<Mix>::backward>());
}

}  // namespace block
}  // namespace vision_rwkv
