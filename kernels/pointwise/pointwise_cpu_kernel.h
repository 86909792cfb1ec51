// Point-wise operators on runs of values or rows; included once for each vector width by simd_variants.h.

using vision_rwkv::ResidualArgs;

template <typename Real>
VRWKV_INLINE Real sigmoid_one(Real x) {
    return 1 / (1 + std::exp(-x));
}

template <typename Real>
VRWKV_INLINE Vec<Real> sigmoid(Vec<Real> x) {
    return splat(Real(1)) / (splat(Real(1)) + exp(-x));
}

// out = sigmoid(r) * y; out may be y.
template <typename Real>
void gate_values(const Real* r, const Real* y, Real* out, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes<Real> <= count; i += kLanes<Real>) store(out + i, sigmoid<Real>(load(r + i)) * load(y + i));
    for (; i < count; ++i) out[i] = sigmoid_one(r[i]) * y[i];
}

// relu(x) ** 2; NaN stays.
template <typename Real>
void square_values(const Real* __restrict x, Real* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const Real positive = x[i] < 0 ? Real(0) : x[i];
        out[i] = positive * positive;
    }
}

// Mean and 1 / deviation of a row.
template <typename Real>
VRWKV_INLINE void row_stats(const Real* x, int64_t channels, double eps, Real& mean, Real& rstd) {
    Vec<Real> total{}, square{};
    int64_t c = 0;
    for (; c + kLanes<Real> <= channels; c += kLanes<Real>) total += load(x + c);
    mean = sum<Real>(total);
    for (; c < channels; ++c) mean += x[c];
    mean /= channels;
    for (c = 0; c + kLanes<Real> <= channels; c += kLanes<Real>) {
        const Vec<Real> away = load(x + c) - mean;
        square += away * away;
    }
    Real variance = sum<Real>(square);
    for (; c < channels; ++c) variance += (x[c] - mean) * (x[c] - mean);
    rstd = 1 / std::sqrt(variance / channels + static_cast<Real>(eps));
}

template <typename Real>
void residual_rows(const ResidualArgs<Real>& args, int64_t begin, int64_t end, Real* __restrict branch) {
    const int64_t channels = args.channels;
    for (int64_t row = begin; row < end; ++row) {
        const Real* __restrict x = args.x + row * channels, * __restrict z = args.z + row * channels;
        Real* __restrict out = args.out + row * channels;
        if (args.gate) {
            gate_values(args.gate + row * channels, z, branch, channels);
        } else {
            for (int64_t c = 0; c < channels; ++c) branch[c] = z[c];
        }
        if (args.weight) {
            Real mean, rstd;
            row_stats(branch, channels, args.eps, mean, rstd);
            const Real* __restrict weight = args.weight, * __restrict bias = args.bias;
            for (int64_t c = 0; c < channels; ++c) branch[c] = (branch[c] - mean) * rstd * weight[c] + bias[c];
        }
        if (args.gamma) {
            for (int64_t c = 0; c < channels; ++c) branch[c] *= args.gamma[c];
        }
        const Real scale = args.scale ? args.scale[row / args.tokens] : Real(1);
        for (int64_t c = 0; c < channels; ++c) out[c] = x[c] + branch[c] * scale;
        if (args.stats) row_stats(out, channels, args.stats_eps, args.stats[2 * row], args.stats[2 * row + 1]);
    }
}
