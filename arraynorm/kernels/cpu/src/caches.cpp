#include "caches.hpp"

#include <algorithm>
#include <fstream>
#include <string>

namespace arraynorm {
namespace {

// From Linux itself: glibc's sysconf multiplies, on some machines, by the caches of processors that are not there.
std::ifstream cache_file(int index, const char* name) {
    return std::ifstream("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/" + name);
}

int64_t last_level_cache() {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
        std::ifstream file = cache_file(index, "size");
        int64_t size = 0;
        char unit = 0;
        if (file >> size >> unit) largest = std::max(largest, size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0));
    }
    return largest ? largest : int64_t(32) << 20;
}

}  // namespace

bool exceeds_cache(int64_t bytes) {
    // A larger one serves more processors than these: on two of a Xeon whose cache is said to have 480 MB, all that
    // writes 50 MB and more beside what it reads is faster streamed, up to 1.6 times.
    constexpr int64_t most = int64_t(192) << 20;
    static const int64_t cache = std::min(last_level_cache(), most);
    return bytes > cache / 4;
}

int first_level_ways() {
    static const int ways = [] {  // index 0 is the first level's, for data
        int found = 0;
        return cache_file(0, "ways_of_associativity") >> found ? found : 8;
    }();
    return ways;
}

}  // namespace arraynorm
