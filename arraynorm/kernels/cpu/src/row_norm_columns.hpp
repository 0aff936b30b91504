// Rows that are some columns of a sample's matrix: group and instance norm with channels last, or with spatial
// dimensions on both sides of the channels.
#pragma once

#include "columns.hpp"
#include "row_norm_channels.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// A sample's matrix, cut into blocks of lines, and those into pieces whose sums stay in the first-level cache.
struct Matrix {
    int64_t lines, width, blocks;
    static constexpr int64_t piece = 1024;  // columns

    explicit Matrix(const Rows& rows)
        : lines(rows.lines), width(rows.parameters() * rows.size),
          blocks(std::clamp<int64_t>(lines * width / (128 * 1024), 1, std::min<int64_t>(lines, 32))) {}

    int64_t first_line(int64_t block) const { return lines * block / blocks; }

    // visit(first column, columns)
    template <class Visit>
    void pieces(Visit visit) const {
        for (int64_t j = 0; j < width; j += piece) visit(j, std::min(piece, width - j));
    }
};

// Reduces every sample's columns, keeps its rows' sums, and then writes it.
//
// reduce(sample, first line, lines, sums) adds to the sums of columns; keep(sample, sums of all blocks);
// write(sample, first line, lines).
template <class Sum, class Reduce, class Keep, class Write>
inline void over_samples(const Rows& rows, int64_t bytes, Reduce reduce, Keep keep, Write write) {
    const Matrix m(rows);
    const int64_t threads = num_threads(), sums_per_sample = m.blocks * m.width;
    auto reduce_block = [&](int64_t sample, int64_t block, Sum* sums) {
        const int64_t line = m.first_line(block);
        reduce(sample, line, m.first_line(block + 1) - line, sums + block * m.width);
    };
    auto write_block = [&](int64_t sample, int64_t block) {
        const int64_t line = m.first_line(block);
        write(sample, line, m.first_line(block + 1) - line);
    };
    if (threads == 1 || rows.samples >= 4 * threads || m.blocks == 1) {
        parallel_for(rows.samples, bytes, [&](int64_t sample) {
            std::vector<Sum> sums(sums_per_sample);
            for (int64_t block = 0; block < m.blocks; ++block) reduce_block(sample, block, sums.data());
            keep(sample, sums.data());
            for (int64_t block = m.blocks; block-- > 0;) write_block(sample, block);  // the last is still in the cache
        });
        return;
    }
    std::vector<Sum> sums(rows.samples * sums_per_sample);
    parallel_for(rows.samples * m.blocks, bytes, [&](int64_t i) {
        reduce_block(i / m.blocks, i % m.blocks, sums.data() + i / m.blocks * sums_per_sample);
    });
    parallel_for(rows.samples, bytes, [&](int64_t sample) { keep(sample, sums.data() + sample * sums_per_sample); });
    parallel_for(rows.samples * m.blocks, bytes, [&](int64_t i) { write_block(i / m.blocks, i % m.blocks); });
}

// The sum of the columns [begin, end) in all blocks.
template <class Sum>
inline Sum sum_of_columns(const Rows& rows, const Sum* columns, int64_t begin, int64_t end) {
    const Matrix m(rows);
    Sum sum{};
    for (int64_t block = 0; block < m.blocks; ++block)
        for (int64_t j = begin; j < end; ++j) sum.add(columns[block * m.width + j]);
    return sum;
}

// -- forward --------------------------------------------------------------------------------------------------

template <class T, class E>
void write_piece(
    const RowNormForward& call, int64_t sample, int64_t line, int64_t lines, int64_t column, int64_t width) {
    const Rows& rows = call.rows;
    ColumnMeans<E> means(width);
    std::vector<E> scales(width), shifts(width);
    for (int64_t j = 0; j < width; ++j) {
        const int64_t channel = (column + j) / rows.size, row = sample * rows.groups + channel / rows.channels;
        means.set(j, call.mean[row]);
        scales[j] = E(call.rstd[row] * value_or(call.weight, channel, 1));
        shifts[j] = E(value_or(call.bias, channel, 0));
    }
    struct Map {
        Mean<E> mean;
        Pack<E> scale, shift;
    };
    auto parameters = [&](int64_t j, auto count) {
        return Map{means.at(j, count), load<E>(scales.data() + j, count), load<E>(shifts.data() + j, count)};
    };
    const T* x = call.x.at<const T>(sample, line) + column;
    write_columns(call.y.at<T>(sample, line) + column, call.y.channel, lines, width, call.streaming, parameters,
                  [&](const Map& map, int64_t r, int64_t j, auto count) {
                      const Pack<E> deviation = map.mean.deviation(load<E>(x + r * call.x.channel + j, count));
                      return fma(deviation, map.scale, map.shift);
                  });
}

template <class T>
void forward_columns(const RowNormForward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    const Matrix matrix(rows);
    over_samples<Moments>(
        rows, 2 * rows.elements() * sizeof(T),
        [&](int64_t sample, int64_t line, int64_t lines, Moments* moments) {
            matrix.pieces([&](int64_t j, int64_t width) {
                add_column_moments(call.x.at<const T>(sample, line) + j, call.x.channel, lines, width, moments + j);
            });
        },
        [&](int64_t sample, const Moments* moments) {
            const int64_t width = rows.channels * rows.size;
            for (int64_t g = 0; g < rows.groups; ++g)
                keep_statistics(call, sample * rows.groups + g,
                                sum_of_columns(rows, moments, g * width, (g + 1) * width), [] { return false; });
        },
        [&](int64_t sample, int64_t line, int64_t lines) {
            bool tame = true;
            for (int64_t c = 0; !std::is_same_v<E, double> && c < rows.parameters(); ++c) {
                const int64_t row = sample * rows.groups + c / rows.channels;
                tame = tame && is_tame(call.mean[row], call.rstd[row] * value_or(call.weight, c, 1));
            }
            matrix.pieces([&](int64_t j, int64_t width) {
                if (tame)
                    write_piece<T, E>(call, sample, line, lines, j, width);
                else
                    write_piece<T, double>(call, sample, line, lines, j, width);
            });
            if (call.streaming) finish_streaming();
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T>
void add_piece_sums(const RowNormBackward& call, int64_t sample, int64_t line, int64_t lines, int64_t column,
                    int64_t width, Sums* total) {
    using E = Summation;
    const Rows& rows = call.rows;
    ColumnMeans<E> means(width);
    for (int64_t j = 0; j < width; ++j)
        means.set(j, call.mean[sample * rows.groups + (column + j) / rows.size / rows.channels]);
    ColumnSums<E> sums(width);
    constexpr int64_t chunk = rows_per_chunk<E>;
    for (int64_t begin = line; begin < line + lines; begin += chunk) {
        const T *dy = call.dy.at<const T>(sample, begin) + column, *x = call.x.at<const T>(sample, begin) + column;
        sums.run(std::min(chunk, line + lines - begin), width,
                 [&](Pack<E>& a, Pack<E>& b, int64_t r, int64_t j, auto count) {
                     const Pack<E> g = load<E>(dy + r * call.dy.channel + j, count);
                     a = a + g;
                     b = fma(g, means.at(j, count).deviation(load_filled<E>(x + r * call.x.channel + j, count)), b);
                 });
        for (int64_t j = 0; j < width; ++j) total[j].add({sums.first[j], sums.second[j]});
    }
}

template <class T, class E>
void write_backward_piece(const RowNormBackward& call, const ChannelSums& sums, int64_t sample, int64_t line,
                          int64_t lines, int64_t column, int64_t width) {
    const Rows& rows = call.rows;
    ColumnMeans<E> means(width);
    std::vector<E> of_dy(width), of_deviation(width), constant(width);
    for (int64_t j = 0; j < width; ++j) {
        const int64_t channel = (column + j) / rows.size;
        const RowCoefficients& k = sums.coefficients(sample * rows.groups + channel / rows.channels);
        means.set(j, k.mean);
        of_dy[j] = E(k.rstd * value_or(call.weight, channel, 1));
        of_deviation[j] = E(k.of_deviation), constant[j] = E(k.constant);
    }
    struct Map {
        Mean<E> mean;
        Pack<E> of_dy, of_deviation, constant;
    };
    auto parameters = [&](int64_t j, auto count) {
        return Map{means.at(j, count), load<E>(of_dy.data() + j, count), load<E>(of_deviation.data() + j, count),
                   load<E>(constant.data() + j, count)};
    };
    const T *dy = call.dy.at<const T>(sample, line) + column, *x = call.x.at<const T>(sample, line) + column;
    write_columns(call.dx.at<T>(sample, line) + column, call.dx.channel, lines, width, call.streaming, parameters,
                  [&](const Map& map, int64_t r, int64_t j, auto count) {
                      const Pack<E> g = load<E>(dy + r * call.dy.channel + j, count);
                      const Pack<E> deviation = map.mean.deviation(load<E>(x + r * call.x.channel + j, count));
                      return fma(g, map.of_dy, fma(deviation, map.of_deviation, map.constant));
                  });
}

template <class T>
void backward_columns(const RowNormBackward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    const Matrix matrix(rows);
    ChannelSums sums(call);
    over_samples<Sums>(
        rows, 3 * rows.elements() * sizeof(T),
        [&](int64_t sample, int64_t line, int64_t lines, Sums* columns) {
            matrix.pieces([&](int64_t j, int64_t width) {
                add_piece_sums<T>(call, sample, line, lines, j, width, columns + j);
            });
        },
        [&](int64_t sample, const Sums* columns) {
            for (int64_t c = 0; c < rows.parameters(); ++c)
                sums.of(sample, c) = sum_of_columns(rows, columns, c * rows.size, (c + 1) * rows.size);
            for (int64_t g = 0; g < rows.groups; ++g) sums.keep(sample * rows.groups + g);
        },
        [&](int64_t sample, int64_t line, int64_t lines) {
            bool tame = true;
            for (int64_t c = 0; !std::is_same_v<E, double> && c < rows.parameters(); ++c) {
                const RowCoefficients& k = sums.coefficients(sample * rows.groups + c / rows.channels);
                tame = tame && is_tame(k.mean, k.rstd * value_or(call.weight, c, 1)) &&
                       is_tame(k.constant, k.of_deviation);
            }
            matrix.pieces([&](int64_t j, int64_t width) {
                if (tame)
                    write_backward_piece<T, E>(call, sums, sample, line, lines, j, width);
                else
                    write_backward_piece<T, double>(call, sums, sample, line, lines, j, width);
            });
            if (call.streaming) finish_streaming();
        });
    sums.keep_parameter_gradients();
}

}  // namespace arraynorm::ARRAYNORM_ISA
