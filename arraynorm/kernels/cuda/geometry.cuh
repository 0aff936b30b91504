// Geometry: what norms see of their arrays, and how threads walk them. _plan.py fills the structs, in the same order.
//
// Every norm sees x as (N, A, C, B), of any strides: samples, elements before the channel axis, channels, elements
// after it. The channels stand in groups of K; one (sample, group) is normalized together. Batch norm is N = 1, K = 1,
// with the batch in A; layer and RMS norm are N = rows, A = B = 1, K = C.
#pragma once

__device__ __forceinline__ int64 quotient(int64 a, int64 b) {  // of nonnegative numbers; 64 bits only where needed
  return (a | b) >> 31 ? a / b : int64(unsigned(a) / unsigned(b));
}

struct Strides {  // in elements
  int64 n, a, c, b;
};

struct Geometry {
  int64 N, A, C, B;
  int64 K;      // channels of a group
  int64 U;      // channels of a unit: what one block or team visits is (A, U, B) of one sample
  int64 parts;  // a unit is cut into so many parts, for as many blocks
  int64 size;   // of a part, in packs (slabs) or rows (tiles); a function of the shape, not of timing
  int64 team;   // threads that share a unit: a power of two up to 32, or the whole block
  int64 merge;  // threads that share the merging of one group's parts: a power of two up to 32
  int64 stash;  // packs that a thread keeps in shared memory between its two visits of them
  int64 lanes;  // tiles: threads side by side; blockDim.x / lanes rows at a time
  int64 blocks; // map kernels: blocks that map; those after them sum the parameters' gradients,
  int64 summed; // from products that were cut into so many parts
  Strides x, dy, y, z;  // z: the second output

  __device__ __forceinline__ int64 units() const { return C / U; }  // of a sample
  __device__ __forceinline__ int64 unit_elements() const { return A * U * B; }
  __device__ __forceinline__ int64 group(int64 n, int64 c) const {  // that a channel of a sample belongs to
    return n * (C / K) + (K == 1 ? c : quotient(c, K));
  }
};

// Every `step`-th pack of V from `first` to `last` of a unit: a run of U * B elements for each of A, one run after the
// other. V > 1 needs packs that are contiguous, aligned, and of one channel, or of adjacent ones where B is 1.
template <int V>
struct Walk {
  int64 pack, last, step;  // in packs
  int64 a, i;              // the run, and the element within it
  int64 run, next_a, next_i;

  __device__ __forceinline__ Walk(const Geometry& g, int64 first, int64 end, int64 stride)
      : pack(first), last(end), step(stride), a(0), i(first * V), run(g.U * g.B), next_a(0), next_i(stride * V) {
    if (g.A > 1) {
      const int64 packs = run / V;
      a = quotient(first, packs);
      i = (first - a * packs) * V;
      next_a = quotient(stride, packs);
      next_i = (stride - next_a * packs) * V;
    }
  }
  __device__ __forceinline__ bool more() const { return pack < last; }
  __device__ __forceinline__ void next() {
    pack += step;
    a += next_a;
    i += next_i;
    if (i >= run) {
      i -= run;
      ++a;
    }
  }
  __device__ __forceinline__ int64 channel(const Geometry& g) const {  // within the unit
    return g.U == 1 ? 0 : g.B == 1 ? i : quotient(i, g.B);
  }
  __device__ __forceinline__ int64 at(const Geometry& g, const Strides& s) const {  // from the unit's first element
    if (g.U == 1) return a * s.a + i * s.b;
    if (g.B == 1) return a * s.a + i * s.c;
    const int64 c = quotient(i, g.B);
    return a * s.a + c * s.c + (i - c * g.B) * s.b;
  }
};
