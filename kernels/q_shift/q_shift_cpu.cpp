// Q-Shift with its mixes on the CPU: the operators vision_rwkv::q_shift, q_shift_backward and norm_stats, whose schemas
// vision_rwkv/ops/q_shift.py defines.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"
#include "q_shift/q_shift_args.h"

#define VRWKV_KERNEL "q_shift/q_shift_cpu_kernel.h"
#include "simd_variants.h"

namespace vision_rwkv {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16;  // rows that are worth a thread
constexpr int64_t kRuns = 64;   // of rows in the backward pass: as many whatever the number of threads

// The tensors of a call in the dtype that sums are kept in.
struct Input {
    Input(const Tensor& x_, at::TensorList mixes_, const MaybeTensor& delta_, const MaybeTensor& weight_,
          const MaybeTensor& bias_, const MaybeTensor& stats_, at::ScalarType dtype_)
        : dtype(dtype_), x(prepared(x_, dtype)) {
        for (const Tensor& mix : mixes_) mixes.push_back(prepared(mix, dtype));
        if (delta_) delta = prepared(*delta_, dtype);
        if (stats_)
            stats = prepared(*stats_, dtype), weight = prepared(*weight_, dtype), bias = prepared(*bias_, dtype);
    }
    at::ScalarType dtype;
    Tensor x, delta, weight, bias, stats;
    std::vector<Tensor> mixes;
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
    for (const Tensor& mix : mixes) {
        TORCH_CHECK(mix.numel() == x.size(2), "q_shift: a mix must have ", x.size(2), " values, got ", mix.sizes());
    }
    if (stats) {
        TORCH_CHECK(stats->numel() == 2 * x.size(0) * x.size(1) && weight && bias && weight->numel() == x.size(2) &&
                        bias->numel() == x.size(2),
                    "q_shift: stats must have shape (B, T, 2), weight and bias (C,), got ", stats->sizes());
    }
    if (delta) {
        TORCH_CHECK(delta->dim() == 4 && delta->size(0) == static_cast<int64_t>(mixes.size()) &&
                        delta->sizes().slice(1) == x.sizes(),
                    "q_shift: delta must have shape (mixes, B, T, C), got ", delta->sizes());
    }
}

std::vector<Segment> segments(int64_t channels, int64_t pixels, double gamma, int64_t heads) {
    const int64_t dim = channels / heads;
    const int64_t steps[5][2] = {{0, -pixels}, {0, pixels}, {-pixels, 0}, {pixels, 0}, {0, 0}};
    std::vector<Segment> out;
    for (int64_t head = 0; head < heads; ++head) {
        for (int part = 0; part < 5; ++part) {
            const auto border = [&](int j) { return j < 5 ? static_cast<int64_t>(dim * gamma * j) : dim; };
            const int64_t begin = border(part), end = border(part + 1);
            if (begin < end) out.push_back({head * dim + begin, head * dim + end, steps[part][0], steps[part][1]});
        }
    }
    return out;
}

template <typename Real>
struct Call {
    Call(const Input& in, const std::vector<Segment>& segments, int64_t height, int64_t width) {
        for (const Tensor& mix : in.mixes) mixes.push_back(data<Real>(mix));
        args.rows = in.x.size(0) * in.x.size(1), args.tokens = in.x.size(1), args.channels = in.x.size(2);
        args.height = height, args.width = width;
        args.segments = segments.data(), args.segment_count = static_cast<int64_t>(segments.size());
        args.mixes = mixes.data(), args.mix_count = static_cast<int64_t>(mixes.size());
        args.x = data<Real>(in.x), args.delta = in.delta.defined() ? data<Real>(in.delta) : nullptr;
        if (in.stats.defined()) {
            args.stats = data<Real>(in.stats), args.weight = data<Real>(in.weight), args.bias = data<Real>(in.bias);
        }
    }
    std::vector<const Real*> mixes;
    QShiftArgs<Real> args{};
};

at::ScalarType sums_dtype(const Tensor& x, const MaybeTensor& other) {
    return other ? compute_dtype("q_shift", {x, *other}) : compute_dtype("q_shift", {x});
}

Tensor forward(const Tensor& x, at::TensorList mixes, const MaybeTensor& delta, const MaybeTensor& weight,
               const MaybeTensor& bias, const MaybeTensor& stats, int64_t height, int64_t width, int64_t pixels,
               double gamma, int64_t heads, at::ScalarType dtype) {
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    const Input in(x, mixes, delta, weight, bias, stats, sums_dtype(x, delta));
    Tensor out =
        at::empty({static_cast<int64_t>(mixes.size()), x.size(0), x.size(1), x.size(2)}, x.options().dtype(in.dtype));
    if (x.numel() > 0) {
        const std::vector<Segment> parts = segments(x.size(2), pixels, gamma, heads);
        for_real(in.dtype, [&](auto real) {
            using Real = decltype(real);
            Call<Real> call(in, parts, height, width);
            call.args.out = out.mutable_data_ptr<Real>();
            at::parallel_for(0, call.args.rows, kGrain, [&](int64_t begin, int64_t end) {
                std::vector<Real> buffer(4 * call.args.channels);
                VRWKV_DISPATCH(mix_rows<Real>, call.args, begin, end, buffer.data());
            });
        });
    }
    return out.to(dtype);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five backward(const Tensor& g, const Tensor& x, at::TensorList mixes, const MaybeTensor& delta,
              const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& stats, int64_t height,
              int64_t width, int64_t pixels, double gamma, int64_t heads) {
    check(x, mixes, delta, weight, bias, stats, height, width, pixels, gamma, heads);
    const int64_t count = static_cast<int64_t>(mixes.size()), channels = x.size(2), rows = x.size(0) * x.size(1);
    TORCH_CHECK(g.dim() == 4 && g.size(0) == count && g.sizes().slice(1) == x.sizes(),
                "q_shift: the gradient must have shape (mixes, B, T, C), got ", g.sizes());
    const Input in(x, mixes, delta, weight, bias, stats, sums_dtype(x, g));
    const at::TensorOptions options = x.options().dtype(in.dtype);
    Tensor gx = at::empty(x.sizes(), options);
    Tensor gdelta = delta ? at::empty(g.sizes(), options) : at::empty({0}, options);
    Tensor sums = at::zeros({std::min(kRuns, std::max<int64_t>(rows, 1)), count + 2, channels}, options);
    if (x.numel() > 0) {
        const Tensor grad = prepared(g, in.dtype);
        const std::vector<Segment> parts = segments(channels, pixels, gamma, heads);
        for_real(in.dtype, [&](auto real) {
            using Real = decltype(real);
            Call<Real> call(in, parts, height, width);
            call.args.g = data<Real>(grad);
            call.args.gx = gx.mutable_data_ptr<Real>();
            call.args.gdelta = gdelta.mutable_data_ptr<Real>();
            Real* const all = sums.mutable_data_ptr<Real>();
            const int64_t runs = sums.size(0);
            at::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
                std::vector<Real> buffer(4 * channels);
                for (int64_t run = first; run < last; ++run) {
                    QShiftArgs<Real> args = call.args;
                    args.sums = all + run * (count + 2) * channels;
                    VRWKV_DISPATCH(mix_rows_backward<Real>, args, rows * run / runs, rows * (run + 1) / runs,
                                   buffer.data());
                }
            });
        });
    }
    const Tensor total = sums.sum(0);
    const Tensor gmixes = total.narrow(0, 0, count).to(mixes[0].scalar_type());
    const Tensor none = at::empty({0}, x.options());
    return {gx.to(x.scalar_type()), gmixes, delta ? gdelta.to(g.scalar_type()) : none,
            stats ? total[count].clone().to(weight->scalar_type()) : none,
            stats ? total[count + 1].clone().to(bias->scalar_type()) : none};
}

Tensor norm_stats(const Tensor& x, double eps) {
    TORCH_CHECK(x.dim() > 0, "norm_stats: x must have channels, got a scalar");
    const at::ScalarType dtype = compute_dtype("norm_stats", {x});
    std::vector<int64_t> sizes = x.sizes().vec();
    const int64_t channels = sizes.back();
    sizes.back() = 2;
    Tensor stats = at::empty(sizes, x.options().dtype(dtype));
    if (x.numel() > 0) {
        const Tensor in = prepared(x, dtype);
        for_real(dtype, [&](auto real) {
            using Real = decltype(real);
            Real* const out = stats.mutable_data_ptr<Real>();
            at::parallel_for(0, x.numel() / channels, kGrain, [&](int64_t begin, int64_t end) {
                VRWKV_DISPATCH(row_stats<Real>, data<Real>(in), begin, end, channels, eps, out);
            });
        });
    }
    return stats;
}

}  // namespace

TORCH_LIBRARY_IMPL(vision_rwkv, CPU, m) {
    m.impl("q_shift", forward);
    m.impl("q_shift_backward", backward);
    m.impl("norm_stats", norm_stats);
}

}  // namespace vision_rwkv
