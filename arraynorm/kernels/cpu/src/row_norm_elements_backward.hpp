// The backward over rows of adjacent elements.
//
// Some rows at a time: their sums first, then dx and what they add to the parameters' gradients, while they are in the
// cache.
#pragma once

#include <bit>

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
            blocks = std::clamp<int64_t>(std::min(rows.samples / (2 * rows_at_once), rows.samples * row / 16384), 1, 32);
        }
    }
};

// Whether products of dy can be added up in float. A float16 has no exponents that could not.
template <class T>
inline bool is_tame_run(const T* dy, int64_t n) {
    if constexpr (!std::is_same_v<T, bfloat16>) return true;
    int16_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint16_t bits;
        std::memcpy(&bits, dy + i, sizeof bits);
        largest = std::max(largest, int16_t(bits & 0x7fff));
    }
    const double size = std::abs(double(to_float(bfloat16{uint16_t(largest)})));
    return is_tame_parameter(size);
}

template <class T>
struct ElementsBackward {
    using E = Summation;  // of dx too, which comes with the parameters' gradients in one sweep
    const RowNormBackward& call;
    const Rows& rows;
    Blocks blocks;
    Parameters<E> weight;
    Parameters<double> exact_weight;

    explicit ElementsBackward(const RowNormBackward& call)
        : call(call), rows(call.rows), blocks(1, rows.channels), weight(call.weight, rows.parameters(), 1),
          exact_weight(std::is_same_v<E, double> ? nullptr : call.weight,
                       std::is_same_v<E, double> ? 0 : rows.parameters(), 1) {}

    template <class F>
    const F* weight_of(int64_t group) const {
        const int64_t first = group * rows.channels;
        if constexpr (std::is_same_v<F, E>)
            return weight.data() + first;
        else
            return exact_weight.data() + first;
    }

    template <class F>
    Sums piece_sums(const T* dy, const T* x, const F* w, double mean_, int64_t length) const {
        const Mean<F> mean(mean_);
        Accumulators<F> sums;
        sums.run(length, [&](Pack<F>& s, Pack<F>& q, int64_t j, auto count) {
            const Pack<F> g = load<F>(dy + j, count) * load<F>(w + j, count);
            s = s + g;
            q = fma(g, mean.deviation(load_filled<F>(x + j, count)), q);
        });
        return sums.total();
    }

    Sums part_sums(int64_t sample, int64_t group, int64_t part) const {
        const int64_t row = sample * rows.groups + group, first = group * rows.channels;
        const T *dy = call.dy.at<const T>(sample, first), *x = call.x.at<const T>(sample, first);
        const double mean = mean_of(call.mean, row);
        const bool tame = std::is_same_v<E, double> || (weight.tame() && is_tame(mean, call.rstd[row]));
        Sums total;
        blocks.blocks_of(part, [&](int64_t block) {
            blocks.visit(block, [&](int64_t, int64_t i, int64_t length) {
                if (tame) {
                    const Sums sums = piece_sums<E>(dy + i, x + i, weight_of<E>(group) + i, mean, length);
                    if (is_representable<E>(sums)) return total.add(sums);
                }
                if constexpr (!std::is_same_v<E, double>)
                    total.add(piece_sums<double>(dy + i, x + i, weight_of<double>(group) + i, mean, length));
            });
        });
        return total;
    }

    RowCoefficients coefficients(int64_t sample, int64_t group) const {
        Sums sums;
        for (int64_t part = 0; part < blocks.parts(); ++part) sums.add(part_sums(sample, group, part));
        return row_coefficients(call, sample * rows.groups + group, sums);
    }

    // dx of the elements [first, first + width) of `number` rows, and what they add to the parameters' gradients.
    // `ahead` is the distance to the samples that this thread does next, or 0.
    template <class F, int number, bool streaming>
    void write(int64_t sample, int64_t group, int64_t first, int64_t width, const RowCoefficients* k, int64_t ahead,
               F* dweight, F* dbias) const {
        struct Map {
            const T *dy, *x;
            T* dx;
            Mean<F> mean{0};
            Pack<F> rstd, of_deviation, constant;
        } maps[number];
        const int64_t column = group * rows.channels + first;
        for (int r = 0; r < number; ++r) {
            Map& m = maps[r];
            m.dy = call.dy.at<const T>(sample + r, column);
            m.x = call.x.at<const T>(sample + r, column);
            m.dx = call.dx.at<T>(sample + r, column);
            m.mean = Mean<F>(k[r].mean);
            m.rstd = Pack<F>(F(k[r].rstd));
            m.of_deviation = Pack<F>(F(k[r].of_deviation));
            m.constant = Pack<F>(F(k[r].constant));
        }
        const F* w = weight_of<F>(group) + first;
        const int64_t dy_ahead = ahead * call.dy.sample, x_ahead = ahead * call.x.sample;
        auto step = [&](int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<F> weights = load<F>(w + j, count);
            Pack<F> a = load<F>(dweight + j, count), b = load<F>(dbias + j, count);
            for (int r = 0; r < number; ++r) {
                const Map& m = maps[r];
                const Pack<F> dy = load<F>(m.dy + j, count), scaled = dy * m.rstd;
                const Pack<F> deviation = m.mean.deviation(load_filled<F>(m.x + j, count));
                a = fma(scaled, deviation, a);
                b = b + dy;
                const Pack<F> dx = fma(scaled, weights, fma(deviation, m.of_deviation, m.constant));
                if constexpr (streaming && std::is_same_v<decltype(count), Full>)
                    stream(m.dx + j, dx);
                else
                    store(m.dx + j, dx, count);
            }
            store(dweight + j, a, count);
            store(dbias + j, b, count);
        };
        constexpr int64_t line = 64 / sizeof(T);
        int64_t j = 0;
        for (; j + line <= width; j += line) {
            if (ahead)
                for (int r = 0; r < number; ++r) {
                    prefetch(maps[r].dy + dy_ahead + j);
                    prefetch(maps[r].x + x_ahead + j);
                }
            for (int64_t i = 0; i < line; i += lanes) step(j + i, Full{});
        }
        for (; j + lanes <= width; j += lanes) step(j, Full{});
        if (j < width) step(j, width - j);
    }

    // The same for any number of rows, as many at a time as registers hold the coefficients of.
    template <class F>
    void write(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, const RowCoefficients* k,
               int64_t ahead, F* dweight, F* dbias) const {
        constexpr int some = std::is_same_v<F, double> ? 2 : 4;
        bool streaming = call.streaming && call.dx.sample * sizeof(T) % 64 == 0;
        streaming = streaming && to_line(call.dx.at<T>(sample, group * rows.channels + first)) == 0;
        for (int64_t at = 0; at < width; at += segment) {
            const int64_t length = std::min(segment, width - at);
            auto these = [&](int64_t r, auto count) {
                constexpr int n = decltype(count)::value;
                if (streaming)
                    write<F, n, true>(sample + r, group, first + at, length, k + r, ahead, dweight + at, dbias + at);
                else
                    write<F, n, false>(sample + r, group, first + at, length, k + r, ahead, dweight + at, dbias + at);
            };
            int64_t r = 0;
            for (; r + some <= number; r += some) these(r, std::integral_constant<int, some>{});
            for (; r < number; ++r) these(r, std::integral_constant<int, 1>{});
        }
    }

    // Sums of columns in E, taken over into doubles before its rounding errors show; in double those themselves.
    struct Totals {
        double *dweight, *dbias;
        std::vector<E> of_weight, of_bias;

        Totals(double* dweight, double* dbias, int64_t width)
            : dweight(dweight), dbias(dbias), of_weight(std::is_same_v<E, double> ? 0 : width),
              of_bias(of_weight.size()) {}
        E* weight() { return in_place(dweight, of_weight); }
        E* bias() { return in_place(dbias, of_bias); }
        void flush() {
            for (size_t j = 0; j < of_weight.size(); ++j) {
                dweight[j] += double(of_weight[j]), dbias[j] += double(of_bias[j]);
                of_weight[j] = of_bias[j] = E(0);
            }
        }

    private:
        static E* in_place(double* total, std::vector<E>& own) {
            if constexpr (std::is_same_v<E, double>)
                return total;
            else
                return own.data();
        }
    };

    // As `write`, in double where a row needs it. The totals begin with the column of element `origin` of the sample.
    void write(int64_t number, int64_t sample, int64_t group, int64_t first, int64_t width, const RowCoefficients* k,
               int64_t ahead, Totals& totals, int64_t origin) const {
        const int64_t column = group * rows.channels + first, at = column - origin;
        if constexpr (!std::is_same_v<E, double>) {
            bool tame = weight.tame();
            for (int64_t r = 0; r < number; ++r)
                tame = tame && is_tame(k[r]) && is_tame_run(call.dy.at<const T>(sample + r, column), width);
            if (!tame) {
                write<double>(number, sample, group, first, width, k, ahead, totals.dweight + at, totals.dbias + at);
                return;
            }
        }
        write<E>(number, sample, group, first, width, k, ahead, totals.weight() + at, totals.bias() + at);
    }

    // All of the rows of some samples and groups.
    void run(int64_t begin, int64_t end, int64_t group, int64_t end_group, double* dweight, double* dbias) const {
        const int64_t origin = group * rows.channels;
        Totals totals(dweight, dbias, (end_group - group) * rows.channels);
        const int64_t bundle = std::bit_floor(uint64_t(rows_in_cache<T>(rows.channels)));
        for (int64_t sample = begin; sample < end; sample += bundle) {
            const int64_t number = std::min(bundle, end - sample);
            const int64_t ahead = rows.groups == 1 && sample + 2 * bundle <= end ? bundle : 0;
            for (int64_t g = group; g < end_group; ++g) {
                RowCoefficients k[rows_at_once];
                for (int64_t r = 0; r < number; ++r) k[r] = coefficients(sample + r, g);
                write(number, sample, g, 0, rows.channels, k, ahead, totals, origin);
            }
            if ((sample - begin + bundle) % rows_per_chunk<float> == 0) totals.flush();
        }
        totals.flush();
        if (call.streaming) finish_streaming();
    }

    void by_samples(int64_t number) const {
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
            Totals totals(call.dweight + first, call.dbias + first, width);
            for (int64_t sample = 0; sample < rows.samples; sample += rows_at_once) {
                write(std::min<int64_t>(rows_at_once, rows.samples - sample), sample, 0, first, width, &k[sample], 0,
                      totals, first);
                if ((sample + rows_at_once) % rows_per_chunk<float> == 0) totals.flush();
            }
            totals.flush();
            if (call.streaming) finish_streaming();
        });
    }

    int64_t bytes() const { return 3 * rows.elements() * sizeof(T); }
};

template <class T>
void backward_elements(const RowNormBackward& call) {
    const Sharing sharing(call.rows);
    const ElementsBackward<T> backward(call);
    if (sharing.kind == Sharing::by_groups)
        backward.by_groups();
    else if (sharing.kind == Sharing::by_pieces)
        backward.by_pieces();
    else
        backward.by_samples(sharing.blocks);
}

}  // namespace arraynorm::ARRAYNORM_ISA
