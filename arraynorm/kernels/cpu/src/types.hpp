// The storage types, and float16 in software for machines without instructions for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace arraynorm {

struct float16 {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

enum class DType { float16, bfloat16, float32, float64 };

// NaN for NaN, without what its lower bits say: see rounded_above in simd_formats.hpp.
inline double quiet(double value) { return value == value ? value : std::numeric_limits<double>::quiet_NaN(); }

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(bfloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float to_float(float16 value) {
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // a float16 is its bits, shifted to where float32 has them, times 2^112: exact, subnormals included
    return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

// To nearest, ties to even.
inline float16 to_float16(float value) {
    uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= as_bits(65520.0f)) return {uint16_t(sign | 0x7c00)};
    if (magnitude < as_bits(0x1p-14f)) {
        // adding 0.5 leaves the float's last bit where float16's subnormals have theirs, and rounds there
        return {uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)))};
    }
    return {uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

}  // namespace arraynorm
