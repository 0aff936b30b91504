// How a set of elements that are normalized together (a channel, a row) is cut, where it consists of runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.hpp"
#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// A set's blocks, of about chunk_size elements each: some whole runs, or a piece of one.
struct Blocks {
    int64_t runs, run_size, pieces, runs_per_block, count;

    Blocks(int64_t runs, int64_t run_size)
        : runs(runs), run_size(run_size), pieces(std::max<int64_t>(1, (run_size + chunk_size - 1) / chunk_size)),
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

// Reduces every set, and then writes it. Few sets are shared out in parts, by the same arithmetic.
//
// reduce(set, part) gives what is added up; keep(set, sum) is told the whole set's; write(set, part, more) writes, with
// `more` where this thread goes on to the next set.
template <class Sum, class Reduce, class Keep, class Write>
inline void over_sets(int64_t sets, int64_t parts, int64_t bytes, bool writes, Reduce reduce, Keep keep, Write write) {
    const int64_t threads = num_threads();
    if (threads == 1 || parts == 1 || sets >= 4 * threads) {
        const int64_t group = std::max<int64_t>(1, sets / (8 * threads));
        parallel_for((sets + group - 1) / group, bytes, [&](int64_t item) {
            const int64_t end = std::min(sets, (item + 1) * group);
            for (int64_t set = item * group; set < end; ++set) {
                Sum sum{};
                for (int64_t part = 0; part < parts; ++part) sum.add(reduce(set, part));
                keep(set, sum);
                for (int64_t part = 0; writes && part < parts; ++part) write(set, part, set + 1 < end);
            }
        });
        return;
    }
    std::vector<Sum> sums(sets * parts);
    parallel_for(sets * parts, bytes, [&](int64_t i) { sums[i] = reduce(i / parts, i % parts); });
    for (int64_t set = 0; set < sets; ++set) {
        Sum sum{};
        for (int64_t part = 0; part < parts; ++part) sum.add(sums[set * parts + part]);
        keep(set, sum);
    }
    if (writes) parallel_for(sets * parts, bytes, [&](int64_t i) { write(i / parts, i % parts, false); });
}

}  // namespace arraynorm::ARRAYNORM_ISA
