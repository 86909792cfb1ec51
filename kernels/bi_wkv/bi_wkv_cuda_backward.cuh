// The backward kernels. Names: e = exp(k), a = gy / denominator, b = -a y; README.md has the formulas.
#pragma once

#include "bi_wkv/bi_wkv_cuda_forward.cuh"

namespace bi_wkv {

// Gradients of w and u. A pair of tokens counts in gw once for each token between them. That number is split: the left
// token counts those behind it in its row, the right one those before it in its row less kRow, each border between rows
// kRow. So sums over tokens and over borders, not pairs, give gw, and nothing larger than 2 kRow cancels.
struct ParameterSums {
    float w, u;
};

// Outputs aside, all of the forward again, from what the other rows send; turns g, the gradients of y, into a, and
// gives b, their sums as seen right behind and right before the row, and what the row itself and those right of it send
// to the left in *before_row.
__device__ inline void token_adjoints(const Channel& channel, const float (&e)[kRow], float (&v)[kRow], Pair left,
                                      Pair right, float (&g)[kRow], float (&b)[kRow], Pair (&sums)[2], Pair* before_row,
                                      ParameterSums* grads) {
    Pair kept[kRow / kGroup];
#pragma unroll
    for (int q = kRow / kGroup - 1; q >= 0; --q) {
        kept[q] = right;
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) {
            const int i = q * kGroup + j;
            absorb(right, channel.decay, e[i] * v[i], e[i]);
        }
    }
    make_new(v);
    *before_row = right;
    sums[0] = {0, 0};
#pragma unroll
    for (int q = 0; q < kRow / kGroup; ++q) {
        Pair after[kGroup];
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) {
            const int i = q * kGroup + j;
            after[j] = kept[q];
            absorb(kept[q], channel.decay, e[i] * v[i], e[i]);
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const int i = q * kGroup + j;
            const float ev = e[i] * v[i];
            const float numerator = fmaf(channel.own, ev, left.x + after[j].x);
            const float denominator = fmaf(channel.own, e[i], left.y + after[j].y);
            const float inverse = fast_reciprocal(fmaxf(denominator, kTiny));
            g[i] *= inverse;
            b[i] = -g[i] * (numerator * inverse);
            grads->w = fmaf(2 * kRow - 1 - 2 * i, fmaf(g[i], left.x, b[i] * left.y), grads->w);
            absorb(sums[0], channel.decay, g[i], b[i]);
            absorb(left, channel.decay, ev, e[i]);
        }
    }
    sums[1] = {0, 0};
#pragma unroll
    for (int i = kRow - 1; i >= 0; --i) absorb(sums[1], channel.decay, g[i], b[i]);
}

// gk and gv, left in e and v, from the adjoint sums that the other rows send; returns what this row and those right of
// it send to the left.
__device__ inline Pair key_value_gradients(const Channel& channel, float (&e)[kRow], float (&v)[kRow], Pair left,
                                           Pair right, const float (&a)[kRow], const float (&b)[kRow],
                                           ParameterSums* grads) {
    Pair kept[kRow / kGroup];
#pragma unroll
    for (int q = kRow / kGroup - 1; q >= 0; --q) {
        kept[q] = right;
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) absorb(right, channel.decay, a[q * kGroup + j], b[q * kGroup + j]);
    }
#pragma unroll
    for (int q = 0; q < kRow / kGroup; ++q) {
        Pair after[kGroup];
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) {
            after[j] = kept[q];
            absorb(kept[q], channel.decay, a[q * kGroup + j], b[q * kGroup + j]);
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const int i = q * kGroup + j;
            const float from_left = fmaf(v[i], left.x, left.y), from_right = fmaf(v[i], after[j].x, after[j].y);
            const float from_own = fmaf(v[i], a[i], b[i]), bonus = channel.own * from_own;
            const float weighted = fmaf(kRow - i, from_left, (kRow - 1 - i) * (bonus - from_right));
            grads->w = fmaf(e[i], weighted, grads->w);
            grads->u = fmaf(e[i], from_own, grads->u);
            v[i] = e[i] * fmaf(channel.own, a[i], left.x + after[j].x);
            e[i] *= from_left + from_right + bonus;
            absorb(left, channel.decay, a[i], b[i]);
        }
    }
    return right;
}

// A row in hand, up to its tokens' adjoints.
struct AdjointRow {
    float e[kRow], v[kRow], a[kRow], b[kRow], reference;
    Pair in[2], adjoint[2], before_row, received;  // in: what other rows send; adjoint: what this one sends
    ParameterSums grads = {0, 0};

    template <typename T, Others kOthers, typename AfterSharing>
    __device__ void receive(const Problem& p, const Tile& t, const Channel& channel, unsigned turn,
                            AfterSharing after) {
        const auto read_more = [&](const auto& copies) { read_row(copies.staged(turn, 2), a); };
        bi_wkv::receive<T, 3, kOthers, true>(p, t, channel, turn, e, v, &reference, in, read_more, after);
    }

    // The adjoints, from what the other rows send, and their sums, where the other rows find them.
    __device__ void share_adjoints(const Problem& p, const Channel& channel) {
        token_adjoints(channel, e, v, in[0], in[1], a, b, adjoint, &before_row, &grads);
        const bool in_range = within(adjoint[0], kLargestAdjoint) && within(adjoint[1], kLargestAdjoint);
        received = share(p, kAdjointSums, channel.row_decay, adjoint, in_range);
    }
};

// The sums of the adjoints that each tile leaves for the others.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads<true>, 4) adjoint_sums_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, unsigned turn, const Resume&, auto next) -> int {
        AdjointRow x;
        x.receive<T, kForward>(p, t, channel, turn, next);
        x.share_adjoints(p, channel);
        if (this_row() < 2) publish(p, t, kAdjointSums, channel.row_decay, -x.reference);
        return kDone;
    };
    for_each_tile<T, 3, true>(
        p, [&](auto channel, auto copies) { begin_alone(p, channel, copies); }, fast,
        [&](unsigned i, unsigned lanes, int) { exact_adjoint_sums<T>(p, i, lanes); });
}

// The second half of gradient_kernel, with x.adjoint what the other rows send.
template <typename T>
__device__ inline void finish_gradients(const Problem& p, const Tile& t, const Channel& channel, AdjointRow& x) {
    const Pair left = x.adjoint[0];
    const Pair before_row = key_value_gradients(channel, x.e, x.v, left, x.adjoint[1], x.a, x.b, &x.grads);
    const float over_border =
        fmaf(left.x, x.before_row.x, left.y * x.before_row.y) + fmaf(before_row.x, x.in[0].x, before_row.y * x.in[0].y);
    write_row<T>(p.call.gk, p, t, x.e);
    write_row<T>(p.call.gv, p, t, x.v);
    store_partials(p, t, x.grads.w - kRow * over_border, channel.own * x.grads.u, kAllLanes);
}

template <typename T, bool kMany>
__global__ void __launch_bounds__(kMaxThreads<kMany>, kMany ? 4 : 2)
    gradient_kernel(const __grid_constant__ Problem p) {
    const auto fast = [&](const Tile& t, const Channel& channel, unsigned turn, const Resume&, auto next) -> int {
        AdjointRow x;
        x.receive<T, kMany ? kBoth : kNone>(p, t, channel, turn, next);
        x.share_adjoints(p, channel);
        Pair beyond[2] = {};
        if constexpr (kMany) beyond[0] = incoming(p, kAdjointSums, 0), beyond[1] = incoming(p, kAdjointSums, 1);
        gather_rows(p, kAdjointSums, channel.row_decay, x.received, beyond, x.adjoint);
        finish_gradients<T>(p, t, channel, x);
        return kDone;
    };
    // The other way round than adjoint_sums_kernel, whose last tiles are still in the L2 cache.
    for_each_tile<T, 3, false>(
        p, [&](auto channel, auto copies) { begin_alone(p, channel, copies); }, fast,
        [&](unsigned i, unsigned lanes, int) { exact_gradients<T>(p, i, lanes); });
}

// gw and gu: the sum of the tiles' partial sums, in a fixed order. A block serves one slice; a group of its threads has
// one thread for each partial sum of a tile.
constexpr int kReduceWidth = 2 * kLanes, kReduceGroups = 16;

template <typename T>
__global__ void __launch_bounds__(kReduceWidth* kReduceGroups) reduce_kernel(const __grid_constant__ Problem p) {
    __shared__ double sums[kReduceWidth * kReduceGroups];
    const int64_t parts = p.call.batch * p.plan.chunks;
    const int place = threadIdx.x % kReduceWidth, group = threadIdx.x / kReduceWidth;
    const SumType<T>* partials =
        static_cast<const SumType<T>*>(p.partials) + blockIdx.x * int64_t(kReduceWidth) + place;
    wait_for_previous_kernel();
    double sum = 0;
#pragma unroll 8
    for (int64_t part = group; part < parts; part += kReduceGroups) {
        sum += partials[part * p.plan.slices * kReduceWidth];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    const int64_t channel = blockIdx.x * int64_t(kLanes) + place % kLanes;
    if (group == 0 && channel < p.call.channels) {
        sum = 0;
        for (int g = 0; g < kReduceGroups; ++g) sum += sums[g * kReduceWidth + place];
        if (p.call.over_tokens) sum /= static_cast<double>(p.tokens);
        const bool is_w = place < kLanes;
        store_parameter(is_w ? p.call.gw : p.call.gu, is_w ? p.call.w_type : p.call.u_type, channel, sum);
    }
}

}  // namespace bi_wkv
