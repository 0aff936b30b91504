// Batch norm where the elements of a channel are runs of S adjacent ones.
//
// One channel after the other while it sits in the second-level cache: the second look at it costs no memory traffic.
#pragma once

#include "batch_norm.hpp"
#include "blocks.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// The bit of the mask of element i of run (n, c).
inline int64_t mask_bit(const Volume& v, int64_t n, int64_t c, int64_t i) { return (n * v.c + c) * v.s + i; }

// -- forward --------------------------------------------------------------------------------------------------

template <class T>
Moments part_moments(const BatchNormForward& call, const Blocks& blocks, int64_t c, int64_t part) {
    Moments moments;
    blocks.blocks_of(part, [&](int64_t block) {
        moments.add(moments_of<T>([&](auto f) {
            blocks.visit(block, [&](int64_t n, int64_t i, int64_t length) { f(call.x.at<const T>(n, c) + i, length); });
        }));
    });
    return moments;
}

template <class T, class E>
[[gnu::flatten]] void write_forward(const BatchNormForward& call, const Blocks& blocks, int64_t c, int64_t part, bool more) {
    const Mean<E> mean(call.mean[c]);
    const Pack<E> scale(E(forward_scale(call, c))), shift(E(call.bias ? call.bias[c] : 0));
    const Writing how{call.streaming};
    blocks.blocks_of(part, [&](int64_t block) {
        blocks.visit(block, [&](int64_t n, int64_t i, int64_t length) {
            const T* x = call.x.at<const T>(n, c) + i;
            T* y = call.y.at<T>(n, c) + i;
            const T* ahead = more ? call.x.at<const T>(n, c + 1) + i : nullptr;
            auto affine = [=](int64_t j, auto count) {
                return fma(mean.deviation(load<E>(x + j, count)), scale, shift);
            };
            if (!call.mask) return write_run(y, length, how, ahead, affine);
            const T* addend = call.addend ? call.addend.at<const T>(n, c) + i : nullptr;
            MaskWriter mask(call.mask, mask_bit(call.volume, n, c, i));
            write_run(y, length, how, ahead, [&](int64_t j, auto count) {
                Pack<E> v = affine(j, count);
                if (addend) v = v + load<E>(addend + j, count);
                v = relu(v);
                mask.put(positive<T>(v), count);
                return v;
            });
        });
    });
    if (call.streaming) finish_streaming();
}

template <class T>
void forward_planes(const BatchNormForward& call) {
    using E = Computation<T>;
    const Blocks blocks(call.volume.n, call.volume.s);
    over_sets<Moments>(
        call.volume.c, blocks.parts(), 2 * call.volume.size() * sizeof(T), call.takes_statistics, call.writes,
        [&](int64_t c, int64_t part) { return part_moments<T>(call, blocks, c, part); },
        [&](int64_t c, const Moments& moments) { keep_statistics(call, c, moments); },
        [&](int64_t c, int64_t part, bool more) {
            if (std::is_same_v<E, double> || is_tame(call.mean[c], forward_scale(call, c)))
                write_forward<T, E>(call, blocks, c, part, more);
            else
                write_forward<T, double>(call, blocks, c, part, more);
        });
}

// -- backward -------------------------------------------------------------------------------------------------

template <class T, class E, class Mask>
[[gnu::flatten]] Sums block_sums(const BatchNormBackward& call, const Blocks& blocks, int64_t c, int64_t block) {
    const Mean<E> mean(call.mean[c]);
    Accumulators<E> sums;
    blocks.visit(block, [&](int64_t n, int64_t i, int64_t length) {
        const T *dy = call.dy.at<const T>(n, c) + i, *x = call.x.at<const T>(n, c) + i;
        const Mask mask(call.mask, mask_bit(call.volume, n, c, i));
        sums.run(length, [&](Pack<E>& s, Pack<E>& q, int64_t j, auto count) {
            const Pack<E> g = mask.gate(j, load<E>(dy + j, count), count);
            s = s + g;
            q = fma(g, mean.deviation(load_filled<E>(x + j, count)), q);
        });
    });
    return sums.total();
}

template <class T, class Mask>
Sums part_sums(const BatchNormBackward& call, const Blocks& blocks, int64_t c, int64_t part) {
    using E = Summation;
    const bool tame = std::is_same_v<E, double> || is_tame(call.mean[c], call.rstd[c]);
    Sums total;
    blocks.blocks_of(part, [&](int64_t block) {
        if (tame) {
            const Sums sums = block_sums<T, E, Mask>(call, blocks, c, block);
            if (is_representable<E>(sums)) return total.add(sums);
        }
        total.add(block_sums<T, double, Mask>(call, blocks, c, block));
    });
    return total;
}

template <class T, class E, class Mask>
[[gnu::flatten]] void write_backward(const BatchNormBackward& call, const Blocks& blocks, int64_t c, int64_t part, bool more) {
    const BackwardCoefficients k = backward_coefficients(call, c);
    const bool needs_x = call.mean_dy;
    const Mean<E> mean(needs_x ? call.mean[c] : 0);
    const Pack<E> of_dy(E(k.of_dy)), of_deviation(E(k.of_deviation)), constant(E(k.constant));
    const Writing how{call.streaming};
    blocks.blocks_of(part, [&](int64_t block) {
        blocks.visit(block, [&](int64_t n, int64_t i, int64_t length) {
            const T *dy = call.dy.at<const T>(n, c) + i, *x = call.x.at<const T>(n, c) + i;
            T* daddend = call.daddend ? call.daddend.at<T>(n, c) + i : nullptr;
            const T* ahead = more ? call.dy.at<const T>(n, c + 1) + i : nullptr;
            const T* x_ahead = more && needs_x ? call.x.at<const T>(n, c + 1) + i : nullptr;
            const Mask mask(call.mask, mask_bit(call.volume, n, c, i));
            auto gated = [&](int64_t j, auto count) {
                const Pack<E> g = mask.gate(j, load<E>(dy + j, count), count);
                if (daddend) store(daddend + j, g, count);
                return g;
            };
            T* dx = call.dx.at<T>(n, c) + i;
            if (!needs_x)
                return write_run(dx, length, how, ahead, [&](int64_t j, auto count) { return gated(j, count) * of_dy; });
            write_run(dx, length, how, ahead, [&](int64_t j, auto count) {
                if (x_ahead) prefetch(x_ahead + j);
                const Pack<E> deviation = mean.deviation(load<E>(x + j, count));
                return fma(gated(j, count), of_dy, fma(deviation, of_deviation, constant));
            });
        });
    });
    if (call.streaming) finish_streaming();
}

template <class T, class Mask>
void backward_planes(const BatchNormBackward& call) {
    using E = Computation<T>;
    const Blocks blocks(call.volume.n, call.volume.s);
    over_sets<Sums>(
        call.volume.c, blocks.parts(), 3 * call.volume.size() * sizeof(T), call.reduces, call.writes,
        [&](int64_t c, int64_t part) { return part_sums<T, Mask>(call, blocks, c, part); },
        [&](int64_t c, const Sums& sums) { keep_sums(call, c, sums); },
        [&](int64_t c, int64_t part, bool more) {
            if (std::is_same_v<E, double> || is_tame(call, c))
                write_backward<T, E, Mask>(call, blocks, c, part, more);
            else
                write_backward<T, double, Mask>(call, blocks, c, part, more);
        });
}

}  // namespace arraynorm::ARRAYNORM_ISA
