// Q-Shift on runs of rows; included once for each vector width by simd_variants.h. The loops over channels have no
// branches, so that the compiler turns them into vectors.

using vision_rwkv::QShiftArgs;
using vision_rwkv::Segment;

// The row `row` normalised into unit, and with weight and bias into n; both are x without a norm.
template <typename Real>
VRWKV_INLINE void read_row(const QShiftArgs<Real>& args, int64_t row, int64_t begin, int64_t end, Real* __restrict unit,
                           Real* __restrict n) {
    const Real* __restrict x = args.x + row * args.channels;
    if (!args.stats) {
        for (int64_t c = begin; c < end; ++c) n[c] = unit[c] = x[c];
        return;
    }
    const Real mean = args.stats[2 * row], rstd = args.stats[2 * row + 1];
    const Real* __restrict weight = args.weight, * __restrict bias = args.bias;
    for (int64_t c = begin; c < end; ++c) {
        unit[c] = (x[c] - mean) * rstd;
        n[c] = unit[c] * weight[c] + bias[c];
    }
}

// The row that segment's channels of `row` come from, or (sign = -1) go to; -1 where there is none.
template <typename Real>
VRWKV_INLINE int64_t other_row(const QShiftArgs<Real>& args, const Segment& segment, int64_t row, int sign) {
    const int64_t position = row % args.tokens;
    if (position >= args.height * args.width) return row;
    const int64_t y = position / args.width + sign * segment.dy, x = position % args.width + sign * segment.dx;
    if (y < 0 || y >= args.height || x < 0 || x >= args.width) return -1;
    return row + sign * (segment.dy * args.width + segment.dx);
}

// n and its neighbours' values of a row; `unit` as in read_row, `spare` is overwritten.
template <typename Real>
VRWKV_INLINE void read_both(const QShiftArgs<Real>& args, int64_t row, Real* unit, Real* n, Real* far, Real* spare) {
    read_row(args, row, 0, args.channels, unit, n);
    for (int64_t s = 0; s < args.segment_count; ++s) {
        const Segment& segment = args.segments[s];
        const int64_t from = other_row(args, segment, row, 1);
        if (from >= 0) {
            read_row(args, from, segment.begin, segment.end, spare, far);
        } else {
            for (int64_t c = segment.begin; c < segment.end; ++c) far[c] = 0;
        }
    }
}

template <typename Real>
void mix_rows(const QShiftArgs<Real>& args, int64_t begin, int64_t end, Real* buffer) {
    const int64_t channels = args.channels;
    Real* __restrict n = buffer, * __restrict far = buffer + channels;
    for (int64_t row = begin; row < end; ++row) {
        read_both<Real>(args, row, buffer + 2 * channels, n, far, buffer + 3 * channels);
        for (int64_t i = 0; i < args.mix_count; ++i) {
            const Real* __restrict mix = args.mixes[i];
            const int64_t at = (i * args.rows + row) * channels;
            Real* __restrict out = args.out + at;
            if (args.delta) {
                const Real* __restrict delta = args.delta + at;
                for (int64_t c = 0; c < channels; ++c) {
                    const Real m = mix[c] - delta[c];
                    out[c] = n[c] * m + far[c] * (1 - m);
                }
            } else {
                for (int64_t c = 0; c < channels; ++c) out[c] = n[c] * mix[c] + far[c] * (1 - mix[c]);
            }
        }
    }
}

// Adds g (1 - mix) of those rows that took this one.
template <typename Real>
VRWKV_INLINE void add_takers(const QShiftArgs<Real>& args, int64_t row, int64_t i, Real* __restrict gn) {
    const Real* __restrict mix = args.mixes[i];
    for (int64_t s = 0; s < args.segment_count; ++s) {
        const Segment& segment = args.segments[s];
        const int64_t taker = other_row(args, segment, row, -1);
        if (taker < 0) continue;
        const int64_t at = (i * args.rows + taker) * args.channels;
        const Real* __restrict g = args.g + at;
        if (args.delta) {
            const Real* __restrict delta = args.delta + at;
            for (int64_t c = segment.begin; c < segment.end; ++c) gn[c] += g[c] * (1 - mix[c] + delta[c]);
        } else {
            for (int64_t c = segment.begin; c < segment.end; ++c) gn[c] += g[c] * (1 - mix[c]);
        }
    }
}

// From gn, the gradient of the norm's output, those of weight, bias and, in gx, of the norm's input.
template <typename Real>
VRWKV_INLINE void norm_backward(const QShiftArgs<Real>& args, int64_t row, const Real* __restrict unit,
                                Real* __restrict gn, Real* __restrict gx) {
    const int64_t channels = args.channels;
    Real* __restrict gweight = args.sums + args.mix_count * channels, * __restrict gbias = gweight + channels;
    const Real* __restrict weight = args.weight;
    for (int64_t c = 0; c < channels; ++c) {
        gweight[c] += gn[c] * unit[c];
        gbias[c] += gn[c];
        gn[c] *= weight[c];
    }
    Vec<Real> total{}, along{};
    int64_t c = 0;
    for (; c + kLanes<Real> <= channels; c += kLanes<Real>) {
        const Vec<Real> g = load(gn + c);
        total += g;
        along += g * load(unit + c);
    }
    Real mean = sum<Real>(total), slope = sum<Real>(along);
    for (; c < channels; ++c) {
        mean += gn[c];
        slope += gn[c] * unit[c];
    }
    mean /= channels;
    slope /= channels;
    const Real rstd = args.stats[2 * row + 1];
    for (c = 0; c < channels; ++c) gx[c] = rstd * (gn[c] - mean - unit[c] * slope);
}

template <typename Real>
void mix_rows_backward(const QShiftArgs<Real>& args, int64_t begin, int64_t end, Real* buffer) {
    const int64_t channels = args.channels;
    Real* __restrict n = buffer, * __restrict far = buffer + channels, * __restrict unit = buffer + 2 * channels, * __restrict gn = buffer + 3 * channels;
    for (int64_t row = begin; row < end; ++row) {
        read_both<Real>(args, row, unit, n, far, gn);
        for (int64_t c = 0; c < channels; ++c) {
            n[c] -= far[c];  // what a mix scales
            gn[c] = 0;
        }
        for (int64_t i = 0; i < args.mix_count; ++i) {
            const int64_t at = (i * args.rows + row) * channels;
            const Real* __restrict mix = args.mixes[i], * __restrict g = args.g + at;
            Real* __restrict gmix = args.sums + i * channels;
            for (int64_t c = 0; c < channels; ++c) gmix[c] += g[c] * n[c];
            if (args.delta) {
                const Real* __restrict delta = args.delta + at;
                Real* __restrict gdelta = args.gdelta + at;
                for (int64_t c = 0; c < channels; ++c) {
                    gdelta[c] = -g[c] * n[c];
                    gn[c] += g[c] * (mix[c] - delta[c]);
                }
            } else {
                for (int64_t c = 0; c < channels; ++c) gn[c] += g[c] * mix[c];
            }
            add_takers(args, row, i, gn);
        }
        Real* __restrict gx = args.gx + row * channels;
        if (args.stats) {
            norm_backward<Real>(args, row, unit, gn, gx);
        } else {
            for (int64_t c = 0; c < channels; ++c) gx[c] = gn[c];
        }
    }
}

// Mean and 1 / deviation of rows of x (rows, channels).
template <typename Real>
void row_stats(const Real* x, int64_t begin, int64_t end, int64_t channels, double eps, Real* stats) {
    for (int64_t row = begin; row < end; ++row) {
        const Real* from = x + row * channels;
        Vec<Real> total{}, square{};
        int64_t c = 0;
        for (; c + kLanes<Real> <= channels; c += kLanes<Real>) total += load(from + c);
        Real mean = sum<Real>(total);
        for (; c < channels; ++c) mean += from[c];
        mean /= channels;
        for (c = 0; c + kLanes<Real> <= channels; c += kLanes<Real>) {
            const Vec<Real> away = load(from + c) - mean;
            square += away * away;
        }
        Real variance = sum<Real>(square);
        for (; c < channels; ++c) variance += (from[c] - mean) * (from[c] - mean);
        stats[2 * row] = mean;
        stats[2 * row + 1] = 1 / std::sqrt(variance / channels + static_cast<Real>(eps));
    }
}
