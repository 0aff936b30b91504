// What the processor's caches hold.
#pragma once

#include <cstdint>

namespace arraynorm {

// Whether results should bypass the cache: input and output together exceed a quarter of the last level, or 48 MiB.
// With more than that a store most often waits for the memory that it replaces: other programs, and what the caller
// does in between, have their shares of the cache too.
bool exceeds_cache(int64_t bytes);

// So many lines that lie a multiple of 4 KiB apart have room in the first level.
int first_level_ways();

}  // namespace arraynorm
