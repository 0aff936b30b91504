// Eight elements at a time: a Pack of a computation type, float or double, and plain arithmetic on it. See simd.hpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "types.hpp"

namespace arraynorm::ARRAYNORM_ISA {

inline constexpr int lanes = 8;

#if defined(__AVX__)
inline constexpr int register_bytes = 32;
#else
inline constexpr int register_bytes = 16;
#endif

template <class E>
struct Pack {
    static_assert(std::is_same_v<E, float> || std::is_same_v<E, double>);
    using Element = E;
    static constexpr int width = register_bytes / sizeof(E);
    static constexpr int parts = lanes / width;
    typedef E Register __attribute__((vector_size(register_bytes)));
    typedef E Unaligned __attribute__((vector_size(register_bytes), aligned(alignof(E)), may_alias));
    Register part[parts];

    Pack() = default;
    [[gnu::always_inline]] explicit Pack(E value) {
        for (auto& p : part) p = value - Register{};
    }
};

// Everything below is inlined by force: a compiler that weighs the size of its callers leaves some of it out, and a
// pack then goes through memory on every call.

template <class E>
[[gnu::always_inline]] inline Pack<E> operator+(Pack<E> a, Pack<E> b) {
    for (int i = 0; i < Pack<E>::parts; ++i) a.part[i] += b.part[i];
    return a;
}
template <class E>
[[gnu::always_inline]] inline Pack<E> operator-(Pack<E> a, Pack<E> b) {
    for (int i = 0; i < Pack<E>::parts; ++i) a.part[i] -= b.part[i];
    return a;
}
template <class E>
[[gnu::always_inline]] inline Pack<E> operator*(Pack<E> a, Pack<E> b) {
    for (int i = 0; i < Pack<E>::parts; ++i) a.part[i] *= b.part[i];
    return a;
}

// max(a, 0), and NaN for NaN.
template <class E>
[[gnu::always_inline]] inline Pack<E> relu(Pack<E> a) {
    for (auto& p : a.part) p = p < 0 ? typename Pack<E>::Register{} : p;
    return a;
}

#if defined(__FMA__)
[[gnu::always_inline]] inline __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <class R>
[[gnu::always_inline]] inline R fused(R a, R b, R c) {
    return a * b + c;
}
#endif

// a * b + c, rounded once where the ISA level can.
template <class E>
[[gnu::always_inline]] inline Pack<E> fma(Pack<E> a, Pack<E> b, Pack<E> c) {
    for (int i = 0; i < Pack<E>::parts; ++i) c.part[i] = fused(a.part[i], b.part[i], c.part[i]);
    return c;
}

// -- conversions between the computation types ----------------------------------------------------------------

typedef float HalfOfFloats __attribute__((vector_size(register_bytes / 2)));

[[gnu::always_inline]] inline Pack<double> widened(const float* p) {
    Pack<double> r;
    for (int i = 0; i < Pack<double>::parts; ++i) {
#if defined(__AVX__)
        // GCC 12 makes six instructions of the conversion below
        r.part[i] = _mm256_cvtps_pd(_mm_loadu_ps(p + i * Pack<double>::width));
#else
        HalfOfFloats half;
        std::memcpy(&half, p + i * Pack<double>::width, sizeof half);
        r.part[i] = __builtin_convertvector(half, Pack<double>::Register);
#endif
    }
    return r;
}

[[gnu::always_inline]] inline Pack<double> widened(Pack<float> a) {
#if defined(__AVX__)
    Pack<double> r;
    r.part[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.part[0]));
    r.part[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.part[0], 1));
    return r;
#else
    return widened(reinterpret_cast<const float*>(&a));
#endif
}
[[gnu::always_inline]] inline Pack<double> widened(Pack<double> a) { return a; }

[[gnu::always_inline]] inline Pack<float> narrowed(Pack<double> a) {
    Pack<float> r;
#if defined(__AVX__)
    r.part[0] = _mm256_set_m128(_mm256_cvtpd_ps(a.part[1]), _mm256_cvtpd_ps(a.part[0]));
#else
    for (int i = 0; i < Pack<double>::parts; ++i) {
        HalfOfFloats half = __builtin_convertvector(a.part[i], HalfOfFloats);
        std::memcpy(reinterpret_cast<float*>(&r) + i * Pack<double>::width, &half, sizeof half);
    }
#endif
    return r;
}

template <class E, class F>
[[gnu::always_inline]] inline Pack<E> converted(Pack<F> a) {
    if constexpr (std::is_same_v<E, F>)
        return a;
    else if constexpr (std::is_same_v<E, double>)
        return widened(a);
    else
        return narrowed(a);
}

template <class E>
[[gnu::always_inline]] inline E first_lane(Pack<E> a) {
    return a.part[0][0];
}

// The sum of the eight elements, in double, always in the same order.
template <class E>
[[gnu::always_inline]] inline double sum(Pack<E> a) {
    const Pack<double> wide = widened(a);
#if defined(__AVX__)
    const __m256d fours = wide.part[0] + wide.part[1];
    const __m128d twos = _mm256_castpd256_pd128(fours) + _mm256_extractf128_pd(fours, 1);
    return twos[0] + twos[1];
#else
    double v[lanes];
    std::memcpy(v, &wide, sizeof v);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// -- bits -----------------------------------------------------------------------------------------------------

// Bit i is set where element i of what is stored as T is greater than 0: what is greater than half of T's least number.
template <class T, class E>
[[gnu::always_inline]] inline unsigned positive(Pack<E> a) {
    if constexpr (std::is_same_v<E, double> && !std::is_same_v<T, double>) {
        return positive<T>(narrowed(a));
    } else {
        const Pack<E> least(std::is_same_v<T, bfloat16> ? E(0x1p-134) : std::is_same_v<T, float16> ? E(0x1p-25) : 0);
        unsigned bits = 0;
#if defined(__AVX__)
        for (int i = 0; i < Pack<E>::parts; ++i) {
            if constexpr (std::is_same_v<E, float>)
                bits |= unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a.part[i], least.part[i], _CMP_GT_OQ))) << 8 * i;
            else
                bits |= unsigned(_mm256_movemask_pd(_mm256_cmp_pd(a.part[i], least.part[i], _CMP_GT_OQ))) << 4 * i;
        }
#elif defined(__x86_64__)
        for (int i = 0; i < Pack<E>::parts; ++i) {
            if constexpr (std::is_same_v<E, float>)
                bits |= unsigned(_mm_movemask_ps(_mm_cmpgt_ps(a.part[i], least.part[i]))) << 4 * i;
            else
                bits |= unsigned(_mm_movemask_pd(_mm_cmpgt_pd(a.part[i], least.part[i]))) << 2 * i;
        }
#else
        E v[lanes];
        std::memcpy(v, &a, sizeof v);
        for (int i = 0; i < lanes; ++i) bits |= unsigned(v[i] > least.part[0][0]) << i;
#endif
        return bits;
    }
}

// Element i of a where bit i is set, else 0.
template <class E>
[[gnu::always_inline]] inline Pack<E> where(unsigned bits, Pack<E> a) {
    using Mask = std::conditional_t<std::is_same_v<E, float>, int32_t, int64_t>;
    typedef Mask Masks __attribute__((vector_size(register_bytes)));
    constexpr int width = Pack<E>::width;
    for (int i = 0; i < Pack<E>::parts; ++i) {
        Masks place;
        for (int j = 0; j < width; ++j) place[j] = Mask(1) << (i * width + j);
        Masks chosen = (place & Mask(bits)) != 0;
        Masks value;
        std::memcpy(&value, &a.part[i], sizeof value);
        value &= chosen;
        std::memcpy(&a.part[i], &value, sizeof value);
    }
    return a;
}

}  // namespace arraynorm::ARRAYNORM_ISA
