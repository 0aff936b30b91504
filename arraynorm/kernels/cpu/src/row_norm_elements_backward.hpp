// The backward over rows of adjacent elements.
//
// Some rows at a time: their sums first, then dx and what they add to the parameters' gradients, while they are in the
// cache.
#pragma once

#include <bit>

#include "caches.hpp"
#include "row_norm_elements.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// How the gradients of parameters are added up: by blocks of samples or, of few samples and of large ones, by groups
// or, in a single group, by pieces of a row.
struct Sharing {
    enum { by_samples, by_groups, by_pieces } kind = by_samples;
    int64_t blocks = 1;  // of samples
    explicit Sharing(const Rows& rows) {
        const int64_t row = rows.groups * rows.channels;
        if (row >= (rows.samples < 32 ? 8192 : 32768)) {
            kind = rows.groups > 1 ? by_groups : by_pieces;
        } else {
            blocks = std::clamp<int64_t>(std::min(rows.samples / group_size, rows.samples * row / 16384), 1, 32);
        }
    }
};

// RMS norm is not `centered`: it has no mean, and no bias.
template <class T, bool centered>
struct ElementsBackward {
    using E = Computation<T>;
    const RowNormBackward& call;
    const Rows& rows;
    Blocks blocks;
    ParametersIn<E> weight;
    Exact<ParametersIn<double>> exact_weight;

    explicit ElementsBackward(const RowNormBackward& call)
        : call(call), rows(call.rows), blocks(1, rows.channels), weight(call.weight, rows.parameters(), 1) {}

    template <class F>
    const F* weight_of(int64_t column) const {
        if constexpr (std::is_same_v<F, E>)
            return weight.data() + column;
        else
            return exact_weight.made_of(call.weight, rows.parameters(), 1.0).data() + column;
    }

    // -- a row's sums

    Sums part_sums(int64_t sample, int64_t group, int64_t part) const {
        const int64_t row = sample * rows.groups + group, column = group * rows.channels;
        const T *dy = call.dy.at<const T>(sample, column), *x = call.x.at<const T>(sample, column);
        const T* fetched = fetched_with(x, call.dx.at<const T>(sample, column), rows, call.streaming);
        const double mean = mean_of(call.mean, row);
        return gradient_sums<E, centered>(
            blocks, part, mean, weight.tame() && is_tame<E>(mean, call.rstd[row]), [&](auto f, int64_t, int64_t i) {
                const auto* w = weight_of<decltype(f)>(column) + i;
                return Gradients{dy + i, x + i,
                                 [=](auto dy, int64_t j, auto count)
                                     __attribute__((always_inline)) { return dy * load<decltype(f)>(w + j, count); },
                                 fetched + i};
            });
    }

    RowCoefficients coefficients(int64_t sample, int64_t group) const {
        Sums sums;
        for (int64_t part = 0; part < blocks.parts(); ++part) sums.add(part_sums(sample, group, part));
        return row_coefficients(call, sample * rows.groups + group, sums);
    }

    // -- dx, and the parameters' gradients

    // How dx is written: with the parameters' gradients, all rows by turns; or afterwards, a row at a time.
    enum class Turns { together, together_streaming, by_row };

    Turns turns_of(int64_t number, const T* dx) const {
        const int64_t distance = call.dx.sample * sizeof(T);
        // Rows that lie a multiple of 4 KiB apart share their places in the first-level cache. On a processor where
        // that has eight ways they took three times as long by turns as one after the other; on one with twelve, 0.8.
        if (number > 1 && distance % 4096 == 0 && first_level_ways() < 12) return Turns::by_row;
        if (!call.streaming) return Turns::together;
        return distance % 64 == 0 && to_line(dx) == 0 ? Turns::together_streaming : Turns::by_row;
    }

    // One of the rows that are written together.
    template <class F>
    struct Row {
        const T *dy, *x;
        T* dx;
        Pack<F> pivot, rstd, shift, of_x_hat, constant;

        template <class Count>
        [[gnu::always_inline]] Pack<F> x_hat(int64_t i, Count count) const {
            if constexpr (!centered) return load<F>(x + i, count) * rstd;
            return fma(load<F>(x + i, count) - pivot, rstd, shift);
        }
        template <class Count>
        [[gnu::always_inline]] Pack<F> gradient(Pack<F> of_y, Pack<F> x_hat, const F* weight, Count count) const {
            return fma(of_y * rstd, load<F>(weight, count), fma(x_hat, of_x_hat, constant));
        }
    };

    // The elements from j of some rows, `packs` packs of them. `dy_ahead` and `x_ahead` are the distances to what this
    // thread reads next, or 0.
    template <int packs, Turns turns, class F, class Count>
    [[gnu::always_inline]] static void write_packs(const Row<F>* some, int64_t number, const F* weight, int64_t j,
                                                   Count count, int64_t dy_ahead, int64_t x_ahead, double* dweight,
                                                   double* dbias) {
        Pack<F> a[packs], b[packs];
        for (int p = 0; p < packs; ++p) a[p] = b[p] = Pack<F>(0);
        for (int64_t r = 0; r < number; ++r) {
            const Row<F>& row = some[r];
            if (dy_ahead)
                for (int64_t line = 0; line < packs * lanes; line += int64_t(64 / sizeof(T))) {
                    prefetch(row.dy + dy_ahead + j + line);
                    prefetch(row.x + x_ahead + j + line);
                }
            for (int p = 0; p < packs; ++p) {
                const int64_t i = j + p * lanes;
                const Pack<F> dy = load<F>(row.dy + i, count), x_hat = row.x_hat(i, count);
                a[p] = fma(dy, x_hat, a[p]);
                if constexpr (centered) b[p] = b[p] + dy;
                if constexpr (turns == Turns::by_row) continue;
                const Pack<F> dx = row.gradient(dy, x_hat, weight + i, count);
                if constexpr (turns == Turns::together_streaming && std::is_same_v<Count, Full>)
                    stream(row.dx + i, dx);
                else
                    store(row.dx + i, dx, count);
            }
        }
        for (int p = 0; p < packs; ++p) {
            const int64_t i = j + p * lanes;
            store(dweight + i, load<double>(dweight + i, count) + widened(a[p]), count);
            if constexpr (centered) store(dbias + i, load<double>(dbias + i, count) + widened(b[p]), count);
        }
    }

    // The elements [first, first + width) of `number` rows. `ahead` is the distance to the samples that this thread
    // does next, or 0.
    template <class F, Turns turns>
    [[gnu::flatten]] void write_in(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width,
                                   const RowCoefficients* k, int64_t ahead, double* dweight, double* dbias) const {
        constexpr int packs = std::max(1, 4 / Pack<F>::parts);
        const int64_t column = group * rows.channels + first;
        Row<F> some[group_size];
        for (int64_t r = 0; r < number; ++r) {
            const Mean<F> mean(k[r].mean);
            some[r] = {call.dy.at<const T>(sample + r, column),
                       call.x.at<const T>(sample + r, column),
                       call.dx.at<T>(sample + r, column),
                       Pack<F>(mean.rounded),
                       Pack<F>(F(k[r].rstd)),
                       Pack<F>(F(mean.constant(k[r].rstd, 0))),
                       Pack<F>(F(k[r].of_x_hat)),
                       Pack<F>(F(k[r].constant))};
        }
        const F* w = weight_of<F>(column);
        const int64_t dy_ahead = turns == Turns::by_row ? 0 : ahead * call.dy.sample, x_ahead = ahead * call.x.sample;
        int64_t j = 0;
        for (; j + packs * lanes <= width; j += packs * lanes)
            write_packs<packs, turns>(some, number, w, j, Full{}, dy_ahead, x_ahead, dweight, dbias);
        for (; j + lanes <= width; j += lanes) write_packs<1, turns>(some, number, w, j, Full{}, 0, 0, dweight, dbias);
        if (j < width) write_packs<1, turns>(some, number, w, j, width - j, 0, 0, dweight, dbias);
        if constexpr (turns == Turns::by_row)
            for (int64_t r = 0; r < number; ++r) {
                const Row<F> row = some[r];
                const T* next_x = ahead ? row.x + x_ahead : nullptr;
                write_run(row.dx, width, call.streaming, ahead ? row.dy + ahead * call.dy.sample : nullptr,
                          [=](int64_t i, auto count, auto) __attribute__((always_inline)) {
                              if constexpr (std::is_same_v<decltype(count), Full>)
                                  if (next_x) prefetch(next_x + i);
                              return row.gradient(load<F>(row.dy + i, count), row.x_hat(i, count), w + i, count);
                          });
            }
    }

    // The same, in double for the rows that need it.
    void write(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, const RowCoefficients* k,
               int64_t ahead, double* dweight, double* dbias) const {
        const Turns turns = turns_of(number, call.dx.at<T>(sample, group * rows.channels + first));
        const bool all = weight.tame() && std::all_of(k, k + number, [](const auto& row) { return is_tame<E>(row); });
        if (!all && number > 1) {
            for (int64_t r = 0; r < number; ++r)
                write(1, sample + r, group, first, width, k + r, ahead, dweight, dbias);
            return;
        }
        computed<E>(all, [&](auto f) {
            using F = decltype(f);
            const auto in = turns == Turns::by_row ? &ElementsBackward::write_in<F, Turns::by_row>
                            : turns == Turns::together_streaming
                                ? &ElementsBackward::write_in<F, Turns::together_streaming>
                                : &ElementsBackward::write_in<F, Turns::together>;
            (this->*in)(number, sample, group, first, width, k, ahead, dweight, dbias);
        });
    }

    // All of the rows of some samples and groups.
    void run(int64_t begin, int64_t end, int64_t group, int64_t end_group, double* dweight, double* dbias) const {
        const int64_t bundle = std::bit_floor(uint64_t(rows_in_cache<T>(rows.channels, group_size)));
        for (int64_t sample = begin; sample < end; sample += bundle) {
            const int64_t number = std::min(bundle, end - sample);
            const int64_t ahead = rows.groups == 1 && sample + 2 * bundle <= end ? bundle : 0;
            for (int64_t g = group; g < end_group; ++g) {
                RowCoefficients k[group_size];
                for (int64_t r = 0; r < number; ++r) k[r] = coefficients(sample + r, g);
                const int64_t column = (g - group) * rows.channels;
                write(number, sample, g, 0, rows.channels, k, ahead, dweight + column, dbias + column);
            }
        }
        if (call.streaming) finish_streaming();
    }

    void by_samples(int64_t number) const {
        if (number == 1) return run(0, rows.samples, 0, rows.groups, call.dweight, call.dbias);
        const int64_t width = rows.parameters();
        std::vector<double> sums(2 * number * width);
        parallel_for(number, bytes(), [&](int64_t block) {
            double* own = sums.data() + 2 * block * width;
            run(rows.samples * block / number, rows.samples * (block + 1) / number, 0, rows.groups, own, own + width);
        });
        for (int64_t block = 0; block < number; ++block)
            for (int64_t j = 0; j < width; ++j) {
                call.dweight[j] += sums[2 * block * width + j];
                call.dbias[j] += sums[(2 * block + 1) * width + j];
            }
    }

    void by_groups() const {
        const int64_t some = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, rows.channels));
        parallel_for((rows.groups + some - 1) / some, bytes(), [&](int64_t item) {
            const int64_t group = item * some, first = group * rows.channels;
            run(0, rows.samples, group, std::min(rows.groups, group + some), call.dweight + first, call.dbias + first);
        });
    }

    void by_pieces() const {
        const int64_t parts = blocks.parts(), piece = 2048;
        std::vector<Sums> sums(rows.samples * parts);
        parallel_for(rows.samples * parts, bytes(), [&](int64_t i) { sums[i] = part_sums(i / parts, 0, i % parts); });
        std::vector<RowCoefficients> k(rows.samples);
        for (int64_t row = 0; row < rows.samples; ++row) {
            Sums total;
            for (int64_t part = 0; part < parts; ++part) total.add(sums[row * parts + part]);
            k[row] = row_coefficients(call, row, total);
        }
        parallel_for((rows.channels + piece - 1) / piece, bytes(), [&](int64_t item) {
            const int64_t first = item * piece, width = std::min(piece, rows.channels - first);
            for (int64_t sample = 0; sample < rows.samples; sample += group_size)
                write(std::min<int64_t>(group_size, rows.samples - sample), sample, 0, first, width, &k[sample], 0,
                      call.dweight + first, call.dbias + first);
            if (call.streaming) finish_streaming();
        });
    }

    int64_t bytes() const { return 3 * rows.elements() * sizeof(T); }
};

template <class T, bool centered>
void backward_elements(const RowNormBackward& call) {
    const Sharing sharing(call.rows);
    const ElementsBackward<T, centered> backward(call);
    if (sharing.kind == Sharing::by_groups)
        backward.by_groups();
    else if (sharing.kind == Sharing::by_pieces)
        backward.by_pieces();
    else
        backward.by_samples(sharing.blocks);
}

}  // namespace arraynorm::ARRAYNORM_ISA
