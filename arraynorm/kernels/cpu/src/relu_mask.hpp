// The mask of ReLU: one bit per element, least significant first, in C order of (N, C, S).
#pragma once

#include <cstdint>

#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// Writes the bits of one run, in order. A run may begin and end within a byte whose other bits another thread writes at
// the same time: those two bytes are added to, atomically, so the mask must be zero before.
class MaskWriter {
public:
    MaskWriter(uint8_t* mask, int64_t bit) : byte_(mask + bit / 8), pending_(bit % 8), shared_(bit % 8 != 0) {}
    MaskWriter(const MaskWriter&) = delete;
    ~MaskWriter() {
        if (pending_) add(bits_);
    }

    void put(unsigned bits, Full) {
        if (pending_ == 0)
            *byte_++ = uint8_t(bits);
        else
            put(bits, lanes);
    }
    void put(unsigned bits, int64_t count) {
        bits_ |= (bits & ((1u << count) - 1)) << pending_;
        pending_ += unsigned(count);
        if (pending_ < 8) return;
        if (shared_)
            add(bits_ & 0xff);
        else
            *byte_ = uint8_t(bits_);
        ++byte_;
        shared_ = false;
        bits_ >>= 8;
        pending_ -= 8;
    }

private:
    void add(unsigned bits) { __atomic_fetch_or(byte_, uint8_t(bits), __ATOMIC_RELAXED); }

    uint8_t* byte_;
    unsigned bits_ = 0, pending_;
    bool shared_;
};

// Lets the elements of a run pass whose bits are set.
class MaskReader {
public:
    MaskReader(const uint8_t* mask, int64_t bit) : mask_(mask), bit_(uint64_t(bit)) {}

    template <class E>
    Pack<E> gate(int64_t i, Pack<E> a, Full) const {
        const Place from(*this, i);
        unsigned bits = from.bytes[0] >> from.shift;
        if (from.shift) bits |= unsigned(from.bytes[1]) << (8 - from.shift);
        return where(bits, a);
    }
    template <class E>
    Pack<E> gate(int64_t i, Pack<E> a, int64_t count) const {
        const Place from(*this, i);
        unsigned bits = from.bytes[0] >> from.shift;
        if (from.shift + count > 8) bits |= unsigned(from.bytes[1]) << (8 - from.shift);
        return where(bits, a);
    }
    // Of elements as they are stored.
    template <class Stored>
    Stored gate(int64_t i, Stored stored, Two) const {
        const Place from(*this, i);
        unsigned bits = (from.bytes[0] | unsigned(from.bytes[1]) << 8) >> from.shift;
        if (from.shift) bits |= unsigned(from.bytes[2]) << (16 - from.shift);
        return where(bits, stored);
    }

private:
    // The bytes from that of element i on, and its bit there. Unsigned: a shift, where a signed quotient takes four
    // steps.
    struct Place {
        const uint8_t* bytes;
        unsigned shift;
        Place(const MaskReader& mask, int64_t i)
            : bytes(mask.mask_ + ((mask.bit_ + uint64_t(i)) >> 3)), shift((mask.bit_ + uint64_t(i)) & 7) {}
    };

    const uint8_t* mask_;
    uint64_t bit_;
};

// Where there is no ReLU.
struct NoMask {
    NoMask(const uint8_t*, int64_t) {}
    template <class Elements, class Count>
    Elements gate(int64_t, Elements a, Count) const {
        return a;
    }
};

}  // namespace arraynorm::ARRAYNORM_ISA
