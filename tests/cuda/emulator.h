// CUDA C++ on the CPU, for tests: put before a kernel's source, this header lets g++ (C++17) compile it. Every CUDA
// thread is a fiber of its own; emulator.cpp schedules them. Grids and blocks have one dimension.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define CUDA_ON_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { unsigned x; };

// -- the scheduler's side: emulator.cpp ------------------------------------------------------------------------

struct Lane {  // what a fiber knows of its place
  Index thread, block;
  void* dynamic;  // the block's dynamic shared memory
};
extern "C" {
extern Lane* emulated_lane;
extern Index emulated_grid, emulated_block;
void emulated_block_barrier(unsigned line);
void emulated_warp_barrier(unsigned mask, unsigned line);
void emulated_exchange(unsigned mask, int source, const uint64_t* value, uint64_t* result, unsigned line);
void* emulated_shared(int key, size_t bytes);
void emulated_fence();
const char* emulated_launch(void (*body)(void*), void* argument, unsigned grid, unsigned block, size_t shared,
                            uint64_t seed, unsigned resident);
}

// -- CUDA's vocabulary, as far as the kernels keep to it -------------------------------------------------------

#define threadIdx (emulated_lane->thread)
#define blockIdx (emulated_lane->block)
#define blockDim emulated_block
#define gridDim emulated_grid
#define SHARED(T, name, count) T* name = static_cast<T*>(emulated_shared(__COUNTER__, sizeof(T) * (count)))
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emulated_lane->dynamic)
#define __syncthreads() emulated_block_barrier(__LINE__)
#define __syncwarp() emulated_warp_barrier(0xffffffffu, __LINE__)
#define __shfl_xor_sync(mask, value, distance) emulated_shuffle_xor(mask, value, distance, __LINE__)

template <class T>
T emulated_shuffle_xor(unsigned mask, T value, int distance, unsigned line) {
  uint64_t bits = 0;
  static_assert(sizeof(value) <= sizeof(bits));
  memcpy(&bits, &value, sizeof(T));
  emulated_exchange(mask, int(emulated_lane->thread.x & 31) ^ distance, &bits, &bits, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline void __threadfence() { emulated_fence(); }
template <class T> T __ldcg(const T* address) { return *address; }

// -- numbers ---------------------------------------------------------------------------------------------------

template <class To, class From> To bit_cast(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float value) { return bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return bit_cast<float>(bits); }
struct __half { _Float16 value; };
inline float __half2float(__half x) { return float(x.value); }
inline __half __double2half(double x) { return {_Float16(x)}; }
using std::fma, std::rint, std::sqrt;

// -- what Python calls -----------------------------------------------------------------------------------------

template <class... A, size_t... I>
const char* emulated_run(void (*kernel)(A...), std::index_sequence<I...>, unsigned grid, unsigned block, size_t shared,
                         void** arguments, uint64_t seed, unsigned resident) {
  auto call = [=] { kernel(*static_cast<A*>(arguments[I])...); };
  auto body = [](void* self) { (*static_cast<decltype(call)*>(self))(); };
  return emulated_launch(body, &call, grid, block, shared, seed, resident);
}
template <class... A> std::index_sequence_for<A...> emulated_indices(void (*)(A...)) { return {}; }
template <class T>
constexpr int kind = std::is_pointer_v<T> ? 'P' : std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : 'V';
template <class... A>
int emulated_signature(void (*)(A...), int* out) {  // (kind << 16 | size) of every parameter
  int count = 0;
  ((out[count++] = kind<A> << 16 | int(sizeof(A))), ...);
  return count;
}
#define EXPORT_KERNEL(id, ...)                                                                                     \
  extern "C" const char* run_##id(unsigned grid, unsigned block, size_t shared, void** arguments, uint64_t seed,   \
                                  unsigned resident) {                                                             \
    auto* kernel = &__VA_ARGS__;                                                                                   \
    return emulated_run(kernel, emulated_indices(kernel), grid, block, shared, arguments, seed, resident);         \
  }                                                                                                                \
  extern "C" int signature_##id(int* out) { return emulated_signature(&__VA_ARGS__, out); }
