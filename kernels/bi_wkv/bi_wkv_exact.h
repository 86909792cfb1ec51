// Bi-WKV of one channel of one sample, token by token in double with a running maximum: right for any finite input, but
// dozens of times slower than the vector code, which hands over what its number range does not hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bi_wkv/bi_wkv_args.h"

namespace vision_rwkv {

// a = sum_i exp(key_i - distance_i w - m) a_i and the same for b, with m the largest of the exponents.
struct ScaledSums {
    double m = -std::numeric_limits<double>::infinity(), a = 0, b = 0;

    // One more token between these sums and the reader.
    void decay(double w) { m -= w; }

    void add(double key, double new_a, double new_b) {
        if (key > m) {
            const double scale = std::exp(m - key);
            a = a * scale + new_a;
            b = b * scale + new_b;
            m = key;
        } else {  // also where a NaN came in, which spreads from here
            const double scale = std::exp(key - m);
            a += scale * new_a;
            b += scale * new_b;
        }
    }
};

template <typename Real>
class ExactChannel {
 public:
    ExactChannel(const BiWkvArgs<Real>& args, int64_t sample, int64_t channel)
        : args_(args),
          offset_(sample * args.tokens * args.channels + channel),
          w_(args.w[channel]),
          u_(args.u[channel]),
          before_(args.tokens),
          after_(args.tokens),
          y_(args.tokens),
          log_sum_(args.tokens) {}

    void forward() {
        scan([this](int64_t t) { return Term{at(args_.k, t), at(args_.v, t), 1.0}; }, before_, after_);
        for (int64_t t = 0; t < args_.tokens; ++t) {
            ScaledSums total = before_[t];
            merge(total, after_[t]);
            total.add(u_ + at(args_.k, t), at(args_.v, t), 1.0);
            y_[t] = total.a / total.b;
            log_sum_[t] = total.m + std::log(total.b);
        }
    }

    void write_y() {
        for (int64_t t = 0; t < args_.tokens; ++t) args_.y[offset_ + t * args_.channels] = static_cast<Real>(y_[t]);
    }

    // Writes gk and gv; returns this sample's part of the gradients of w and u.
    std::pair<double, double> backward() {
        forward();
        std::vector<ScaledSums> left(args_.tokens), right(args_.tokens);
        scan(
            [this](int64_t t) {
                const double g = at(args_.gy, t);
                return Term{-log_sum_[t], g, -g * y_[t]};
            },
            left, right);
        double gw = 0, gu = 0;
        for (int64_t t = 0; t < args_.tokens; ++t) {
            const double k = at(args_.k, t), v = at(args_.v, t), gy = at(args_.gy, t);
            const double own = share(u_ + k - log_sum_[t]) * gy;
            const double from_left = share(k + left[t].m), from_right = share(k + right[t].m);
            const double gv = from_left * left[t].a + from_right * right[t].a + own;
            const double gb = from_left * left[t].b + from_right * right[t].b - own * y_[t];
            args_.gv[offset_ + t * args_.channels] = static_cast<Real>(gv);
            args_.gk[offset_ + t * args_.channels] = static_cast<Real>(v * gv + gb);
            gu += own * (v - y_[t]);
            gw -= across(before_[t], right[t]) + across(after_[t], left[t]);
        }
        return {gw, gu};
    }

 private:
    struct Term {
        double key, a, b;
    };

    double at(const Real* x, int64_t t) const { return static_cast<double>(x[offset_ + t * args_.channels]); }

    // A token's share of a denominator that it is part of. Of exponents past 1e15 the last digit is more than 1: what
    // does not cancel then must not become more than the whole. NaN stays NaN.
    static double share(double exponent) { return std::exp(std::min(exponent, 0.0)); }

    double across(const ScaledSums& one, const ScaledSums& other) const {
        return share(one.m + other.m - w_) * (one.a * other.a + one.b * other.b);
    }

    static void merge(ScaledSums& sums, const ScaledSums& other) {
        if (other.b == 0) return;  // no token there; a NaN is not 0
        sums.add(other.m, other.a, other.b);
    }

    // The sums over the tokens before each token, and over those after it.
    template <typename TermAt>
    void scan(const TermAt& term_at, std::vector<ScaledSums>& before, std::vector<ScaledSums>& after) const {
        ScaledSums sums;
        for (int64_t t = 0; t < args_.tokens; ++t) {
            before[t] = sums;
            step(sums, term_at(t));
        }
        sums = {};
        for (int64_t t = args_.tokens - 1; t >= 0; --t) {
            after[t] = sums;
            step(sums, term_at(t));
        }
    }

    void step(ScaledSums& sums, const Term& term) const {
        sums.decay(w_);
        sums.add(term.key, term.a, term.b);
    }

    const BiWkvArgs<Real>& args_;
    const int64_t offset_;
    const double w_, u_;
    std::vector<ScaledSums> before_, after_;
    std::vector<double> y_, log_sum_;
};

}  // namespace vision_rwkv
