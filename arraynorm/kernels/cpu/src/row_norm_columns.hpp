// Rows that are some columns of a sample's matrix: group and instance norm with channels last, or with spatial
// dimensions on both sides of the channels.
#pragma once

#include "columns.hpp"
#include "row_norm_channels.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// A sample's matrix, cut into blocks of lines, and those into tiles whose sums stay in the first-level cache.
struct Matrix {
    int64_t lines, channels, s, blocks, some;  // channels of all groups, s columns each; so many to a tile

    explicit Matrix(const Rows& rows)
        : lines(rows.lines),
          channels(rows.parameters()),
          s(rows.size),
          blocks(std::clamp<int64_t>(lines * width() / (128 * 1024), 1, std::clamp<int64_t>(lines, 1, 32))),
          some(std::max<int64_t>(1, 1024 / std::max<int64_t>(1, s))) {}

    int64_t width() const { return channels * s; }
    int64_t first_line(int64_t block) const { return lines * block / blocks; }

    // visit(tile) for all of a block
    template <class Visit>
    void tiles(int64_t block, Visit visit) const {
        const int64_t line = first_line(block), number = first_line(block + 1) - line;
        for (int64_t c = 0; c < channels; c += some) visit(Tile{line, number, c, std::min(some, channels - c), s});
    }
};

// Reduces every sample's channels, keeps its rows' sums, and then writes it.
//
// reduce(sample, tile, add, sums) adds to the sums of the sample's channels what it makes of add(add_rows, total), as
// in over_tiles of batch norm; keep(sample, sums of its channels); write(sample, tile). What is `read` and what is
// `written` are arrays; how sums are cut must not depend on where results go.
template <class Sum, class Reduce, class Keep, class Write>
inline void over_samples(const Rows& rows, int64_t bytes, std::initializer_list<Tensor> read, const Tensor& written,
                         Reduce reduce, Keep keep, Write write) {
    const Matrix m(rows);
    const int64_t of_read = common(&Tensor::channel, read), of_all = written.channel == of_read ? of_read : 0;
    const int64_t threads = num_threads(), sums_per_sample = m.blocks * m.channels;
    auto reduce_block = [&](int64_t sample, int64_t block, Sum* sums) {
        m.tiles(block, [&](const Tile& tile) {
            auto add = [&](Span span, auto add_rows, Sums* total) {
                span.of(tile).widened(span.distance(of_read), [&](const Tile& some) { add_rows(some, total); });
            };
            reduce(sample, tile, add, sums + block * m.channels);
        });
    };
    auto write_block = [&](int64_t sample, int64_t block) {
        m.tiles(block, [&](const Tile& tile) {
            write(sample, tile.widest(of_all), [&](auto write_rows) { tile.widened(of_all, write_rows); });
        });
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
            for (int64_t block = m.blocks; block-- > 0;) write_block(sample, block);  // the last is still in the cache
        });
        return;
    }
    std::vector<Sum> sums(rows.samples * sums_per_sample);
    parallel_for(rows.samples * m.blocks, bytes, [&](int64_t i) {
        reduce_block(i / m.blocks, i % m.blocks, sums.data() + i / m.blocks * sums_per_sample);
    });
    parallel_for(rows.samples, bytes,
                 [&](int64_t sample) { keep_sample(sample, sums.data() + sample * sums_per_sample); });
    parallel_for(rows.samples * m.blocks, bytes, [&](int64_t i) { write_block(i / m.blocks, i % m.blocks); });
}

template <class T>
inline RowsOf<T> rows_of(const Tensor& tensor, int64_t sample, const Tile& tile, bool uncached = false) {
    return {tensor.at<T>(sample, tile.row) + tile.first * tile.s, tensor.channel * tile.repeat, uncached};
}

// -- forward --------------------------------------------------------------------------------------------------

template <class T, class Values>
[[gnu::flatten]] void write_forward(const RowNormForward& call, int64_t sample, const Tile& tile,
                                    const Values& values) {
    using E = typename Values::Element;
    const auto x = rows_of<const T>(call.x, sample, tile, call.streaming);
    auto affine = [=](const auto& v, int64_t r, int64_t j, auto count) {
        return fma(load<E>(x.at(r, j), count) - v[0], v[1], v[2]);
    };
    write_columns(rows_of<T>(call.y, sample, tile), tile, call.streaming, values, affine, x);
}

template <class T>
void forward_columns(const RowNormForward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    over_samples<Moments>(
        rows, 2 * rows.elements() * sizeof(T), {call.x}, call.y,
        [&](int64_t sample, const Tile& tile, auto add, Moments* moments) {
            const auto x = rows_of<const T>(call.x, sample, tile);
            channel_moments<E>(
                x, tile,
                [&](auto type, Span span, const double* centers, Sums* found) {
                    auto add_rows = [&](const Tile& some, Sums* total) {
                        const auto x = rows_of<const T>(call.x, sample, some, call.streaming);
                        add_deviations<decltype(type)>(x, some, centers, total);
                    };
                    add(span, add_rows, found);
                },
                [&](int64_t c, const Moments& found) { moments[tile.first + c].add(found); });
        },
        [&](int64_t sample, const Moments* moments) {
            for (int64_t g = 0; g < rows.groups; ++g) {
                Moments row;
                for (int64_t c = g * rows.channels; c < (g + 1) * rows.channels; ++c) row.add(moments[c]);
                keep_statistics(call, sample * rows.groups + g, row, [] { return false; });
            }
        },
        [&](int64_t sample, const Tile& tile, auto body) {
            auto row_of = [&](int64_t c) { return sample * rows.groups + c / rows.channels; };
            auto scale = [&](int64_t c) { return call.rstd[row_of(c)] * call.weight.value_or(c, 1); };
            with_values<E>(
                tile, [&](int64_t c) { return is_tame<E>(call.mean[row_of(c)], scale(c)); },
                [&](auto e, int64_t c) -> std::array<double, 3> {
                    const Mean<decltype(e)> mean(call.mean[row_of(c)]);
                    return {double(mean.rounded), scale(c), mean.constant(scale(c), call.bias.value_or(c, 0))};
                },
                [&](const Tile& some, const auto& values) { write_forward<T>(call, sample, some, values); }, body);
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T, class Values>
[[gnu::flatten]] void write_backward(const RowNormBackward& call, int64_t sample, const Tile& tile,
                                     const Values& values) {
    using E = typename Values::Element;
    const auto dy = rows_of<const T>(call.dy, sample, tile, call.streaming),
               x = rows_of<const T>(call.x, sample, tile, call.streaming);
    auto of_both = [=](const auto& v, int64_t r, int64_t j, auto count) {
        return fma(load<E>(dy.at(r, j), count), v[1], fma(load<E>(x.at(r, j), count) - v[0], v[2], v[3]));
    };
    write_columns(rows_of<T>(call.dx, sample, tile), tile, call.streaming, values, of_both, dy, x);
}

template <class T>
void backward_columns(const RowNormBackward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    ChannelSums sums(call);
    over_samples<Sums>(
        rows, 3 * rows.elements() * sizeof(T), {call.dy, call.x}, call.dx,
        [&](int64_t sample, const Tile& tile, auto add, Sums* found) {
            auto row_of = [&](int64_t c) { return sample * rows.groups + (tile.first + c) / rows.channels; };
            channel_products<E>(
                tile.channels, [&](int64_t c) { return call.mean[row_of(c)]; },
                [&](int64_t c) { return is_tame<E>(call.mean[row_of(c)], call.rstd[row_of(c)]); },
                [&](auto type, Span span, const double* means, Sums* of_span) {
                    auto add_rows = [&](const Tile& some, Sums* total) {
                        const auto dy = rows_of<const T>(call.dy, sample, some, call.streaming),
                                   x = rows_of<const T>(call.x, sample, some, call.streaming);
                        add_products<decltype(type)>(dy, x, some, means, Ungated{}, total);
                    };
                    add(span, add_rows, of_span);
                },
                [&](int64_t c, const Sums& sums) { found[tile.first + c].add(sums); });
        },
        [&](int64_t sample, const Sums* found) {
            for (int64_t c = 0; c < rows.parameters(); ++c) sums.of(sample, c) = found[c];
            for (int64_t g = 0; g < rows.groups; ++g) sums.keep(sample * rows.groups + g);
        },
        [&](int64_t sample, const Tile& tile, auto body) {
            auto of_row = [&](int64_t c) -> const RowCoefficients& {
                return sums.coefficients(sample * rows.groups + c / rows.channels);
            };
            with_values<E>(
                tile, [&](int64_t c) { return is_tame<E>(of_row(c), call.weight.value_or(c, 1)); },
                [&](auto e, int64_t c) -> std::array<double, 4> {
                    const RowCoefficients& k = of_row(c);
                    const Mean<decltype(e)> mean(k.mean);
                    return {double(mean.rounded), k.rstd * call.weight.value_or(c, 1), k.of_deviation(),
                            mean.constant(k.of_deviation(), k.constant)};
                },
                [&](const Tile& some, const auto& values) { write_backward<T>(call, sample, some, values); }, body);
        });
    sums.keep_parameter_gradients();
}

}  // namespace arraynorm::ARRAYNORM_ISA
