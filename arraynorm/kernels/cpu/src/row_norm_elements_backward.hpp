// The backward over rows of adjacent elements.
//
// Some rows at a time, while they are in the cache: their sums first, then dx. What they add to the parameters'
// gradients comes with the sums where rows are taken one by one, and with dx where they are taken together.
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

    // -- sums

    // Whether a row's x_hat, and its products with the weights, can be computed in E.
    bool is_row_tame(int64_t row) const { return weight.tame() && is_tame<E>(mean_of(call.mean, row), call.rstd[row]); }

    // Of a part of a row.
    Sums part_sums(int64_t sample, int64_t group, int64_t part) const {
        const int64_t row = sample * rows.groups + group, column = group * rows.channels;
        const T *dy = call.dy.at<const T>(sample, column), *x = call.x.at<const T>(sample, column);
        const T* fetched = fetched_with(x, call.dx.at<const T>(sample, column), rows, call.streaming);
        const double mean = mean_of(call.mean, row);
        return gradient_sums<E, centered>(blocks, part, mean, is_row_tame(row), [&](auto f, int64_t, int64_t i) {
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

    // A row's x_hat, in F.
    template <class F>
    struct XHat {
        Pack<F> pivot, rstd, shift;

        XHat() = default;
        XHat(double row_mean, double row_rstd) : rstd(F(row_rstd)) {
            const Mean<F> mean(row_mean);
            pivot = Pack<F>(mean.rounded);
            shift = Pack<F>(F(mean.constant(row_rstd, 0)));
        }
        [[gnu::always_inline]] Pack<F> deviation(Pack<F> x) const { return centered ? x - pivot : x; }
        [[gnu::always_inline]] Pack<F> of(Pack<F> deviation) const {
            return centered ? fma(deviation, rstd, shift) : deviation * rstd;
        }
    };

    // A row, while it is written.
    template <class F>
    struct Row {
        const T *dy, *x;
        T* dx;
        XHat<F> x_hat;
        Pack<F> of_x_hat, constant;

        [[gnu::always_inline]] Pack<F> gradient(Pack<F> of_y, Pack<F> x_hat_here, Pack<F> weight) const {
            return fma(of_y * x_hat.rstd, weight, fma(x_hat_here, of_x_hat, constant));
        }
    };
    template <class F>
    Row<F> row_at(int64_t sample, int64_t column, const RowCoefficients& k) const {
        return {call.dy.at<const T>(sample, column),
                call.x.at<const T>(sample, column),
                call.dx.at<T>(sample, column),
                XHat<F>(k.mean, k.rstd),
                Pack<F>(F(k.of_x_hat)),
                Pack<F>(F(k.constant))};
    }

    // -- some rows together

    // Elements of a row past another one's that this thread does next, or none.
    struct Ahead {
        int64_t dy = 0, x = 0;
        bool fetches = false;
    };

    // The elements from j of some rows, `packs` packs of them: dx, and what they add to the gradients, whose sums over
    // these rows stay in registers.
    template <int packs, bool streams, class Count>
    [[gnu::always_inline]] static void write_packs(const Row<E>* some, int64_t number, const E* weight, double* dweight,
                                                   double* dbias, Ahead ahead, int64_t j, Count count) {
        Pack<E> a[packs], b[packs];
        for (int p = 0; p < packs; ++p) a[p] = b[p] = Pack<E>(0);
        for (int64_t r = 0; r < number; ++r) {
            const Row<E>& row = some[r];
            if (ahead.fetches)
                for (int64_t line = 0; line < packs * lanes; line += int64_t(64 / sizeof(T))) {
                    prefetch(row.dy + ahead.dy + j + line);
                    prefetch(row.x + ahead.x + j + line);
                }
            for (int p = 0; p < packs; ++p) {
                const int64_t i = j + p * lanes;
                const Pack<E> dy = load<E>(row.dy + i, count);
                const Pack<E> x_hat = row.x_hat.of(row.x_hat.deviation(load<E>(row.x + i, count)));
                a[p] = fma(dy, x_hat, a[p]);
                if constexpr (centered) b[p] = b[p] + dy;
                const Pack<E> dx = row.gradient(dy, x_hat, load<E>(weight + i, count));
                if constexpr (streams)
                    stream(row.dx + i, dx, count);
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

    // The elements [first, first + width) of `number` rows, for all of which E will do. `next` is the distance to the
    // samples that this thread does next, or 0.
    template <bool streams>
    [[gnu::flatten]] void write_together(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width,
                                         const RowCoefficients* k, int64_t next, double* dweight, double* dbias) const {
        constexpr int packs = std::max(1, 4 / Pack<E>::parts);
        const int64_t column = group * rows.channels + first;
        Row<E> some[group_size];
        for (int64_t r = 0; r < number; ++r) some[r] = row_at<E>(sample + r, column, k[r]);
        const E* w = weight_of<E>(column);
        const int64_t bytes_of_x = call.rows.elements() * sizeof(T);
        const bool early = is_fetched_early(bytes_of_x, bytes_of_x, !call.streaming);
        const Ahead ahead{next * call.dy.sample, early ? next * call.x.sample : 0, next != 0};
        int64_t j = 0;
        auto write_part = [&](int64_t count) __attribute__((always_inline)) {
            if (count == 0) return;
            write_packs<1, streams>(some, number, w, dweight, dbias, {}, j, count);
            j += count;
        };
        auto write_to = [&](int64_t to) __attribute__((always_inline)) {
            for (; j + lanes <= to; j += lanes) write_packs<1, streams>(some, number, w, dweight, dbias, {}, j, Full{});
        };
        if (streams) {  // up to a line's end
            const int64_t head = to_line(some[0].dx);
            write_part(std::min(head % lanes, width));
            write_to(std::min(head, width));
        }
        for (; j + packs * lanes <= width; j += packs * lanes)
            write_packs<packs, streams>(some, number, w, dweight, dbias, ahead, j, Full{});
        write_to(width);
        write_part(width - j);
    }

    // -- rows one by one

    // Adds what the elements [first, first + width) of a row make of the gradients, and gives the row's sums over them.
    template <class F>
    [[gnu::flatten]] Sums add_gradients(int64_t sample, int64_t group, int64_t first, int64_t width, F* dweight,
                                        F* dbias) const {
        const int64_t row = sample * rows.groups + group, column = group * rows.channels + first;
        const T *dy = call.dy.at<const T>(sample, column), *x = call.x.at<const T>(sample, column);
        const F* w = weight_of<F>(column);
        const double mean = mean_of(call.mean, row);
        const XHat<F> x_hat(mean, call.rstd[row]);
        Accumulators<centered> accumulators;
        auto terms = [=](int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<F> of_y = load<F>(dy + j, count), deviation = x_hat.deviation(load<F>(x + j, count));
            store(dweight + j, fma(of_y, x_hat.of(deviation), load<F>(dweight + j, count)), count);
            if constexpr (centered) store(dbias + j, load<F>(dbias + j, count) + of_y, count);
            const Pack<F> g = of_y * load<F>(w + j, count);
            return Terms{g, g, first_of(deviation, count)};
        };
        accumulators.run(width, terms, dy, x);
        Sums sums = accumulators.total();
        sums.second = Mean<F>(mean).constant(sums.first, sums.second);
        return sums;
    }

    // The elements [first, first + width) of a row's dx.
    template <class F>
    [[gnu::flatten]] void write_row(int64_t sample, int64_t group, int64_t first, int64_t width,
                                    const RowCoefficients& k) const {
        const int64_t column = group * rows.channels + first;
        const Row<F> row = row_at<F>(sample, column, k);
        const F* w = weight_of<F>(column);
        write_run(row.dx, width, call.streaming, row.dy, 0, [&](int64_t j, auto count, auto) {
            const Pack<F> x_hat = row.x_hat.of(row.x_hat.deviation(load<F>(row.x + j, count)));
            return row.gradient(load<F>(row.dy + j, count), x_hat, load<F>(w + j, count));
        });
    }

    // How many of `number` rows are looked at before the first of them is written.
    int64_t looked_at_together(int64_t number, int64_t width) const {
        // Those that may be looked at once more must still be what they were.
        if (call.dx.data == call.dy.data || call.dx.data == call.x.data) return number;
        if (!share_lines()) return 1;
        // What is streamed of a line that two short rows share is to be streamed at once: 0.8 to 0.95 of the time.
        return std::max<int64_t>(1, std::bit_floor(uint64_t(6144 / std::max<int64_t>(1, width * sizeof(T)))));
    }

    // The elements [first, first + width) of `number` rows; coefficients_of(r, sums) is told a row's sums over them.
    // Those of the gradients are `carried` from row to row in E. Rows for which that will not do add theirs to the
    // totals; where that comes to light with a row's coefficients, the others' are added up once more.
    template <class CoefficientsOf>
    void one_by_one(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, Scratch<E>& carried,
                    double* dweight, double* dbias, CoefficientsOf coefficients_of) const {
        bool is_carried[group_size];
        RowCoefficients k[group_size];
        auto carry = [&](int64_t r) {
            return add_gradients<E>(sample + r, group, first, width, carried.data(), carried.data() + width);
        };
        auto add = [&](int64_t r) { return add_gradients<double>(sample + r, group, first, width, dweight, dbias); };
        auto look = [&](int64_t r) {
            is_carried[r] = is_row_tame((sample + r) * rows.groups + group);
            k[r] = coefficients_of(r, is_carried[r] ? carry(r) : add(r));
            if (!is_carried[r] || is_tame<E>(k[r])) return;
            is_carried[r] = false;
            carried.assign(2 * width, E(0));
            for (int64_t other = 0; other < r; ++other)
                if (is_carried[other]) carry(other);
            add(r);
        };
        auto write = [&](int64_t r) {
            const auto way = is_carried[r] ? &ElementsBackward::write_row<E> : &ElementsBackward::write_row<double>;
            (this->*way)(sample + r, group, first, width, k[r]);
        };
        carried.assign(2 * width, E(0));
        const int64_t together = looked_at_together(number, width);
        for (int64_t r = 0; r < number; r += together) {
            const int64_t end = std::min(number, r + together);
            for (int64_t i = r; i < end; ++i) look(i);
            for (int64_t i = r; i < end; ++i) write(i);
        }
        for (int64_t j = 0; j < width; ++j) dweight[j] += double(carried[j]);
        for (int64_t j = 0; centered && j < width; ++j) dbias[j] += double(carried[width + j]);
    }

    // Whether streamed rows' cache lines begin at different elements, or are partly another row's.
    bool share_lines() const { return call.streaming && call.dx.sample * sizeof(T) % 64 != 0; }

    // Whether the same elements of several rows are not to be written at once.
    bool are_apart() const {
        const int64_t distance = call.dx.sample * sizeof(T);
        // Rows a multiple of 4 KiB apart share their places. On a processor where that cache has eight ways they took
        // three times as long together; on one with twelve, 0.8.
        if (distance % 4096 == 0 && first_level_ways() < 12) return true;
        return share_lines();
    }

    // Whether whole rows are best taken one by one, each while the first-level cache holds it. Together they are read
    // again from the second level, but the gradients' sums stay in registers. One by one, float32 takes 0.8 to 0.95 of
    // the time, as long as the row, the weights and the sums have room; short rows up to 1.3. So do the other formats,
    // of which 16 bits have more to compute, and float64 has twice the sums, unless results are streamed: 0.9 to 1.0.
    bool are_best_one_by_one() const {
        if (are_apart()) return true;
        const int64_t width = rows.channels, least = centered ? 320 : 160;
        const int64_t bytes = width * int64_t(3 * sizeof(T) + (centered ? 3 : 2) * sizeof(E));
        return width >= least && bytes <= (std::is_same_v<T, float> ? 40 * 1024 : call.streaming ? 24 * 1024 : 0);
    }

    // -- all rows

    // The elements [first, first + width) of `number` rows, whose coefficients are known. `left` is the number of
    // samples from here on that this thread does, if one follows the other in memory; `carried` is room for sums of
    // gradients.
    void write(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, int64_t left,
               const RowCoefficients* k, Scratch<E>& carried, double* dweight, double* dbias) const {
        const bool tame = weight.tame() && std::all_of(k, k + number, [](const auto& row) { return is_tame<E>(row); });
        if (!tame || (number > 1 && are_apart()))
            return one_by_one(number, sample, group, first, width, carried, dweight, dbias,
                              [&](int64_t r, const Sums&) { return k[r]; });
        const auto way =
            call.streaming ? &ElementsBackward::write_together<true> : &ElementsBackward::write_together<false>;
        (this->*way)(number, sample, group, first, width, k, left >= 2 * number ? number : 0, dweight, dbias);
    }

    // All of the rows of some samples and groups.
    void run(int64_t begin, int64_t end, int64_t group, int64_t end_group, double* dweight, double* dbias) const {
        const int64_t width = rows.channels, bundle = std::bit_floor(uint64_t(rows_in_cache<T>(width, group_size)));
        const bool alone = bundle > 1 && are_best_one_by_one();
        Scratch<E> carried;
        for (int64_t sample = begin; sample < end; sample += bundle)
            for (int64_t g = group; g < end_group; ++g) {
                const int64_t number = std::min(bundle, end - sample), left = rows.groups == 1 ? end - sample : 0;
                double *of_weight = dweight + (g - group) * width, *of_bias = dbias + (g - group) * width;
                if (alone && number > 1) {
                    one_by_one(number, sample, g, 0, width, carried, of_weight, of_bias,
                               [&](int64_t r, const Sums& sums) {
                                   return is_representable<E>(sums)
                                              ? row_coefficients(call, (sample + r) * rows.groups + g, sums)
                                              : coefficients(sample + r, g);
                               });
                    continue;
                }
                RowCoefficients k[group_size];
                for (int64_t r = 0; r < number; ++r) k[r] = coefficients(sample + r, g);
                write(number, sample, g, 0, width, left, k, carried, of_weight, of_bias);
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
            Scratch<double> own(2 * width);
            for (int64_t block = 0; block < number; ++block) run_block(block, own.data()), add(own.data(), 0, width);
            return quiet_all(0, width);
        }
        // set to zero, and added up, where they are used: otherwise one thread does it while the others wait
        const int64_t of_block = (2 * width + 7) / 8 * 8;  // whole cache lines
        Scratch<double> sums(number * of_block);
        parallel_for(number, bytes(), [&](int64_t block) { run_block(block, sums.data() + block * of_block); });
        const int64_t some = std::max<int64_t>(64, width / 8), items = (width + some - 1) / some;
        parallel_for(items, 2 * number * width * int64_t(sizeof(double)), [&](int64_t item) {
            const int64_t begin = item * some, end = std::min(width, begin + some);
            for (int64_t block = 0; block < number; ++block) add(sums.data() + block * of_block, begin, end);
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
            Scratch<E> carried;
            for (int64_t sample = 0; sample < rows.samples; sample += group_size)
                write(std::min<int64_t>(group_size, rows.samples - sample), sample, 0, first, width, 0, &k[sample],
                      carried, call.dweight + first, call.dbias + first);
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
