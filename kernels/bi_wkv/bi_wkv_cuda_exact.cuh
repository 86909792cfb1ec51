// The exact path: token by token in double, every sum beside its own exponent. Right for any finite input; it serves
// those channels of a tile whose numbers the fast path's range does not hold, and all of float64.
#pragma once

#include <cmath>

#include "bi_wkv/bi_wkv_cuda_common.cuh"

namespace bi_wkv {

__device__ inline State empty_state() { return {-INFINITY, 0, 0}; }

__device__ inline State merge(const State& a, const State& b) {
    const double top = fmax(a.m, b.m);
    if (top == -INFINITY) return a;
    const double of_a = exp(a.m - top), of_b = exp(b.m - top);
    return {top, of_a * a.x + of_b * b.x, of_a * a.y + of_b * b.y};
}

// The sums as seen from further away.
__device__ inline State decayed(const State& s, double decay) { return {s.m - decay, s.x, s.y}; }

struct ExactRow {
    double w, u, largest;  // largest: of the exponents that w and u make
    int valid;
    bool mine;  // whether this lane is to be done
};

// The sums of a row's tokens as seen right behind it (side 0) and right before it (side 1).
template <typename Term>
__device__ inline void row_sums(const ExactRow& row, Term term, State (&sums)[2]) {
    sums[0] = sums[1] = empty_state();
    for (int j = 0; j < row.valid; ++j) sums[0] = merge(decayed(sums[0], row.w), term(j));
    for (int j = row.valid - 1; j >= 0; --j) sums[1] = merge(decayed(sums[1], row.w), term(j));
    // Rows that are cut short end at the last token: what is right behind them is further away.
    sums[0] = decayed(sums[0], row.valid > 0 ? (kRow - row.valid) * row.w : 0);
}

// Shares the rows' sums; one thread for each lane calls `use` with each side and that lane's first row. What that
// leaves there are then the sums.
template <typename Use>
__device__ inline void share_rows(const ExactRow& row, State (&sums)[2], Use use) {
    State* shared = reinterpret_cast<State*>(shared_memory());
    for (int side = 0; side < 2; ++side) {
        __syncthreads();
        shared[threadIdx.x] = sums[side];
        __syncthreads();
        if (this_row() == 0 && row.mine) use(side, shared + this_lane());
        __syncthreads();
        sums[side] = shared[threadIdx.x];
    }
}

// Leaves the tile's sums for the other tiles.
__device__ inline void exact_publish(const Problem& p, const Tile& t, const ExactRow& row, Phase phase,
                                     State (&sums)[2]) {
    const int rows = p.plan.rows;
    share_rows(row, sums, [&](int side, const State* of_rows) {
        State all = empty_state();
        for (int i = 0; i < rows; ++i) {
            all = merge(decayed(all, kRow * row.w), of_rows[(side == 0 ? i : rows - 1 - i) * kLanes]);
        }
        *tile_sums(p, t, phase, side) = all;
    });
}

// What the other tiles of the sequence send to this one from one side, where no kernel has added it up.
__device__ inline State exact_incoming(const Problem& p, const Tile& t, const ExactRow& row, Phase phase, int side) {
    State in = empty_state();
    Tile other = t;
    const int step = side == 0 ? 1 : -1;
    for (other.chunk = side == 0 ? 0 : p.plan.chunks - 1; other.chunk != t.chunk; other.chunk += step) {
        const Message* from = p.messages + sums_index(p, other, phase, side);
        Message x = look_for(from);
        while (x.kind == kMissing) x = look_for(from);
        __threadfence();
        const State sent = x.kind == kPlain ? State{x.base * kNats, x.x, x.y} : *tile_sums(p, other, phase, side);
        in = merge(decayed(in, p.chunk_tokens * row.w), sent);
    }
    return in;
}

// Turns the sums of each row into what all other rows of the sequence send: sums[0] from the left, sums[1] from the
// right.
__device__ inline void exact_exchange(const Problem& p, const Tile& t, const ExactRow& row, Phase phase,
                                      State (&sums)[2]) {
    const int rows = p.plan.rows;
    share_rows(row, sums, [&](int side, State* of_rows) {
        State in = p.plan.chunks == 1  ? empty_state()
                   : p.plan.blocks > 0 ? exact_incoming(p, t, row, phase, side)
                                       : *tile_sums(p, t, phase, side);
        for (int i = 0; i < rows; ++i) {
            State* place = of_rows + (side == 0 ? i : rows - 1 - i) * kLanes;
            const State own = *place;
            *place = in;
            in = merge(decayed(in, kRow * row.w), own);
        }
    });
}

__device__ inline ExactRow exact_row(const Problem& p, const Tile& t, unsigned lanes) {
    const double w = channel_parameter<double>(p, p.call.w, p.call.w_type, t.channel());
    const double u = channel_parameter<double>(p, p.call.u, p.call.u_type, t.channel());
    return {w, u, fmax(fabs(w) * p.tokens, fabs(u)),
            t.channel() < p.channels && has_lane(lanes) ? max(0, min(kRow, t.left())) : 0, has_lane(lanes)};
}

// y and the logarithm of its denominator, from the sums on both sides and the token itself.
__device__ inline double exact_output(const State& before, const State& after, const State& own, double* log_sum) {
    const State all = merge(merge(before, after), own);
    *log_sum = all.m + log(all.y);
    return all.x / all.y;
}

// exp(key + m), a token's share of a denominator that it is part of. Where keys, or the row's decays or bonus, are past
// 1e15, the last digit of m is more than 1, also where little is left of m: what does not cancel then must not become
// more than the whole. Sums that come from the fast path hold part of their size beside m, so below kRoughExponent,
// where no digits are missing and which that path keeps to, m + key may be above 0. NaN stays NaN.
constexpr double kRoughExponent = 1e12;
__device__ inline double share_of(const ExactRow& row, double key, double m) {
    const double exponent = key + m;
    return exp(exponent > 0 && fmax(fabs(key), row.largest) >= kRoughExponent ? 0 : exponent);
}

// What a token's key and value add to the sums. A key that is NaN makes the sums NaN: as an exponent it would be lost
// where the larger one counts.
template <typename T>
struct KeyValue {
    const T *k, *v;
    int64_t stride;

    __device__ State operator()(int j) const {
        const double key = to_real(k[j * stride]), value = to_real(v[j * stride]);
        return isnan(key) ? State{0, key, key} : State{key, value, 1};
    }
};

template <typename T>
__device__ inline KeyValue<T> key_value(const Problem& p, const Tile& t) {
    return {static_cast<const T*>(p.call.k) + row_offset(p, t), static_cast<const T*>(p.call.v) + row_offset(p, t),
            p.call.channels};
}

// The sums before and after each of a row's tokens, from what the other rows send.
template <typename Term>
__device__ inline void exact_scan(const ExactRow& row, Term term, const State (&sums)[2], State* before, State* after) {
    State from_left = sums[0], from_right = sums[1];
    for (int j = row.valid - 1; j >= 0; --j) {
        after[j] = from_right;
        from_right = merge(decayed(from_right, row.w), term(j));
    }
    for (int j = 0; j < row.valid; ++j) {
        before[j] = from_left;
        from_left = merge(decayed(from_left, row.w), term(j));
    }
}

// The functions below do the lanes of a tile whose bits are set; they are functions of their own so that the fast path
// keeps its registers.

template <typename T>
__device__ __noinline__ void exact_sums(const Problem& p, unsigned number, unsigned lanes) {
    const Tile t = locate(p, number);
    const ExactRow row = exact_row(p, t, lanes);
    State sums[2];
    row_sums(row, key_value<T>(p, t), sums);
    exact_publish(p, t, row, kForwardSums, sums);
    if (this_row() == 0 && row.mine) *tile_reference(p, t) = NAN;
}

template <typename T>
__device__ __noinline__ void exact_outputs(const Problem& p, unsigned number, unsigned lanes) {
    const Tile t = locate(p, number);
    const ExactRow row = exact_row(p, t, lanes);
    const KeyValue<T> term = key_value<T>(p, t);
    State sums[2], before[kRow], after[kRow];
    row_sums(row, term, sums);
    exact_exchange(p, t, row, kForwardSums, sums);
    exact_scan(row, term, sums, before, after);
    T* y = static_cast<T*>(p.call.y) + row_offset(p, t);
    const T* r = p.call.r ? static_cast<const T*>(p.call.r) + row_offset(p, t) : nullptr;
    for (int j = 0; j < row.valid; ++j) {
        const State own = term(j);
        double log_sum;
        const double value = exact_output(before[j], after[j], {own.m + row.u, own.x, own.y}, &log_sum);
        const double gate = r ? 1 / (1 + exp(-static_cast<double>(to_real(r[j * p.call.channels])))) : 1;
        store(y + j * p.call.channels, gate * value);
    }
}

// The forward again, and what its adjoint scan takes: keys -log_sum, sums of gy and -gy y (README.md).
template <typename T>
struct ExactAdjoint {
    State before[kRow], after[kRow], adjoint[kRow], sums[2];

    __device__ ExactAdjoint(const Problem& p, const Tile& t, const ExactRow& row) {
        const KeyValue<T> term = key_value<T>(p, t);
        row_sums(row, term, sums);
        exact_exchange(p, t, row, kForwardSums, sums);
        exact_scan(row, term, sums, before, after);
        const T* gy = static_cast<const T*>(p.call.gy) + row_offset(p, t);
        for (int j = 0; j < row.valid; ++j) {
            const State own = term(j);
            double log_sum;
            const double y = exact_output(before[j], after[j], {own.m + row.u, own.x, own.y}, &log_sum);
            const double g = to_real(gy[j * p.call.channels]);
            adjoint[j] = {-log_sum, g, -g * y};
        }
        row_sums(row, [this](int j) { return adjoint[j]; }, sums);
    }
};

template <typename T>
__device__ __noinline__ void exact_adjoint_sums(const Problem& p, unsigned number, unsigned lanes) {
    const Tile t = locate(p, number);
    const ExactRow row = exact_row(p, t, lanes);
    ExactAdjoint<T> x(p, t, row);
    exact_publish(p, t, row, kAdjointSums, x.sums);
}

template <typename T>
__device__ __noinline__ void exact_gradients(const Problem& p, unsigned number, unsigned lanes) {
    const Tile t = locate(p, number);
    const ExactRow row = exact_row(p, t, lanes);
    const KeyValue<T> term = key_value<T>(p, t);
    ExactAdjoint<T> x(p, t, row);
    exact_exchange(p, t, row, kAdjointSums, x.sums);
    State lefts[kRow], rights[kRow];
    exact_scan(row, [&](int j) { return x.adjoint[j]; }, x.sums, lefts, rights);
    const int64_t stride = p.call.channels;
    T* gk = static_cast<T*>(p.call.gk) + row_offset(p, t);
    T* gv = static_cast<T*>(p.call.gv) + row_offset(p, t);
    double gw = 0, gu = 0;
    for (int j = 0; j < row.valid; ++j) {
        const State &left = lefts[j], &right = rights[j], &before = x.before[j], &after = x.after[j], token = term(j);
        const double from_left = share_of(row, token.m, left.m), from_right = share_of(row, token.m, right.m);
        const double weight = share_of(row, token.m + row.u, x.adjoint[j].m), v = token.x;
        const double own = weight * (x.adjoint[j].x * v + x.adjoint[j].y);
        store(gv + j * stride, from_left * left.x + from_right * right.x + weight * x.adjoint[j].x);
        store(gk + j * stride, from_left * (left.x * v + left.y) + from_right * (right.x * v + right.y) + own);
        gu += own;
        gw -= share_of(row, before.m, right.m - row.w) * (before.x * right.x + before.y * right.y) +
              share_of(row, after.m, left.m - row.w) * (after.x * left.x + after.y * left.y);
    }
    store_partials(p, t, static_cast<SumType<T>>(gw), static_cast<SumType<T>>(gu), lanes);
}

}  // namespace bi_wkv
