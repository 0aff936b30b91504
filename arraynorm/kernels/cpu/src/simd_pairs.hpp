// Sixteen elements of a 16-bit format, in the order in which they are cheapest.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_access.hpp"

namespace arraynorm::ARRAYNORM_ISA {

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

}  // namespace arraynorm::ARRAYNORM_ISA
