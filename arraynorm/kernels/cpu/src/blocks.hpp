// How a set of elements that are normalized together (a channel, a row) is cut, where it consists of runs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "caches.hpp"
#include "calls.hpp"
#include "parallel.hpp"
#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// A set's blocks, of about chunk_size elements each: some whole runs, or a piece of one.
struct Blocks {
    int64_t runs, run_size, pieces, runs_per_block, count;

    Blocks(int64_t runs, int64_t run_size)
        : runs(runs),
          run_size(run_size),
          pieces(std::max<int64_t>(1, (run_size + chunk_size - 1) / chunk_size)),
          runs_per_block(std::max<int64_t>(1, chunk_size / std::max<int64_t>(1, run_size))),
          count(pieces > 1 ? runs * pieces : (runs + runs_per_block - 1) / runs_per_block) {}

    // visit(run, first, length) for every piece of a run in the block
    template <class Visit>
    [[gnu::always_inline]] void visit(int64_t block, Visit f) const {
        if (pieces > 1) {
            const int64_t first = block % pieces * chunk_size;
            f(block / pieces, first, std::min(chunk_size, run_size - first));
        } else {
            const int64_t end = std::min(runs, (block + 1) * runs_per_block);
            for (int64_t n = block * runs_per_block; n < end; ++n) f(n, 0, run_size);
        }
    }

    // What a set is shared out in where there are fewer sets than threads could use: 64 Ki elements and more.
    int64_t parts() const { return std::clamp<int64_t>(count / 16, 1, 64); }

    // visit(run, first, length) for the pieces of all blocks of a part
    template <class Visit>
    [[gnu::always_inline]] void pieces_of(int64_t part, Visit f) const {
        const int64_t all = parts();
        // short sets have one part, and no time for divisions
        const int64_t begin = all == 1 ? 0 : count * part / all, end = all == 1 ? count : count * (part + 1) / all;
        for (int64_t block = begin; block < end; ++block) visit(block, f);
    }
};

// write(pieces) for every item; pieces(f) calls f(n, c, first, length) for its pieces of runs, in the order of memory
//
// What an item has of a run is one piece: where one begins its channel's values are read, and a load waits for stores
// that have not left the processor yet if their addresses agree in the last 12 bits. Runs of 50 KB in four pieces took
// 1.02 of the time.
template <class Write>
inline void over_runs(const Volume& v, int64_t bytes, bool streaming, Write write) {
    const int64_t chunks = Blocks(1, v.s).count;  // of a run
    const int64_t all = v.n * v.c * chunks, share = std::max<int64_t>(1, all / (8 * num_threads()));
    parallel_for((all + share - 1) / share, bytes, [&](int64_t item) {
        write([&](auto f) {
            const int64_t end = std::min(all, (item + 1) * share), run = item * share / chunks;
            int64_t n = run / v.c, c = run % v.c;
            for (int64_t chunk = item * share, start = run * chunks; chunk < end; start += chunks) {
                const int64_t past = std::min(end, start + chunks), first = (chunk - start) * chunk_size;
                f(n, c, first, std::min(v.s, (past - start) * chunk_size) - first);
                chunk = past;
                if (++c == v.c) c = 0, ++n;
            }
        });
        if (streaming) finish_streaming();
    });
}

// What sums of gradients are made of: g = gate(dy, j, count), and x. Of a pair the gate, which must be InAnyOrder, is
// given what is stored. `fetched` is what memory is to bring meanwhile.
template <class T, class Gate, class Fetched = std::nullptr_t>
struct Gradients {
    const T *dy, *x;
    Gate gate;
    Fetched fetched = nullptr;

    template <class E, class Count>
    [[gnu::always_inline]] Pack<E> gated(int64_t j, Count count) const {
        return gate(load<E>(dy + j, count), j, count);
    }
    template <class E, int half>
    [[gnu::always_inline]] Pack<E> gated(int64_t j, Half<half> which) const {
        return half_of(gate(load_stored(dy + j, Two{}), j, Two{}), which);
    }
};
template <class T, class Gate>
Gradients(const T*, const T*, Gate) -> Gradients<T, Gate>;
template <class T, class Gate>
Gradients(const T*, const T*, Gate, const T*) -> Gradients<T, Gate, const T*>;

// As below.
template <class E, bool centered = true, class Open>
[[gnu::flatten]] Sums gradient_sums_in(const Blocks& blocks, int64_t part, double set_mean, const Open& open) {
    const Mean<E> mean(set_mean);
    const Pack<E> pivot(mean.rounded);
    Accumulators<centered> accumulators;
    blocks.pieces_of(part, [&](int64_t run, int64_t i, int64_t length) __attribute__((always_inline)) {
        const auto from = open(E{}, run, i);
        auto terms = [=](int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> g = from.template gated<E>(j, count);
            const Pack<E> x = load<E>(from.x + j, count);
            return Terms{g, g, first_of(centered ? x - pivot : x, count)};
        };
        constexpr bool in_any_order = is_in_any_order<decltype(from.gate)>;
        const std::conditional_t<in_any_order, InAnyOrder<decltype(terms)>, decltype(terms)> ordered{terms};
        if constexpr (std::is_null_pointer_v<decltype(from.fetched)>)
            accumulators.run(length, ordered, from.dy, from.x);
        else
            accumulators.run(length, ordered, from.dy, from.x, from.fetched);
    });
    Sums sums = accumulators.total();
    sums.second = mean.constant(sums.first, sums.second);
    return sums;
}

// Sums of g and of g * (x - mean), not `centered` of g * x alone, over a part of a set; open(e, run, i) gives the
// Gradients, in e's type, from element i of a run. In E where it is `tame` and the sums are what they should be, else
// in double.
template <class E, bool centered = true, class Open>
inline Sums gradient_sums(const Blocks& blocks, int64_t part, double mean, bool tame, const Open& open) {
    if (tame) {
        const Sums sums = gradient_sums_in<E, centered>(blocks, part, mean, open);
        if (is_representable<E>(sums)) return sums;
    }
    return gradient_sums_in<double, centered>(blocks, part, mean, open);
}

// Sets that are reduced one after the other before the first of them is written: of small ones several, for the
// divisions and the root of one wait for its sums, not for those of others.
inline constexpr int64_t most_in_bundle = 8;

// Bytes of a set, inputs and outputs, up to which another one's inputs have room in the cache beside it.
inline constexpr int64_t largest_with_another = int64_t(3) << 19;
// What memory is to bring while a set is written: what this thread most likely reads so many sets later, or what
// follows in the set itself; or nothing.
struct Next {
    int64_t sets = 0;
    bool follows = false;

    // Of a set that has so many bytes. A large one's own inputs have left the cache before they are looked at again,
    // and come in 0.77 to 0.9 of the time if they are asked for. Measured with a second-level cache of 2 MiB.
    static Next of(int64_t bytes_each, int64_t sets) {
        constexpr int64_t smallest_that_leaves = int64_t(3) << 20;
        if (bytes_each <= largest_with_another) return {sets, false};
        return {0, bytes_each >= smallest_that_leaves};
    }
    // what follows, and another set only where that is fetched so early
    Next only_if(bool early) const { return {early ? sets : 0, follows}; }

    // How many elements it lies behind what is written, or 0. to(sets) is the distance to another set; what follows
    // in short runs is another set's.
    template <class T, class To>
    int64_t distance(int64_t run_size, To to) const {
        return sets ? to(sets) : follows && run_size >= 4 * elements_ahead<T> ? elements_far_ahead<T> : 0;
    }
};

// Whether x of the next set is fetched while this one is written, or else by that set's own sums. Of all that is read
// and written, each of the two is to have its share: where sums have nothing else to fetch, x with them takes 0.8 to
// 0.95 of the time. But not x that comes out of memory itself, for which they would wait, up to 1.2 times as long; nor
// runs of less than a page, for what fetches by itself has to find out about each of them; rows one behind the other
// are one run.
inline bool is_fetched_early(int64_t bytes_of_x, int64_t bytes_of_run, bool sums_fetch_results) {
    return sums_fetch_results || bytes_of_run < 4096 || exceeds_cache(bytes_of_x);
}
inline int64_t bundle_of(int64_t bytes_each) {
    return std::clamp<int64_t>(8192 / std::max<int64_t>(1, bytes_each), 1, most_in_bundle);
}

// Whether sets are shared out in small items, and what comes next is fetched over an item's end. The smaller the items,
// the shorter the others wait for the thread that has the last: 0.94 to 0.98 of the time with two threads. But to take
// one is a locked instruction, which waits for all that has been streamed: 1.02 of it; and of 1 MB, which the threads'
// own caches hold, what is fetched is often the other's: 1.1 to 1.25.
inline bool are_items_small(int64_t bytes) { return bytes > (int64_t(4) << 20) && !exceeds_cache(bytes); }
// Up to which of all sets those that come next are fetched, in an item that ends before `end`.
inline int64_t end_of_fetched(int64_t bytes, int64_t end, int64_t sets) { return are_items_small(bytes) ? sets : end; }

// How many sets, one after the other, are an item for a thread; where there are many not less than a bundle.
inline int64_t sets_per_item(int64_t sets, int64_t bundle, int64_t bytes) {
    const int64_t threads = num_threads(), least = std::min(bundle, std::max<int64_t>(1, sets / (4 * threads)));
    return std::max(least, sets / ((are_items_small(bytes) ? 32 : 8) * threads));
}

// In which order few sets are shared out: all parts of a set, or the same part of all sets. As memory has them: so no
// thread writes between what another one writes, which takes up to twice as long.
enum class MemoryOrder { by_sets, by_parts };

// Reduces every set, and then writes it. Few sets are shared out in parts, by the same arithmetic.
//
// reduce(set, part) gives what is added up; keep(set, sum) is told the whole set's; write(set, part, next) writes.
template <class Sum, class Reduce, class Keep, class Write>
inline void over_sets(int64_t sets, MemoryOrder order, int64_t parts, int64_t bytes, bool writes, Reduce reduce,
                      Keep keep, Write write) {
    const int64_t threads = num_threads(), bytes_each = bytes / std::max<int64_t>(1, sets);
    if (threads == 1 || parts == 1 || sets >= 4 * threads) {
        const int64_t bundle = bundle_of(bytes_each);
        const int64_t group = sets_per_item(sets, bundle, bytes);
        parallel_for((sets + group - 1) / group, bytes, [&](int64_t item) {
            const int64_t end = std::min(sets, (item + 1) * group), fetched = end_of_fetched(bytes, end, sets);
            Sum sums[most_in_bundle];
            for (int64_t first = item * group; first < end; first += bundle) {
                const int64_t number = std::min(bundle, end - first);
                for (int64_t k = 0; k < number; ++k) {
                    sums[k] = {};
                    for (int64_t part = 0; part < parts; ++part) sums[k].add(reduce(first + k, part));
                }
                for (int64_t k = 0; k < number; ++k) keep(first + k, sums[k]);
                // what was read last first: of a large set only that is still in the cache
                for (int64_t k = 0; writes && k < number; ++k)
                    for (int64_t part = parts - 1; part >= 0; --part)
                        write(first + k, part, Next::of(bytes_each, first + k + bundle < fetched ? bundle : 0));
            }
            finish_streaming();  // not after every set: it waits for memory
        });
        return;
    }
    std::vector<Sum> sums(sets * parts);
    auto of_item = [&](int64_t item, auto f) {
        order == MemoryOrder::by_parts ? f(item % sets, item / sets) : f(item / parts, item % parts);
    };
    parallel_for(sets * parts, bytes, [&](int64_t item) {
        of_item(item, [&](int64_t set, int64_t part) { sums[set * parts + part] = reduce(set, part); });
    });
    for (int64_t set = 0; set < sets; ++set) {
        Sum sum{};
        for (int64_t part = 0; part < parts; ++part) sum.add(sums[set * parts + part]);
        keep(set, sum);
    }
    if (!writes) return;
    parallel_for(sets * parts, bytes, [&](int64_t item) {
        of_item(item, [&](int64_t set, int64_t part) { write(set, part, Next::of(bytes_each, 0)); });
        finish_streaming();
    });
}

}  // namespace arraynorm::ARRAYNORM_ISA
