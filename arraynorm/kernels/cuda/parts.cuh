// Parts: what one block visits of x, in two forms with the same members, so that the kernels are written once.
#pragma once

// What the block that finishes last has to merge: groups `first` to `last` of its sample, when as many as `blocks` have
// been counted at `index`.
struct Job {
  int64 index, blocks, first, last;
};

struct Part {
  int64 n, unit, c;         // sample, and the thread's first unit and channel; of those inside, or 0
  int64 part, first, last;  // which part of the units, and its packs (slabs) or rows (tiles)
  int64 row, rows;          // where the thread begins, and how far its steps are
  bool inside;              // whether the channels exist

  template <class A>
  __device__ __forceinline__ A* of(A* array, const Strides& s) const {  // where the thread's channels begin
    return array + n * s.n + c * s.c;
  }
  template <class At>
  __device__ __forceinline__ int64 mask_index(const Geometry& g, const At& at) const {
    return (at.a * g.C + c) * g.B + at.i;
  }
};

// A part of one unit along its runs, which are contiguous in NCHW: a thread takes V adjacent elements at a time.
template <int V>
struct Slab : Part {
  static constexpr int THREADS = 512;  // of a block, at most
  static constexpr int CHANNELS = 1;   // that a thread takes at a time,
  static constexpr int STEP = V;       // so many elements of each

  __device__ __forceinline__ Slab(const Geometry& g, int64 block) {
    const int64 index = quotient(block, g.parts), total = g.unit_elements() / V;
    n = quotient(index, g.units());
    unit = index - n * g.units();
    c = unit * g.U;
    part = block - index * g.parts;
    first = part * g.size;
    last = first + g.size < total ? first + g.size : total;
    row = threadIdx.x;
    rows = blockDim.x;
    inside = true;
  }
  __device__ __forceinline__ Walk<V> walk(const Geometry& g) const { return {g, first + row, last, rows}; }
  static __device__ __forceinline__ int64 apart(const Geometry&) { return 1; }  // a thread's elements, in the mask

  // Each of the M values becomes its sum over the block. shared: 32 * M doubles.
  template <int M>
  __device__ __forceinline__ void sum(double (&values)[M], double* shared) const {
    Team(blockDim.x).sum(values, shared);
  }
  __device__ __forceinline__ Job job(const Geometry& g) const {
    const int64 group = quotient(c, g.K);
    return {g.group(n, c), quotient(g.K, g.U) * g.parts, group, group + 1};
  }
};

// Rows of a tile of channels: threads side by side along them, each with V adjacent ones, and several rows of them. For
// channels that are contiguous, as in NHWC; a row is one (a, b). U = 1.
template <int V>
struct Tile : Part {
  static constexpr int THREADS = 256;
  static constexpr int CHANNELS = V;
  static constexpr int STEP = 1;
  int64 tile, tiles;
  int lanes;

  __device__ __forceinline__ Tile(const Geometry& g, int64 block) : lanes(int(g.lanes)) {
    const int64 index = quotient(block, g.parts), total = g.A * g.B;
    tiles = (g.C + g.lanes * V - 1) / (g.lanes * V);
    n = quotient(index, tiles);
    tile = index - n * tiles;
    c = (tile * g.lanes + threadIdx.x % unsigned(lanes)) * V;
    inside = c < g.C;
    unit = c = inside ? c : 0;
    part = block - index * g.parts;
    first = part * g.size;
    last = first + g.size < total ? first + g.size : total;
    row = threadIdx.x / unsigned(lanes);
    rows = blockDim.x / unsigned(lanes);
  }
  __device__ __forceinline__ Walk<1> walk(const Geometry& g) const { return {g, first + row, inside ? last : 0, rows}; }
  static __device__ __forceinline__ int64 apart(const Geometry& g) { return g.B; }

  // Each of the M values becomes its sum over the rows of the block, in a fixed order. shared: M * blockDim.x doubles.
  template <int M>
  __device__ __forceinline__ void sum(double (&values)[M], double* shared) const {
    const int threads = blockDim.x, thread = threadIdx.x;
#pragma unroll
    for (int m = 0; m < M; ++m) shared[m * threads + thread] = values[m];
    for (int reach = threads / 2; reach >= lanes; reach /= 2) {
      __syncthreads();
      if (thread < reach)
#pragma unroll
        for (int m = 0; m < M; ++m) shared[m * threads + thread] += shared[m * threads + thread + reach];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m) values[m] = shared[m * threads + thread % lanes];
    __syncthreads();
  }
  // The groups of the tile, or of the sample where a group may reach over tiles.
  __device__ __forceinline__ Job job(const Geometry& g) const {
    if (g.K > 1) return {n, g.parts * tiles, 0, g.C / g.K};
    const int64 end = (tile + 1) * lanes * V;
    return {n * tiles + tile, g.parts, tile * lanes * V, end < g.C ? end : g.C};
  }
};
