// Batch norm where the elements of a channel are runs of S adjacent ones.
//
// One channel after the other while it sits in the second-level cache: the second look at it costs no memory traffic.
// Where nothing is summed there is no second look, and memory is walked as it lies; so it is where channels are too
// large for that cache and their runs short.
#pragma once

#include <algorithm>
#include <iterator>
#include <numeric>

#include "batch_norm.hpp"
#include "blocks.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// The bit of the mask of element i of run (n, c).
inline int64_t mask_bit(const Volume& v, int64_t n, int64_t c, int64_t i) { return (n * v.c + c) * v.s + i; }

// Whether sums are taken sample by sample, as memory lies: where a channel of so many arrays has no room in the
// second-level cache, so that its runs come from memory twice, in pieces. A cache has room by address, modulo some 64
// KiB, and runs at distances that have a large divisor in common with that share few places: those of (512, 32, 256)
// floats, 32 KiB apart, a thirtieth of the cache. By samples that takes half the time. Where a channel does fit, sums
// by samples lose a quarter; the shorter the runs the less. Measured with runs of 400 bytes to 64 KiB. Of runs shorter
// still the sums alone would be as large as x.
template <class T>
inline bool are_summed_by_samples(const Volume& v, int64_t arrays) {
    constexpr int64_t cache = 2 << 20, places = 64 << 10;
    const int64_t run = v.s * sizeof(T), distinct = std::gcd(v.c * run, places);
    const int64_t room = run < 4096 ? cache * std::min(run, distinct) / distinct * (run <= 512 ? 1 : 2) : cache;
    return v.size() > 0 && v.s >= 64 && run <= places && arrays * v.n * run >= room;
}

// The sums of every channel; of_run(n, c) are those of a run.
template <class OfRun>
inline std::vector<Sums> sums_by_samples(const Volume& v, int64_t bytes, OfRun of_run) {
    const int64_t blocks = std::min<int64_t>(v.n, 32);
    std::vector<Sums> sums(blocks * v.c);
    parallel_for(blocks, bytes, [&](int64_t block) {
        for (int64_t n = v.n * block / blocks; n < v.n * (block + 1) / blocks; ++n)
            for (int64_t c = 0; c < v.c; ++c) sums[block * v.c + c].add(of_run(n, c));
        finish_streaming();  // of what is written with them
    });
    for (int64_t block = 1; block < blocks; ++block)
        for (int64_t c = 0; c < v.c; ++c) sums[c].add(sums[block * v.c + c]);
    return sums;
}

// -- forward --------------------------------------------------------------------------------------------------

template <class T>
void keep_moments_by_samples(const BatchNormForward& call, int64_t bytes) {
    using E = Computation<T>;
    const Volume& v = call.volume;
    auto run = [&](int64_t n, int64_t c) { return call.x.at<const T>(n, c); };
    std::vector<double> pivots(v.c);
    for (int64_t c = 0; c < v.c; ++c) pivots[c] = pivot_of(run(0, c), v.s);
    const std::vector<Sums> sums = sums_by_samples(v, bytes, [&](int64_t n, int64_t c) {
        return sums_about<E, T>(E(pivots[c]), [&](auto f) __attribute__((always_inline)) { f(run(n, c), v.s); });
    });
    parallel_for(v.c, bytes, [&](int64_t c) {
        auto runs = [&](auto f) __attribute__((always_inline)) {
            for (int64_t n = 0; n < v.n; ++n) f(run(n, c), v.s);
        };
        keep_statistics(call, c, moments_by<E>(sums[c], pivots[c], double(v.plane_size()), run(0, c), runs));
    });
}

template <class T>
Moments part_moments(const BatchNormForward& call, const Blocks& blocks, int64_t c, int64_t part) {
    return summed<T>(call.volume.plane_size(), [&](auto e) {
        return moments_of<T, decltype(e)>([&](auto f) __attribute__((always_inline)) {
            blocks.pieces_of(part, [&](int64_t n, int64_t i, int64_t length)
                                       __attribute__((always_inline)) { f(call.x.at<const T>(n, c) + i, length); });
        });
    });
}

// What writes a channel's runs, by its map in E.
template <class T, class E>
struct ForwardPlane {
    const BatchNormForward& call;
    int64_t c;
    std::array<Pack<E>, 3> values;

    ForwardPlane(const BatchNormForward& call, int64_t c, const Map<3>& map)
        : call(call), c(c), values(packs_of<E>(map.coefficients)) {}

    // `length` elements of run n from element i; what this thread reads next lies `ahead` elements behind them, or 0
    [[gnu::flatten]] void write(int64_t n, int64_t i, int64_t length, int64_t ahead, SharedBytes& ends) const {
        const T* x = call.x.at<const T>(n, c) + i;
        T* y = call.y.at<T>(n, c) + i;
        auto affine = [x, v = values](int64_t j, auto count) { return y_of(load<E>(x + j, count), v); };
        if (!call.mask)
            return write_run(y, length, call.streaming, x, ahead,
                             InAnyOrder{[=](int64_t j, auto count, auto) { return affine(j, count); }});
        MaskWriter mask(call.mask, mask_bit(call.volume, n, c, i), ends);
        auto gated = [&](Pack<E> sum, auto count) {
            const auto v = converted<Computation<T>>(sum);
            mask.put(positive<T>(v), count);
            return relu(v);
        };
        if (!call.addend)
            return write_run(y, length, call.streaming, x, ahead,
                             [&](int64_t j, auto count, auto) { return gated(affine(j, count), count); });
        const T* addend = call.addend.at<const T>(n, c) + i;
        write_run(y, length, call.streaming, x, ahead, [&](int64_t j, auto count, auto) {
            if constexpr (std::is_same_v<decltype(count), Full>) prefetch(further_on(addend + j));
            return gated(affine(j, count) + load<E>(addend + j, count), count);
        });
    }
};

template <class T>
void forward_planes(const BatchNormForward& call) {
    using E = MapType<T>;
    const Volume& v = call.volume;
    const int64_t bytes = 2 * v.size() * sizeof(T);
    const bool by_samples = call.takes_statistics && are_summed_by_samples<T>(v, 1);
    if (by_samples) keep_moments_by_samples<T>(call, bytes);
    if (by_samples && !call.writes) return;
    if (by_samples || !call.takes_statistics) {
        const auto maps = maps_of<E>(call);
        return over_runs(v, bytes, call.streaming, [&](auto pieces) {
            SharedBytes ends;
            pieces([&](int64_t n, int64_t c, int64_t i, int64_t length) {
                computed<E>(maps[c].tame, [&](auto e) {
                    ForwardPlane<T, decltype(e)>(call, c, maps[c]).write(n, i, length, elements_far_ahead<T>, ends);
                });
            });
        });
    }
    const Blocks blocks(v.n, v.s);
    const bool early = is_fetched_early(v.size() * sizeof(T), v.s * sizeof(T), false);
    over_sets<Moments>(
        v.c, MemoryOrder::by_parts, blocks.parts(), bytes, call.writes,
        [&](int64_t c, int64_t part) { return part_moments<T>(call, blocks, c, part); },
        [&](int64_t c, const Moments& moments) { keep_statistics(call, c, moments); },
        [&](int64_t c, int64_t part, Next next) {
            const int64_t ahead =
                next.only_if(early).template distance<T>(v.s, [&](int64_t sets) { return sets * call.x.channel; });
            SharedBytes ends;
            const auto map = map_of<E>(call, c);
            computed<E>(map.tame, [&](auto e) {
                const ForwardPlane<T, decltype(e)> plane(call, c, map);
                blocks.pieces_of(part,
                                 [&](int64_t n, int64_t i, int64_t length) { plane.write(n, i, length, ahead, ends); });
            });
        });
}

// -- backward -------------------------------------------------------------------------------------------------

// What sums of a channel are made of, from element i of run n.
template <class T, class Mask>
[[gnu::always_inline]] inline auto gradients(const BatchNormBackward& call, int64_t n, int64_t c, int64_t i) {
    const Mask mask(call.mask, mask_bit(call.volume, n, c, i));
    return Gradients{call.dy.at<const T>(n, c) + i, call.x.at<const T>(n, c) + i,
                     InAnyOrder{[=](auto dy, int64_t j, auto count)
                                    __attribute__((always_inline)) { return mask.gate(j, dy, count); }}};
}

template <class T, class Mask>
Sums part_sums(const BatchNormBackward& call, const Blocks& blocks, int64_t c, int64_t part) {
    return summed<T>(call.volume.plane_size(), [&](auto e) {
        using E = decltype(e);
        return gradient_sums<E>(blocks, part, call.mean[c], is_tame<E>(call.mean[c], call.rstd[c]),
                                [&](auto, int64_t n, int64_t i) { return gradients<T, Mask>(call, n, c, i); });
    });
}

// What writes a channel's runs, by its map in E.
template <class T, class E, class Mask>
struct BackwardPlane {
    const BatchNormBackward& call;
    int64_t c;
    bool needs_x;
    std::array<Pack<E>, 4> values;

    BackwardPlane(const BatchNormBackward& call, int64_t c, const Map<4>& map)
        : call(call), c(c), needs_x(call.mean_dy), values(packs_of<E>(map.coefficients)) {}

    // `length` elements of run n from element i; what follows `ahead` as in ForwardPlane
    [[gnu::flatten]] void write(int64_t n, int64_t i, int64_t length, int64_t dy_ahead, int64_t x_ahead) const {
        const T *dy = call.dy.at<const T>(n, c) + i, *x = call.x.at<const T>(n, c) + i;
        T *dx = call.dx.at<T>(n, c) + i, *daddend = call.daddend ? call.daddend.at<T>(n, c) + i : nullptr;
        const Mask mask(call.mask, mask_bit(call.volume, n, c, i));
        // both outputs' lines begin at the same elements
        const bool together = daddend && to_line(daddend) == to_line(dx);
        constexpr bool is_masked = !std::is_same_v<Mask, NoMask>;
        auto gated = [&](int64_t j, auto count, auto streams) {
            if constexpr (std::is_same_v<decltype(count), Two>) {
                const auto stored = mask.gate(j, load_stored(dy + j, count), count);
                if (is_masked && daddend) {
                    if (together)
                        put_stored(daddend + j, stored, streams);
                    else
                        put_stored(daddend + j, stored, std::false_type{});
                }
                return pair_of<E>(T{}, stored);
            } else if constexpr (!is_masked) {
                return load<E>(dy + j, count);  // widened as it is loaded: one instruction, from a register three
            } else {
                const auto g = mask.gate(j, load<Computation<T>>(dy + j, count), count);
                if (daddend) {
                    if (streams.value && together)
                        stream(daddend + j, g, count);
                    else
                        store(daddend + j, g, count);
                }
                return converted<E>(g);
            }
        };
        const auto v = values;
        if (!needs_x)
            return write_run(
                dx, length, call.streaming, dy, dy_ahead,
                InAnyOrder{[&](int64_t j, auto count, auto streams) { return dx_of(gated(j, count, streams), v); }});
        write_run(dx, length, call.streaming, dy, dy_ahead, InAnyOrder{[&](int64_t j, auto count, auto streams) {
                      if constexpr (!std::is_same_v<decltype(count), int64_t>)
                          if (x_ahead) prefetch(x + x_ahead + j);
                      return dx_of(gated(j, count, streams), load<E>(x + j, count), v);
                  }});
    }
};

// Whether a run's dx is written as soon as its sums are taken: of given statistics it does not depend on the sums of
// other runs. So dy comes from memory once; measured where results are streamed, and done there alone. Sums out of
// float's range are taken again, so nothing that they are made of may be written over.
inline bool is_written_at_once(const BatchNormBackward& call) {
    const void *dy = call.dy.data, *x = call.x.data, *results[] = {call.dx.data, call.daddend.data};
    return call.writes && !call.mean_dy && call.streaming &&
           std::none_of(std::begin(results), std::end(results),
                        [=](const void* result) { return result == dy || result == x; });
}

template <class T, class Mask>
void keep_sums_by_samples(const BatchNormBackward& call, int64_t bytes) {
    using E = Computation<T>;
    const Volume& v = call.volume;
    const Blocks run(1, v.s), all(v.n, v.s);
    const bool at_once = is_written_at_once(call);
    const auto maps = at_once ? maps_of<MapType<T>>(call) : std::vector<Map<4>>();
    auto tame = [&](int64_t c) { return is_tame<E>(call.mean[c], call.rstd[c]); };
    const std::vector<Sums> sums = sums_by_samples(v, bytes, [&](int64_t n, int64_t c) {
        Sums of_run;
        if (tame(c))
            of_run = gradient_sums_in<E>(run, 0, call.mean[c],
                                         [&](auto, int64_t, int64_t i) { return gradients<T, Mask>(call, n, c, i); });
        if (at_once)
            computed<MapType<T>>(maps[c].tame, [&](auto e) {
                // what is not far ahead has been fetched for the sums
                const int64_t ahead = v.s > elements_ahead<T> ? call.dy.channel : 0;
                BackwardPlane<T, decltype(e), Mask>(call, c, maps[c]).write(n, 0, v.s, ahead, 0);
            });
        return of_run;
    });
    parallel_for(v.c, bytes, [&](int64_t c) {
        Sums found = sums[c];
        if (!tame(c) || !is_representable<E>(found)) {
            found = {};
            for (int64_t part = 0; part < all.parts(); ++part)
                found.add(gradient_sums_in<double>(all, part, call.mean[c], [&](auto, int64_t n, int64_t i) {
                    return gradients<T, Mask>(call, n, c, i);
                }));
        }
        keep_sums(call, c, found);
    });
}

// Whether a channel is written while it sits in the cache. Where dx does not depend on the sums, that spares a second
// look at dy, and costs more than that where short runs share cache lines with other channels'.
template <class T>
inline bool is_written_by_channels(const BatchNormBackward& call) {
    const int64_t run = call.volume.s * int64_t(sizeof(T));
    return call.writes && (call.mean_dy || run % 64 == 0 || run >= 4096);
}

template <class T, class Mask>
void backward_planes(const BatchNormBackward& call) {
    using E = MapType<T>;
    const Volume& v = call.volume;
    const int64_t bytes = 3 * v.size() * sizeof(T);
    bool writes = call.writes;
    if (call.reduces && are_summed_by_samples<T>(v, 2)) {
        keep_sums_by_samples<T, Mask>(call, bytes);
        if (is_written_at_once(call)) writes = false;
    } else if (call.reduces) {
        const Blocks blocks(v.n, v.s);
        const bool early = is_fetched_early(v.size() * sizeof(T), v.s * sizeof(T), false);
        over_sets<Sums>(
            v.c, MemoryOrder::by_parts, blocks.parts(), bytes, is_written_by_channels<T>(call),
            [&](int64_t c, int64_t part) { return part_sums<T, Mask>(call, blocks, c, part); },
            [&](int64_t c, const Sums& sums) { keep_sums(call, c, sums); },
            [&](int64_t c, int64_t part, Next next) {
                auto ahead = [&](Next of, const Tensor& tensor) {
                    return of.distance<T>(v.s, [&](int64_t sets) { return sets * tensor.channel; });
                };
                const int64_t dy_ahead = ahead(next, call.dy), x_ahead = ahead(next.only_if(early), call.x);
                const auto map = map_of<E>(call, c);
                computed<E>(map.tame, [&](auto e) {
                    const BackwardPlane<T, decltype(e), Mask> plane(call, c, map);
                    blocks.pieces_of(part, [&](int64_t n, int64_t i, int64_t length) {
                        plane.write(n, i, length, dy_ahead, x_ahead);
                    });
                });
            });
        if (is_written_by_channels<T>(call)) writes = false;
    }
    if (!writes) return;
    const auto maps = maps_of<E>(call);
    over_runs(v, bytes, call.streaming, [&](auto pieces) {
        pieces([&](int64_t n, int64_t c, int64_t i, int64_t length) {
            computed<E>(maps[c].tame, [&](auto e) {
                constexpr int64_t ahead = elements_far_ahead<T>;
                BackwardPlane<T, decltype(e), Mask>(call, c, maps[c]).write(n, i, length, ahead, ahead);
            });
        });
    });
}

}  // namespace arraynorm::ARRAYNORM_ISA
