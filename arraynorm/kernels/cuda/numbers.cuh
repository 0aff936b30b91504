// Numbers: four dtypes in memory, float64 in all arithmetic, one rounding back.
#pragma once
#ifndef CUDA_ON_HOST
#include <cuda_fp16.h>
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char bytes_[]; \
  T* name = reinterpret_cast<T*>(bytes_)
#endif

typedef long long int64;
typedef __half float16;
struct bfloat16 {
  unsigned short bits;
};

// -- to float64 and back ---------------------------------------------------------------------------------------
//
// CuPy compiles with -ftz=true, under which conversions from and to float take subnormal numbers for 0. Those are
// converted by hand here, so that they are what they are on the CPU. A float16 becomes a normal float, always.

__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ double widen(float x) {
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  if (magnitude - 1u < 0x007fffffu) {  // subnormal: magnitude * 2^-149
    const double wide = magnitude * 0x1p-149;
    return bits >> 31 ? -wide : wide;
  }
  return x;
}

__device__ __forceinline__ double widen(float16 x) { return __half2float(x); }
__device__ __forceinline__ double widen(bfloat16 x) { return widen(__uint_as_float(unsigned(x.bits) << 16)); }
__device__ __forceinline__ double widen(unsigned char x) { return x; }
__device__ __forceinline__ double widen(signed char x) { return x; }

__device__ __forceinline__ void narrow(double v, double& to) { to = v; }

__device__ __forceinline__ void narrow(double v, float& to) {
  const double magnitude = v < 0 ? -v : v;
  if (magnitude < 0x1p-126) {  // in steps of 2^-149, ties to even; 2^23 steps are the smallest normal float
    const unsigned steps = unsigned(rint(magnitude * 0x1p149));
    to = __uint_as_float(steps | (v < 0 ? 0x80000000u : 0u));
  } else {
    to = float(v);
  }
}

__device__ __forceinline__ void narrow(double v, float16& to) { to = __double2half(v); }

__device__ __forceinline__ void narrow(double v, bfloat16& to) {  // through float, as ml_dtypes
  float single;
  narrow(v, single);
  const unsigned bits = __float_as_uint(single);
  to.bits = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 & 0x8000u) | 0x7fc0u  // NaN
                                               : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// -- packs: V adjacent elements, read or written by one instruction --------------------------------------------

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T>
__device__ __forceinline__ void store(const double (&values)[V], T* to) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(values[v], pack.v[v]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// -- parameters: contiguous arrays of any of the dtypes, known at run time; null is the default ----------------

enum Dtype { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

struct Parameter {
  const void* data;
  int dtype;  // uniform over the grid, so that the branch costs little
  double absent;

  __device__ __forceinline__ double operator[](int64 i) const {
    double value[1];
    adjacent(i, value);
    return value[0];
  }
  // Elements i to i + V; i is a multiple of V.
  template <int V>
  __device__ __forceinline__ void adjacent(int64 i, double (&out)[V]) const {
    if (data == nullptr) {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = absent;
    } else if (dtype == FLOAT16) {
      read(static_cast<const float16*>(data) + i, out);
    } else if (dtype == BFLOAT16) {
      read(static_cast<const bfloat16*>(data) + i, out);
    } else if (dtype == FLOAT32) {
      read(static_cast<const float*>(data) + i, out);
    } else {
      read(static_cast<const double*>(data) + i, out);
    }
  }

 private:
  template <class P, int V>
  static __device__ __forceinline__ void read(const P* from, double (&out)[V]) {
    constexpr int WIDE = V * sizeof(P) < 16 ? V : 16 / sizeof(P);  // elements of one load
    if (reinterpret_cast<unsigned long long>(from) % (WIDE * sizeof(P)) == 0) {
#pragma unroll
      for (int v = 0; v < V; v += WIDE) {
        const Pack<P, WIDE> pack = load<WIDE>(from + v);
#pragma unroll
        for (int k = 0; k < WIDE; ++k) out[v + k] = widen(pack.v[k]);
      }
    } else {  // a view that begins between packs
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = widen(from[v]);
    }
  }
};

// -- what the formulas share -----------------------------------------------------------------------------------

__device__ __forceinline__ bool is_infinite(double v) {
  return v > 0x1.fffffffffffffp1023 || v < -0x1.fffffffffffffp1023;
}

// rstd = 1 / sqrt(var + eps), and 0 where that is 1/0: a set without deviation normalizes to zero.
__device__ __forceinline__ double reciprocal_std(double var, double eps) {
  const double v = var + eps;
  return v == 0 ? 0 : 1 / sqrt(v);
}

// NaN for a sum of squares beyond float64: as infinity it would make y quietly zero.
__device__ __forceinline__ double in_range(double squares) {
  return is_infinite(squares) ? squares - squares : squares;
}
