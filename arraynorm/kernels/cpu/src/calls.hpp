// The calls of the kernels: plain structs, filled in by the binding, run by the code of one ISA level.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "types.hpp"

namespace arraynorm {

// 1 / sqrt(var + eps), and 0 where that is 1/0: a set without deviation normalizes to zero.
inline double reciprocal_std(double var, double eps) {
    const double v = var + eps;
    return v == 0 ? 0 : 1 / std::sqrt(v);
}

// A batch norm's volume (N, C, S), in one of the two shapes in which memory is walked.
struct Volume {
    enum class Layout {
        planes,   // S adjacent elements of one channel at a time; samples and channels at any distance
        columns,  // rows of C * S adjacent elements: channels last, two-dimensional, or S so small that a plane is no
                  // run
    };
    Layout layout;
    int64_t n, c, s;
    int64_t plane_size() const { return n * s; }  // values per channel
    int64_t size() const { return n * c * s; }
};

// The rows of layer, RMS, group and instance norm: one for each group of channels of each sample.
struct Rows {
    enum class Layout {
        elements,  // a row is `channels` adjacent elements, each with parameters of its own; rows of a sample are
                   // adjacent
        planes,    // a row is `channels` runs of `size` adjacent elements
        columns,   // a sample is a matrix, `lines` lines of groups * channels * size adjacent elements; a row some
                   // columns
    };
    Layout layout;
    int64_t samples, groups, channels, size, lines;  // channels of a group
    int64_t count() const { return samples * groups; }
    int64_t parameters() const { return groups * channels; }
    int64_t row_size() const { return channels * size * lines; }
    int64_t elements() const { return count() * row_size(); }
};

// An array seen as a volume or as rows; distances in elements. `channel` is that of runs: of a volume's planes or a
// row's, 1 for elements, s for a volume's columns, and that of lines for a row's columns.
struct Tensor {
    void* data = nullptr;
    int64_t sample = 0, channel = 0;

    template <class T>
    T* at(int64_t n, int64_t c) const {
        return static_cast<T*>(data) + n * sample + c * channel;
    }
    explicit operator bool() const { return data != nullptr; }
};

// A value per channel, or per element of a row: a vector of double or of float, as the caller has it; or none.
struct Parameter {
    const double* doubles = nullptr;
    const float* floats = nullptr;

    Parameter() = default;
    Parameter(const double* values) : doubles(values) {}
    Parameter(const float* values) : floats(values) {}

    explicit operator bool() const { return doubles || floats; }
    double operator[](int64_t i) const { return floats ? double(floats[i]) : doubles[i]; }
    double value_or(int64_t i, double otherwise) const { return *this ? (*this)[i] : otherwise; }
};

struct BatchNormForward {
    DType dtype;
    Volume volume;
    Tensor x, y, addend;
    uint8_t* mask;           // with it: add the addend, if there is one, apply ReLU, and keep where the result is > 0
    Parameter weight, bias;  // (C,) or none
    double eps;
    double *mean, *m2, *rstd;  // (C,)
    bool takes_statistics;     // compute mean, m2 and rstd; else mean and rstd are given
    bool writes;               // compute y
    bool streaming;
};

struct BatchNormBackward {
    DType dtype;
    Volume volume;
    Tensor dy, x, dx, daddend;
    const uint8_t* mask;  // with it: dy counts where its bit is set
    Parameter weight;     // (C,) or none
    const double *mean, *rstd;
    double *dbias, *dweight;          // (C,) sums of dy and dy * x_hat
    double *mean_dy, *mean_dy_x_hat;  // (C,) or null: statistics that do not depend on x
    bool reduces;                     // compute the sums, and, where there are means and dx, those
    bool writes;                      // compute dx
    bool streaming;
};

struct RowNormForward {
    DType dtype;
    Rows rows;
    Tensor x, y;
    Parameter weight, bias;  // a value per parameter or none
    double eps;
    double *mean, *var, *rstd;  // a value per row. RMS norm has no mean and no var, layer norm no var
    bool streaming;
};

struct RowNormBackward {
    DType dtype;
    Rows rows;
    Tensor dy, x, dx;
    Parameter weight;           // a value per parameter or none
    const double *mean, *rstd;  // a value per row; no mean for RMS norm
    double *dweight, *dbias;    // a value per parameter; for RMS norm dbias is scratch
    bool streaming;
};

struct QuantizedBatchNorm {
    Volume volume;
    Tensor x, y;
    bool is_signed, with_relu;
    const double *a, *b;  // (C,)
    double x_scale, x_zero_point, y_scale, y_zero_point;
};

// What one ISA level has.
struct Kernels {
    const char* isa;
    void (*batch_norm_forward)(const BatchNormForward&);
    void (*batch_norm_backward)(const BatchNormBackward&);
    void (*row_norm_forward)(const RowNormForward&);
    void (*row_norm_backward)(const RowNormBackward&);
    void (*quantized_batch_norm)(const QuantizedBatchNorm&);
};

const Kernels& baseline_kernels();
#if defined(ARRAYNORM_HAS_V3)
const Kernels& v3_kernels();
#endif

}  // namespace arraynorm
