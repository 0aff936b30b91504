// What the processor's caches hold.
#pragma once

#include <cstdint>

namespace arraynorm {

// Whether results should bypass the cache: input and output together exceed a quarter of the last level, or 48 MiB.
// With more than that a store most often waits for the memory that it replaces: other programs, and what the caller
// does in between, have their shares of the cache too.
bool exceeds_cache(int64_t bytes);

// The ways of the first level for data: so many lines have room in it that lie a multiple of 4 KiB apart, where a way
// has 4 KiB as on x86-64. 8 where the system does not tell.
int first_level_ways();

}  // namespace arraynorm
