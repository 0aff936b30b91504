// Partial results of a group's parts, and their merging by whichever block finishes last: in a fixed order, so that it
// does not matter which one that is. No float is ever added atomically.
#pragma once

// Two planes of (N, parts, units): of moments, the sum of deviations from the group's first element and m2 about the
// part's own mean; of products, the sums of dy and of dy * x_hat.
struct Partials {
  double* data;
  const Geometry& g;

  __device__ __forceinline__ int64 plane() const { return g.N * g.parts * g.units(); }
  __device__ __forceinline__ double* at(int64 n, int64 part, int64 unit) const {
    return data + (n * g.parts + part) * g.units() + unit;
  }
  __device__ __forceinline__ void put(int64 n, int64 part, int64 unit, double first, double second) const {
    double* to = at(n, part, unit);
    to[0] = first;
    to[plane()] = second;
  }
};

// Whether this block is the last of `blocks` to come here; then it sees what the others had written before. `arrived`
// is 0 at the start, and not needed for a single block.
__device__ __forceinline__ bool is_last(unsigned* arrived, int64 blocks) {
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  SHARED(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(arrived, 1u) == unsigned(blocks - 1);
  __syncthreads();
  __threadfence();
  return *last;
}

// The parts of one group: K / U units by `parts`, walked by a team of up to a warp. __ldcg: what other blocks have
// written is in L2, and this processor's L1 may hold older lines.
template <class Visit>
__device__ __forceinline__ void each_partial(const Partials& p, int64 n, int64 group, const Team& team, bool exists,
                                             Visit visit) {
  const Geometry& g = p.g;
  const int64 units = g.K / g.U;
  for (int64 q = team.rank; exists && q < units * g.parts; q += team.size) {
    const int64 part = quotient(q, units), unit = group * units + q - part * units;
    const double* from = p.at(n, part, unit);
    visit(part, unit, __ldcg(from), __ldcg(from + p.plane()));
  }
}

struct MomentsOut {
  double *mean, *m2, *var, *rstd;  // (N, C / K) or null
  double eps;

  __device__ __forceinline__ void put(int64 index, double origin, double count, double sum, double squares) const {
    const double in_reach = in_range(squares), variance = in_reach / count;
    if (mean) mean[index] = origin + sum / count;
    if (m2) m2[index] = in_reach;
    if (var) var[index] = variance;
    if (rstd) rstd[index] = reciprocal_std(variance, eps);
  }
};

// A part has g.size steps of `width` elements of each unit, the last one the rest. All threads of a block call it.
template <class T>
__device__ __forceinline__ void merge_moments(const Partials& p, const T* x, int64 n, const Job& job, int width,
                                              const MomentsOut& out) {
  const Geometry& g = p.g;
  const Team team(g.merge);
  const int64 total = g.unit_elements() / width;
  const double count = double(g.A * g.K * g.B);
  for (int64 start = job.first; start < job.last; start += team.count) {
    const int64 group = start + team.index;
    const bool exists = group < job.last;
    double sum[1] = {0}, squares[1] = {0};
    each_partial(p, n, group, team, exists, [&](int64, int64, double s, double) { sum[0] += s; });
    team.sum(sum, nullptr);
    each_partial(p, n, group, team, exists, [&](int64 part, int64, double s, double m2) {
      const int64 left = total - part * g.size;
      squares[0] += m2_about(double((left < g.size ? left : g.size) * width), s, m2, sum[0] / count);
    });
    team.sum(squares, nullptr);
    if (exists && team.rank == 0) {
      const double origin = widen(x[n * g.x.n + group * g.K * g.x.c]);
      out.put(n * (g.C / g.K) + group, origin, count, sum[0], squares[0]);
    }
  }
}

struct ProductsOut {
  double* sums;   // (2, N, C / K) or null: of dy and of dy * x_hat; for groups of g = dy * weight
  double* means;  // as sums, over the group's elements, or null
  double count;   // elements of a group

  __device__ __forceinline__ void put(int64 index, int64 plane, double first, double second) const {
    if (sums) sums[index] = first, sums[plane + index] = second;
    if (means) means[index] = first / count, means[plane + index] = second / count;
  }
};

__device__ __forceinline__ void merge_products(const Partials& p, const Parameter& weight, int64 n, const Job& job,
                                               const ProductsOut& out) {
  const Geometry& g = p.g;
  const Team team(g.merge);
  for (int64 start = job.first; start < job.last; start += team.count) {
    const int64 group = start + team.index;
    const bool exists = group < job.last;
    double sums[2] = {0, 0};
    each_partial(p, n, group, team, exists, [&](int64, int64 unit, double dy, double dy_x_hat) {
      const double w = weight[unit];
      sums[0] = fma(w, dy, sums[0]);
      sums[1] = fma(w, dy_x_hat, sums[1]);
    });
    team.sum(sums, nullptr);
    if (exists && team.rank == 0) out.put(n * (g.C / g.K) + group, g.N * (g.C / g.K), sums[0], sums[1]);
  }
}
