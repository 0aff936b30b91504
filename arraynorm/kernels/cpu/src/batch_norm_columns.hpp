// Batch norm over rows of C * S adjacent elements, S of which belong to a channel: channels last and two-dimensional
// inputs (S = 1), and planes too small to be runs.
#pragma once

#include "batch_norm.hpp"
#include "columns.hpp"
#include "parallel.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// Some rows of some channels, as the code below walks them: `repeat` rows of memory may stand side by side in one.
struct Tile {
    int64_t row, rows;  // as walked; the first is that of memory
    int64_t first, channels, s, repeat;

    int64_t all() const { return channels * repeat; }
    int64_t width() const { return all() * s; }
    int64_t channel(int64_t c) const { return first + c % channels; }
};

// How the matrix of a volume is cut: by channels where a few of them fit the second-level cache with all their rows, and
// are then looked at twice for the price of once; else by rows.
struct Tiles {
    int64_t rows, channels, s;
    int64_t channels_per_tile = 0;  // 0: cut by rows
    int64_t row_blocks = 1;

    template <class T>
    static Tiles of(const Volume& v) {
        Tiles t{v.n, v.c, v.s};
        const int64_t cache = 128 * 1024 / sizeof(T), row = std::max<int64_t>(1, v.c * v.s);
        const int64_t columns = std::clamp<int64_t>(cache / std::max<int64_t>(1, t.rows), 1, 1024);
        // the rows of a tile would share their places in the cache, so that it would not hold them
        const bool crowded = row * sizeof(T) % 4096 == 0 && v.size() * sizeof(T) <= (4 << 20);
        if (!crowded && (columns >= 64 || columns >= row))
            // eight channels, so that a tile begins with a byte of the mask
            t.channels_per_tile = std::max<int64_t>(1, columns / std::max<int64_t>(1, 8 * v.s)) * 8;
        else
            t.row_blocks = std::clamp<int64_t>(t.rows * row / (8 * cache), 1, std::clamp<int64_t>(t.rows, 1, 32));
        return t;
    }

    int64_t tiles() const { return (channels + channels_per_tile - 1) / channels_per_tile; }
    int64_t first_row(int64_t block) const { return rows * block / row_blocks; }

    // visit(tile) for some rows of some channels; `adjacent` where the rows of all arrays that it goes through lie side by side
    template <class Visit>
    void visit(int64_t row, int64_t number, int64_t first, int64_t some, bool adjacent, Visit f) const {
        const int64_t repeat = rows_as_one(adjacent && some == channels, number, some * s), whole = number / repeat;
        f(Tile{row, whole, first, some, s, repeat});
        if (whole * repeat < number) f(Tile{row + whole * repeat, number - whole * repeat, first, some, s, 1});
    }
};

// Reduces all channels, keeps their sums, and then writes.
//
// reduce(tile, sums) adds to the sums of its channels; keep(c, sum); write(tile). What is `read` and what is `written` are
// arrays in the shape of x; how sums are cut must not depend on where results go.
template <class Sum, class Reduce, class Keep, class Write>
inline void over_tiles(const Volume& v, const Tiles& t, int64_t bytes, std::initializer_list<Tensor> read,
                       std::initializer_list<Tensor> written, bool reduces, bool writes, Reduce reduce, Keep keep, Write write) {
    const auto is_adjacent = [&](const Tensor& tensor) { return !tensor || tensor.sample == v.c * v.s; };
    const bool reads_adjacent = std::all_of(read.begin(), read.end(), is_adjacent);
    const bool adjacent = reads_adjacent && std::all_of(written.begin(), written.end(), is_adjacent);
    if (t.channels_per_tile && reduces) {
        parallel_for(t.tiles(), bytes, [&](int64_t tile) {
            const int64_t c = tile * t.channels_per_tile, number = std::min(t.channels_per_tile, t.channels - c);
            std::vector<Sum> sums(number);
            t.visit(0, t.rows, c, number, reads_adjacent, [&](const Tile& some) { reduce(some, sums.data()); });
            for (int64_t k = 0; k < number; ++k) keep(c + k, sums[k]);
            if (writes) t.visit(0, t.rows, c, number, adjacent, write);
        });
        return;
    }
    if (reduces) {
        std::vector<Sum> sums(t.row_blocks * t.channels);
        parallel_for(t.row_blocks, bytes, [&](int64_t block) {
            const int64_t row = t.first_row(block);
            t.visit(row, t.first_row(block + 1) - row, 0, t.channels, reads_adjacent,
                    [&](const Tile& some) { reduce(some, sums.data() + block * t.channels); });
        });
        for (int64_t c = 0; c < t.channels; ++c) {
            Sum sum{};
            for (int64_t block = 0; block < t.row_blocks; ++block) sum.add(sums[block * t.channels + c]);
            keep(c, sum);
        }
    }
    if (writes) {
        // more and smaller items than for the sums, for nothing is added up
        const int64_t rows = std::max<int64_t>(4, 64 * 1024 / std::max<int64_t>(1, t.channels * t.s));
        const int64_t items = (t.rows + rows - 1) / rows;
        parallel_for(items, bytes, [&](int64_t item) {
            const int64_t i = items - 1 - item;  // the last rows are still in the cache
            t.visit(i * rows, std::min(rows, t.rows - i * rows), 0, t.channels, adjacent, write);
        });
    }
}

// write(E{}, tile), where E will do for all channels of the tile; else its channels one by one, each as that needs.
template <class E, class Call, class Write>
inline void write_tile(const Call& call, const Tile& tile, Write write) {
    bool all = true;
    for (int64_t c = tile.first; c < tile.first + tile.channels; ++c) all = all && is_tame<E>(call, c);
    if (all) return write(E{}, tile);
    for (int64_t c = tile.first; c < tile.first + tile.channels; ++c)
        computed<E>(is_tame<E>(call, c),
                    [&](auto e) { write(e, Tile{tile.row, tile.rows * tile.repeat, c, 1, tile.s, 1}); });
}

// The values of the tile's columns, of(channel) for each.
template <class E, int number, class Of>
inline ColumnValues<E, number> values_of(const Tile& tile, Of of) {
    ColumnValues<E, number> values(tile.width());
    for (int64_t c = 0; c < tile.all(); ++c) {
        const std::array<double, number> channel = of(tile.channel(c));
        for (int64_t j = c * tile.s; j < (c + 1) * tile.s; ++j) values.set(j, channel);
    }
    return values;
}

// -- forward --------------------------------------------------------------------------------------------------

template <class T, class E>
[[gnu::flatten]] void write_forward(const BatchNormForward& call, const Tile& tile) {
    const int64_t distance = call.x.sample * tile.repeat, of_y = call.y.sample * tile.repeat,
                  of_addend = call.addend.sample * tile.repeat;
    const auto values = values_of<E, 3>(tile, [&](int64_t c) -> std::array<double, 3> {
        const Mean<E> mean(call.mean[c]);
        const double scale = forward_scale(call, c);
        return {double(mean.rounded), scale, mean.constant(scale, call.bias ? call.bias[c] : 0)};
    });
    const T *x = call.x.at<const T>(tile.row, tile.first),
            *addend = call.addend ? call.addend.at<const T>(tile.row, tile.first) : nullptr;
    T* y = call.y.at<T>(tile.row, tile.first);
    auto affine = [=](const auto& v, int64_t r, int64_t j, auto count) {
        return fma(load<E>(x + r * distance + j, count) - v[0], v[1], v[2]);
    };
    if (!call.mask) {
        write_columns(y, of_y, tile.rows, tile.width(), call.streaming, values, affine);
    } else {
        const int64_t all = call.volume.c * tile.s, bit = tile.row * all + tile.first * tile.s;
        const bool whole_bytes = all % 8 == 0 && bit % 8 == 0 && tile.width() % 8 == 0;
        uint8_t* bytes = whole_bytes ? call.mask + bit / 8 : nullptr;
        write_columns(y, of_y, tile.rows, tile.width(), call.streaming, values,
                      [=](const auto& v, int64_t r, int64_t j, auto count) {
                          Pack<E> result = affine(v, r, j, count);
                          if (addend) result = result + load<E>(addend + r * of_addend + j, count);
                          if (bytes) bytes[(r * tile.repeat * all + j) / 8] = uint8_t(positive<T>(result));
                          return relu(result);
                      });
        if (!bytes)  // rows that share bytes
            for (int64_t r = 0; r < tile.rows; ++r) {
                MaskWriter mask(call.mask, bit + r * tile.repeat * all);
                const T* out = y + r * of_y;
                for (int64_t j = 0; j < tile.width(); j += lanes) {
                    const int64_t count = std::min<int64_t>(lanes, tile.width() - j);
                    mask.put(positive<T>(load<Computation<T>>(out + j, count)), count);
                }
            }
    }
    if (call.streaming) finish_streaming();
}

template <class T>
void forward_columns(const BatchNormForward& call) {
    const Volume& v = call.volume;
    over_tiles<Moments>(
        v, Tiles::of<T>(v), 2 * v.size() * sizeof(T), {call.x}, {call.addend, call.y}, call.takes_statistics, call.writes,
        [&](const Tile& tile, Moments* moments) {
            channel_moments(call.x.at<const T>(tile.row, tile.first), call.x.sample * tile.repeat, tile.rows, tile.all(), tile.s,
                            [&](int64_t c, const Moments& found) { moments[c % tile.channels].add(found); });
        },
        [&](int64_t c, const Moments& moments) { keep_statistics(call, c, moments); },
        [&](const Tile& tile) {
            write_tile<Mapping<T>>(call, tile, [&](auto e, const Tile& some) { write_forward<T, decltype(e)>(call, some); });
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T, class Mask>
void add_backward_sums(const BatchNormBackward& call, const Tile& tile, Sums* total) {
    const int64_t all = call.volume.c * tile.s * tile.repeat;
    const Mask mask(call.mask, (tile.row * call.volume.c + tile.first) * tile.s);
    auto stream = [&](const Tensor& tensor) {
        return Stream<T>{tensor.at<const T>(tile.row, tile.first), tensor.sample * tile.repeat};
    };
    channel_sums(
        stream(call.dy), stream(call.x), tile.rows, tile.all(), tile.s,
        [&](int64_t c) { return is_tame<Computation<T>>(call.mean[tile.channel(c)], call.rstd[tile.channel(c)]); },
        [&](int64_t c) { return call.mean[tile.channel(c)]; },
        [=](auto dy, int64_t row, int64_t j, auto count)
            __attribute__((always_inline)) { return mask.gate(row * all + j, dy, count); },
        [&](int64_t c, const Sums& sums) { total[c % tile.channels].add(sums); });
}

template <class T, class E, class Mask>
[[gnu::flatten]] void write_backward(const BatchNormBackward& call, const Tile& tile) {
    const int64_t all = call.volume.c * tile.s * tile.repeat;
    const int64_t of_dy = call.dy.sample * tile.repeat, of_x = call.x.sample * tile.repeat,
                  of_dx = call.dx.sample * tile.repeat, of_daddend = call.daddend.sample * tile.repeat;
    const bool needs_x = call.mean_dy;
    const auto values = values_of<E, 4>(tile, [&](int64_t c) -> std::array<double, 4> {
        const BackwardCoefficients k = backward_coefficients(call, c);
        const Mean<E> mean(needs_x ? call.mean[c] : 0);
        return {double(mean.rounded), k.of_dy, k.of_deviation, mean.constant(k.of_deviation, k.constant)};
    });
    const T *dy = call.dy.at<const T>(tile.row, tile.first), *x = call.x.at<const T>(tile.row, tile.first);
    T* daddend = call.daddend ? call.daddend.at<T>(tile.row, tile.first) : nullptr;
    const Mask mask(call.mask, (tile.row * call.volume.c + tile.first) * tile.s);
    write_columns(call.dx.at<T>(tile.row, tile.first), of_dx, tile.rows, tile.width(), call.streaming, values,
                  [=](const auto& v, int64_t r, int64_t j, auto count) {
                      const Pack<E> g = mask.gate(r * all + j, load<E>(dy + r * of_dy + j, count), count);
                      if (daddend) store(daddend + r * of_daddend + j, g, count);
                      if (!needs_x) return g * v[1];
                      return fma(g, v[1], fma(load<E>(x + r * of_x + j, count) - v[0], v[2], v[3]));
                  });
    if (call.streaming) finish_streaming();
}

template <class T, class Mask>
void backward_columns(const BatchNormBackward& call) {
    const Volume& v = call.volume;
    over_tiles<Sums>(
        v, Tiles::of<T>(v), 3 * v.size() * sizeof(T), {call.dy, call.x}, {call.dx, call.daddend}, call.reduces, call.writes,
        [&](const Tile& tile, Sums* sums) { add_backward_sums<T, Mask>(call, tile, sums); },
        [&](int64_t c, const Sums& sums) { keep_sums(call, c, sums); },
        [&](const Tile& tile) {
            write_tile<Mapping<T>>(call, tile,
                                   [&](auto e, const Tile& some) { write_backward<T, decltype(e), Mask>(call, some); });
        });
}

}  // namespace arraynorm::ARRAYNORM_ISA
