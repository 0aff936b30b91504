// Teams: threads that share one unit, and the sums they form together. A team is a power of two of adjacent lanes, up
// to a warp, or the whole block. Sums are butterflies: every thread gets the same bits, in an order that depends on
// the size of the team alone.
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

// What one thread has seen of a set: n values, their sum and sum of squares about its own first value. As the pivot is
// one of the values, squares <= (n + 1) * m2: the subtraction in m2() costs at most n + 1 roundings, whatever the data.
struct Moments {
  double n = 0, pivot = 0, sum = 0, squares = 0;

  __device__ __forceinline__ void add(double x) {
    if (n == 0) pivot = x;
    const double d = x - pivot;
    n += 1;
    sum += d;
    squares = fma(d, d, squares);
  }
  // Sum of deviations from `origin`, and of squared deviations from the thread's own mean.
  __device__ __forceinline__ double about(double origin) const { return n == 0 ? 0 : fma(n, pivot - origin, sum); }
  __device__ __forceinline__ double m2() const {
    if (n == 0) return 0;
    const double m2 = fma(-sum / n, sum, squares);
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

// A team's moments: the sum of deviations from `origin`, which is one of its values, and m2 about the team's mean.
__device__ __forceinline__ void team_moments(const Moments& mine, double origin, double count, const Team& team,
                                             double* scratch, double& sum, double& m2) {
  const double s = mine.about(origin);
  double total[1] = {s};
  team.sum(total, scratch);
  double squares[1] = {m2_about(mine.n, s, mine.m2(), total[0] / count)};
  team.sum(squares, scratch);
  sum = total[0];
  m2 = squares[0];
}
