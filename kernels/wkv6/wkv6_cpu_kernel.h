// WKV6 on vectors of channels; the plan and the formulas are in README.md. Included once for each vector width.
//
// One direction at a time, the state S (N x N) advances token by token, as the definition has it, so that no decay is
// ever divided by. A few rows of it stay in registers for a run of tokens; then the next rows take the same tokens.

template <typename Real>
using Args = vision_rwkv::Wkv6Args<Real>;

constexpr int kRun = 32;                                     // tokens whose vectors stay in the L1 cache
constexpr int kRows = VRWKV_VECTOR_BYTES == 64 ? 8 : 4;      // rows of the state in registers, two vectors each
constexpr int kGradRows = VRWKV_VECTOR_BYTES == 64 ? 8 : 4;  // the same in the backward

template <typename Real>
constexpr int kStrip = 2 * kLanes<Real>;  // channels of a task

static_assert(vision_rwkv::kHeadMultiple % kStrip<float> == 0 && vision_rwkv::kHeadMultiple % kRows == 0,
              "padding must fill the strips and rows of every vector width");

// The tokens of one head, in the order of a direction.
struct Walk {
    int64_t tokens, stride, head;  // stride from token to token, offset of the head
    bool forth;

    template <typename Real>
    Walk(const Args<Real>& args, int64_t sample, int64_t h, bool forth)
        : tokens(args.tokens),
          stride(args.heads * args.width),
          head((sample * args.tokens * args.heads + h) * args.width),
          forth(forth) {}

    int64_t begin(int64_t step) const { return head + (forth ? step : tokens - 1 - step) * stride; }
    int64_t next() const { return forth ? stride : -stride; }
};

template <typename Real>
struct Row {
    Real x[kStrip<Real>];
};

// y += r S and S = decay S + k v for kRows rows of S and a strip of columns, over a run of tokens from `at` on.
template <typename Real>
void advance_rows(const Args<Real>& args, int64_t at, int64_t next, int64_t tokens, int64_t row, int64_t column,
                  Row<Real>* state) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    V s[kRows][2];
    for (int i = 0; i < kRows; ++i) {
        s[i][0] = load(state[row + i].x);
        s[i][1] = load(state[row + i].x + L);
    }
    const Real *r = args.r + at + row, *k = args.k + at + row, *decay = args.decay + at + row;
    const Real* v = args.v + at + column;
    Real* y = args.y + at + column;
    for (int64_t t = 0; t < tokens; ++t) {
        V y0 = load(y), y1 = load(y + L);
        const V v0 = load(v), v1 = load(v + L);
        for (int i = 0; i < kRows; ++i) {
            const V r_i = splat(r[i]), k_i = splat(k[i]), decay_i = splat(decay[i]);
            y0 += r_i * s[i][0];
            y1 += r_i * s[i][1];
            s[i][0] = decay_i * s[i][0] + k_i * v0;
            s[i][1] = decay_i * s[i][1] + k_i * v1;
        }
        store(y, y0);
        store(y + L, y1);
        r += next, k += next, decay += next, v += next, y += next;
    }
    for (int i = 0; i < kRows; ++i) {
        store(state[row + i].x, s[i][0]);
        store(state[row + i].x + L, s[i][1]);
    }
}

// The token itself: y = (sum_n r u k) v.
template <typename Real>
void write_own(const Args<Real>& args, const Walk& walk, int64_t h, int64_t column) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    const Real* u = args.u + h * args.width;
    for (int64_t t = 0; t < args.tokens; ++t) {
        const int64_t at = walk.begin(t);
        V dot{};
        for (int64_t n = 0; n < args.width; n += L) dot += load(args.r + at + n) * load(args.k + at + n) * load(u + n);
        const V bonus = splat(sum<Real>(dot));
        for (int64_t m = column; m < column + kStrip<Real>; m += L)
            store(args.y + at + m, bonus * load(args.v + at + m));
    }
}

// y of one head and one strip of its channels, in both directions.
template <typename Real>
void output_strip(const Args<Real>& args, int64_t sample, int64_t h, int64_t column) {
    std::unique_ptr<Row<Real>[]> state(new Row<Real>[args.width]);
    for (bool forth : {true, false}) {
        const Walk walk(args, sample, h, forth);
        if (forth) write_own(args, walk, h, column);
        std::memset(state.get(), 0, args.width * sizeof(Row<Real>));
        for (int64_t t = 0; t < args.tokens; t += kRun) {
            const int64_t tokens = std::min<int64_t>(kRun, args.tokens - t);
            for (int64_t row = 0; row < args.width; row += kRows) {
                advance_rows(args, walk.begin(t), walk.next(), tokens, row, column, state.get());
            }
        }
    }
}

// The backward of r, k and w keeps the state transposed: a strip of k's channels in vectors, for each of v's channels.
// Then sums over v's channels, which these three are, need no sum across a vector.

// S = decay S + k v over a run of tokens, for kGradRows of v's channels. Where gr is asked for, also gr += S gy, and
// every S before its token goes to `history`.
template <bool keep, typename Real>
void advance_columns(const Args<Real>& args, int64_t at, int64_t next, int64_t tokens, int64_t row, int64_t column,
                     const Row<Real>* from, Row<Real>* to, Row<Real>* history) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    V s[kGradRows][2];
    for (int i = 0; i < kGradRows; ++i) {
        s[i][0] = load(from[row + i].x);
        s[i][1] = load(from[row + i].x + L);
    }
    for (int64_t t = 0; t < tokens; ++t, at += next) {
        const Real *k = args.k + at + column, *decay = args.decay + at + column;
        const V k0 = load(k), k1 = load(k + L), decay0 = load(decay), decay1 = load(decay + L);
        const Real *v = args.v + at + row, *gy = args.gy + at + row;
        if (keep) {
            Real* gr = args.gr + at + column;
            V gr0 = load(gr), gr1 = load(gr + L);
            for (int i = 0; i < kGradRows; ++i) {
                const V gy_i = splat(gy[i]);
                gr0 += gy_i * s[i][0];
                gr1 += gy_i * s[i][1];
                store(history[t * kGradRows + i].x, s[i][0]);
                store(history[t * kGradRows + i].x + L, s[i][1]);
            }
            store(gr, gr0);
            store(gr + L, gr1);
        }
        for (int i = 0; i < kGradRows; ++i) {
            const V v_i = splat(v[i]);
            s[i][0] = decay0 * s[i][0] + v_i * k0;
            s[i][1] = decay1 * s[i][1] + v_i * k1;
        }
    }
    if (keep) return;
    for (int i = 0; i < kGradRows; ++i) {
        store(to[row + i].x, s[i][0]);
        store(to[row + i].x + L, s[i][1]);
    }
}

// The adjoint state G = decay G + r gy, against the walk: gk += G v and, before the decay's own factor, gw += S G.
template <typename Real>
void retreat_columns(const Args<Real>& args, int64_t at, int64_t next, int64_t tokens, int64_t row, int64_t column,
                     Row<Real>* adjoint, const Row<Real>* history) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    V g[kGradRows][2];
    for (int i = 0; i < kGradRows; ++i) {
        g[i][0] = load(adjoint[row + i].x);
        g[i][1] = load(adjoint[row + i].x + L);
    }
    at += (tokens - 1) * next;
    for (int64_t t = tokens - 1; t >= 0; --t, at -= next) {
        const Real *r = args.r + at + column, *decay = args.decay + at + column;
        const V r0 = load(r), r1 = load(r + L), decay0 = load(decay), decay1 = load(decay + L);
        const Real *v = args.v + at + row, *gy = args.gy + at + row;
        Real *gk = args.gk + at + column, *gw = args.gw + at + column;
        V gk0 = load(gk), gk1 = load(gk + L), gw0 = load(gw), gw1 = load(gw + L);
        for (int i = 0; i < kGradRows; ++i) {
            const V v_i = splat(v[i]), gy_i = splat(gy[i]);
            gk0 += v_i * g[i][0];
            gk1 += v_i * g[i][1];
            gw0 += load(history[t * kGradRows + i].x) * g[i][0];
            gw1 += load(history[t * kGradRows + i].x + L) * g[i][1];
            g[i][0] = decay0 * g[i][0] + gy_i * r0;
            g[i][1] = decay1 * g[i][1] + gy_i * r1;
        }
        store(gk, gk0);
        store(gk + L, gk1);
        store(gw, gw0);
        store(gw + L, gw1);
    }
    for (int i = 0; i < kGradRows; ++i) {
        store(adjoint[row + i].x, g[i][0]);
        store(adjoint[row + i].x + L, g[i][1]);
    }
}

// The token itself, for a strip of k's channels: gr = (gy v) u k, gk = (gy v) u r and gu; gw starts at 0.
template <typename Real>
void write_own_gradients(const Args<Real>& args, const Walk& walk, int64_t sample, int64_t h, int64_t column) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    const Real* u = args.u + h * args.width + column;
    double* gu = args.gu + (sample * args.heads + h) * args.width + column;
    std::fill(gu, gu + kStrip<Real>, 0.0);
    for (int64_t begin = 0; begin < args.tokens; begin += kRun) {
        V gu_run[2] = {};
        for (int64_t t = begin; t < std::min(args.tokens, begin + kRun); ++t) {
            const int64_t at = walk.begin(t);
            V dot{};
            for (int64_t m = 0; m < args.width; m += L) dot += load(args.gy + at + m) * load(args.v + at + m);
            const V all = splat(sum<Real>(dot));
            for (int j = 0; j < 2; ++j) {
                const int64_t here = at + column + j * L;
                const V r = load(args.r + here), k = load(args.k + here), scale = all * load(u + j * L);
                gu_run[j] += all * (r * k);
                store(args.gr + here, scale * k);
                store(args.gk + here, scale * r);
                store(args.gw + here, V{});
            }
        }
        for (int i = 0; i < kStrip<Real>; ++i) gu[i] += gu_run[i / L][i % L];
    }
}

// gr, gk, gw and gu of one head and one strip of k's channels. The states at the borders of the runs are kept on the
// way through a direction; on the way back each run's states are computed again.
template <typename Real>
void gradient_strip(const Args<Real>& args, int64_t sample, int64_t h, int64_t column) {
    const int64_t runs = (args.tokens + kRun - 1) / kRun, width = args.width;
    std::unique_ptr<Row<Real>[]> states(new Row<Real>[runs * width]), adjoint(new Row<Real>[width]);
    Row<Real> history[kRun * kGradRows];
    for (bool forth : {true, false}) {
        const Walk walk(args, sample, h, forth);
        if (forth) write_own_gradients(args, walk, sample, h, column);
        std::memset(states.get(), 0, width * sizeof(Row<Real>));
        std::memset(adjoint.get(), 0, width * sizeof(Row<Real>));
        for (int64_t run = 0; run + 1 < runs; ++run) {
            Row<Real>* from = states.get() + run * width;
            for (int64_t row = 0; row < width; row += kGradRows) {
                advance_columns<false>(args, walk.begin(run * kRun), walk.next(), kRun, row, column, from, from + width,
                                       static_cast<Row<Real>*>(nullptr));
            }
        }
        for (int64_t run = runs - 1; run >= 0; --run) {
            const int64_t tokens = std::min<int64_t>(kRun, args.tokens - run * kRun), at = walk.begin(run * kRun);
            for (int64_t row = 0; row < width; row += kGradRows) {
                advance_columns<true>(args, at, walk.next(), tokens, row, column, states.get() + run * width,
                                      static_cast<Row<Real>*>(nullptr), history);
                retreat_columns(args, at, walk.next(), tokens, row, column, adjoint.get(), history);
            }
        }
    }
    const Walk walk(args, sample, h, true);
    for (int64_t t = 0; t < args.tokens; ++t) {
        for (int64_t at = walk.begin(t) + column; at < walk.begin(t) + column + kStrip<Real>; at += kLanes<Real>) {
            store(args.gw + at, load(args.gw + at) * load(args.decay + at));
        }
    }
}

template <typename Real>
void for_strips(const Args<Real>& args, void (*body)(const Args<Real>&, int64_t, int64_t, int64_t)) {
    const int64_t strips = args.width / kStrip<Real>;
    at::parallel_for(0, args.batch * args.heads * strips, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            body(args, i / strips / args.heads, i / strips % args.heads, i % strips * kStrip<Real>);
        }
    });
}

template <typename Real>
void write_output(const Args<Real>& args) {
    for_strips(args, &output_strip<Real>);
}

template <typename Real>
void write_gradients(const Args<Real>& args) {
    for_strips(args, &gradient_strip<Real>);
}

// exp of `count` numbers, a multiple of the lanes.
template <typename Real>
void exp_range(const Real* from, Real* to, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) store(to + i * kLanes<Real>, exp(load(from + i * kLanes<Real>)));
}

template <typename Real>
void take_exp(const Real* from, Real* to, int64_t count) {
    at::parallel_for(0, count / kLanes<Real>, 1024,
                     [&](int64_t begin, int64_t end) { exp_range(from, to, begin, end); });
}
