// The storage types that processors do not compute in, as packs of float: the two 16-bit formats, and 8-bit integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd_packs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

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

}  // namespace arraynorm::ARRAYNORM_ISA
