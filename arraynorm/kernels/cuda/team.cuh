// Teams: threads that share one unit, the sums and moments they form together, and what each keeps. A team is a power of
// two of adjacent lanes, up to a warp, or the whole block. Sums are butterflies: every thread gets the same bits, in an
// order that depends on the size of the team alone.
#pragma once

struct Team {
  int size, rank, index, count;  // threads of this team, this one's place; the team's place among the block's teams

  __device__ __forceinline__ explicit Team(int64 threads)
      : size(int(threads)),
        rank(int(threadIdx.x % unsigned(threads))),
        index(int(threadIdx.x / unsigned(threads))),
        count(int(blockDim.x / unsigned(threads))) {}

  // Each of the M values becomes its sum over the team. All threads of the block call it together; `scratch`, 32 * M
  // doubles of shared memory, is needed by teams of more than a warp. What was read before may be overwritten after.
  template <int M>
  __device__ __forceinline__ void sum(double (&values)[M], double* scratch) const {
    butterfly(values, size < 32 ? size : 32);
    if (size <= 32) {
      __syncwarp();
      return;
    }
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = size >> 5;
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (lane == 0) scratch[m * 32 + warp] = values[m];
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m) values[m] = lane < warps ? scratch[m * 32 + lane] : 0;
    butterfly(values, 32);
    __syncthreads();
  }

  template <int M>
  static __device__ __forceinline__ void butterfly(double (&values)[M], int lanes) {
    for (int distance = lanes >> 1; distance > 0; distance >>= 1)
#pragma unroll
      for (int m = 0; m < M; ++m) values[m] += __shfl_xor_sync(0xffffffffu, values[m], distance);
  }
};

// What one thread has seen of M sets: of each n values, their sum and sum of squares about its own first value. As the
// pivot is one of the values, squares <= (n + 1) * m2: the subtraction in m2() costs at most n + 1 roundings, whatever
// the data.
template <int M>
struct Moments {
  double n = 0, pivot[M] = {}, sum[M] = {}, squares[M] = {};

  // A value of set m; the sets take turns.
  __device__ __forceinline__ void add(double x, int m = 0) {
    if (n == 0) pivot[m] = x;
    const double d = x - pivot[m];
    sum[m] += d;
    squares[m] = fma(d, d, squares[m]);
    if (m == M - 1) n += 1;
  }
  // Sum of deviations from `origin`, and of squared deviations from the thread's own mean.
  __device__ __forceinline__ double about(double origin, int m) const {
    return n == 0 ? 0 : fma(n, pivot[m] - origin, sum[m]);
  }
  __device__ __forceinline__ double m2(int m) const {
    if (n == 0) return 0;
    const double m2 = fma(-sum[m] / n, sum[m], squares[m]);
    return m2 < 0 ? 0 : m2;
  }
};

// Squared deviations about the mean of all, of n values with sum of deviations s about an origin and m2 about their own
// mean, where the mean of all is origin + shift: Chan, Golub & LeVeque, 1983, equation 2.1b for any number of parts.
__device__ __forceinline__ double m2_about(double n, double s, double m2, double shift) {
  if (n == 0) return 0;
  const double e = s / n - shift;
  return fma(n * e, e, m2);
}

// Of `count` values of each set, seen by many threads: the sum of deviations from `origin`, which is one of the values,
// and m2 about their mean. `add_up` makes M values of each thread their sums.
template <int M, class AddUp>
__device__ __forceinline__ void merge_threads(const Moments<M>& mine, const double (&origin)[M], double count,
                                              double (&sum)[M], double (&m2)[M], AddUp add_up) {
  double own[M];
#pragma unroll
  for (int m = 0; m < M; ++m) sum[m] = own[m] = mine.about(origin[m], m);
  add_up(sum);
#pragma unroll
  for (int m = 0; m < M; ++m) m2[m] = m2_about(mine.n, own[m], mine.m2(m), sum[m] / count);
  add_up(m2);
}

// What a thread keeps for itself in shared memory between its two visits of a pack, at [j * blockDim.x + threadIdx.x].
template <class T, int V>
struct Stash {
  Pack<T, V>* packs;
  int64 depth;

  // The thread's j-th pack: on the first visit from memory, on the second from here where there was room.
  __device__ __forceinline__ Pack<T, V> keep(const T* from, int64 j) const {
    const Pack<T, V> pack = load<V>(from);
    if (j < depth) packs[j * blockDim.x + threadIdx.x] = pack;
    return pack;
  }
  __device__ __forceinline__ Pack<T, V> again(const T* from, int64 j) const {
    return j < depth ? packs[j * blockDim.x + threadIdx.x] : load<V>(from);
  }
};
