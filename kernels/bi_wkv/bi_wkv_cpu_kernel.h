// Bi-WKV on vectors of channels; the plan and the formulas are in README.md. Included once for each vector width.
//
// The sequence is cut into chunks. Every sum over tokens is kept relative to an exponent close to its largest term:
// within a chunk one exponent serves all tokens, and from chunk to chunk the exponent travels along with the sums.

template <typename Real>
using Args = vision_rwkv::BiWkvArgs<Real>;

constexpr int kMaxChunk = 64;  // tokens whose scratch fits the L1 cache, and whose decays one float holds
constexpr int kMinChunk = 8;   // a channel that would need shorter ones goes to the exact code
// Within these bounds what underflows is below rounding: exp(-87) (the smallest float) times exp(kMaxBonus) times
// kMaxChunk against a denominator of exp(kMinLog) at least.
constexpr double kMaxDecay = 16;               // of |w| times the chunk length
constexpr double kMaxBonus = 30;               // of u
constexpr double kMinLog = -36, kMaxLog = 40;  // of a denominator relative to the chunk's exponent
constexpr double kMaxAdjoint = 40;             // of the exponent of adjoint sums that enter a chunk
constexpr double kMaxTop = 256;                // of that of the sums that do: a float holds it to 1e-5

// Sums over one chunk's terms exp(key_i) x_i, relative to exp(key), decayed to the borders of the chunk.
template <typename Real>
struct Summary {
    Real key[kLanes<Real>];
    Real first[2][kLanes<Real>];  // decayed as the token before the chunk sees them
    Real last[2][kLanes<Real>];   // as the token after it does
};

// Sums over all terms on one side of a chunk, as its nearest token sees them, relative to exp(key - age w). Keeping the
// age apart keeps the exponent exact however long the sequence.
template <typename Real>
struct Side {
    Real key[kLanes<Real>];
    Real age[kLanes<Real>];
    Real sum[2][kLanes<Real>];
};

template <typename Real>
struct Border {
    Side<Real> before, after;
};

// How a sequence is cut.
struct Chunks {
    int64_t tokens, length, count;

    int64_t begin(int64_t c) const { return c * length; }
    int64_t size(int64_t c) const { return std::min(length, tokens - begin(c)); }
};

// A vector of channels of one sample.
template <typename Real>
struct Channels {
    using V = Vec<Real>;
    Real w_lanes[kLanes<Real>] = {}, decay_lanes[kLanes<Real>], bonus_lanes[kLanes<Real>] = {};
    int64_t first, stride;  // offsets of the first channel, and from token to token
    int64_t sequence = 0;   // offset of the sample
    int64_t ahead = 0;      // offset from a chunk to the next one in line
    int count;              // channels in the vector

    // `exact` marks channels whose w or u is outside the bounds; the vector code computes something else there.
    Channels(const Args<Real>& args, const std::vector<uint8_t>& exact, int64_t block)
        : first(block * kLanes<Real>), stride(args.channels) {
        count = static_cast<int>(std::min<int64_t>(kLanes<Real>, args.channels - first));
        for (int i = 0; i < count; ++i) {
            if (exact[first + i]) continue;
            w_lanes[i] = args.w[first + i];
            bonus_lanes[i] = args.u[first + i];
        }
        store(decay_lanes, exp(-w()));
        store(bonus_lanes, exp(bonus()));
    }

    VRWKV_INLINE V w() const { return load(w_lanes); }
    VRWKV_INLINE V decay() const { return load(decay_lanes); }  // exp(-w)
    VRWKV_INLINE V bonus() const { return load(bonus_lanes); }  // exp(u)

    int64_t offset(int64_t token) const { return sequence + token * stride + first; }

    template <bool full>
    VRWKV_INLINE V get(const Real* p) const {
        return full ? load(p) : load_first(p, count);
    }

    // For the first touch in a phase. A chunk is a narrow column of a row-major tensor, which no processor foresees;
    // so its next one is fetched on the way. An address beyond the tensor does no harm.
    template <bool full>
    VRWKV_INLINE V fetch(const Real* p) const {
        __builtin_prefetch(p + ahead, 0, 2);
        return get<full>(p);
    }

    template <bool full>
    VRWKV_INLINE void put(Real* p, V x) const {
        __builtin_prefetch(p + ahead, 1, 2);
        if (full) {
            store(p, x);
        } else {
            store_first(p, x, count);
        }
    }
};

// Phase 1: one chunk's largest k and, unless it is the only chunk, its sums of e^k v and e^k.
template <typename Real, bool full>
void summarise(const Args<Real>& args, const Channels<Real>& ch, int64_t begin, int64_t tokens, bool only,
               Summary<Real>& out) {
    using V = Vec<Real>;
    const Real* k = args.k + ch.offset(begin);
    const Real* v = args.v + ch.offset(begin);
    V key = ch.template get<full>(k);
    for (int64_t t = 1; t < tokens; ++t) key = max(ch.template fetch<full>(k + t * ch.stride), key);
    store(out.key, key);
    if (only) return;
    V first_p{}, first_q{}, last_p{}, last_q{};
    V power = splat(Real(1));
    const V decay = ch.decay();
    for (int64_t t = 0; t < tokens; ++t) {
        const V q = exp(ch.template get<full>(k + t * ch.stride) - key);
        const V p = q * ch.template fetch<full>(v + t * ch.stride);
        last_p = last_p * decay + p;
        last_q = last_q * decay + q;
        first_p += p * power;
        first_q += q * power;
        power *= decay;
    }
    store(out.first[0], first_p);
    store(out.first[1], first_q);
    store(out.last[0], last_p);
    store(out.last[1], last_q);
}

template <typename Real>
VRWKV_INLINE void set_empty(Side<Real>& side) {
    store(side.key, splat(-std::numeric_limits<Real>::infinity()));
    for (Real* x : {side.age, side.sum[0], side.sum[1]}) store(x, Vec<Real>{});
}

// next = `side` seen from `tokens` further away, plus the chunk between with its key and sums.
template <typename Real>
VRWKV_INLINE void pass_chunk(const Channels<Real>& ch, const Side<Real>& side, int64_t tokens, const Real* chunk_key,
                             const Real (*chunk_sum)[kLanes<Real>], Side<Real>& next) {
    using V = Vec<Real>;
    const V key = load(side.key), new_key = load(chunk_key);
    const V age = load(side.age) + Real(tokens);
    const V lead = (new_key - key) + age * ch.w();  // by how much the chunk's exponent is larger
    const auto newer = lead > 0;
    const V scale = exp(newer ? -lead : lead);
    const V one = splat(Real(1));
    const V old_scale = newer ? scale : one, new_scale = newer ? one : scale;
    store(next.key, newer ? new_key : key);
    store(next.age, newer ? V{} : age);
    for (int i = 0; i < 2; ++i) store(next.sum[i], load(side.sum[i]) * old_scale + load(chunk_sum[i]) * new_scale);
}

// Phase 2: what enters every chunk of a sequence from the left and from the right.
template <typename Real>
void chain(const Channels<Real>& ch, const Chunks& chunks, const Summary<Real>* sums, Border<Real>* borders) {
    const int64_t last = chunks.count - 1;
    set_empty(borders[0].before);
    set_empty(borders[last].after);
    for (int64_t c = 0; c < last; ++c) {  // both directions at once: two chains of dependent steps, side by side
        pass_chunk(ch, borders[c].before, chunks.length, sums[c].key, sums[c].last, borders[c + 1].before);
        const int64_t r = last - c;
        pass_chunk(ch, borders[r].after, chunks.size(r), sums[r].key, sums[r].first, borders[r - 1].after);
    }
}

// The exponent of a chunk, key + top, and the sums that enter it relative to that.
template <typename Real>
struct Entry {
    using V = Vec<Real>;
    V key, top, before[2], after[2];

    VRWKV_INLINE Entry(const Channels<Real>& ch, const Summary<Real>& sums, const Border<Real>& border) {
        key = load(sums.key);
        const V left = lead(ch, border.before), right = lead(ch, border.after);
        top = max(max(left, right), V{});
        const V left_scale = exp(left - top), right_scale = exp(right - top);
        for (int i = 0; i < 2; ++i) {
            before[i] = load(border.before.sum[i]) * left_scale;
            after[i] = load(border.after.sum[i]) * right_scale;
        }
    }

    VRWKV_INLINE V lead(const Channels<Real>& ch, const Side<Real>& side) const {
        return (load(side.key) - key) - load(side.age) * ch.w();
    }

    // Whether the exponents were numbers of a size that loses no digits; the two sides' may differ by their last ones.
    VRWKV_INLINE Mask<Real> held() const { return (key == key) & (top <= Real(kMaxTop)); }
};

// Whether the floats held what they had to.
template <typename Real>
VRWKV_INLINE Mask<Real> in_bounds(Vec<Real> denominator) {
    return (denominator >= Real(std::exp(kMinLog))) & (denominator <= Real(std::exp(kMaxLog)));
}

template <typename Real>
VRWKV_INLINE Mask<Real> finite(Vec<Real> x) {
    const Real largest = std::numeric_limits<Real>::max();
    return (x <= largest) & (x >= -largest);
}

// A row for each token of a chunk.
template <typename Real>
struct Row {
    Real x[kLanes<Real>];
};

// Runs from the last token of a chunk to the first: rows of e^k and of the sums over everything after the token.
template <typename Real, bool full>
VRWKV_INLINE void suffix(const Args<Real>& args, const Channels<Real>& ch, const Entry<Real>& entry, int64_t begin,
                         int64_t tokens, Row<Real>* exps, Row<Real>* after_p, Row<Real>* after_q) {
    using V = Vec<Real>;
    const Real* k = args.k + ch.offset(begin);
    const Real* v = args.v + ch.offset(begin);
    const V decay = ch.decay();
    V p = entry.after[0], q = entry.after[1];
    for (int64_t t = tokens - 1; t >= 0; --t) {
        const V e = exp((ch.template fetch<full>(k + t * ch.stride) - entry.key) - entry.top);
        store(exps[t].x, e);
        store(after_p[t].x, p);
        store(after_q[t].x, q);
        p = p * decay + e * ch.template fetch<full>(v + t * ch.stride);
        q = q * decay + e;
    }
}

// Phase 3 of the forward: y of one chunk. Returns the lanes that the exact code need not redo.
template <typename Real, bool full>
Mask<Real> write_y(const Args<Real>& args, const Channels<Real>& ch, int64_t begin, int64_t tokens,
                   const Summary<Real>& sums, const Border<Real>& border) {
    using V = Vec<Real>;
    Row<Real> exps[kMaxChunk], after_p[kMaxChunk], after_q[kMaxChunk];
    const Entry<Real> entry(ch, sums, border);
    suffix<Real, full>(args, ch, entry, begin, tokens, exps, after_p, after_q);
    const Real* v = args.v + ch.offset(begin);
    Real* y = args.y + ch.offset(begin);
    Mask<Real> good = entry.held();
    const V decay = ch.decay(), bonus = ch.bonus();
    V p = entry.before[0], q = entry.before[1];
    for (int64_t t = 0; t < tokens; ++t) {
        const V e = load(exps[t].x), e_v = e * ch.template get<full>(v + t * ch.stride);
        const V numerator = (p + load(after_p[t].x)) + e_v * bonus;
        const V denominator = (q + load(after_q[t].x)) + e * bonus;
        good &= in_bounds<Real>(denominator) & finite<Real>(numerator);
        ch.template put<full>(y + t * ch.stride, numerator / denominator);
        p = p * decay + e_v;
        q = q * decay + e;
    }
    return good;
}

// Everything the backward needs to know about a chunk's forward; rows relative to the chunk's exponent.
template <typename Real>
struct ChunkRows {
    Row<Real> exps[kMaxChunk], after_p[kMaxChunk], after_q[kMaxChunk];  // e^k and the sums over the tokens after
    Row<Real> before_p[kMaxChunk], before_q[kMaxChunk];                 // over the tokens before
    Row<Real> a[kMaxChunk], b[kMaxChunk];                               // gy / denominator, and times -y
};

// Phase 3 of the backward: fills the rows. Returns the smallest denominator, marks bad lanes in `good`.
template <typename Real, bool full>
VRWKV_INLINE Vec<Real> fill_rows(const Args<Real>& args, const Channels<Real>& ch, const Entry<Real>& entry,
                                 int64_t begin, int64_t tokens, ChunkRows<Real>& rows, Mask<Real>& good) {
    using V = Vec<Real>;
    suffix<Real, full>(args, ch, entry, begin, tokens, rows.exps, rows.after_p, rows.after_q);
    const Real* v = args.v + ch.offset(begin);
    const Real* gy = args.gy + ch.offset(begin);
    const V decay = ch.decay(), bonus = ch.bonus();
    V p = entry.before[0], q = entry.before[1], smallest = splat(Real(1));
    for (int64_t t = 0; t < tokens; ++t) {
        store(rows.before_p[t].x, p);
        store(rows.before_q[t].x, q);
        const V e = load(rows.exps[t].x), e_v = e * ch.template get<full>(v + t * ch.stride);
        const V numerator = (p + load(rows.after_p[t].x)) + e_v * bonus;
        const V denominator = (q + load(rows.after_q[t].x)) + e * bonus;
        good &= in_bounds<Real>(denominator) & finite<Real>(numerator);
        smallest = min(denominator, smallest);
        const V inverse = Real(1) / denominator;
        const V a = ch.template fetch<full>(gy + t * ch.stride) * inverse;
        store(rows.a[t].x, a);
        store(rows.b[t].x, -a * (numerator * inverse));
        p = p * decay + e_v;
        q = q * decay + e;
    }
    return smallest;
}

// Phase 3 of the backward: one chunk's sums of gy / D and -gy y / D, with D the denominator.
template <typename Real, bool full>
void summarise_adjoint(const Args<Real>& args, const Channels<Real>& ch, int64_t begin, int64_t tokens,
                       const Summary<Real>& sums, const Border<Real>& border, Summary<Real>& out) {
    using V = Vec<Real>;
    ChunkRows<Real> rows;
    const Entry<Real> entry(ch, sums, border);
    Mask<Real> good{};  // the last phase asks again
    const V smallest = fill_rows<Real, full>(args, ch, entry, begin, tokens, rows, good);
    V first_a{}, first_b{}, last_a{}, last_b{};
    V power = splat(Real(1));
    const V decay = ch.decay();
    for (int64_t t = 0; t < tokens; ++t) {
        const V a = load(rows.a[t].x), b = load(rows.b[t].x);
        last_a = last_a * decay + a;
        last_b = last_b * decay + b;
        first_a += a * power;
        first_b += b * power;
        power *= decay;
    }
    // The largest term is about 1 / smallest; as the exponent only has to be near it, it may as well be rounded.
    const V key = -(entry.key + (entry.top + log_floor(smallest)));
    const V scale = exp((-entry.key - key) - entry.top);
    store(out.key, key);
    store(out.first[0], first_a * scale);
    store(out.first[1], first_b * scale);
    store(out.last[0], last_a * scale);
    store(out.last[1], last_b * scale);
}

// The adjoint sums that enter a chunk, relative to minus the chunk's exponent.
template <typename Real>
VRWKV_INLINE void enter_adjoint(const Channels<Real>& ch, const Entry<Real>& entry, const Side<Real>& side,
                                Vec<Real>& a, Vec<Real>& b, Mask<Real>& good) {
    const Vec<Real> lead = ((load(side.key) + entry.key) - load(side.age) * ch.w()) + entry.top;
    good &= lead <= Real(kMaxAdjoint);
    const Vec<Real> scale = exp(lead);
    a = load(side.sum[0]) * scale;
    b = load(side.sum[1]) * scale;
}

// Phase 5 of the backward: gk and gv of one chunk, and its part of gw and gu.
template <typename Real, bool full>
Mask<Real> write_gradients(const Args<Real>& args, const Channels<Real>& ch, int64_t begin, int64_t tokens,
                           const Summary<Real>& sums, const Border<Real>& border, const Border<Real>& adjoint, Real* gw,
                           Real* gu) {
    using V = Vec<Real>;
    ChunkRows<Real> rows;
    const Entry<Real> entry(ch, sums, border);
    Mask<Real> good = entry.held();
    fill_rows<Real, full>(args, ch, entry, begin, tokens, rows, good);
    const V decay = ch.decay(), bonus = ch.bonus();
    V a, b, across{}, own{};
    enter_adjoint(ch, entry, adjoint.after, a, b, good);
    for (int64_t t = tokens - 1; t >= 0; --t) {
        across += load(rows.before_p[t].x) * a + load(rows.before_q[t].x) * b;
        store(rows.before_p[t].x, a);  // from here on these rows hold the adjoint sums over the tokens after
        store(rows.before_q[t].x, b);
        a = a * decay + load(rows.a[t].x);
        b = b * decay + load(rows.b[t].x);
    }
    const int64_t offset = ch.offset(begin);
    enter_adjoint(ch, entry, adjoint.before, a, b, good);
    for (int64_t t = 0; t < tokens; ++t) {
        const V e = load(rows.exps[t].x), v = ch.template get<full>(args.v + offset + t * ch.stride);
        const V own_a = load(rows.a[t].x), own_b = load(rows.b[t].x);
        across += load(rows.after_p[t].x) * a + load(rows.after_q[t].x) * b;
        own += e * (own_a * v + own_b);
        const V gv = e * ((a + load(rows.before_p[t].x)) + own_a * bonus);
        const V gk = v * gv + e * ((b + load(rows.before_q[t].x)) + own_b * bonus);
        good &= finite<Real>(gv) & finite<Real>(gk);
        ch.template put<full>(args.gv + offset + t * ch.stride, gv);
        ch.template put<full>(args.gk + offset + t * ch.stride, gk);
        a = a * decay + own_a;
        b = b * decay + own_b;
    }
    store(gw, -decay * across);
    store(gu, bonus * own);
    return good;
}
#include "bi_wkv/bi_wkv_cpu_driver.h"
