// Rows that are some columns of a sample's matrix: group and instance norm with channels last, or with spatial
// dimensions on both sides of the channels.
#pragma once

#include "columns.hpp"
#include "row_norm_channels.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// A sample's matrix, cut into blocks of lines, and those into pieces whose sums stay in the first-level cache.
struct Matrix {
    int64_t lines, channels, s, blocks, piece;  // channels of all groups, s columns each; so many to a piece

    explicit Matrix(const Rows& rows)
        : lines(rows.lines), channels(rows.parameters()), s(rows.size),
          blocks(std::clamp<int64_t>(lines * width() / (128 * 1024), 1, std::min<int64_t>(lines, 32))),
          piece(std::max<int64_t>(1, 1024 / std::max<int64_t>(1, s))) {}

    int64_t width() const { return channels * s; }
    int64_t first_line(int64_t block) const { return lines * block / blocks; }

    // visit(first channel, channels)
    template <class Visit>
    void pieces(Visit visit) const {
        for (int64_t c = 0; c < channels; c += piece) visit(c, std::min(piece, channels - c));
    }
};

// Some lines of some channels of a sample, as the code below walks them: `repeat` lines of memory may stand side by side.
struct Piece {
    int64_t sample, line, lines, first, channels, s, repeat;

    int64_t all() const { return channels * repeat; }
    int64_t width() const { return all() * s; }
    int64_t channel(int64_t c) const { return first + c % channels; }
    template <class T>
    T* start(const Tensor& tensor) const {
        return tensor.at<T>(sample, line) + first * s;
    }
};

// Reduces every sample's channels, keeps its rows' sums, and then writes it.
//
// reduce(piece, sums) adds to the sums of the sample's channels; keep(sample, sums of its channels); write(piece). What is
// `read` and what is `written` are arrays; how sums are cut must not depend on where results go.
template <class Sum, class Reduce, class Keep, class Write>
inline void over_samples(const Rows& rows, int64_t bytes, std::initializer_list<Tensor> read, const Tensor& written,
                         Reduce reduce, Keep keep, Write write) {
    const Matrix m(rows);
    const auto is_adjacent = [&](const Tensor& tensor) { return tensor.channel == m.width(); };
    const bool reads_adjacent = std::all_of(read.begin(), read.end(), is_adjacent);
    const bool adjacent = reads_adjacent && is_adjacent(written);
    const int64_t threads = num_threads(), sums_per_sample = m.blocks * m.channels;
    auto visit = [&](int64_t sample, int64_t block, bool adjacent, auto f) {
        const int64_t line = m.first_line(block), number = m.first_line(block + 1) - line;
        m.pieces([&](int64_t first, int64_t channels) {
            const int64_t repeat = rows_as_one(adjacent && channels == m.channels, number, channels * m.s);
            const int64_t whole = number / repeat;
            f(Piece{sample, line, whole, first, channels, m.s, repeat});
            if (whole * repeat < number)
                f(Piece{sample, line + whole * repeat, number - whole * repeat, first, channels, m.s, 1});
        });
    };
    auto reduce_block = [&](int64_t sample, int64_t block, Sum* sums) {
        visit(sample, block, reads_adjacent, [&](const Piece& piece) { reduce(piece, sums + block * m.channels); });
    };
    auto keep_sample = [&](int64_t sample, Sum* sums) {
        for (int64_t block = 1; block < m.blocks; ++block)
            for (int64_t c = 0; c < m.channels; ++c) sums[c].add(sums[block * m.channels + c]);
        keep(sample, sums);
    };
    if (threads == 1 || rows.samples >= 4 * threads || m.blocks == 1) {
        parallel_for(rows.samples, bytes, [&](int64_t sample) {
            std::vector<Sum> sums(sums_per_sample);
            for (int64_t block = 0; block < m.blocks; ++block) reduce_block(sample, block, sums.data());
            keep_sample(sample, sums.data());
            for (int64_t block = m.blocks; block-- > 0;) visit(sample, block, adjacent, write);  // the last is still in the cache
        });
        return;
    }
    std::vector<Sum> sums(rows.samples * sums_per_sample);
    parallel_for(rows.samples * m.blocks, bytes, [&](int64_t i) {
        reduce_block(i / m.blocks, i % m.blocks, sums.data() + i / m.blocks * sums_per_sample);
    });
    parallel_for(rows.samples, bytes, [&](int64_t sample) { keep_sample(sample, sums.data() + sample * sums_per_sample); });
    parallel_for(rows.samples * m.blocks, bytes, [&](int64_t i) { visit(i / m.blocks, i % m.blocks, adjacent, write); });
}

// write(E{}, piece), where E will do for all its channels; else those one by one, each as that needs.
template <class E, class IsTame, class Write>
inline void computed_by_channel(const Piece& piece, IsTame is_tame_channel, Write write) {
    bool all = true;
    for (int64_t c = piece.first; c < piece.first + piece.channels; ++c) all = all && is_tame_channel(c);
    if (all) return write(E{}, piece);
    for (int64_t c = piece.first; c < piece.first + piece.channels; ++c)
        computed<E>(is_tame_channel(c), [&](auto e) {
            write(e, Piece{piece.sample, piece.line, piece.lines * piece.repeat, c, 1, piece.s, 1});
        });
}

// The values of the piece's columns, of(channel) for each.
template <class E, int number, class Of>
inline ColumnValues<E, number> values_of(const Piece& piece, Of of) {
    ColumnValues<E, number> values(piece.width());
    for (int64_t c = 0; c < piece.all(); ++c) {
        const std::array<double, number> channel = of(piece.channel(c));
        for (int64_t j = c * piece.s; j < (c + 1) * piece.s; ++j) values.set(j, channel);
    }
    return values;
}

// -- forward --------------------------------------------------------------------------------------------------

template <class T, class E>
[[gnu::flatten]] void write_piece(const RowNormForward& call, const Piece& piece) {
    const int64_t first_row = piece.sample * call.rows.groups;
    const auto values = values_of<E, 3>(piece, [&](int64_t channel) -> std::array<double, 3> {
        const int64_t row = first_row + channel / call.rows.channels;
        const Mean<E> mean(call.mean[row]);
        const double scale = call.rstd[row] * value_or(call.weight, channel, 1);
        return {double(mean.rounded), scale, mean.constant(scale, value_or(call.bias, channel, 0))};
    });
    const T* x = piece.start<const T>(call.x);
    const int64_t distance = call.x.channel * piece.repeat;
    write_columns(piece.start<T>(call.y), call.y.channel * piece.repeat, piece.lines, piece.width(), call.streaming, values,
                  [=](const auto& v, int64_t r, int64_t j, auto count) {
                      return fma(load<E>(x + r * distance + j, count) - v[0], v[1], v[2]);
                  });
    if (call.streaming) finish_streaming();
}

template <class T>
void forward_columns(const RowNormForward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    over_samples<Moments>(
        rows, 2 * rows.elements() * sizeof(T), {call.x}, call.y,
        [&](const Piece& piece, Moments* moments) {
            channel_moments(piece.start<const T>(call.x), call.x.channel * piece.repeat, piece.lines, piece.all(), piece.s,
                            [&](int64_t c, const Moments& found) { moments[piece.channel(c)].add(found); });
        },
        [&](int64_t sample, const Moments* moments) {
            for (int64_t g = 0; g < rows.groups; ++g) {
                Moments row;
                for (int64_t c = g * rows.channels; c < (g + 1) * rows.channels; ++c) row.add(moments[c]);
                keep_statistics(call, sample * rows.groups + g, row, [] { return false; });
            }
        },
        [&](const Piece& piece) {
            auto is_tame_channel = [&](int64_t c) {
                const int64_t row = piece.sample * rows.groups + c / rows.channels;
                return is_tame<E>(call.mean[row], call.rstd[row] * value_or(call.weight, c, 1));
            };
            computed_by_channel<E>(piece, is_tame_channel,
                                   [&](auto e, const Piece& some) { write_piece<T, decltype(e)>(call, some); });
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T>
void add_piece_sums(const RowNormBackward& call, const Piece& piece, Sums* sums) {
    const double *mean = call.mean + piece.sample * call.rows.groups, *rstd = call.rstd + piece.sample * call.rows.groups;
    const int64_t per_group = call.rows.channels;
    auto group_of = [=](int64_t c) { return piece.channel(c) / per_group; };
    auto stream = [&](const Tensor& tensor) {
        return Stream<T>{piece.start<const T>(tensor), tensor.channel * piece.repeat};
    };
    channel_sums(
        stream(call.dy), stream(call.x), piece.lines, piece.all(), piece.s,
        [&](int64_t c) { return is_tame<Computation<T>>(mean[group_of(c)], rstd[group_of(c)]); },
        [&](int64_t c) { return mean[group_of(c)]; },
        [](auto dy, int64_t, int64_t, auto) __attribute__((always_inline)) { return dy; },
        [&](int64_t c, const Sums& found) { sums[piece.channel(c)].add(found); });
}

template <class T, class E>
[[gnu::flatten]] void write_backward_piece(const RowNormBackward& call, const ChannelSums& sums, const Piece& piece) {
    const int64_t first_row = piece.sample * call.rows.groups;
    const auto values = values_of<E, 4>(piece, [&](int64_t channel) -> std::array<double, 4> {
        const RowCoefficients& k = sums.coefficients(first_row + channel / call.rows.channels);
        const Mean<E> mean(k.mean);
        return {double(mean.rounded), k.rstd * value_or(call.weight, channel, 1), k.of_deviation(),
                mean.constant(k.of_deviation(), k.constant)};
    });
    const T *dy = piece.start<const T>(call.dy), *x = piece.start<const T>(call.x);
    const int64_t of_dy = call.dy.channel * piece.repeat, of_x = call.x.channel * piece.repeat;
    write_columns(piece.start<T>(call.dx), call.dx.channel * piece.repeat, piece.lines, piece.width(), call.streaming, values,
                  [=](const auto& v, int64_t r, int64_t j, auto count) {
                      return fma(load<E>(dy + r * of_dy + j, count), v[1],
                                 fma(load<E>(x + r * of_x + j, count) - v[0], v[2], v[3]));
                  });
    if (call.streaming) finish_streaming();
}

template <class T>
void backward_columns(const RowNormBackward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    ChannelSums sums(call);
    over_samples<Sums>(
        rows, 3 * rows.elements() * sizeof(T), {call.dy, call.x}, call.dx,
        [&](const Piece& piece, Sums* found) { add_piece_sums<T>(call, piece, found); },
        [&](int64_t sample, const Sums* found) {
            for (int64_t c = 0; c < rows.parameters(); ++c) sums.of(sample, c) = found[c];
            for (int64_t g = 0; g < rows.groups; ++g) sums.keep(sample * rows.groups + g);
        },
        [&](const Piece& piece) {
            auto is_tame_channel = [&](int64_t c) {
                const RowCoefficients& k = sums.coefficients(piece.sample * rows.groups + c / rows.channels);
                return is_tame<E>(k.mean, k.rstd * value_or(call.weight, c, 1)) && is_tame<E>(k.constant, k.of_deviation());
            };
            computed_by_channel<E>(piece, is_tame_channel, [&](auto e, const Piece& some) {
                write_backward_piece<T, decltype(e)>(call, sums, some);
            });
        });
    sums.keep_parameter_gradients();
}

}  // namespace arraynorm::ARRAYNORM_ISA
