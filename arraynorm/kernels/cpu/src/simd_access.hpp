// Packs to and from memory: whole or in part, past the cache or not; and what is asked for ahead.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd_formats.hpp"

namespace arraynorm::ARRAYNORM_ISA {

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

}  // namespace arraynorm::ARRAYNORM_ISA
