// Batch norm in all its pieces, and what instance and group norm share with it: the kernels of reductions.cuh and
// maps.cuh, by slabs (NCHW) and by tiles (NHWC), here with RELU = false.
#include "numbers.cuh"
#include "geometry.cuh"
#include "team.cuh"
#include "parts.cuh"
#include "partials.cuh"
#include "parameter_sums.cuh"
#include "formulas.cuh"
#include "reductions.cuh"
#include "maps.cuh"

// Backward of batch norm (N = 1) and instance norm where a channel of a sample fits on the chip (K = U = 1): one team
// to each; it reads dy and x once. dx as in formulas.cuh.
template <class T, int V>
__global__ void __launch_bounds__(512, 1)
slab_backward(const T* dy,         // (N, A, C, B)
              const T* x,          // as dy
              const double* mean,  // (N, C)
              const double* rstd,  // (N, C)
              const void* weight,  // (C,) or null
              int weight_dtype,    //
              T* dx,               // as dy, perhaps dy itself
              double* sums,        // (2, N, C): sums of dy and of dy * x_hat
              Geometry g) {
  DYNAMIC_SHARED(double, scratch);
  Pack<T, V>* kept = reinterpret_cast<Pack<T, V>*>(scratch + 64);
  const Stash<T, V> stashed_x{kept, g.stash}, stashed_dy{kept + g.stash * blockDim.x, g.stash};
  const Team team(g.team);
  const int64 units = g.N * g.C, packs = g.unit_elements() / V;
  for (int64 start = int64(blockIdx.x) * team.count; start < units; start += int64(gridDim.x) * team.count) {
    const int64 unit = start + team.index, end = unit < units ? packs : 0;
    const int64 n = end ? quotient(unit, g.C) : 0, c = end ? unit - n * g.C : 0;
    const T *xs = x + n * g.x.n + c * g.x.c, *dys = dy + n * g.dy.n + c * g.dy.c;
    T* dxs = dx + n * g.y.n + c * g.y.c;
    const double mu = mean[n * g.C + c], rs = rstd[n * g.C + c];
    Products<1> mine;
    int64 j = 0;
    for (Walk<V> at(g, team.rank, end, team.size); at.more(); at.next(), ++j) {
      const Pack<T, V> xv = stashed_x.keep(xs + at.at(g, g.x), j), dyv = stashed_dy.keep(dys + at.at(g, g.dy), j);
#pragma unroll
      for (int v = 0; v < V; ++v) mine.add(widen(dyv.v[v]), widen(xv.v[v]) - mu);
    }
    team.sum(mine.sums, scratch);
    const double count = double(g.A * g.B), sum[2] = {mine.sums[0], mine.sums[1] * rs};
    if (team.rank == 0 && end) {
      sums[unit] = sum[0];
      sums[units + unit] = sum[1];
    }
    const double w = Parameter{weight, weight_dtype, 1}[c];
    const Gradient gradient{mu, rs, w, w * (sum[0] / count), w * (sum[1] / count)};
    j = 0;
    for (Walk<V> at(g, team.rank, end, team.size); at.more(); at.next(), ++j) {
      const Pack<T, V> xv = stashed_x.again(xs + at.at(g, g.x), j), dyv = stashed_dy.again(dys + at.at(g, g.dy), j);
      double out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient(widen(dyv.v[v]), widen(xv.v[v]));
      store(out, dxs + at.at(g, g.y));
    }
  }
}
