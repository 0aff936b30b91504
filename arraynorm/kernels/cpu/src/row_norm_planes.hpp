// Rows of channels that are runs of adjacent elements: group and instance norm in the order (N, C, spatial).
//
// One row after the other while it sits in the second-level cache: the second look at it costs no memory traffic.
#pragma once

#include "row_norm_channels.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// -- forward --------------------------------------------------------------------------------------------------

template <class T, class E>
[[gnu::flatten]] void write_planes(const RowNormForward& call, const Blocks& blocks, int64_t row, int64_t part,
                                   Next next) {
    const int64_t first = row % call.rows.groups * call.rows.channels;
    const T* row_x = start_of<const T>(call.rows, call.x, row);
    const int64_t ahead = next.distance<T>(
        blocks.run_size, [&](int64_t sets) { return start_of<const T>(call.rows, call.x, row + sets) - row_x; });
    T* row_y = start_of<T>(call.rows, call.y, row);
    const Mean<E> mean(call.mean[row]);
    const Pack<E> pivot(mean.rounded);
    blocks.pieces_of(part, [&](int64_t run, int64_t i, int64_t length) {
        const T* x = row_x + run * call.x.channel + i;
        const double of_x = call.rstd[row] * call.weight.value_or(first + run, 1);
        const Pack<E> scale{E(of_x)}, shift(E(mean.constant(of_x, call.bias.value_or(first + run, 0))));
        write_run(
            row_y + run * call.y.channel + i, length, call.streaming, x, ahead,
            InAnyOrder{[=](int64_t j, auto count, auto) { return fma(load<E>(x + j, count) - pivot, scale, shift); }});
    });
}

template <class T>
void forward_planes(const RowNormForward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    const Blocks blocks(rows.channels, rows.size);
    const bool early = is_fetched_early(rows.elements() * sizeof(T), rows.size * sizeof(T), !call.streaming);
    auto tame = [&](int64_t row) {
        const int64_t first = row % rows.groups * rows.channels;
        for (int64_t k = first; k < first + rows.channels; ++k)
            if (!is_tame<E>(call.mean[row], call.rstd[row] * call.weight.value_or(k, 1))) return false;
        return true;
    };
    over_sets<Moments>(
        rows.count(), MemoryOrder::by_sets, blocks.parts(), 2 * rows.elements() * sizeof(T), true,
        [&](int64_t row, int64_t part) { return row_moments<T>(call, blocks, row, part); },
        [&](int64_t row, const Moments& moments) { keep_statistics(call, row, moments, [] { return false; }); },
        [&](int64_t row, int64_t part, Next next) {
            computed<E>(tame(row),
                        [&](auto e) { write_planes<T, decltype(e)>(call, blocks, row, part, next.only_if(early)); });
        });
}

// -- backward -------------------------------------------------------------------------------------------------

// The blocks are those of one channel's run.
template <class T>
Sums channel_part_sums(const RowNormBackward& call, const Blocks& blocks, int64_t row, int64_t sample, int64_t channel,
                       int64_t part) {
    using E = Computation<T>;
    const T *dy = call.dy.at<const T>(sample, channel), *x = call.x.at<const T>(sample, channel);
    const T* fetched = fetched_with(x, call.dx.at<const T>(sample, channel), call.rows, call.streaming);
    return gradient_sums<E>(
        blocks, part, call.mean[row], is_tame<E>(call.mean[row], call.rstd[row]), [=](auto, int64_t, int64_t i) {
            return Gradients{dy + i, x + i,
                             InAnyOrder{[](auto dy, int64_t, auto) __attribute__((always_inline)) { return dy; }},
                             fetched + i};
        });
}

// In elements, or 0: from what is written to what is to be fetched meanwhile.
struct Ahead {
    int64_t dy = 0, x = 0;
};

// `ahead` is how far on that lies which this thread most likely reads next.
template <class T, class E>
[[gnu::flatten]] void write_channel(const RowNormBackward& call, const RowCoefficients& k, double scale,
                                    const Blocks& blocks, int64_t sample, int64_t channel, int64_t part, Ahead ahead) {
    const T *all_dy = call.dy.at<const T>(sample, channel), *all_x = call.x.at<const T>(sample, channel);
    const Mean<E> mean(k.mean);
    const Pack<E> pivot(mean.rounded), of_dy{E(scale)}, of_deviation(E(k.of_deviation())),
        constant(E(mean.constant(k.of_deviation(), k.constant)));
    blocks.pieces_of(part, [&](int64_t, int64_t i, int64_t length) {
        const T *dy = all_dy + i, *x = all_x + i;
        write_run(call.dx.at<T>(sample, channel) + i, length, call.streaming, dy, ahead.dy,
                  InAnyOrder{[=](int64_t j, auto count, auto) {
                      if constexpr (!std::is_same_v<decltype(count), int64_t>)
                          if (ahead.x) prefetch(x + ahead.x + j);
                      return fma(load<E>(dy + j, count), of_dy,
                                 fma(load<E>(x + j, count) - pivot, of_deviation, constant));
                  }});
    });
}

template <class T>
void backward_planes(const RowNormBackward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    const Blocks blocks(1, rows.size);
    const int64_t parts = blocks.parts(), parameters = rows.parameters(), threads = num_threads();
    const int64_t bytes = 3 * rows.elements() * sizeof(T);
    ChannelSums sums(call);
    const bool early = is_fetched_early(rows.elements() * sizeof(T), rows.size * sizeof(T), !call.streaming);
    auto write = [&](int64_t row, int64_t sample, int64_t channel, int64_t part, Ahead ahead) {
        const RowCoefficients& k = sums.coefficients(row);
        const double weight = call.weight.value_or(channel, 1);
        computed<E>(is_tame<E>(k, weight), [&](auto e) {
            write_channel<T, decltype(e)>(call, k, k.rstd * weight, blocks, sample, channel, part, ahead);
        });
    };
    auto ahead_by = [&](Next next, int64_t row) -> Ahead {
        auto distance = [&](Next of, const Tensor& tensor) {
            return of.distance<T>(rows.size, [&](int64_t sets) {
                return start_of<const T>(rows, tensor, row + sets) - start_of<const T>(rows, tensor, row);
            });
        };
        return {distance(next, call.dy), distance(next.only_if(early), call.x)};
    };
    const int64_t bytes_each = bytes / std::max<int64_t>(1, rows.count());
    if (threads == 1 || rows.count() >= 4 * threads || rows.channels * parts == 1) {
        const int64_t bundle = bundle_of(bytes_each);
        const int64_t group = sets_per_item(rows.count(), bundle, bytes);
        parallel_for((rows.count() + group - 1) / group, bytes, [&](int64_t item) {
            const int64_t end = std::min(rows.count(), (item + 1) * group),
                          fetched = end_of_fetched(bytes, end, rows.count());
            for (int64_t first = item * group; first < end; first += bundle) {
                const int64_t last = std::min(end, first + bundle);
                // f(sample, channel, part) for those of a row
                auto parts_of = [&](int64_t row, bool backwards, auto f) __attribute__((always_inline)) {
                    const int64_t sample = row / rows.groups, channel = row % rows.groups * rows.channels;
                    for (int64_t k = 0; k < rows.channels; ++k)
                        for (int64_t p = 0; p < parts; ++p)
                            backwards ? f(sample, channel + rows.channels - 1 - k, parts - 1 - p)
                                      : f(sample, channel + k, p);
                };
                for (int64_t row = first; row < last; ++row)
                    parts_of(row, false, [&](int64_t sample, int64_t c, int64_t part) {
                        sums.of(sample, c).add(channel_part_sums<T>(call, blocks, row, sample, c, part));
                    });
                for (int64_t row = first; row < last; ++row) sums.keep(row);
                for (int64_t row = first; row < last; ++row) {
                    const Next next = Next::of(bytes_each, row + bundle < fetched ? bundle : 0);
                    const Ahead ahead = ahead_by(next, row);
                    // of a large row the parts that were read last first: only those are still in the cache
                    parts_of(row, bytes_each > largest_with_another,
                             [&](int64_t sample, int64_t c, int64_t part) { write(row, sample, c, part, ahead); });
                }
            }
            if (call.streaming) finish_streaming();
        });
    } else {
        const int64_t runs = rows.samples * parameters;
        std::vector<Sums> found(runs * parts);
        parallel_for(runs * parts, bytes, [&](int64_t i) {
            const int64_t run = i / parts;
            found[i] =
                channel_part_sums<T>(call, blocks, run / rows.channels, run / parameters, run % parameters, i % parts);
        });
        for (int64_t i = 0; i < runs * parts; ++i)
            sums.of(i / parts / parameters, i / parts % parameters).add(found[i]);
        for (int64_t row = 0; row < rows.count(); ++row) sums.keep(row);
        parallel_for(runs * parts, bytes, [&](int64_t i) {
            const int64_t run = i / parts;
            const int64_t row = run / rows.channels;
            write(row, run / parameters, run % parameters, i % parts, ahead_by(Next::of(bytes_each, 0), row));
            if (call.streaming) finish_streaming();
        });
    }
    sums.keep_parameter_gradients();
}

}  // namespace arraynorm::ARRAYNORM_ISA
