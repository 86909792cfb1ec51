// What vision_rwkv/ops registers with torch.library.register_autograd, for every device, without the 100 microseconds a
// call that Python's way costs: the gradients of the operators, and that operators `*_backward` have none.

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "block/block.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;
using Values = std::vector<IValue>;

// Arguments and results of any operator lie on a stack.

// The tensors among the values, one after the other; those not given left out.
variable_list tensors(c10::ArrayRef<IValue> values) {
    variable_list out;
    for (const IValue& value : values) {
        if (value.isTensor()) {
            out.push_back(value.toTensor());
        } else if (value.isTensorList()) {
            for (const Tensor& x : value.toTensorVector()) out.push_back(x);
        }
    }
    return out;
}

// The values with their tensors replaced by those of `given`, in order, or by undefined ones.
Values with_tensors(c10::ArrayRef<IValue> values, const variable_list& given) {
    size_t used = 0;
    const auto next = [&] { return used < given.size() ? given[used++] : Tensor(); };
    Values out;
    out.reserve(values.size());
    for (const IValue& value : values) {
        if (value.isTensor()) {
            out.emplace_back(next());
        } else if (value.isTensorList()) {
            c10::List<Tensor> list;
            for (size_t i = 0; i < value.toListRef().size(); ++i) list.push_back(next());
            out.emplace_back(std::move(list));
        } else {
            out.push_back(value);
        }
    }
    return out;
}

c10::ArrayRef<IValue> arguments(const OperatorHandle& op, const Stack& stack) {
    return torch::jit::last(stack, op.schema().arguments().size());
}

// Whether autograd has to know of a call with these tensors.
bool recorded(const variable_list& inputs) {
    return at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(inputs);
}

void run(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// Runs the operator for a Function; the tensors it returns.
variable_list results(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    run(op, keys, stack);
    return tensors(torch::jit::last(*stack, op.schema().returns().size()));
}

// Gradients, each a Function whose arguments are the tensors given to the operator, then the operator and its call.
constexpr size_t NO_TENSORS = 3;  // op, keys and stack, which have no gradient

// `name`_backward takes the gradient and the first arguments of `name`, which are saved, and returns a gradient for the
// first of them each. That of several mixes is one tensor.
struct Usual : torch::autograd::Function<Usual> {
    static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const OperatorHandle& op,
                                 DispatchKeySet keys, Stack* stack) {
        ctx->saved_data["backward"] = op.operator_name().name + "_backward";
        ctx->saved_data["arguments"] = c10::ivalue::Tuple::create(with_tensors(arguments(op, *stack), {}));
        ctx->save_for_backward(inputs.vec());
        return results(op, keys, stack);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& g) {
        const auto op =
            c10::Dispatcher::singleton().findSchemaOrThrow(ctx->saved_data["backward"].toStringRef().c_str(), "");
        const auto saved = ctx->saved_data["arguments"].toTuple();
        const Values given = with_tensors(saved->elements(), ctx->get_saved_variables());
        const auto& takes = op.schema().arguments();
        Stack stack(given.begin(), given.begin() + static_cast<int64_t>(takes.size() - 1));
        const bool in_front = takes[0].name() == "g", several = takes[0].type()->kind() == c10::TypeKind::ListType;
        stack.insert(in_front ? stack.begin() : stack.end(), several ? IValue(g) : IValue(g[0]));
        op.callBoxed(stack);
        return spread(given, stack);
    }

 private:
    static variable_list spread(const Values& given, const Stack& grads) {
        variable_list out;
        for (size_t i = 0; i < given.size(); ++i) {
            const IValue grad = i < grads.size() ? grads[i] : IValue();
            if (given[i].isTensor()) {
                out.push_back(grad.isTensor() ? grad.toTensor() : Tensor());
            } else if (given[i].isTensorList()) {
                const variable_list xs = given[i].toTensorVector();
                const variable_list parts = grad.isTensor() ? grad.toTensor().unbind() : grad.toTensorVector();
                for (size_t j = 0; j < xs.size(); ++j) out.push_back(parts[j].view_symint(xs[j].sym_sizes()));
            }
        }
        out.resize(out.size() + NO_TENSORS);
        return out;
    }
};

// Arguments x, z, gate, weight, bias, gamma, scale, eps, stats_eps. The gradient of x is that of the sum.
struct Residual : torch::autograd::Function<Residual> {
    static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const OperatorHandle& op,
                                 DispatchKeySet keys, Stack* stack) {
        const auto given = arguments(op, *stack);
        const bool plain = given[2].isNone() && given[3].isNone() && given[5].isNone();
        variable_list kept;
        for (size_t i = plain ? 6 : 1; i < 7; ++i) kept.push_back(given[i].isNone() ? Tensor() : given[i].toTensor());
        ctx->saved_data["plain"] = plain;
        ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
        ctx->saved_data["dtype"] = given[1].toTensor().scalar_type();
        ctx->saved_data["eps"] = given[7];
        ctx->save_for_backward(std::move(kept));
        ctx->set_materialize_grads(false);
        return results(op, keys, stack);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& g) {
        variable_list out;
        if (g[0].defined()) out = ctx->saved_data["plain"].toBool() ? plain(ctx, g[0]) : whole(ctx, g[0]);
        out.resize(static_cast<size_t>(ctx->saved_data["inputs"].toInt()) + NO_TENSORS);
        return out;
    }

 private:
    static variable_list plain(AutogradContext* ctx, const Tensor& g) {
        const Tensor scale = ctx->get_saved_variables()[0];
        const Tensor gz = scale.defined() ? g * scale.to(g.scalar_type()).view({-1, 1, 1}) : g;
        return {g, gz.to(ctx->saved_data["dtype"].toScalarType())};
    }

    static variable_list whole(AutogradContext* ctx, const Tensor& g) {
        static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("vision_rwkv::residual_backward", "");
        const variable_list saved = ctx->get_saved_variables();
        Stack stack{g};
        for (const Tensor& x : saved) stack.push_back(x.defined() ? IValue(x) : IValue());
        stack.push_back(ctx->saved_data["eps"]);
        op.callBoxed(stack);
        variable_list out{g};
        for (size_t i = 0; i < stack.size(); ++i)
            if (saved[i].defined()) out.push_back(stack[i].toTensor());
        return out;
    }
};

// Arguments raw, base. It saves its result.
struct LogDecay : torch::autograd::Function<LogDecay> {
    static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const OperatorHandle& op,
                                 DispatchKeySet keys, Stack* stack) {
        ctx->saved_data["dtype"] = inputs[0].scalar_type();
        ctx->saved_data["base_dtype"] = inputs[1].scalar_type();
        ctx->saved_data["base_shape"] = inputs[1].sym_sizes();
        variable_list out = results(op, keys, stack);
        ctx->save_for_backward(out);
        return out;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& g) {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("vision_rwkv::log_decay_backward", "")
                                   .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, at::ScalarType)>();
        auto& data = ctx->saved_data;
        const auto [graw, gbase] = op.call(g[0], ctx->get_saved_variables()[0], data["dtype"].toScalarType());
        const Tensor shaped = gbase.view_symint(data["base_shape"].toSymIntVector());
        variable_list out{graw, shaped.to(data["base_dtype"].toScalarType())};
        out.resize(out.size() + NO_TENSORS);
        return out;
    }
};

// A block's results come with what its backward takes beside the arguments, which is saved too.
struct Block : torch::autograd::Function<Block> {
    static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const OperatorHandle& op, DispatchKeySet,
                                 Stack* stack) {
        const std::string name = op.operator_name().name;
        const auto kept = c10::Dispatcher::singleton().findSchemaOrThrow((name + "_kept").c_str(), "");
        const auto given = arguments(op, *stack);
        ctx->saved_data["backward"] = name + "_backward";
        ctx->saved_data["arguments"] = c10::ivalue::Tuple::create(with_tensors(given, {}));
        Stack call(given.begin(), given.end());
        {
            at::AutoDispatchBelowADInplaceOrView below;
            kept.callBoxed(&call);
        }
        variable_list all = call[0].toTensorVector(), saved = inputs.vec(), out(all.begin(), all.begin() + 2);
        saved.insert(saved.end(), all.begin() + 2, all.end());
        ctx->save_for_backward(std::move(saved));
        ctx->set_materialize_grads(false);
        ctx->mark_non_differentiable({out[1]});  // statistics: the gradient through them is part of the norm's
        torch::jit::drop(*stack, given.size());
        torch::jit::push(*stack, out[0], out[1]);
        return out;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& g) {
        const auto op =
            c10::Dispatcher::singleton().findSchemaOrThrow(ctx->saved_data["backward"].toStringRef().c_str(), "");
        const auto saved_arguments = ctx->saved_data["arguments"].toTuple();
        const variable_list saved = ctx->get_saved_variables();
        const Values given = with_tensors(saved_arguments->elements(), saved);
        const variable_list inputs = tensors(given);
        variable_list out(inputs.size() + NO_TENSORS);
        if (!g[0].defined()) return out;
        Stack stack{g[0]};
        stack.insert(stack.end(), given.begin(), given.end());
        stack.emplace_back(variable_list(saved.begin() + static_cast<int64_t>(inputs.size()), saved.end()));
        op.callBoxed(&stack);
        const variable_list grads = spread(given, stack[0].toTensorVector());
        std::copy(grads.begin(), grads.end(), out.begin());
        return out;
    }

 private:
    // In the order of the arguments; undefined for those without a gradient.
    static variable_list spread(const Values& given, const variable_list& found) {
        const bool post_norm = given[kPostNorm].toBool();
        const variable_list norms = given[kNorms].toTensorVector(), mixes = given[kMixes].toTensorVector(),
                            maps = given[kMaps].toTensorVector(), own = tensors(of_spatial_mix(given));
        const size_t spatial_mixes = mixes.size() - kChannelMixes, spatial_maps = maps.size() - kMapsAfter;
        variable_list out{found[kGx]};
        const auto add = [&](const Tensor& grad, const Tensor& parameter) {
            out.push_back(grad.to(parameter.scalar_type()).view_symint(parameter.sym_sizes()));
        };
        const auto column = [&](size_t half, size_t i) {
            return found[half ? kColumns2 : kColumns1].select(0, static_cast<int64_t>(i));
        };
        if (given[kStats].isTensor()) out.emplace_back();
        size_t other = kGothers + own.size();
        for (size_t i = 0; i < norms.size(); ++i) {
            const size_t half = i / 2, of_mixes = half ? kChannelMixes : spatial_mixes;
            add(post_norm ? found[other++] : column(half, of_mixes + i % 2), norms[i]);
        }
        for (size_t i = 0; i < mixes.size(); ++i)
            add(i < spatial_mixes ? column(0, i) : column(1, i - spatial_mixes), mixes[i]);
        for (size_t i = 0; i < spatial_maps; ++i) add(found[kGspatial].select(0, static_cast<int64_t>(i)), maps[i]);
        for (size_t i = 0; i < kMapsAfter; ++i) out.push_back(found[kGmaps + i]);
        for (size_t i = 0; i < own.size(); ++i) add(found[kGothers + i], own[i]);
        for (const LastArgument gamma : {kGamma1, kGamma2})
            if (last(given, gamma).isTensor()) out.push_back(found[other++]);
        return out;
    }
};

template <typename Gradient>
void differentiable(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    const variable_list inputs = tensors(arguments(op, *stack));
    if (!recorded(inputs)) return run(op, keys, stack);
    variable_list out = Gradient::apply(at::TensorList(inputs), op, keys, stack);
    const size_t count = op.schema().returns().size();
    Values values = with_tensors(torch::jit::last(*stack, count), out);
    torch::jit::drop(*stack, count);
    for (IValue& value : values) stack->push_back(std::move(value));
}

// An operator `name`_backward: its results say that there is no second derivative when one is asked for.
void once(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    const variable_list inputs = tensors(arguments(op, *stack));
    const bool refuse = recorded(inputs);
    run(op, keys, stack);
    if (!refuse) return;
    std::string name = op.operator_name().name;
    name = name.substr(name.find("::") + 2);
    name.resize(name.rfind("_backward"));
    const std::shared_ptr<torch::autograd::Node> node(
        new torch::autograd::Error(
            name + " has no second derivative: call backward() or torch.autograd.grad() without create_graph=True",
            torch::autograd::collect_next_edges(inputs)),
        torch::autograd::deleteNode);
    torch::autograd::set_history(tensors(torch::jit::last(*stack, op.schema().returns().size())), node);
}

template <typename Gradient>
void implement(torch::Library& m, const std::string& name) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&differentiable<Gradient>>());
    m.impl((name + "_backward").c_str(), torch::CppFunction::makeFromBoxedFunction<&once>());
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, Autograd, m) {
    for (const char* name : {"bi_wkv", "wkv6", "q_shift", "mix_linear", "gated_linear", "squared_relu_linear", "gate",
                             "squared_relu", "norm_gate", "dynamic_linear"})
        implement<Usual>(m, name);
    implement<Residual>(m, "residual");
    implement<LogDecay>(m, "log_decay");
    for (const char* name : {"vrwkv_block", "vrwkv6_block"}) {
        implement<Block>(m, name);
        m.impl((std::string(name) + "_kept").c_str(), torch::CppFunction::makeFallthrough());
    }
}

}  // namespace vision_rwkv
