// What the rows of planes and of columns share: their elements have a channel's parameters, and their gradients are
// made of sums per sample and channel.
#pragma once

#include "row_norm.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// For every channel of every sample the sums of dy and of dy * (x - mean), and, for every row, what these make of dx.
class ChannelSums {
public:
    explicit ChannelSums(const RowNormBackward& call)
        : call_(call), rows_(call.rows), sums_(rows_.samples * rows_.parameters()), coefficients_(rows_.count()) {}

    Sums& of(int64_t sample, int64_t channel) { return sums_[sample * rows_.parameters() + channel]; }
    const RowCoefficients& coefficients(int64_t row) const { return coefficients_[row]; }

    // The row's channels have their sums.
    void keep(int64_t row) {
        const int64_t first = row % rows_.groups * rows_.channels;
        Sums of_g;
        for (int64_t k = 0; k < rows_.channels; ++k) {
            const Sums& sums = of(row / rows_.groups, first + k);
            const double weight = call_.weight.value_or(first + k, 1);
            of_g.add({weight * sums.first, weight * sums.second});
        }
        coefficients_[row] = row_coefficients(call_, row, of_g);
    }

    void keep_parameter_gradients() const {
        for (int64_t sample = 0; sample < rows_.samples; ++sample)
            for (int64_t channel = 0; channel < rows_.parameters(); ++channel) {
                const Sums& sums = sums_[sample * rows_.parameters() + channel];
                const double rstd = call_.rstd[sample * rows_.groups + channel / rows_.channels];
                call_.dweight[channel] += sums.second * rstd;
                call_.dbias[channel] += sums.first;
            }
    }

private:
    const RowNormBackward& call_;
    const Rows& rows_;
    std::vector<Sums> sums_;
    std::vector<RowCoefficients> coefficients_;
};

}  // namespace arraynorm::ARRAYNORM_ISA
