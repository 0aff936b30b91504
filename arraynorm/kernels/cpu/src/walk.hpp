// How the memory of a volume (N, C, S) is walked, chosen by the strides of x; the other arrays follow.
#pragma once

#include "arrays.hpp"

namespace arraynorm {

// Whether runs of so many elements, side by side in that many samples, are better walked as rows, each element a column
// with values of its own. With few samples the bookkeeping of a column outweighs that of a short run: measured at 1 to
// 64 samples and runs of 2 to 63.
inline bool are_short_runs(int64_t samples, int64_t size) { return size <= (samples < 8 ? 4 * samples : 63); }

enum class Walk {
    nothing,        // no elements
    planes,         // runs of S
    one_channel,    // C = 1: N * S adjacent elements
    samples,        // S = 1, runs of N: two-dimensional in Fortran's order
    rows,           // S = 1, rows of C
    small_planes,   // rows of C * S, S too small for a run
    channels_last,  // N * S rows of C
};

struct Walked {
    Walk walk;
    Volume volume;

    // `array` as this walk sees it, or nothing if its strides do not allow that.
    std::optional<Tensor> tensor(PyArrayObject* array) const;

    // The walk for x; nothing if its strides allow none. With a mask the order of walking must be that of (N, C, S).
    static std::optional<Walked> of(PyArrayObject* x, bool with_mask);

    int64_t n, c, s;  // as the caller sees them
};

// The volume of arrays in C order, whose samples are C * S elements apart and whose channels S.
Volume volume_in_c_order(int64_t n, int64_t c, int64_t s);

}  // namespace arraynorm
