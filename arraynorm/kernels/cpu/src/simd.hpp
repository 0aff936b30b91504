// Eight elements at a time: a Pack of a computation type (float or double), loaded from and stored to any of the four
// storage types, and 8-bit integers. The only file that knows of registers; everything above it is plain arithmetic on
// packs.
//
// Compiled once per ISA level, in a namespace of its own (ARRAYNORM_ISA). Registers are GCC and Clang vector types,
// which exist on every architecture; intrinsics stand only where those have no words, or GCC makes much of few: fused
// multiply-add, conversions, stores that bypass the cache, parts of packs, and collecting signs into bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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

// -- the two 16-bit formats -----------------------------------------------------------------------------------

typedef uint16_t Bits16 __attribute__((vector_size(16)));
typedef uint32_t Bits32 __attribute__((vector_size(32)));

// -Wpsabi warns that such a value would be passed in another way without AVX; nothing here is passed between ISA
// levels.
#if defined(__AVX2__)
// As instructions: GCC 12 takes the conversions of vectors below apart, element by element.
[[gnu::always_inline]] inline Pack<float> from_storage(const bfloat16* p) {
    // Each half of the register takes four of the eight that both have: a load and a shuffle, where to widen and to
    // shift would be a load and two.
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    Pack<float> r;
    r.part[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(both, places));
    return r;
}

// The upper halves, rounded to nearest, ties to even; the lower halves are left over. Of a NaN the lower half must be
// zero, or a carry out of it could make it zero or infinity: it comes from a bfloat16, from arithmetic, or from a
// parameter by way of `quiet`.
[[gnu::always_inline]] inline __m256i rounded_above(Pack<float> a) {
    const __m256i bits = _mm256_castps_si256(a.part[0]);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
[[gnu::always_inline]] inline __m256i upper_halves(Pack<float> a) { return _mm256_srli_epi32(rounded_above(a), 16); }
[[gnu::always_inline]] inline Bits16 to_bits(bfloat16, Pack<float> a) {
    const __m256i halves = upper_halves(a);
    return reinterpret_cast<Bits16>(
        _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
[[gnu::always_inline]] inline __m256i to_bits(bfloat16, Pack<float> a, Pack<float> b) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(upper_halves(a), upper_halves(b)), 0b11'01'10'00);
}
#else
[[gnu::always_inline]] inline Pack<float> from_storage(const bfloat16* p) {
    Bits16 bits;
    std::memcpy(&bits, p, sizeof bits);
    Bits32 wide = __builtin_convertvector(bits, Bits32) << 16;
    Pack<float> r;
    std::memcpy(&r, &wide, sizeof r);
    return r;
}

// See above.
[[gnu::always_inline]] inline Bits16 to_bits(bfloat16, Pack<float> a) {
    Bits32 bits;
    std::memcpy(&bits, &a, sizeof bits);
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Bits16);
}
#endif

#if defined(__F16C__)
[[gnu::always_inline]] inline Pack<float> from_storage(const float16* p) {
    Pack<float> r;
    r.part[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return r;
}
[[gnu::always_inline]] inline Bits16 to_bits(float16, Pack<float> a) {
    return reinterpret_cast<Bits16>(_mm256_cvtps_ph(a.part[0], _MM_FROUND_TO_NEAREST_INT));
}
#if defined(__AVX2__)
[[gnu::always_inline]] inline __m256i to_bits(float16, Pack<float> a, Pack<float> b) {
    return _mm256_set_m128i(_mm256_cvtps_ph(b.part[0], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(a.part[0], _MM_FROUND_TO_NEAREST_INT));
}
#endif
#else
// Not inlined: where there are no instructions, eight conversions are some hundred, and take a compiler minutes.
[[gnu::noinline]] inline void widen(const float16* p, float* v) {
    for (int i = 0; i < lanes; ++i) v[i] = to_float(p[i]);
}
[[gnu::noinline]] inline void narrow(const float* v, uint16_t* bits) {
    for (int i = 0; i < lanes; ++i) bits[i] = to_float16(v[i]).bits;
}
[[gnu::always_inline]] inline Pack<float> from_storage(const float16* p) {
    float v[lanes];
    widen(p, v);
    Pack<float> r;
    std::memcpy(&r, v, sizeof r);
    return r;
}
[[gnu::always_inline]] inline Bits16 to_bits(float16, Pack<float> a) {
    float v[lanes];
    std::memcpy(v, &a, sizeof v);
    uint16_t stored[lanes];
    narrow(v, stored);
    Bits16 bits;
    std::memcpy(&bits, stored, sizeof bits);
    return bits;
}
#endif

// -- 8-bit integers -------------------------------------------------------------------------------------------

template <class Q>
inline constexpr bool is_level = std::is_same_v<Q, uint8_t> || std::is_same_v<Q, int8_t>;

template <class Q, std::enable_if_t<is_level<Q>, int> = 0>
[[gnu::always_inline]] inline Pack<float> from_storage(const Q* p) {
    Pack<float> r;
#if defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    r.part[0] = _mm256_cvtepi32_ps(std::is_signed_v<Q> ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    float v[lanes];
    for (int i = 0; i < lanes; ++i) v[i] = float(p[i]);
    std::memcpy(&r, v, sizeof r);
#endif
    return r;
}

// The integers next to a, half to even, but not below `least`; plus zero_point, and clamped to what Q holds. NaN gives
// the smallest. Four packs, for the last steps of one would leave most of a register empty.
template <class Q>
[[gnu::always_inline]] inline void store_levels(Q* p, const Pack<float> (&a)[4], int16_t least, int16_t zero_point) {
#if defined(__AVX2__)
    __m256i half[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i both =
            _mm256_packs_epi32(_mm256_cvtps_epi32(a[2 * i].part[0]), _mm256_cvtps_epi32(a[2 * i + 1].part[0]));
        half[i] = _mm256_adds_epi16(_mm256_max_epi16(both, _mm256_set1_epi16(least)), _mm256_set1_epi16(zero_point));
    }
    const __m256i mixed =  // the first half of each pack, then the second halves
        std::is_signed_v<Q> ? _mm256_packs_epi16(half[0], half[1]) : _mm256_packus_epi16(half[0], half[1]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(mixed, order));
#elif defined(__x86_64__)
    __m128i v[4];
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm_packs_epi32(_mm_cvtps_epi32(a[i].part[0]), _mm_cvtps_epi32(a[i].part[1]));
        v[i] = _mm_adds_epi16(_mm_max_epi16(v[i], _mm_set1_epi16(least)), _mm_set1_epi16(zero_point));
    }
    for (int i = 0; i < 2; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, std::is_signed_v<Q>
                                                                ? _mm_packs_epi16(v[2 * i], v[2 * i + 1])
                                                                : _mm_packus_epi16(v[2 * i], v[2 * i + 1]));
#else
    constexpr int smallest = std::numeric_limits<Q>::min(), largest = std::numeric_limits<Q>::max();
    const float lowest = std::max<int>(least, smallest - zero_point), highest = largest - zero_point;
    for (int i = 0; i < 4; ++i) {
        float v[lanes];
        std::memcpy(v, &a[i], sizeof v);
        for (int k = 0; k < lanes; ++k) {
            const float level = v[k] > lowest ? std::nearbyint(v[k]) : lowest;
            p[i * lanes + k] = Q(int(level < highest ? level : highest) + zero_point);
        }
    }
#endif
}

// -- load and store -------------------------------------------------------------------------------------------

// Eight elements from p.
template <class E, class T>
[[gnu::always_inline]] inline Pack<E> load(const T* p) {
    if constexpr (std::is_same_v<E, T>) {
        Pack<E> r;
        for (int i = 0; i < Pack<E>::parts; ++i)
            r.part[i] = *reinterpret_cast<const typename Pack<E>::Unaligned*>(p + i * Pack<E>::width);
        return r;
    } else if constexpr (std::is_same_v<T, float>) {
        return widened(p);
    } else if constexpr (std::is_same_v<E, float>) {
        return from_storage(p);
    } else {
        Pack<float> single = from_storage(p);
        return widened(reinterpret_cast<const float*>(&single));
    }
}

// -1 eight times, then 0: from 8 - n on, a mask of the first n lanes.
template <class Integer>
inline constexpr Integer first_lanes[2 * lanes] = {-1, -1, -1, -1, -1, -1, -1, -1};

// The first n lanes of a, 0 <= n <= 8, then zeros.
template <class E>
[[gnu::always_inline]] inline Pack<E> first_of(Pack<E> a, int64_t n) {
    using Integer = std::conditional_t<std::is_same_v<E, float>, int32_t, int64_t>;
    typedef Integer Mask __attribute__((vector_size(register_bytes)));
    for (int i = 0; i < Pack<E>::parts; ++i) {
        Mask mask;
        std::memcpy(&mask, first_lanes<Integer> + lanes - n + i * Pack<E>::width, sizeof mask);
        a.part[i] = reinterpret_cast<typename Pack<E>::Register>(reinterpret_cast<Mask>(a.part[i]) & mask);
    }
    return a;
}

// Some elements of T, 0 < n <= 8, to and from eight. Without a call of memcpy, which costs what ten packs do, and
// where that helps without many small stores before a large load, for which a processor waits.
template <class T>
[[gnu::always_inline]] inline void gather(T (&all)[lanes], const T* p, int64_t n) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_lanes<int32_t> + lanes - n));
        const __m256 some = _mm256_maskload_ps(reinterpret_cast<const float*>(p), mask);
        const __m256 fill = _mm256_loadu_ps(reinterpret_cast<const float*>(all));
        const __m256 chosen = _mm256_blendv_ps(fill, some, _mm256_castsi256_ps(mask));
        std::memcpy(all, &chosen, sizeof chosen);
    } else if constexpr (sizeof(T) == 8) {
        for (int i = 0; i < 2; ++i) {
            const auto* masks = reinterpret_cast<const __m256i*>(first_lanes<int64_t> + lanes - n + 4 * i);
            const __m256i mask = _mm256_loadu_si256(masks);
            const __m256d some = _mm256_maskload_pd(reinterpret_cast<const double*>(p) + 4 * i, mask);
            const __m256d fill = _mm256_loadu_pd(reinterpret_cast<const double*>(all) + 4 * i);
            const __m256d chosen = _mm256_blendv_pd(fill, some, _mm256_castsi256_pd(mask));
            std::memcpy(all + 4 * i, &chosen, sizeof chosen);
        }
    } else {
        static_assert(sizeof(T) == 2);
        auto some = [p](auto bits, int64_t from) {
            std::memcpy(&bits, p + from, sizeof bits);
            return bits;
        };
        // the last four, or two, of those that there are, moved down to where they begin
        uint64_t low, high = 0;
        if (n >= 4) {
            low = some(uint64_t(), 0);
            if (n > 4) high = some(uint64_t(), n - 4) >> 16 * (8 - n);
        } else if (n >= 2) {
            low = some(uint32_t(), 0);
            if (n > 2) low |= uint64_t(some(uint32_t(), n - 2) >> 16 * (4 - n)) << 32;
        } else {
            low = some(uint16_t(), 0);
        }
        const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first_lanes<int16_t> + lanes - n));
        const __m128i fill = _mm_loadu_si128(reinterpret_cast<const __m128i*>(all));
        const __m128i chosen = _mm_blendv_epi8(fill, _mm_set_epi64x(int64_t(high), int64_t(low)), mask);
        std::memcpy(all, &chosen, sizeof chosen);
    }
#else
    std::memcpy(all, p, n * sizeof(T));
#endif
}

template <class T>
[[gnu::always_inline]] inline void scatter(T* p, const T (&all)[lanes], int64_t n) {
    if (n & 8) return void(std::memcpy(p, all, sizeof all));
    const T* from = all;
    if (n & 4) std::memcpy(p, from, 4 * sizeof(T)), p += 4, from += 4;
    if (n & 2) std::memcpy(p, from, 2 * sizeof(T)), p += 2, from += 2;
    if (n & 1) std::memcpy(p, from, sizeof(T));
}

// The first n elements from p, 0 < n <= 8, then `fill`.
template <class E, class T>
[[gnu::always_inline]] inline Pack<E> load(const T* p, int64_t n, T fill = T{}) {
    T some[lanes] = {fill, fill, fill, fill, fill, fill, fill, fill};
    gather(some, p, n);
    return load<E>(some);
}

// What is stored of a pack: eight elements of T.
template <class T, class E>
[[gnu::always_inline]] inline auto rounded(Pack<E> a) {
    if constexpr (std::is_same_v<T, E>)
        return a;
    else if constexpr (std::is_same_v<T, float>)
        return narrowed(a);
    else if constexpr (std::is_same_v<E, float>)
        return to_bits(T{}, a);
    else
        return to_bits(T{}, narrowed(a));
}

template <class T, class E>
[[gnu::always_inline]] inline void store(T* p, Pack<E> a) {
    auto r = rounded<T>(a);
    if constexpr (sizeof(T) == 2)
        std::memcpy(p, &r, sizeof r);
    else
        for (int i = 0; i < decltype(r)::parts; ++i)
            *reinterpret_cast<typename Pack<T>::Unaligned*>(p + i * Pack<T>::width) = r.part[i];
}

template <class T, class E>
[[gnu::always_inline]] inline void store(T* p, Pack<E> a, int64_t n) {
    auto r = rounded<T>(a);
    T all[lanes];
    std::memcpy(all, &r, sizeof all);
    scatter(p, all, n);
}

// Bypasses the cache; p must be aligned to 32 bytes (16 for the 16-bit formats), or to as many as said.
template <int alignment = register_bytes, class T, class E>
[[gnu::always_inline]] inline void stream(T* p, Pack<E> a) {
#if defined(__x86_64__)
    auto r = rounded<T>(a);
    constexpr int bytes = std::min<int>(sizeof r, alignment);
    for (size_t i = 0; i < sizeof r / bytes; ++i) {
        const char* from = reinterpret_cast<const char*>(&r) + i * bytes;
        char* to = reinterpret_cast<char*>(p) + i * bytes;
#if defined(__AVX__)
        if constexpr (bytes == 32) {
            __m256i v;
            std::memcpy(&v, from, 32);
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v);
            continue;
        }
#endif
        __m128i v;
        std::memcpy(&v, from, 16);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), v);
    }
#else
    store(p, a);
#endif
}

// The first n elements, 0 < n <= 8. Where the rest of their cache line is streamed too, by this thread and soon, it
// goes to memory whole; an ordinary store there would first fetch it, and every streamed one would wait for that.
template <class T, class E>
[[gnu::always_inline]] inline void stream(T* p, Pack<E> a, int64_t n) {
#if defined(__x86_64__)
    auto r = rounded<T>(a);
    char all[sizeof r];
    std::memcpy(all, &r, sizeof all);
    char* to = reinterpret_cast<char*>(p);
    int64_t i = 0;
    for (; i + 4 <= n * int64_t(sizeof(T)); i += 4) {
        int32_t four;
        std::memcpy(&four, all + i, sizeof four);
        _mm_stream_si32(reinterpret_cast<int32_t*>(to + i), four);
    }
    if (sizeof(T) == 2 && n % 2) {
        int16_t two;
        std::memcpy(&two, all + i, sizeof two);
        // within 16 aligned bytes: this faults for bytes that it does not write, too, should they be another page's
        const uintptr_t place = reinterpret_cast<uintptr_t>(to + i);
        const __m128i chosen = _mm_cmpeq_epi16(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7), _mm_set1_epi16(place % 16 / 2));
        _mm_maskmoveu_si128(_mm_set1_epi16(two), chosen, reinterpret_cast<char*>(place - place % 16));
    }
#else
    store(p, a, n);
#endif
}

#if defined(__AVX2__)
template <class T>
[[gnu::always_inline]] inline void put_stored(T* p, __m256i stored, std::true_type) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), stored);
}
template <class T>
[[gnu::always_inline]] inline void put_stored(T* p, __m256i stored, std::false_type) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), stored);
}
#endif

// Whether two packs are stored at less expense together. Of float16 each conversion stores by itself.
template <class T>
#if defined(__AVX2__)
inline constexpr bool is_stored_by_twos = std::is_same_v<T, bfloat16>;
#else
inline constexpr bool is_stored_by_twos = false;
#endif

// Two packs side by side, streamed or not. If they are, p must be aligned to 32 bytes, for the 16-bit formats too.
template <class T, class E, class Streams>
[[gnu::always_inline]] inline void put(T* p, Pack<E> a, Pack<E> b, Streams) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 2 && (Streams::value || is_stored_by_twos<T>)) {
        if constexpr (std::is_same_v<E, float>)
            return put_stored(p, to_bits(T{}, a, b), Streams{});
        else
            return put(p, narrowed(a), narrowed(b), Streams{});
    }
#endif
    if constexpr (Streams::value)
        stream(p, a), stream(p + lanes, b);
    else
        store(p, a), store(p + lanes, b);
}

// -- pairs ----------------------------------------------------------------------------------------------------

// Sixteen elements of a 16-bit format. As they are stored they fill a register, which is taken apart and put together
// again at less expense if it need not be in their order: bfloat16's lower and upper halves of 32 bits, to which zeros
// are added below. So what is done to a pair must be the same for all elements.
struct Two {};  // a pair, where a number of elements may stand
template <int half>
struct Half {};  // one of the packs that a pair is taken apart into

template <class T>
#if defined(__AVX2__)
inline constexpr bool has_pairs = sizeof(T) == 2;
#else
inline constexpr bool has_pairs = false;
#endif

template <class E>
struct Pair {
    Pack<E> half[2];
};

// Whether two packs of T in E cost more than a pair: float16's conversions are the same for both.
template <class T, class E>
inline constexpr bool is_cheaper_as_pair = has_pairs<T> && std::is_same_v<T, bfloat16> && std::is_same_v<E, float>;

template <class E>
[[gnu::always_inline]] inline Pair<E> operator-(Pair<E> a, Pack<E> b) {
    return {a.half[0] - b, a.half[1] - b};
}
template <class E>
[[gnu::always_inline]] inline Pair<E> operator*(Pair<E> a, Pack<E> b) {
    return {a.half[0] * b, a.half[1] * b};
}
template <class E>
[[gnu::always_inline]] inline Pair<E> fma(Pair<E> a, Pack<E> b, Pack<E> c) {
    return {fma(a.half[0], b, c), fma(a.half[1], b, c)};
}
template <class E>
[[gnu::always_inline]] inline Pair<E> fma(Pair<E> a, Pack<E> b, Pair<E> c) {
    return {fma(a.half[0], b, c.half[0]), fma(a.half[1], b, c.half[1])};
}
#if defined(__AVX2__)
template <class T>
[[gnu::always_inline]] inline __m256i load_stored(const T* p, Two) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Of bfloat16.
[[gnu::always_inline]] inline Pack<float> half_of(__m256i stored, Half<0>) {
    Pack<float> r;
    r.part[0] = _mm256_castsi256_ps(_mm256_slli_epi32(stored, 16));
    return r;
}
[[gnu::always_inline]] inline Pack<float> half_of(__m256i stored, Half<1>) {
    Pack<float> r;
    r.part[0] = _mm256_castsi256_ps(_mm256_and_si256(stored, _mm256_set1_epi32(int(0xffff0000))));
    return r;
}
template <class E, class T, int half>
[[gnu::always_inline]] inline Pack<E> load(const T* p, Half<half> which) {
    return half_of(load_stored(p, Two{}), which);
}

template <class E, class T>
[[gnu::always_inline]] inline Pair<E> pair_of(T, __m256i stored) {
    if constexpr (is_cheaper_as_pair<T, E>) {
        return {half_of(stored, Half<0>{}), half_of(stored, Half<1>{})};
    } else {
        T all[2 * lanes];
        std::memcpy(all, &stored, sizeof all);
        return {load<E>(all), load<E>(all + lanes)};
    }
}
template <class E, class T>
[[gnu::always_inline]] inline Pair<E> load(const T* p, Two) {
    return pair_of<E>(T{}, load_stored(p, Two{}));
}

template <class T, class E, class Streams>
[[gnu::always_inline]] inline void put(T* p, Pair<E> pair, Streams) {
    if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<E, float>) {
        const __m256i lower = _mm256_srli_epi32(rounded_above(pair.half[0]), 16), upper = rounded_above(pair.half[1]);
        put_stored(p, _mm256_blend_epi16(lower, upper, 0b10101010), Streams{});
    } else {
        put(p, pair.half[0], pair.half[1], Streams{});
    }
}

// Element i of what is stored where bit i is set, else 0.
[[gnu::always_inline]] inline __m256i where(unsigned bits, __m256i stored) {
    const __m256i place = _mm256_setr_epi16(1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800, 0x1000,
                                            0x2000, 0x4000, int16_t(0x8000));
    const __m256i chosen = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(bits)), place), place);
    return _mm256_and_si256(stored, chosen);
}
#endif

// An f(i, count, ...) that may be asked for a pair, f(i, Two{}, ...), or for its halves: the same is done to all
// elements, in whatever order they are loaded.
template <class F>
struct InAnyOrder : F {};
template <class F>
InAnyOrder(F) -> InAnyOrder<F>;

template <class F>
inline constexpr bool is_in_any_order = false;
template <class F>
inline constexpr bool is_in_any_order<InAnyOrder<F>> = true;

// Streamed stores come after all that other threads may see.
[[gnu::always_inline]] inline void finish_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Into the level-2 cache, for a thread that will soon read there; any address will do, past the end of an array too.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// For this thread, which will soon write there.
[[gnu::always_inline]] inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// What a loop that reads on from p comes to some 30 cache lines later. One that computes as it reads is otherwise held
// up by memory: the hardware's own prefetching stops at every page of 4 KiB. Where what follows is read as well, as in
// long runs, half as far again takes 0.93 to 1.0 of the time; in runs of some KiB it is for nothing: up to 1.1.
inline constexpr int64_t bytes_ahead = 2048, bytes_far_ahead = 3072;
template <class T>
inline constexpr int64_t elements_ahead = bytes_ahead / int64_t(sizeof(T));
template <class T>
inline constexpr int64_t elements_far_ahead = bytes_far_ahead / int64_t(sizeof(T));
template <class T>
[[gnu::always_inline]] inline const T* further_on(const T* p) {
    return p + elements_ahead<T>;
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
