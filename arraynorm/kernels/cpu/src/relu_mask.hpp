// The mask of ReLU: one bit per element, least significant first, in C order of (N, C, S).
#pragma once

#include <cstdint>

#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// Bytes in which a run begins or ends, the other bits of which another thread may write at the same time: they are
// added to, atomically, so the mask must be zero before. Not at once, for an atomic operation waits until all streamed
// stores are in memory: after every run that took three times as long as all else.
class SharedBytes {
public:
    SharedBytes() = default;
    SharedBytes(const SharedBytes&) = delete;
    ~SharedBytes() { write(); }

    void add(uint8_t* byte, unsigned bits) {
        if (number_ == most) write();
        bytes_[number_] = byte;
        bits_[number_++] = uint8_t(bits);
    }

private:
    void write() {
        for (int i = 0; i < number_; ++i) __atomic_fetch_or(bytes_[i], bits_[i], __ATOMIC_RELAXED);
        number_ = 0;
    }

    static constexpr int most = 256;
    uint8_t* bytes_[most];
    uint8_t bits_[most];
    int number_ = 0;
};

// Writes the bits of one run, in order.
class MaskWriter {
public:
    MaskWriter(uint8_t* mask, int64_t bit, SharedBytes& ends)
        : byte_(mask + bit / 8), pending_(bit % 8), shared_(bit % 8 != 0), ends_(ends) {}
    MaskWriter(const MaskWriter&) = delete;
    ~MaskWriter() {
        if (pending_) ends_.add(byte_, bits_);
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
            ends_.add(byte_, bits_ & 0xff);
        else
            *byte_ = uint8_t(bits_);
        ++byte_;
        shared_ = false;
        bits_ >>= 8;
        pending_ -= 8;
    }

private:
    uint8_t* byte_;
    unsigned bits_ = 0, pending_;
    bool shared_;
    SharedBytes& ends_;
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
