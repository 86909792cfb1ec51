// WKV6 on vectors of channels; the plan and the formulas are in README.md. Included once for each vector width.
//
// One direction at a time, the state S (N x N) advances token by token, as the definition has it, so that no decay is
// ever divided by. A few rows of it stay in registers for a run of tokens; then the next rows take the same tokens.

template <typename Real>
using Args = vision_rwkv::Wkv6Args<Real>;

constexpr int kRun = 32;                                     // tokens whose vectors stay in the L1 cache
constexpr int kRows = VRWKV_VECTOR_BYTES == 64 ? 8 : 4;      // rows of the state in registers, two vectors each
constexpr int kGradRows = VRWKV_VECTOR_BYTES == 64 ? 8 : 4;  // the same in the backward

constexpr int kGroup = 2;             // strips that a thread takes through the tokens together
constexpr int64_t kLarge = 20 << 20;  // bytes

template <typename Real>
constexpr int kStrip = 2 * kLanes<Real>;  // channels of a task

static_assert(vision_rwkv::kHeadMultiple % kStrip<float> == 0 && vision_rwkv::kHeadMultiple % kRows == 0,
              "padding must fill the strips and rows of every vector width");

// One head of one sample and a strip of its channels.
template <typename Real>
struct Strip {
    int64_t sample, head, column;

    Strip(const Args<Real>& args, int64_t index) {
        const int64_t strips = args.width / kStrip<Real>;
        sample = index / strips / args.heads;
        head = index / strips % args.heads;
        column = index % strips * kStrip<Real>;
    }
};

// The tokens of one head, in the order of a direction.
struct Walk {
    int64_t tokens, stride, head;  // stride from token to token, offset of the head
    bool forth;

    template <typename Real>
    Walk(const Args<Real>& args, const Strip<Real>& strip, bool forth)
        : tokens(args.tokens),
          stride(args.heads * args.width),
          head((strip.sample * args.tokens * args.heads + strip.head) * args.width),
          forth(forth) {}

    int64_t runs() const { return (tokens + kRun - 1) / kRun; }
    int64_t begin(int64_t run) const { return head + (forth ? run * kRun : tokens - 1 - run * kRun) * stride; }
    int64_t size(int64_t run) const { return std::min<int64_t>(kRun, tokens - run * kRun); }
    int64_t next() const { return forth ? stride : -stride; }
};

// exp(w) of one head over a run of tokens, (token, channel).
template <typename Real>
class Decays {
 public:
    explicit Decays(const Args<Real>& args) : args_(args), rows_(new Real[kRun * args.width]) {}

    // The same rows as last time for the next strip of the same head.
    const Real* of(const Walk& walk, int64_t run) {
        if (walk.begin(run) != begin_ || walk.forth != forth_) {
            begin_ = walk.begin(run);
            forth_ = walk.forth;
            fill(walk, walk.size(run));
        }
        return rows_.get();
    }

 private:
    void fill(const Walk& walk, int64_t tokens) {
        for (int64_t t = 0; t < tokens; ++t) {
            const Real* w = args_.w + begin_ + t * walk.next();
            Real* row = rows_.get() + t * args_.width;
            for (int64_t n = 0; n < args_.width; n += kLanes<Real>) store(row + n, exp(load(w + n)));
        }
    }

    const Args<Real>& args_;
    std::unique_ptr<Real[]> rows_;
    int64_t begin_ = -1;
    bool forth_ = false;
};

template <typename Real>
struct Row {
    Real x[kStrip<Real>];
};

// y += r S and S = decay S + k v for kRows rows of S and a strip of columns, over a run of tokens from `at` on.
template <typename Real>
void advance_rows(const Args<Real>& args, int64_t at, int64_t next, int64_t tokens, int64_t row, int64_t column,
                  const Real* decay, Row<Real>* state) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    V s[kRows][2];
    for (int i = 0; i < kRows; ++i) {
        s[i][0] = load(state[row + i].x);
        s[i][1] = load(state[row + i].x + L);
    }
    const Real *r = args.r + at + row, *k = args.k + at + row, *v = args.v + at + column;
    decay += row;
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
        r += next, k += next, v += next, y += next, decay += args.width;
    }
    for (int i = 0; i < kRows; ++i) {
        store(state[row + i].x, s[i][0]);
        store(state[row + i].x + L, s[i][1]);
    }
}

// The tokens themselves, a run of them from `at` on: y = (sum_n r u k) v.
template <typename Real>
void write_own(const Args<Real>& args, const Strip<Real>& strip, int64_t at, int64_t next, int64_t tokens) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    const Real* u = args.u + strip.head * args.width;
    for (int64_t t = 0; t < tokens; ++t, at += next) {
        V dot{};
        for (int64_t n = 0; n < args.width; n += L) dot += load(args.r + at + n) * load(args.k + at + n) * load(u + n);
        const V bonus = splat(sum<Real>(dot));
        const int64_t here = at + strip.column;
        for (int j = 0; j < 2; ++j) store(args.y + here + j * L, bonus * load(args.v + here + j * L));
    }
}

// Fetches a share of another run into the cache: while some rows work on one run, as large a share of the other one. A
// strip is a narrow column of a row-major tensor, which no processor foresees.
template <typename Real>
VRWKV_INLINE void fetch(const Args<Real>& args, const Strip<Real>& strip, const Walk& walk, int64_t run, int64_t row,
                        int64_t rows, std::initializer_list<const Real*> tensors) {
    constexpr int64_t kLine = 64 / sizeof(Real);
    const int64_t end = walk.size(run) * (row + rows) / args.width;
    for (int64_t t = walk.size(run) * row / args.width; t < end; ++t) {
        const int64_t at = walk.begin(run) + t * walk.next() + strip.column;
        for (const Real* x : tensors) {
            for (int64_t n = 0; n < kStrip<Real>; n += kLine) __builtin_prefetch(x + at + n, 0, 2);
        }
    }
}

// Whether so many tensors are too large for the caches, so that fetching pays.
template <typename Real>
bool is_large(const Args<Real>& args, int64_t tensors) {
    return tensors * args.batch * args.tokens * args.heads * args.width * int64_t(sizeof(Real)) > kLarge;
}

// y of some strips, in both directions. Run by run they go together: what is next to each other in memory
// is read together.
template <typename Real>
void output_group(const Args<Real>& args, int64_t first, int64_t count) {
    std::unique_ptr<Row<Real>[]> states(new Row<Real>[count * args.width]);
    Decays<Real> decays(args);
    const bool large = is_large(args, 5);
    const int64_t runs = Walk(args, Strip<Real>(args, first), true).runs();
    for (bool forth : {true, false}) {
        std::memset(states.get(), 0, count * args.width * sizeof(Row<Real>));
        for (int64_t run = 0; run < runs; ++run) {
            for (int64_t i = 0; i < count; ++i) {
                const Strip<Real> strip(args, first + i);
                const Walk walk(args, strip, forth);
                const int64_t at = walk.begin(run), next = walk.next(), tokens = walk.size(run);
                if (forth) write_own(args, strip, at, next, tokens);
                const Real* decay = decays.of(walk, run);
                for (int64_t row = 0; row < args.width; row += kRows) {
                    if (large && run + 1 < runs) {
                        fetch(args, strip, walk, run + 1, row, kRows, {args.r, args.k, args.v, args.w, args.y});
                    }
                    advance_rows(args, at, next, tokens, row, strip.column, decay, states.get() + i * args.width);
                }
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
                     const Real* decay, const Row<Real>* from, Row<Real>* to, Row<Real>* history) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    V s[kGradRows][2];
    for (int i = 0; i < kGradRows; ++i) {
        s[i][0] = load(from[row + i].x);
        s[i][1] = load(from[row + i].x + L);
    }
    decay += column;
    for (int64_t t = 0; t < tokens; ++t, at += next, decay += args.width) {
        const Real* k = args.k + at + column;
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
                     const Real* decay, Row<Real>* adjoint, const Row<Real>* history) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    V g[kGradRows][2];
    for (int i = 0; i < kGradRows; ++i) {
        g[i][0] = load(adjoint[row + i].x);
        g[i][1] = load(adjoint[row + i].x + L);
    }
    at += (tokens - 1) * next;
    decay += (tokens - 1) * args.width + column;
    for (int64_t t = tokens - 1; t >= 0; --t, at -= next, decay -= args.width) {
        const Real* r = args.r + at + column;
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

// The tokens themselves, a run of them, for a strip of k's channels: gr = (gy v) u k, gk = (gy v) u r and their part of
// gu; gw starts at 0.
template <typename Real>
void write_own_gradients(const Args<Real>& args, const Strip<Real>& strip, int64_t at, int64_t next, int64_t tokens) {
    using V = Vec<Real>;
    constexpr int L = kLanes<Real>;
    const Real* u = args.u + strip.head * args.width + strip.column;
    V gu_run[2] = {};
    for (int64_t t = 0; t < tokens; ++t, at += next) {
        V dot{};
        for (int64_t m = 0; m < args.width; m += L) dot += load(args.gy + at + m) * load(args.v + at + m);
        const V all = splat(sum<Real>(dot));
        for (int j = 0; j < 2; ++j) {
            const int64_t here = at + strip.column + j * L;
            const V r = load(args.r + here), k = load(args.k + here), scale = all * load(u + j * L);
            gu_run[j] += all * (r * k);
            store(args.gr + here, scale * k);
            store(args.gk + here, scale * r);
            store(args.gw + here, V{});
        }
    }
    double* gu = args.gu + (strip.sample * args.heads + strip.head) * args.width + strip.column;
    for (int i = 0; i < kStrip<Real>; ++i) gu[i] += gu_run[i / L][i % L];
}

// The factor that retreat_columns leaves out of gw.
template <typename Real>
void finish_gw(const Args<Real>& args, int64_t at, int64_t next, int64_t tokens, int64_t column, const Real* decay) {
    for (int64_t t = 0; t < tokens; ++t, at += next, decay += args.width) {
        for (int j = 0; j < 2; ++j) {
            const int64_t here = at + column + j * kLanes<Real>;
            store(args.gw + here, load(args.gw + here) * load(decay + column + j * kLanes<Real>));
        }
    }
}

// Through one direction, keeping each strip's state at the start of every run: (strip, run, row).
template <typename Real>
void keep_states(const Args<Real>& args, int64_t first, int64_t count, bool forth, int64_t runs, Decays<Real>& decays,
                 Row<Real>* states) {
    const int64_t width = args.width;
    const bool large = is_large(args, 11);
    for (int64_t i = 0; i < count; ++i) std::memset(states + i * runs * width, 0, width * sizeof(Row<Real>));
    for (int64_t run = 0; run < runs; ++run) {
        for (int64_t i = 0; i < count; ++i) {
            const Strip<Real> strip(args, first + i);
            const Walk walk(args, strip, forth);
            if (forth) write_own_gradients(args, strip, walk.begin(run), walk.next(), walk.size(run));
            if (run + 1 == runs) continue;
            Row<Real>* from = states + (i * runs + run) * width;
            const Real* decay = decays.of(walk, run);
            for (int64_t row = 0; row < width; row += kGradRows) {
                if (large) fetch(args, strip, walk, run + 1, row, kGradRows, {args.k, args.v, args.w});
                advance_columns<false>(args, walk.begin(run), walk.next(), kRun, row, strip.column, decay, from,
                                       from + width, static_cast<Row<Real>*>(nullptr));
            }
        }
    }
}

// gr, gk, gw and gu of some strips of k's channels. On the way back through a direction each run's
// states are computed again from the first one, and meet the adjoint state.
template <typename Real>
void gradient_group(const Args<Real>& args, int64_t first, int64_t count) {
    const int64_t runs = Walk(args, Strip<Real>(args, first), true).runs(), width = args.width;
    std::unique_ptr<Row<Real>[]> states(new Row<Real>[count * runs * width]), adjoints(new Row<Real>[count * width]);
    Row<Real> history[kRun * kGradRows];
    Decays<Real> decays(args);
    const bool large = is_large(args, 11);
    for (bool forth : {true, false}) {
        keep_states(args, first, count, forth, runs, decays, states.get());
        std::memset(adjoints.get(), 0, count * width * sizeof(Row<Real>));
        for (int64_t run = runs - 1; run >= 0; --run) {
            for (int64_t i = 0; i < count; ++i) {
                const Strip<Real> strip(args, first + i);
                const Walk walk(args, strip, forth);
                const int64_t at = walk.begin(run), next = walk.next(), tokens = walk.size(run);
                const Real* decay = decays.of(walk, run);
                for (int64_t row = 0; row < width; row += kGradRows) {
                    if (large && run > 0) {
                        fetch(args, strip, walk, run - 1, row, kGradRows,
                              {args.r, args.k, args.v, args.w, args.gy, args.gr, args.gk, args.gw});
                    }
                    advance_columns<true>(args, at, next, tokens, row, strip.column, decay,
                                          states.get() + (i * runs + run) * width, static_cast<Row<Real>*>(nullptr),
                                          history);
                    retreat_columns(args, at, next, tokens, row, strip.column, decay, adjoints.get() + i * width,
                                    history);
                }
                if (!forth) finish_gw(args, at, next, tokens, strip.column, decay);
            }
        }
    }
}

// Runs `body` on groups of neighbouring strips, in parallel.
template <typename Real>
void for_groups(const Args<Real>& args, void (*body)(const Args<Real>&, int64_t, int64_t)) {
    const int64_t strips = args.batch * args.heads * (args.width / kStrip<Real>);
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kGroup) body(args, i, std::min<int64_t>(end - i, kGroup));
    });
}

template <typename Real>
void write_output(const Args<Real>& args) {
    for_groups(args, &output_group<Real>);
}

template <typename Real>
void write_gradients(const Args<Real>& args) {
    std::fill(args.gu, args.gu + args.batch * args.heads * args.width, 0.0);
    for_groups(args, &gradient_group<Real>);
}
