// Batch norm with given statistics, from 8-bit integers to 8-bit integers. The formulas, and the bits, are those of
// reference/quantized_batch_norm.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "calls.hpp"
#include "parallel.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// A channel's map.
template <class Q>
struct Requantization {
    double a, b, x_scale, x_zero_point, y_scale, y_zero_point;
    bool with_relu;

    Requantization(const QuantizedBatchNorm& call, int64_t channel)
        : a(call.a[channel]),
          b(call.b[channel]),
          x_scale(call.x_scale),
          x_zero_point(call.x_zero_point),
          y_scale(call.y_scale),
          y_zero_point(call.y_zero_point),
          with_relu(call.with_relu) {}

    Q operator()(Q x) const {
        constexpr double smallest = std::numeric_limits<Q>::min(), largest = std::numeric_limits<Q>::max();
        double v = (double(x) - x_zero_point) * x_scale * a + b;
        if (std::isnan(v)) v = b;
        if (with_relu && v < 0) v = 0;
        const double level = std::nearbyint(v / y_scale) + y_zero_point;  // half to even
        if (std::isnan(level)) return 0;
        return Q(int(level < smallest ? smallest : level > largest ? largest : level));
    }
};

// An 8-bit x has 256 values: a channel with more elements than this looks its results up.
inline constexpr int64_t worth_a_table = 1024;

// The results of one channel, by the bits of x.
template <class Q>
struct Table {
    Q results[256];

    explicit Table(const Requantization<Q>& map) {
        for (int bits = 0; bits < 256; ++bits) results[bits] = map(Q(uint8_t(bits)));
    }
    Q operator()(Q x) const { return results[uint8_t(x)]; }
};

template <class Q>
struct QuantizedKernel {
    const QuantizedBatchNorm& call;
    const Volume& v;
    explicit QuantizedKernel(const QuantizedBatchNorm& call) : call(call), v(call.volume) {}

    // Some samples of some channels by maps[channel - c].
    template <class Map>
    void write(int64_t n, int64_t samples, int64_t c, const std::vector<Map>& maps) const {
        for (int64_t sample = n; sample < n + samples; ++sample)
            for (size_t k = 0; k < maps.size(); ++k) {
                const Q* x = call.x.at<const Q>(sample, c + int64_t(k));
                Q* y = call.y.at<Q>(sample, c + int64_t(k));
                const Map& map = maps[k];
                for (int64_t i = 0; i < v.s; ++i) y[i] = map(x[i]);
            }
    }

    template <class Map>
    void run() const {
        // so many channels that their tables stay in the first-level cache
        const bool is_planes = v.layout == Volume::Layout::planes;
        const int64_t channels = is_planes ? 1 : 64, tiles = (v.c + channels - 1) / channels;
        const int64_t per_sample = std::max<int64_t>(1, std::min(channels, v.c) * v.s);
        const int64_t samples = std::max<int64_t>(1, 256 * 1024 / per_sample), blocks = (v.n + samples - 1) / samples;
        parallel_for(tiles * blocks, 2 * v.size(), [&](int64_t item) {
            const int64_t c = item / blocks * channels, n = item % blocks * samples;
            std::vector<Map> maps;
            for (int64_t k = c; k < std::min(v.c, c + channels); ++k) maps.emplace_back(Requantization<Q>(call, k));
            write(n, std::min(samples, v.n - n), c, maps);
        });
    }
};

}  // namespace arraynorm::ARRAYNORM_ISA
