// Batch norm with given statistics, from 8-bit integers to 8-bit integers. The formulas, and the bits, are those of
// reference/quantized_batch_norm.py.
//
// An 8-bit x has 256 values. A channel's map is a line, which floats compute fast, and to the same levels wherever none
// of the 256 lies within their rounding error of a tie. The few channels of which that can't be said look their results
// up.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "columns.hpp"
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

// A channel with fewer elements than this is not worth more than the map itself.
inline constexpr int64_t worth_a_line = 16;

// The results of one channel, by the bits of x.
template <class Q>
struct Table {
    Q results[256];

    explicit Table(const Requantization<Q>& map) {
        for (int bits = 0; bits < 256; ++bits) results[bits] = map(Q(uint8_t(bits)));
    }
    Q operator()(Q x) const { return results[uint8_t(x)]; }
};

// Every x, in the order of their bits.
template <class Q>
struct EveryX {
    Q values[256];
    EveryX() {
        for (int bits = 0; bits < 256; ++bits) values[bits] = Q(uint8_t(bits));
    }
};

// The map in floats: rint(slope * x + intercept) + y_zero_point. It gives the levels, or they are looked up.
struct Line {
    float slope, intercept;
    bool gives_levels;
};

template <class Q>
struct QuantizedKernel {
    const QuantizedBatchNorm& call;
    const Volume& v;
    const EveryX<Q> every_x;

    explicit QuantizedKernel(const QuantizedBatchNorm& call) : call(call), v(call.volume) {}

    void run() const {
        if (v.plane_size() < worth_a_line) return write_few();
        v.layout == Volume::Layout::planes ? write_planes() : write_columns();
    }

    // -- a run of elements --------------------------------------------------------------------------------------

    // Those on lines; line(i) are slope and intercept of the elements from i.
    template <class LineAt>
    [[gnu::always_inline]] void write_run(const Q* x, Q* y, int64_t n, LineAt line) const {
        constexpr int many = 4 * lanes;
        const int16_t least = call.with_relu ? 0 : std::numeric_limits<int16_t>::min();
        const int16_t zero_point = int16_t(call.y_zero_point);
        auto write = [=](const Q* from, Q* to, int64_t i) __attribute__((always_inline)) {
            Pack<float> values[4];
            for (int k = 0; k < 4; ++k) {
                const auto [slope, intercept] = line(i + k * lanes);
                values[k] = fma(load<float>(from + k * lanes), slope, intercept);
            }
            store_levels(to, values, least, zero_point);
        };
        int64_t i = 0;
        for (; i + many <= n; i += many) write(x + i, y + i, i);
        if (i == n) return;
        Q some[many] = {};
        std::memcpy(some, x + i, n - i);
        write(some, some, i);
        std::memcpy(y + i, some, n - i);
    }

    void write_run(const Q* x, Q* y, int64_t n, const Line& line) const {
        const std::array both{Pack<float>(line.slope), Pack<float>(line.intercept)};
        write_run(x, y, n, [=](int64_t) { return both; });
    }

    template <class Map>
    static void look_up(const Q* x, Q* y, int64_t n, const Map& map) {
        for (int64_t i = 0; i < n; ++i) y[i] = map(x[i]);
    }

    // -- channels -----------------------------------------------------------------------------------------------

    // It gives the levels if none of its values lies within their error of a tie: two coefficients, a product and a sum
    // are rounded, each to 2^-24 of itself. Large levels are ruled out with that, infinity, and NaN. Where one does,
    // the line may give them all the same, or if it is moved.
    Line line_of(int64_t c) const {
        const double slope = call.x_scale * call.a[c] / call.y_scale;
        const Line line{float(slope), float(call.b[c] / call.y_scale - call.x_zero_point * slope), true};
        const float error = 0x1p-22f * (256 * std::abs(line.slope) + std::abs(line.intercept));
        if (error < 0.5f && are_apart_from_ties(line, error)) return line;
        const Table<Q> table({call, c});
        for (float shift : {0.0f, error / 4, -error / 4}) {
            const Line moved{line.slope, line.intercept + shift, true};
            Q found[256];
            write_run(every_x.values, found, 256, moved);
            if (std::memcmp(found, table.results, 256) == 0) return moved;
        }
        return {0, 0, false};
    }

    // Whether of every x the level is farther than `error` from all ties: the squares of its distances from the nearest
    // integer, which are rounded too, stay below that of the least that is allowed.
    bool are_apart_from_ties(const Line& line, float error) const {
        const Pack<float> slope(line.slope), intercept(line.intercept), integers(0x1.8p23f);  // of this size all are
        const Pack<float> most((0.5f - error) * (0.5f - error) * (1 - 0x1p-20f));
        Pack<float> beyond(0.0f);
        for (int i = 0; i < 256; i += lanes) {
            const Pack<float> level = fma(load<float>(every_x.values + i), slope, intercept);
            const Pack<float> distance = level - ((level + integers) - integers);
            beyond = beyond + relu(distance * distance - most);
        }
        return sum(beyond) == 0;
    }

    std::vector<Line> lines() const {
        constexpr int64_t some = 16;
        std::vector<Line> lines(v.c);
        parallel_for((v.c + some - 1) / some, v.c * 1024, [&](int64_t item) {
            for (int64_t c = item * some; c < std::min(v.c, (item + 1) * some); ++c) lines[c] = line_of(c);
        });
        return lines;
    }

    // -- all ----------------------------------------------------------------------------------------------------

    void write_few() const {
        for (int64_t c = 0; c < v.c; ++c) {
            const Requantization<Q> map(call, c);
            for (int64_t n = 0; n < v.n; ++n) look_up(call.x.at<const Q>(n, c), call.y.at<Q>(n, c), v.s, map);
        }
    }

    // The channels that are looked up, in order.
    using Exceptions = std::vector<std::pair<int64_t, Table<Q>>>;

    Exceptions exceptions_of(const std::vector<Line>& lines) const {
        Exceptions exceptions;
        for (int64_t c = 0; c < v.c; ++c)
            if (!lines[c].gives_levels) exceptions.emplace_back(c, Table<Q>({call, c}));
        return exceptions;
    }

    void write_planes() const {
        const std::vector<Line> lines = this->lines();
        const Exceptions exceptions = exceptions_of(lines);
        over_runs(v, 2 * v.size(), false, [&](auto pieces) {
            pieces([&](int64_t n, int64_t c, int64_t i, int64_t length) {
                const Q* x = call.x.at<const Q>(n, c) + i;
                Q* y = call.y.at<Q>(n, c) + i;
                if (lines[c].gives_levels) return write_run(x, y, length, lines[c]);
                const auto its = std::lower_bound(exceptions.begin(), exceptions.end(), c,
                                                  [](const auto& exception, int64_t c) { return exception.first < c; });
                look_up(x, y, length, its->second);
            });
        });
    }

    void write_columns() const {
        const Tile all{0, v.n, 0, v.c, v.s};
        const int64_t distance = common(&Tensor::sample, {call.x, call.y});
        const std::vector<Line> lines = this->lines();
        const Exceptions exceptions = exceptions_of(lines);
        auto values_of_line = [&](auto, int64_t c) {
            return std::array<double, 2>{lines[c].slope, lines[c].intercept};
        };
        auto any = [](int64_t) { return true; };
        const auto values = values_of<float>(all.widest(distance), any, values_of_line).first;
        over_row_blocks(all, 2 * v.size(), [&](const Tile& block) {
            const std::vector<Q> kept = results_of(exceptions, block);  // before the rest is written, for y may be x
            block.widened(distance, [&](const Tile& tile) {
                const auto x = rows_of<const Q>(call.x, tile);
                const auto y = rows_of<Q>(call.y, tile);
                for (int64_t r = 0; r < tile.rows; ++r)
                    write_run(x.at(r, 0), y.at(r, 0), tile.width(), [&](int64_t j) { return values.at(j, Full{}); });
            });
            const Q* next = kept.data();
            for (const auto& [c, table] : exceptions)
                for (int64_t r = block.row; r < block.row + block.rows; ++r, next += v.s)
                    std::copy_n(next, v.s, call.y.at<Q>(r, c));
        });
    }

    // Those of the exceptional channels in a block of rows.
    std::vector<Q> results_of(const Exceptions& exceptions, const Tile& block) const {
        std::vector<Q> found(exceptions.size() * block.rows * v.s);
        Q* next = found.data();
        for (const auto& [c, table] : exceptions)
            for (int64_t r = block.row; r < block.row + block.rows; ++r, next += v.s)
                look_up(call.x.at<const Q>(r, c), next, v.s, table);
        return found;
    }
};

}  // namespace arraynorm::ARRAYNORM_ISA
