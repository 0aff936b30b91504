// Batch norm over rows of C * S adjacent elements, S of which belong to a channel: channels last and two-dimensional
// inputs (S = 1), and planes too small to be runs.
#pragma once

#include "batch_norm.hpp"
#include "columns.hpp"
#include "parallel.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// How the matrix of a volume is cut: by channels where a few of them fit the second-level cache with all their rows, and
// are then looked at twice for the price of once; else by rows.
struct Tiles {
    int64_t rows, width, s;       // of the matrix; columns per channel
    int64_t channels_per_tile = 0;  // 0: cut by rows
    int64_t row_blocks = 1;

    template <class T>
    static Tiles of(const Volume& v) {
        Tiles t{v.n, v.c * v.s, v.s};
        const int64_t cache = 128 * 1024 / sizeof(T), row = std::max<int64_t>(1, t.width);
        const int64_t columns = std::clamp<int64_t>(cache / std::max<int64_t>(1, t.rows), 1, 1024);
        if (columns >= 64 || columns >= row)
            // eight channels, so that a tile begins with a byte of the mask
            t.channels_per_tile = std::max<int64_t>(1, columns / std::max<int64_t>(1, 8 * v.s)) * 8;
        else
            t.row_blocks = std::clamp<int64_t>(t.rows * row / (8 * cache), 1, 32);
        return t;
    }

    int64_t channels() const { return width / std::max<int64_t>(1, s); }
    int64_t tiles() const { return (channels() + channels_per_tile - 1) / channels_per_tile; }
    int64_t first_row(int64_t block) const { return rows * block / row_blocks; }
};

// What one channel's columns come to, added up in order.
inline Moments of_channel(const Moments* columns, int64_t s) { return s == 1 ? *columns : merged(columns, s); }
inline Sums of_channel(const Sums* columns, int64_t s) {
    Sums sum;
    for (int64_t j = 0; j < s; ++j) sum.add(columns[j]);
    return sum;
}

// Reduces all columns, keeps the sums of every channel, and then writes.
//
// reduce(first row, rows, first column, columns, sums) adds to the sums of columns; keep(c, sum); write(first row, rows,
// first channel, channels).
template <class Sum, class Reduce, class Keep, class Write>
inline void over_tiles(const Tiles& t, int64_t bytes, bool reduces, bool writes, Reduce reduce, Keep keep, Write write) {
    if (t.channels_per_tile) {
        parallel_for(t.tiles(), bytes, [&](int64_t tile) {
            const int64_t c = tile * t.channels_per_tile, number = std::min(t.channels_per_tile, t.channels() - c);
            if (reduces) {
                std::vector<Sum> sums(number * t.s);
                reduce(0, t.rows, c * t.s, number * t.s, sums.data());
                for (int64_t k = 0; k < number; ++k) keep(c + k, of_channel(sums.data() + k * t.s, t.s));
            }
            if (writes) write(0, t.rows, c, number);
        });
        return;
    }
    if (reduces) {
        std::vector<Sum> sums(t.row_blocks * t.width);
        parallel_for(t.row_blocks, bytes, [&](int64_t block) {
            const int64_t row = t.first_row(block);
            reduce(row, t.first_row(block + 1) - row, 0, t.width, sums.data() + block * t.width);
        });
        parallel_for(t.channels(), t.row_blocks * t.width * sizeof(Sum), [&](int64_t c) {
            Sum sum{};
            for (int64_t block = 0; block < t.row_blocks; ++block)
                sum.add(of_channel(sums.data() + block * t.width + c * t.s, t.s));
            keep(c, sum);
        });
    }
    if (writes) {
        // more and smaller items than for the sums, for nothing is added up
        const int64_t rows = std::max<int64_t>(rows_at_once, 64 * 1024 / std::max<int64_t>(1, t.width));
        parallel_for((t.rows + rows - 1) / rows, bytes, [&](int64_t i) {
            write(i * rows, std::min(rows, t.rows - i * rows), 0, t.channels());
        });
    }
}

// -- forward --------------------------------------------------------------------------------------------------

template <class T, class E>
[[gnu::flatten]] void write_forward_columns(const BatchNormForward& call, int64_t row, int64_t rows, int64_t c, int64_t channels) {
    const int64_t s = call.volume.s, width = channels * s, distance = call.x.sample;
    ColumnMeans<E> means(width);
    std::vector<E> scales(width), shifts(width);
    for (int64_t j = 0; j < width; ++j) {
        const int64_t channel = c + j / s;
        means.set(j, call.mean[channel]);
        scales[j] = E(forward_scale(call, channel));
        shifts[j] = E(call.bias ? call.bias[channel] : 0);
    }
    struct Map {
        Mean<E> mean;
        Pack<E> scale, shift;
    };
    auto parameters = [&](int64_t j, auto count) {
        return Map{means.at(j, count), load<E>(scales.data() + j, count), load<E>(shifts.data() + j, count)};
    };
    const T *x = call.x.at<const T>(row, c), *addend = call.addend ? call.addend.at<const T>(row, c) : nullptr;
    T* y = call.y.at<T>(row, c);
    const int64_t all = call.volume.c * s, bit = row * all + c * s;
    uint8_t* bytes = call.mask && all % 8 == 0 ? call.mask + bit / 8 : nullptr;
    write_columns(y, call.y.sample, rows, width, call.streaming, parameters,
                  [&](const Map& map, int64_t r, int64_t j, auto count) {
                      Pack<E> v = fma(map.mean.deviation(load<E>(x + r * distance + j, count)), map.scale, map.shift);
                      if (!call.mask) return v;
                      if (addend) v = v + load<E>(addend + r * call.addend.sample + j, count);
                      v = relu(v);
                      if (bytes) bytes[(r * all + j) / 8] = uint8_t(positive<T>(v));
                      return v;
                  });
    if (call.streaming) finish_streaming();
    if (!call.mask || bytes) return;
    for (int64_t r = 0; r < rows; ++r) {  // rows that share bytes
        MaskWriter mask(call.mask, bit + r * all);
        const T* out = y + r * call.y.sample;
        for (int64_t j = 0; j < width; j += lanes) {
            const int64_t count = std::min<int64_t>(lanes, width - j);
            mask.put(positive<T>(load<Computation<T>>(out + j, count)), count);
        }
    }
}

template <class T>
void forward_columns(const BatchNormForward& call) {
    using E = Computation<T>;
    const Tiles tiles = Tiles::of<T>(call.volume);
    over_tiles<Moments>(
        tiles, 2 * call.volume.size() * sizeof(T), call.takes_statistics, call.writes,
        [&](int64_t row, int64_t rows, int64_t column, int64_t columns, Moments* moments) {
            const T* x = call.x.at<const T>(row, 0) + column;
            add_column_moments(x, call.x.sample, rows, columns, moments);
        },
        [&](int64_t c, const Moments& moments) { keep_statistics(call, c, moments); },
        [&](int64_t row, int64_t rows, int64_t c, int64_t channels) {
            bool tame = true;
            if (!std::is_same_v<E, double>)
                for (int64_t k = c; k < c + channels; ++k) tame = tame && is_tame(call.mean[k], forward_scale(call, k));
            if (tame)
                write_forward_columns<T, E>(call, row, rows, c, channels);
            else
                write_forward_columns<T, double>(call, row, rows, c, channels);
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T, class Mask>
[[gnu::flatten]] void add_backward_sums(
    const BatchNormBackward& call, int64_t row, int64_t rows, int64_t column, int64_t width, Sums* total) {
    using E = Summation;
    const int64_t s = call.volume.s, all = call.volume.c * s;
    ColumnMeans<E> means(width);
    for (int64_t j = 0; j < width; ++j) means.set(j, call.mean[(column + j) / s]);
    ColumnSums<E> sums(width);
    constexpr int64_t chunk = rows_per_chunk<E>;
    for (int64_t begin = row; begin < row + rows; begin += chunk) {
        const T *dy = call.dy.at<const T>(begin, 0) + column, *x = call.x.at<const T>(begin, 0) + column;
        const Mask mask(call.mask, begin * all + column);
        sums.run(std::min(chunk, row + rows - begin), width,
                 [&](Pack<E>& a, Pack<E>& b, int64_t r, int64_t j, auto count) {
                     const Pack<E> g = mask.gate(r * all + j, load<E>(dy + r * call.dy.sample + j, count), count);
                     a = a + g;
                     b = fma(g, means.at(j, count).deviation(load_filled<E>(x + r * call.x.sample + j, count)), b);
                 });
        for (int64_t j = 0; j < width; ++j) total[j].add({sums.first[j], sums.second[j]});
    }
}

template <class T, class E, class Mask>
[[gnu::flatten]] void write_backward_columns(const BatchNormBackward& call, int64_t row, int64_t rows, int64_t c, int64_t channels) {
    const int64_t s = call.volume.s, width = channels * s, all = call.volume.c * s;
    const bool needs_x = call.mean_dy;
    ColumnMeans<E> means(width);
    std::vector<E> of_dy(width), of_deviation(width), constant(width);
    for (int64_t j = 0; j < width; ++j) {
        const int64_t channel = c + j / s;
        const BackwardCoefficients k = backward_coefficients(call, channel);
        means.set(j, needs_x ? call.mean[channel] : 0);
        of_dy[j] = E(k.of_dy), of_deviation[j] = E(k.of_deviation), constant[j] = E(k.constant);
    }
    struct Map {
        Mean<E> mean;
        Pack<E> of_dy, of_deviation, constant;
    };
    auto parameters = [&](int64_t j, auto count) {
        return Map{means.at(j, count), load<E>(of_dy.data() + j, count), load<E>(of_deviation.data() + j, count),
                   load<E>(constant.data() + j, count)};
    };
    const T *dy = call.dy.at<const T>(row, c), *x = call.x.at<const T>(row, c);
    T* daddend = call.daddend ? call.daddend.at<T>(row, c) : nullptr;
    const Mask mask(call.mask, row * all + c * s);
    write_columns(call.dx.at<T>(row, c), call.dx.sample, rows, width, call.streaming, parameters,
                  [&](const Map& map, int64_t r, int64_t j, auto count) {
                      const Pack<E> g = mask.gate(r * all + j, load<E>(dy + r * call.dy.sample + j, count), count);
                      if (daddend) store(daddend + r * call.daddend.sample + j, g, count);
                      if (!needs_x) return g * map.of_dy;
                      const Pack<E> deviation = map.mean.deviation(load<E>(x + r * call.x.sample + j, count));
                      return fma(g, map.of_dy, fma(deviation, map.of_deviation, map.constant));
                  });
    if (call.streaming) finish_streaming();
}

template <class T, class Mask>
void backward_columns(const BatchNormBackward& call) {
    using E = Computation<T>;
    over_tiles<Sums>(
        Tiles::of<T>(call.volume), 3 * call.volume.size() * sizeof(T), call.reduces, call.writes,
        [&](int64_t row, int64_t rows, int64_t column, int64_t columns, Sums* sums) {
            add_backward_sums<T, Mask>(call, row, rows, column, columns, sums);
        },
        [&](int64_t c, const Sums& sums) { keep_sums(call, c, sums); },
        [&](int64_t row, int64_t rows, int64_t c, int64_t channels) {
            bool tame = true;
            if (!std::is_same_v<E, double>)
                for (int64_t k = c; k < c + channels; ++k) tame = tame && is_tame(call, k);
            if (tame)
                write_backward_columns<T, E, Mask>(call, row, rows, c, channels);
            else
                write_backward_columns<T, double, Mask>(call, row, rows, c, channels);
        });
}

}  // namespace arraynorm::ARRAYNORM_ISA
