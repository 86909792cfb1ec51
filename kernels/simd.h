// Vectors of VRWKV_VECTOR_BYTES bytes by the vector extensions of GCC and Clang, which compile for any processor.
// No include guard: simd_variants.h includes this file once for each vector width, each time inside a namespace of its
// own and under that width's target options. So nothing here may be called through another width's namespace.

#define VRWKV_INLINE inline __attribute__((always_inline))

template <typename Real>
struct SimdOf;

template <>
struct SimdOf<float> {
    typedef float Vec __attribute__((vector_size(VRWKV_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(VRWKV_VECTOR_BYTES), aligned(4), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(VRWKV_VECTOR_BYTES)));
    typedef int32_t Mask __attribute__((vector_size(VRWKV_VECTOR_BYTES)));
};

template <>
struct SimdOf<double> {
    typedef double Vec __attribute__((vector_size(VRWKV_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(VRWKV_VECTOR_BYTES), aligned(8), may_alias));
    typedef uint64_t Bits __attribute__((vector_size(VRWKV_VECTOR_BYTES)));
    typedef int64_t Mask __attribute__((vector_size(VRWKV_VECTOR_BYTES)));
};

template <typename Real>
using Vec = typename SimdOf<Real>::Vec;
template <typename Real>
using Mask = typename SimdOf<Real>::Mask;

template <typename Real>
constexpr int kLanes = VRWKV_VECTOR_BYTES / sizeof(Real);

template <typename Real>
VRWKV_INLINE Vec<Real> load(const Real* p) {
    return *reinterpret_cast<const typename SimdOf<Real>::Unaligned*>(p);
}

template <typename Real>
VRWKV_INLINE void store(Real* p, Vec<Real> x) {
    *reinterpret_cast<typename SimdOf<Real>::Unaligned*>(p) = x;
}

template <typename Real>
VRWKV_INLINE Vec<Real> splat(Real x) {
    return x - Vec<Real>{};  // x - 0 and not 0 + x: the compiler may drop it, also for x = -0
}

// The first `count` lanes; the others are 0 and stay unwritten.
template <typename Real>
VRWKV_INLINE Vec<Real> load_first(const Real* p, int count) {
    Vec<Real> x{};
    for (int i = 0; i < count; ++i) x[i] = p[i];
    return x;
}

template <typename Real>
VRWKV_INLINE void store_first(Real* p, Vec<Real> x, int count) {
    for (int i = 0; i < count; ++i) p[i] = x[i];
}

// The larger one; b where either is NaN.
template <typename V>
VRWKV_INLINE V max(V a, V b) {
    return a > b ? a : b;
}

template <typename V>
VRWKV_INLINE V min(V a, V b) {
    return a < b ? a : b;
}

template <typename M>
VRWKV_INLINE bool all(M mask) {
    bool result = true;
    for (size_t i = 0; i < sizeof(M) / sizeof(mask[0]); ++i) result &= mask[i] != 0;
    return result;
}

template <typename Real>
VRWKV_INLINE Real sum(Vec<Real> x) {
    Real lanes[kLanes<Real>];
    store(lanes, x);
    for (int half = kLanes<Real> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// exp(x) to 1e-7 relative: 2^n exp(r) with |r| <= ln(2)/2, the polynomial of Cephes' expf. 0 below the smallest normal
// number, the largest finite numbers above x = 88.72, NaN stays NaN.
VRWKV_INLINE Vec<float> exp(Vec<float> x) {
    using Bits = SimdOf<float>::Bits;
    const Vec<float> top = splat(88.72f);
    const Vec<float> bounded = x > top ? top : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const Vec<float> shifted = bounded * 1.44269504f + round;
    const Vec<float> n = shifted - round;
    Vec<float> r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const Vec<float> result = (Vec<float>)((Bits)p + ((Bits)shifted << 23));
    return x < -87.33654f ? Vec<float>{} : result;
}

VRWKV_INLINE Vec<double> exp(Vec<double> x) {
    Vec<double> result;
    for (int i = 0; i < kLanes<double>; ++i) result[i] = std::exp(x[i]);
    return result;
}

// ln(2) times the binary exponent of a positive normal x: ln(x) to within 0.7 below.
VRWKV_INLINE Vec<float> log_floor(Vec<float> x) {
    using Bits = SimdOf<float>::Bits;
    const Bits exponent = (Bits)x >> 23;
    return (__builtin_convertvector((Mask<float>)exponent, Vec<float>) - 127.0f) * 0.693147181f;
}

VRWKV_INLINE Vec<double> log_floor(Vec<double> x) {
    Vec<double> result;
    for (int i = 0; i < kLanes<double>; ++i) result[i] = std::log(x[i]);
    return result;
}
