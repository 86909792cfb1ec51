// Q-Shift with its mixes on CUDA, and the statistics of the norm in front: float32, bfloat16, float16. float64 and rows
// too long for a block run on the implementation in PyTorch.
#include <array>
#include <tuple>

#include "rows.cuh"
#include "tensors.cuh"

namespace q_shift {

using namespace rows;

constexpr int kMixes = 8;   // at most
constexpr int kTokens = 4;  // of a thread in the forward pass, in flight together
constexpr int kStay = 4;    // the direction of channels that are not shifted
constexpr int kMaxShared = 48 * 1024;
constexpr int kRowBuffer = 2 * kMaxThreads / kWarp;  // floats for row_sums

struct Place {
    int tokens, height, width, pixels, dim, borders[4];

    __device__ int direction(int channel) const {
        const int place = channel % dim;
        int direction = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) direction += place >= borders[i];
        return direction;
    }

    // How many tokens further the neighbour of token `position` is; false where there is none.
    __device__ bool neighbour(int position, int direction, int& offset) const {
        offset = 0;
        if (direction == kStay || position >= height * width) return true;
        const int row = position / width, column = position - row * width;
        switch (direction) {
            case 0:
                offset = -pixels;
                return column >= pixels;
            case 1:
                offset = pixels;
                return column < width - pixels;
            case 2:
                offset = -pixels * width;
                return row >= pixels;
            default:
                offset = pixels * width;
                return row < height - pixels;
        }
    }
};

// The direction in which a token's takers lie.
__device__ __forceinline__ int opposite(int direction) { return direction == kStay ? kStay : direction ^ 1; }

struct Args {
    int rows, channels, mixes;
    Place place;
    const float* mix[kMixes];            // each (channels,)
    const float *weight, *bias, *stats;  // stats (rows, 2); null without a norm
};

template <int kVec>
__device__ __forceinline__ void load_parameter(const float* from, int channel, float otherwise, float (&to)[kVec]) {
    if (from) {
        load(from + channel, to);
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) to[j] = otherwise;
    }
}

// The normalised values of a row, before weight and bias; the values themselves without a norm.
template <int kVec, typename X>
__device__ __forceinline__ void load_unit(const Args& args, const X* x, int row, int channel, float (&unit)[kVec]) {
    load(x + static_cast<int64_t>(row) * args.channels + channel, unit);
    if (args.stats) {
        const float2 stats = reinterpret_cast<const float2*>(args.stats)[row];
#pragma unroll
        for (int j = 0; j < kVec; ++j) unit[j] = (unit[j] - stats.x) * stats.y;
    }
}

// The mixes of a row: `mix`, less delta where there is one.
template <int kVec, typename D>
__device__ __forceinline__ void load_mix(const float (&mix)[kVec], const D* delta, int64_t at, float (&to)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = 0;
    if (delta) load(delta + at, to);
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = mix[j] - to[j];
}

template <typename X, typename Out, int kVec>
__global__ void __launch_bounds__(kBlock) mix_tokens(const Args args, const X* x, const Out* delta, Out* out) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * kVec;
    if (channel >= args.channels) return;
    const int direction = args.place.direction(channel);
    float weight[kVec], bias[kVec], own[kTokens][kVec], far[kTokens][kVec];
    load_parameter(args.weight, channel, 1.0f, weight);
    load_parameter(args.bias, channel, 0.0f, bias);
    const int first = blockIdx.x * blockDim.y * kTokens + threadIdx.y;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
        const int row = first + k * blockDim.y;
        if (row >= args.rows) continue;
        int offset;
        const bool inside = args.place.neighbour(row % args.place.tokens, direction, offset);
        load_unit(args, x, row, channel, own[k]);
        if (inside) load_unit(args, x, row + offset, channel, far[k]);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            own[k][j] = own[k][j] * weight[j] + bias[j];
            far[k][j] = inside ? far[k][j] * weight[j] + bias[j] : 0.0f;
        }
    }
    for (int i = 0; i < args.mixes; ++i) {
        float constant[kVec], mix[kVec], result[kVec];
        load(args.mix[i] + channel, constant);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            const int row = first + k * blockDim.y;
            if (row >= args.rows) continue;
            const int64_t at = (static_cast<int64_t>(i) * args.rows + row) * args.channels + channel;
            load_mix(constant, delta, at, mix);
#pragma unroll
            for (int j = 0; j < kVec; ++j) result[j] = own[k][j] * mix[j] + far[k][j] * (1.0f - mix[j]);
            store(out + at, result);
        }
    }
}

// Gradients. The normalised token gets what its own results and those of the token that took it give; each block adds
// up the gradients of mixes, weight and bias over its rows, in shared memory, into `part`.
template <typename X, typename G, int kVec>
__global__ void __launch_bounds__(kVec == 1 ? kMaxThreads : kBlock)
    mix_tokens_backward(const Args args, int rows_a_block, const G* g, const X* x, const G* delta, X* gx, G* gdelta,
                        float* part) {
    extern __shared__ float4 shared[];
    float* buffer = reinterpret_cast<float*>(shared);
    float* columns = buffer + kRowBuffer;
    const int channel = threadIdx.x * kVec, slots = args.mixes + (args.stats ? 2 : 0);
    const bool active = channel < args.channels;
    float* mine = columns + threadIdx.y * slots * args.channels + channel;
    float weight[kVec], bias[kVec];
    int direction = kStay;
    if (active) {
        direction = args.place.direction(channel);
        load_parameter(args.weight, channel, 1.0f, weight);
        load_parameter(args.bias, channel, 0.0f, bias);
        for (int slot = 0; slot < slots; ++slot) {
            for (int j = 0; j < kVec; ++j) mine[slot * args.channels + j] = 0;
        }
    }
    const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_a_block;
    const int64_t last = min(first + rows_a_block, static_cast<int64_t>(args.rows));
    for (int64_t base = first; base < last; base += blockDim.y) {
        const int row = static_cast<int>(base) + threadIdx.y;
        const bool on = active && row < last;
        float unit[kVec], far[kVec], apart[kVec], gn[kVec], sums[2] = {0, 0};
        if (on) {
            int offset, taker;
            const int position = row % args.place.tokens;
            const bool inside = args.place.neighbour(position, direction, offset);
            const bool taken = args.place.neighbour(position, opposite(direction), taker);
            load_unit(args, x, row, channel, unit);
            if (inside) load_unit(args, x, row + offset, channel, far);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                apart[j] = unit[j] * weight[j] + bias[j] - (inside ? far[j] * weight[j] + bias[j] : 0.0f);
                gn[j] = 0;
            }
            for (int i = 0; i < args.mixes; ++i) {
                float constant[kVec], mix[kVec], grad[kVec], change[kVec];
                load(args.mix[i] + channel, constant);
                const int64_t at = (static_cast<int64_t>(i) * args.rows + row) * args.channels + channel;
                load_mix(constant, delta, at, mix);
                load(g + at, grad);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    gn[j] += grad[j] * mix[j];
                    change[j] = grad[j] * apart[j];
                }
                add_to_column(mine + i * args.channels, change);
                if (gdelta) {
#pragma unroll
                    for (int j = 0; j < kVec; ++j) change[j] = -change[j];
                    store(gdelta + at, change);
                }
                if (taken) {
                    const int64_t there = at + static_cast<int64_t>(taker) * args.channels;
                    load_mix(constant, delta, there, mix);
                    load(g + there, grad);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) gn[j] += grad[j] * (1.0f - mix[j]);
                }
            }
        }
        if (args.stats) {
            if (on) {
                float change[kVec];
#pragma unroll
                for (int j = 0; j < kVec; ++j) change[j] = gn[j] * unit[j];
                add_to_column(mine + args.mixes * args.channels, change);
                add_to_column(mine + (args.mixes + 1) * args.channels, gn);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    gn[j] *= weight[j];
                    sums[0] += gn[j];
                    sums[1] += gn[j] * unit[j];
                }
            }
            row_sums(sums, buffer);
            if (on) {
                const float rstd = args.stats[2 * static_cast<int64_t>(row) + 1];
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    gn[j] = rstd * (gn[j] - (sums[0] + unit[j] * sums[1]) / args.channels);
                }
            }
        }
        if (on) store(gx + static_cast<int64_t>(row) * args.channels + channel, gn);
    }
    write_columns(columns, slots * args.channels, part);
}

template <typename X, int kVec>
__global__ void token_stats(int rows, int channels, float eps, const X* x, float* stats) {
    __shared__ float buffer[kRowBuffer];
    const int row = blockIdx.x * blockDim.y + threadIdx.y, channel = threadIdx.x * kVec;
    const bool active = row < rows && channel < channels;
    float values[kVec], mean, rstd;
    if (active) load(x + static_cast<int64_t>(row) * channels + channel, values);
    row_stats(values, active, channels, eps, buffer, mean, rstd);
    if (active && channel == 0) reinterpret_cast<float2*>(stats)[row] = make_float2(mean, rstd);
}

// The dispatcher's entries
// ---------------------------------------------------------------------------------------------

struct Input {
    Input(const Tensor& x_, at::TensorList mixes_, const MaybeTensor& delta_, const MaybeTensor& weight_,
          const MaybeTensor& bias_, const MaybeTensor& stats_, int64_t height, int64_t width, int64_t pixels,
          double gamma, int64_t heads)
        : x(aligned(x_)), weight(parameter(weight_)), bias(parameter(bias_)), stats(parameter(stats_)) {
        if (delta_ && delta_->defined()) delta = aligned(*delta_);
        const int64_t channels = x.size(2), dim = channels / heads;
        args.rows = static_cast<int>(x.size(0) * x.size(1)), args.channels = static_cast<int>(channels);
        args.mixes = static_cast<int>(mixes_.size());
        // More than the map's sides is as good as past its border.
        const int64_t clipped = std::min(pixels, std::max(height, width));
        args.place = Place{static_cast<int>(x.size(1)), static_cast<int>(height), static_cast<int>(width),
                           static_cast<int>(clipped),   static_cast<int>(dim),    {}};
        vectors = dim % 4 == 0;
        for (int i = 0; i < 4; ++i) {
            args.place.borders[i] = static_cast<int>(dim * gamma * (i + 1));
            vectors = vectors && args.place.borders[i] % 4 == 0;
        }
        for (size_t i = 0; i < mixes_.size(); ++i) {
            mixes[i] = parameter(mixes_[i]);
            args.mix[i] = floats(mixes[i]);
        }
        args.weight = floats(weight), args.bias = floats(bias), args.stats = floats(stats);
    }
    Tensor x, delta, weight, bias, stats;
    std::array<Tensor, kMixes> mixes;
    Args args{};
    bool vectors;  // four channels at a time take the same neighbour
};

void check(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
           const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width, int64_t pixels,
           double gamma, int64_t heads) {
    TORCH_CHECK(x.dim() == 3, "q_shift: x must have shape (B, T, C), got ", x.sizes());
    TORCH_CHECK(height >= 0 && width >= 0 && height * width <= x.size(1), "q_shift: x must have at least ", height,
                " * ", width, " tokens, got ", x.size(1));
    TORCH_CHECK(heads > 0 && x.size(2) % heads == 0, "q_shift: the ", x.size(2),
                " channels must be a multiple of the heads, got ", heads);
    TORCH_CHECK(gamma >= 0 && gamma <= 0.25 && pixels >= 0,
                "q_shift: gamma must be in [0, 1/4] and pixels at least 0, got ", gamma, " and ", pixels);
    TORCH_CHECK(!mixes.empty(), "q_shift: expected at least one mix");
    const auto per_channel = [&](const Tensor& p) {
        TORCH_CHECK(p.numel() == x.size(2) && p.device() == x.device(), "q_shift: a parameter must have ", x.size(2),
                    " values on ", x.device(), ", got ", p.sizes(), " on ", p.device());
    };
    for (const Tensor& mix : mixes) per_channel(mix);
    if (weight) per_channel(*weight);
    if (bias) per_channel(*bias);
    if (stats) {
        TORCH_CHECK(weight && bias && stats->numel() == 2 * x.size(0) * x.size(1) && stats->device() == x.device(),
                    "q_shift: stats must have shape (B, T, 2), and weight and bias beside them, got ", stats->sizes());
    }
    if (delta) {
        TORCH_CHECK(delta->dim() == 4 && delta->size(0) == static_cast<int64_t>(mixes.size()) &&
                        delta->sizes().slice(1) == x.sizes() && delta->device() == x.device(),
                    "q_shift: delta must have shape (mixes, B, T, C), got ", delta->sizes());
    }
}

bool runs_here(const Tensor& x, at::ScalarType other, at::TensorList mixes, const MaybeTensor& delta) {
    return has_kernel(x.scalar_type(), other) && (!delta || delta->scalar_type() == other) && mixes.size() <= kMixes &&
           x.size(0) * x.size(1) <= kMaxRows && x.size(2) <= kMaxThreads;
}

torch::jit::Stack stack_of(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
                           const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width,
                           int64_t pixels, double gamma, int64_t heads) {
    return {x, mixes.vec(), delta, weight, bias, stats, height, width, pixels, gamma, heads};
}

Tensor q_shift_cuda(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
                    const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width, int64_t pixels,
                    double gamma, int64_t heads, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(x.device());
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    if (x.numel() != 0 && !runs_here(x, dtype, mixes, delta)) {
        auto stack = stack_of(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
        stack.emplace_back(static_cast<int64_t>(dtype));
        call_pytorch("vision_rwkv::q_shift", stack);
        return stack[0].toTensor();
    }
    Tensor out =
        at::empty({static_cast<int64_t>(mixes.size()), x.size(0), x.size(1), x.size(2)}, x.options().dtype(dtype));
    if (x.numel() == 0) return out;
    const Input in(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    for_types(x.scalar_type(), dtype, in.vectors, [&](auto token, auto result, auto vec) {
        using X = decltype(token);
        using Out = decltype(result);
        const int vectors = in.args.channels / vec;
        const int threads = std::min(vectors, kBlock), lines = kBlock / threads, group = lines * kTokens;
        const dim3 grid((in.args.rows + group - 1) / group, (vectors + threads - 1) / threads);
        mix_tokens<X, Out, vec><<<grid, dim3(threads, lines), 0, c10::cuda::getCurrentCUDAStream()>>>(
            in.args, data<X>(in.x), data<Out>(in.delta), mutable_data<Out>(out));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return out;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients of mixes, weight and bias from the sums of all blocks, (slots, C).
Five gradients(const Tensor& gx, const Tensor& gdelta, const Tensor& columns, at::TensorList mixes,
               const MaybeTensor& weight, const MaybeTensor& bias) {
    const int64_t count = static_cast<int64_t>(mixes.size());
    const Tensor gmixes = columns.narrow(0, 0, count).to(mixes[0].scalar_type());
    if (columns.size(0) == count)
        return Five(gx, gmixes, gdelta, at::empty({0}, gx.options()), at::empty({0}, gx.options()));
    return Five(gx, gmixes, gdelta, columns.select(0, count).to(weight->scalar_type()).clone(),
                columns.select(0, count + 1).to(bias->scalar_type()).clone());
}

Five q_shift_backward_cuda(const Tensor& g, const Tensor& x, at::TensorList mixes, const MaybeTensor& delta,
                           const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats, int64_t height,
                           int64_t width, int64_t pixels, double gamma, int64_t heads) {
    const c10::cuda::CUDAGuard guard(x.device());
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    TORCH_CHECK(g.dim() == 4 && g.size(0) == static_cast<int64_t>(mixes.size()) && g.sizes().slice(1) == x.sizes() &&
                    g.device() == x.device(),
                "q_shift: the gradient must have shape (mixes, B, T, C), got ", g.sizes());
    const int64_t channels = x.size(2), slots = static_cast<int64_t>(mixes.size()) + (stats ? 2 : 0);
    const bool fours = x.numel() == 0 || runs_here(x, g.scalar_type(), mixes, delta);
    const int64_t shared = sizeof(float) * (kRowBuffer + slots * channels);  // for one row at a time
    if (x.numel() != 0 && (!fours || shared > kMaxShared)) {
        auto stack = stack_of(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
        stack.insert(stack.begin(), g);
        call_pytorch("vision_rwkv::q_shift_backward", stack);
        return Five(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor(),
                    stack[4].toTensor());
    }
    const Tensor gx = at::empty(x.sizes(), x.options());
    const Tensor gdelta = delta ? at::empty(g.sizes(), g.options()) : at::empty({0}, x.options());
    const Tensor columns = new_floats(x, {slots, channels});
    if (x.numel() == 0) return gradients(gx, gdelta, columns.zero_(), mixes, weight, bias);
    const Input in(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    const Tensor grad = aligned(g);
    for_types(x.scalar_type(), g.scalar_type(), in.vectors, [&](auto token, auto result, auto vec) {
        using X = decltype(token);
        using G = decltype(result);
        Layout how = layout(in.args.rows, channels, vec, 4);
        while (how.threads_y > 1 && sizeof(float) * (kRowBuffer + how.threads_y * slots * channels) > kMaxShared) {
            how.threads_y /= 2;  // rows_a_block stays a multiple
        }
        const size_t bytes = sizeof(float) * (kRowBuffer + how.threads_y * slots * channels);
        const Tensor part = new_floats(x, {how.blocks, slots, channels});
        const auto stream = c10::cuda::getCurrentCUDAStream();
        mix_tokens_backward<X, G, vec><<<how.blocks, how.block(), bytes, stream>>>(
            in.args, static_cast<int>(how.rows_a_block), data<G>(grad), data<X>(in.x), data<G>(in.delta),
            mutable_data<X>(gx), delta ? mutable_data<G>(gdelta) : nullptr, part.mutable_data_ptr<float>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        launch_sum_parts(part.const_data_ptr<float>(), how.blocks, slots * channels, columns.mutable_data_ptr<float>(),
                         stream);
    });
    return gradients(gx, gdelta, columns, mixes, weight, bias);
}

Tensor norm_stats_cuda(const Tensor& x, double eps) {
    const c10::cuda::CUDAGuard guard(x.device());
    const int64_t channels = x.dim() ? x.size(-1) : 0, rows = channels ? x.numel() / channels : 0;
    const bool vectors = channels % 4 == 0;
    if (!has_kernel(x.scalar_type(), x.scalar_type()) || rows > kMaxRows || !fits(channels, vectors ? 4 : 1)) {
        torch::jit::Stack stack{x, eps};
        call_pytorch("vision_rwkv::norm_stats", stack);
        return stack[0].toTensor();
    }
    auto sizes = x.sizes().vec();
    sizes.back() = 2;
    Tensor stats = new_floats(x, sizes);
    if (rows == 0) return stats;
    const Tensor in = aligned(x);
    for_types(x.scalar_type(), x.scalar_type(), vectors, [&](auto token, auto, auto vec) {
        using X = decltype(token);
        const Layout how = layout(rows, channels, vec, 1 << 20);
        token_stats<X, vec><<<how.blocks, how.block(), 0, c10::cuda::getCurrentCUDAStream()>>>(
            static_cast<int>(rows), static_cast<int>(channels), static_cast<float>(eps), data<X>(in),
            stats.mutable_data_ptr<float>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return stats;
}

TORCH_LIBRARY_IMPL(vision_rwkv, CUDA, m) {
    m.impl("q_shift", q_shift_cuda);
    m.impl("q_shift_backward", q_shift_backward_cuda);
    m.impl("norm_stats", norm_stats_cuda);
}

}  // namespace q_shift
