// The backward over rows of adjacent elements.
//
// Some rows at a time, or one: their sums first, then dx and what they add to the parameters' gradients, while they are
// in the cache.
#pragma once

#include <bit>
#include <memory>

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

    // How some rows' dx is written, with what they add to the parameters' gradients.
    enum class Turns {
        one_by_one,  // each after its sums, before those of the next; the gradients' sums go on in an array
        together     // some elements of all rows, and then the next; the gradients' sums stay in registers
    };

    // Of `number` rows of `width` elements.
    Turns turns_of(int64_t number, int64_t width) const {
        const int64_t distance = call.dx.sample * sizeof(T);
        if (number == 1) return Turns::together;
        // Rows that lie a multiple of 4 KiB apart share their places in the first-level cache. On a processor where
        // that has eight ways they took three times as long by turns as one after the other; on one with twelve, 0.8.
        if (distance % 4096 == 0 && first_level_ways() < 12) return Turns::one_by_one;
        if (!call.streaming) return Turns::together;
        // Streamed together, the rows' cache lines must begin at the same elements.
        if (distance % 64 != 0) return Turns::one_by_one;
        // One stream to memory takes 0.86 to 0.96 of the time of eight, if the first-level cache holds the row, the
        // weights and the gradients' sums; not in 16 bits, which take longer to compute.
        const int64_t bytes = width * int64_t(3 * sizeof(T) + (centered ? 3 : 2) * sizeof(E));
        return sizeof(T) > 2 && bytes <= 24 * 1024 ? Turns::one_by_one : Turns::together;
    }

    // A row, while it is written.
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

    // Sums of the parameters' gradients are carried from row to row in F; or what some rows make is added to totals.
    template <class F, bool carried>
    using Sum = std::conditional_t<carried, F, double>;

    bool is_row_tame(const RowCoefficients& k) const { return weight.tame() && is_tame<E>(k); }

    // What goes with rows: the weights, the sums, and the distances to what this thread reads next, if it does.
    template <class F, bool carried>
    struct Company {
        const F* weight;
        Sum<F, carried>*dweight, *dbias;
        bool fetches;
        int64_t dy_ahead, x_ahead;
    };

    // The elements from j of some rows, `packs` packs of them.
    template <int packs, bool streams, class F, bool carried, class Count>
    [[gnu::always_inline]] static void write_packs(const Row<F>* some, int64_t number, const Company<F, carried>& with,
                                                   int64_t j, Count count) {
        Pack<F> a[packs], b[packs];
        for (int p = 0; p < packs; ++p)
            if constexpr (carried) {
                a[p] = load<F>(with.dweight + j + p * lanes, count);
                if constexpr (centered) b[p] = load<F>(with.dbias + j + p * lanes, count);
            } else {
                a[p] = b[p] = Pack<F>(0);
            }
        for (int64_t r = 0; r < number; ++r) {
            const Row<F>& row = some[r];
            if (with.fetches)
                for (int64_t line = 0; line < packs * lanes; line += int64_t(64 / sizeof(T))) {
                    prefetch(row.dy + with.dy_ahead + j + line);
                    prefetch(row.x + with.x_ahead + j + line);
                }
            for (int p = 0; p < packs; ++p) {
                const int64_t i = j + p * lanes;
                const Pack<F> dy = load<F>(row.dy + i, count), x_hat = row.x_hat(i, count);
                a[p] = fma(dy, x_hat, a[p]);
                if constexpr (centered) b[p] = b[p] + dy;
                const Pack<F> dx = row.gradient(dy, x_hat, with.weight + i, count);
                if constexpr (streams)
                    stream(row.dx + i, dx, count);
                else
                    store(row.dx + i, dx, count);
            }
        }
        for (int p = 0; p < packs; ++p) {
            const int64_t i = j + p * lanes;
            if constexpr (carried) {
                store(with.dweight + i, a[p], count);
                if constexpr (centered) store(with.dbias + i, b[p], count);
            } else {
                store(with.dweight + i, load<double>(with.dweight + i, count) + widened(a[p]), count);
                if constexpr (centered)
                    store(with.dbias + i, load<double>(with.dbias + i, count) + widened(b[p]), count);
            }
        }
    }

    // The elements [first, first + width) of `number` rows. `ahead` is the distance to the samples that this thread
    // does next, or 0.
    template <bool streams, class F, bool carried>
    [[gnu::flatten]] void write_by(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width,
                                   const RowCoefficients* k, int64_t ahead, Sum<F, carried>* dweight,
                                   Sum<F, carried>* dbias) const {
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
        const int64_t bytes_of_x = call.rows.elements() * sizeof(T);
        const bool early = is_fetched_early(bytes_of_x, bytes_of_x, !call.streaming);
        const Company<F, carried> with{weight_of<F>(column),
                                       dweight,
                                       dbias,
                                       ahead != 0,
                                       ahead * call.dy.sample,
                                       early ? ahead * call.x.sample : 0};
        const Company<F, carried> without_next{with.weight, dweight, dbias, false, 0, 0};
        int64_t j = 0;
        auto write_part = [&](int64_t count) __attribute__((always_inline)) {
            if (count == 0) return;
            write_packs<1, streams>(some, number, without_next, j, count);
            j += count;
        };
        auto write_to = [&](int64_t to) __attribute__((always_inline)) {
            for (; j + lanes <= to; j += lanes) write_packs<1, streams>(some, number, without_next, j, Full{});
        };
        if (streams) {  // up to a line's end
            const int64_t head = to_line(some[0].dx);
            write_part(std::min(head % lanes, width));
            write_to(std::min(head, width));
        }
        for (; j + packs * lanes <= width; j += packs * lanes)
            write_packs<packs, streams>(some, number, with, j, Full{});
        write_to(width);
        write_part(width - j);
    }
    // The same, streamed or not.
    template <class F, bool carried>
    void write_in(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, const RowCoefficients* k,
                  int64_t ahead, Sum<F, carried>* dweight, Sum<F, carried>* dbias) const {
        const auto way = call.streaming ? &ElementsBackward::write_by<true, F, carried>
                                        : &ElementsBackward::write_by<false, F, carried>;
        (this->*way)(number, sample, group, first, width, k, ahead, dweight, dbias);
    }

    // The elements [first, first + width) of `number` rows; coefficients_of(r) takes a row's sums. `left` is the number
    // of samples from here on that this thread does, if one follows the other in memory; `sums` is room for those of
    // rows.
    template <class CoefficientsOf>
    void write(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, int64_t left,
               std::vector<E>& sums, double* dweight, double* dbias, CoefficientsOf coefficients_of) const {
        if (turns_of(number, width) == Turns::one_by_one)
            return write_one_by_one(number, sample, group, first, width, left > number, sums, dweight, dbias,
                                    coefficients_of);
        RowCoefficients k[group_size];
        for (int64_t r = 0; r < number; ++r) k[r] = coefficients_of(r);
        const int64_t ahead = left >= 2 * number ? number : 0;
        if (std::all_of(k, k + number, [&](const auto& row) { return is_row_tame(row); }))
            return write_in<E, false>(number, sample, group, first, width, k, ahead, dweight, dbias);
        write_one_by_one(number, sample, group, first, width, ahead, sums, dweight, dbias,
                         [&](int64_t r) { return k[r]; });
    }

    // In double the rows that need it. `ahead` as above.
    template <class CoefficientsOf>
    void write_one_by_one(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, int64_t ahead,
                          std::vector<E>& sums, double* dweight, double* dbias, CoefficientsOf coefficients_of) const {
        sums.assign((centered ? 2 : 1) * width, E(0));
        for (int64_t r = 0; r < number; ++r) {
            const RowCoefficients k = coefficients_of(r);
            if (is_row_tame(k))
                write_in<E, true>(1, sample + r, group, first, width, &k, ahead, sums.data(), sums.data() + width);
            else
                write_in<double, false>(1, sample + r, group, first, width, &k, ahead, dweight, dbias);
        }
        for (int64_t j = 0; j < width; ++j) dweight[j] += double(sums[j]);
        for (int64_t j = 0; centered && j < width; ++j) dbias[j] += double(sums[width + j]);
    }

    // All of the rows of some samples and groups.
    void run(int64_t begin, int64_t end, int64_t group, int64_t end_group, double* dweight, double* dbias) const {
        const int64_t bundle = std::bit_floor(uint64_t(rows_in_cache<T>(rows.channels, group_size)));
        std::vector<E> sums;
        for (int64_t sample = begin; sample < end; sample += bundle)
            for (int64_t g = group; g < end_group; ++g) {
                const int64_t column = (g - group) * rows.channels;
                write(std::min(bundle, end - sample), sample, g, 0, rows.channels, rows.groups == 1 ? end - sample : 0,
                      sums, dweight + column, dbias + column, [&](int64_t r) { return coefficients(sample + r, g); });
            }
        if (call.streaming) finish_streaming();
    }

    void by_samples(int64_t number) const {
        if (number == 1) return run(0, rows.samples, 0, rows.groups, call.dweight, call.dbias);
        const int64_t width = rows.parameters();
        auto run_block = [&](int64_t block, double* own) {
            std::fill_n(own, 2 * width, 0.0);
            run(rows.samples * block / number, rows.samples * (block + 1) / number, 0, rows.groups, own, own + width);
        };
        auto add = [&](const double* of_weight, int64_t begin, int64_t end) {
            const double* of_bias = of_weight + width;
            for (int64_t j = begin; j < end; ++j) call.dweight[j] += of_weight[j];
            for (int64_t j = begin; centered && j < end; ++j) call.dbias[j] += of_bias[j];
        };
        // Of two NaNs a sum has the sign of either, as the compiler likes, which is not the same in both ways below.
        auto quiet_all = [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) call.dweight[j] = quiet(call.dweight[j]);
            for (int64_t j = begin; centered && j < end; ++j) call.dbias[j] = quiet(call.dbias[j]);
        };
        if (num_threads() == 1) {  // the same sums, of one block after the other, which stay in the cache
            std::vector<double> own(2 * width);
            for (int64_t block = 0; block < number; ++block) run_block(block, own.data()), add(own.data(), 0, width);
            return quiet_all(0, width);
        }
        // set to zero, and added up, where they are used: otherwise one thread does it while the others wait
        const auto sums = std::make_unique_for_overwrite<double[]>(2 * number * width);
        parallel_for(number, bytes(), [&](int64_t block) { run_block(block, sums.get() + 2 * block * width); });
        const int64_t some = std::max<int64_t>(64, width / 8), items = (width + some - 1) / some;
        parallel_for(items, 2 * number * width * int64_t(sizeof(double)), [&](int64_t item) {
            const int64_t begin = item * some, end = std::min(width, begin + some);
            for (int64_t block = 0; block < number; ++block) add(sums.get() + 2 * block * width, begin, end);
            quiet_all(begin, end);
        });
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
            std::vector<E> of_rows;
            for (int64_t sample = 0; sample < rows.samples; sample += group_size)
                write(std::min<int64_t>(group_size, rows.samples - sample), sample, 0, first, width, 0, of_rows,
                      call.dweight + first, call.dbias + first, [&](int64_t r) { return k[sample + r]; });
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
