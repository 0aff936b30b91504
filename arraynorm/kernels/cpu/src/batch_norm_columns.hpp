// Batch norm over rows of C * S adjacent elements, S of which belong to a channel: channels last and two-dimensional
// inputs (S = 1), and planes too small to be runs.
#pragma once

#include <cstdlib>
#include <numeric>

#include "batch_norm.hpp"
#include "columns.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// How the matrix of a volume is cut: by channels where a few of them fit the second-level cache with all their rows,
// and are then looked at twice for the price of once; else by rows.
struct Tiles {
    int64_t rows, channels, s;
    int64_t channels_per_tile = 0;  // 0: cut by rows
    int64_t row_blocks = 1;

    template <class T>
    static Tiles of(const Volume& v) {
        Tiles t{v.n, v.c, v.s};
        const int64_t cache = 128 * 1024 / sizeof(T), row = std::max<int64_t>(1, v.c * v.s), size = t.rows * row;
        const int64_t columns = std::clamp<int64_t>(cache / std::max<int64_t>(1, t.rows), 1, 1024);
        // Out of the third-level cache, whole rows are read faster than narrow tiles are read again. Where they are
        // few, the sums of blocks of rows, which are to be added up, are as many as the elements.
        const bool is_small = size <= 32 * cache && row <= 4096 && t.rows >= 192;
        const bool is_one_tile = std::max<int64_t>(columns, 64) >= row;
        if (is_one_tile ? size <= 2 * cache : columns >= 64 && !is_small)
            // eight channels, so that a tile begins with a byte of the mask
            t.channels_per_tile = std::max<int64_t>(1, columns / std::max<int64_t>(1, 8 * v.s)) * 8;
        else
            t.row_blocks =
                std::clamp<int64_t>(size / (is_small ? 2 * cache : 8 * cache), 1, std::clamp<int64_t>(t.rows, 1, 32));
        return t;
    }

    // Whether results alone are written by tiles, too. By rows all channels' values are expanded before, by one thread,
    // and read with every row: with few of them that is most of the work, and tiles take 0.2 to 1.0 of the time, of 64
    // float16 rows with one thread 1.1. With more the tiles are too narrow: up to 1.4.
    bool are_best_written_by_channels() const {
        return channels_per_tile && rows <= 64 && tiles() >= 2 * num_threads();
    }

    int64_t tiles() const { return channels_per_tile ? (channels + channels_per_tile - 1) / channels_per_tile : 1; }
    Tile tile(int64_t i) const {
        const int64_t number = channels_per_tile ? channels_per_tile : channels;
        return {0, rows, i * number, std::min(number, channels - i * number), s};
    }
    int64_t first_row(int64_t block) const { return rows * block / row_blocks; }
};

// Reduces all channels, keeps their sums, and then writes.
//
// reduce(tile, add) is to keep what it makes of sums over the tile, for which it calls add(span, add_rows, sums); that
// calls add_rows(rows, sums) for all rows of the span, which adds to the sums of its channels. write(tile, body) as
// with_values. What is `read` and what is `written` are arrays in the shape of x; how sums are cut must not depend on
// where results go.
template <class Reduce, class Write>
inline void over_tiles(const Tiles& t, int64_t bytes, std::initializer_list<Tensor> read,
                       std::initializer_list<Tensor> written, bool reduces, bool writes, Reduce reduce, Write write) {
    // Only whole rows are taken as one: of a tile that spans less, bits of the mask are counted by all channels.
    const int64_t whole = t.channels * t.s, of_read = common(&Tensor::sample, read) == whole ? whole : 0;
    const int64_t of_all = common(&Tensor::sample, written) == of_read ? of_read : 0;
    const Tile all{0, t.rows, 0, t.channels, t.s};
    if (reduces ? t.channels_per_tile > 0 : t.are_best_written_by_channels()) {
        parallel_for(t.tiles(), bytes, [&](int64_t i) {
            const Tile tile = t.tile(i);
            if (reduces)
                reduce(tile, [&](Span span, auto add_rows, Sums* sums) {
                    span.of(tile).widened(span.distance(of_read), [&](const Tile& rows) { add_rows(rows, sums); });
                });
            if (writes) write(tile.widest(of_all), [&](auto write_rows) { tile.widened(of_all, write_rows); });
        });
        return;
    }
    if (reduces)
        reduce(all, [&](Span span, auto add_rows, Sums* sums) {
            const int64_t number = span.end - span.begin;
            std::vector<Sums> of_blocks(t.row_blocks * number);
            parallel_for(t.row_blocks, bytes, [&](int64_t block) {
                const int64_t row = t.first_row(block);
                span.of(Tile{row, t.first_row(block + 1) - row, 0, t.channels, t.s})
                    .widened(span.distance(of_read),
                             [&](const Tile& rows) { add_rows(rows, of_blocks.data() + block * number); });
            });
            for (int64_t block = 0; block < t.row_blocks; ++block)
                for (int64_t c = 0; c < number; ++c) sums[c].add(of_blocks[block * number + c]);
        });
    if (writes)
        write(all.widest(of_all), [&](auto write_rows) {
            over_row_blocks(all, bytes, [&](const Tile& some) { some.widened(of_all, write_rows); });
        });
}

// The elements of all channels to a row of the tile, and those before its first: what bits of the mask are counted by.
inline int64_t all_to_a_row(const Volume& v, const Tile& tile) { return v.c * v.s * tile.repeat; }
inline int64_t first_bit(const Volume& v, const Tile& tile) { return (tile.row * v.c + tile.first) * v.s; }

// Whether what is read to write a tile comes out of memory; a tile of some channels sits in the cache by then.
template <class Call>
inline bool is_uncached(const Call& call, const Tile& tile) {
    return call.streaming && tile.channels == call.volume.c;
}

// -- forward --------------------------------------------------------------------------------------------------

// Whether memory is to bring what a tile of some channels needs before it does: what results replace with its sums, and
// the next tile's x while it is written. Its rows are pieces, too short for what fetches by itself. They must find room
// in the second-level cache by their addresses: those of (64, 2048, 4, 4) floats, 128 KiB apart, share their places,
// and took 1.15 of the time; 32 rows of 7 x 7 take 0.9 to 1.0, in float16 0.8 to 0.9. Backward, where memory has more
// to bring and less time, it took 0.85 to 1.1.
template <class T>
inline bool is_fetched_before(const BatchNormForward& call, const Tile& tile) {
    constexpr int64_t ways = 16, way = 128 * 1024, arrays = 3, cache = ways * way;
    const int64_t places = way / std::gcd(std::abs(call.x.sample) * int64_t(sizeof(T)), way);
    const bool is_cached = 2 * call.volume.size() * int64_t(sizeof(T)) <= cache;
    return call.writes && !call.streaming && !is_cached && tile.channels < call.volume.c && tile.rows >= 32 &&
           arrays * tile.rows <= ways * places;
}

template <class T, class Values>
[[gnu::flatten]] void write_forward(const BatchNormForward& call, const Tile& tile, const Values& values) {
    using E = typename Values::Element;
    const bool uncached = is_uncached(call, tile);
    auto x = rows_of<const T>(call.x, tile, uncached);
    const auto addend = rows_of<const T>(call.addend, tile, uncached);
    const auto y = rows_of<T>(call.y, tile);
    if (call.takes_statistics && is_fetched_before<T>(call, tile)) x.to_next = tile.width();
    auto affine = [=](const auto& v, int64_t r, int64_t j, auto count) { return y_of(load<E>(x.at(r, j), count), v); };
    if (!call.mask) return write_columns(y, tile, call.streaming, values, affine, x);
    const int64_t all = all_to_a_row(call.volume, tile), bit = first_bit(call.volume, tile);
    const bool whole_bytes = all % 8 == 0 && bit % 8 == 0 && tile.width() % 8 == 0;
    uint8_t* bytes = whole_bytes ? call.mask + bit / 8 : nullptr;
    auto sum_relu = [=](const auto& v, int64_t r, int64_t j, auto count) {
        Pack<E> sum = affine(v, r, j, count);
        if (addend.start) sum = sum + load<E>(addend.at(r, j), count);
        const auto result = converted<Computation<T>>(sum);
        if (bytes) bytes[(r * all + j) / 8] = uint8_t(positive<T>(result));
        return relu(result);
    };
    write_columns(y, tile, call.streaming, values, sum_relu, x, addend);
    if (bytes) return;
    SharedBytes ends;
    for (int64_t r = 0; r < tile.rows; ++r) {  // rows that share bytes
        MaskWriter mask(call.mask, bit + r * all, ends);
        for (int64_t j = 0; j < tile.width(); j += lanes) {
            const int64_t count = std::min<int64_t>(lanes, tile.width() - j);
            mask.put(positive<T>(load<Computation<T>>(y.at(r, j), count)), count);
        }
    }
}

template <class T>
void keep_moments(const BatchNormForward& call, const Tile& tile, auto add) {
    summed<T>(call.volume.plane_size(), [&](auto e) {
        channel_moments<decltype(e)>(
            rows_of<const T>(call.x, tile), tile,
            [&](auto type, Span span, const double* centers, Sums* sums) {
                auto add_rows = [&](const Tile& rows, Sums* total) {
                    const auto x = rows_of<const T>(call.x, rows, call.streaming);
                    const auto y = is_fetched_before<T>(call, rows) ? rows_of<T>(call.y, rows) : RowsOf<T>{};
                    add_deviations<decltype(type)>(x, rows, centers, total, y);
                };
                add(span, add_rows, sums);
            },
            [&](int64_t c, const Moments& moments) { keep_statistics(call, tile.first + c, moments); });
    });
}

template <class T>
void forward_columns(const BatchNormForward& call) {
    using E = MapType<T>;
    const Volume& v = call.volume;
    over_tiles(
        Tiles::of<T>(v), 2 * v.size() * sizeof(T), {call.x}, {call.addend, call.y}, call.takes_statistics, call.writes,
        [&](const Tile& tile, auto add) { keep_moments<T>(call, tile, add); },
        [&](const Tile& tile, auto body) {
            with_values<E>(
                tile, [&](int64_t c) { return is_tame<E>(call, c); },
                [&](auto e, int64_t c) { return coefficients<decltype(e)>(call, c); },
                [&](const Tile& rows, const auto& values) { write_forward<T>(call, rows, values); }, body);
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T, class Mask>
void keep_products(const BatchNormBackward& call, const Tile& tile, auto add) {
    summed<T>(call.volume.plane_size(), [&](auto e) {
        using E = decltype(e);
        channel_products<E>(
            tile.channels, [&](int64_t c) { return call.mean[tile.first + c]; },
            [&](int64_t c) { return is_tame<E>(call.mean[tile.first + c], call.rstd[tile.first + c]); },
            [&](auto type, Span span, const double* means, Sums* sums) {
                auto add_rows = [&](const Tile& rows, Sums* total) {
                    const auto dy = rows_of<const T>(call.dy, rows, call.streaming),
                               x = rows_of<const T>(call.x, rows, call.streaming);
                    const int64_t all = all_to_a_row(call.volume, rows);
                    const Mask mask(call.mask, first_bit(call.volume, rows));
                    auto gate = [=](auto dy, int64_t row, int64_t j, auto count)
                                    __attribute__((always_inline)) { return mask.gate(row * all + j, dy, count); };
                    add_products<decltype(type)>(dy, x, rows, means, gate, total);
                };
                add(span, add_rows, sums);
            },
            [&](int64_t c, const Sums& sums) { keep_sums(call, tile.first + c, sums); });
    });
}

template <class T, class Mask, class Values>
[[gnu::flatten]] void write_backward(const BatchNormBackward& call, const Tile& tile, const Values& values) {
    using E = typename Values::Element;
    const int64_t all = all_to_a_row(call.volume, tile);
    const bool uncached = is_uncached(call, tile);
    const auto dy = rows_of<const T>(call.dy, tile, uncached), x = rows_of<const T>(call.x, tile, uncached);
    const auto dx = rows_of<T>(call.dx, tile), daddend = rows_of<T>(call.daddend, tile);
    const Mask mask(call.mask, first_bit(call.volume, tile));
    auto gated = [=](int64_t r, int64_t j, auto count) {
        if constexpr (std::is_same_v<Mask, NoMask>) return load<E>(dy.at(r, j), count);  // as in BackwardPlane
        const auto g = mask.gate(r * all + j, load<Computation<T>>(dy.at(r, j), count), count);
        if (daddend.start) store(daddend.at(r, j), g, count);
        return converted<E>(g);
    };
    auto of_dy = [=](const auto& v, int64_t r, int64_t j, auto count) { return dx_of(gated(r, j, count), v); };
    if (!call.mean_dy) return write_columns(dx, tile, call.streaming, values, of_dy, dy);
    auto of_both = [=](const auto& v, int64_t r, int64_t j, auto count) {
        return dx_of(gated(r, j, count), load<E>(x.at(r, j), count), v);
    };
    write_columns(dx, tile, call.streaming, values, of_both, dy, x);
}

template <class T, class Mask>
void backward_columns(const BatchNormBackward& call) {
    using E = MapType<T>;
    const Volume& v = call.volume;
    over_tiles(
        Tiles::of<T>(v), 3 * v.size() * sizeof(T), {call.dy, call.x}, {call.dx, call.daddend}, call.reduces,
        call.writes, [&](const Tile& tile, auto add) { keep_products<T, Mask>(call, tile, add); },
        [&](const Tile& tile, auto body) {
            with_values<E>(
                tile, [&](int64_t c) { return is_tame<E>(call, c); },
                [&](auto e, int64_t c) { return coefficients<decltype(e)>(call, c); },
                [&](const Tile& rows, const auto& values) { write_backward<T, Mask>(call, rows, values); }, body);
        });
}

}  // namespace arraynorm::ARRAYNORM_ISA
