// Row norms: one team to a row. Forward of layer and RMS norm, of group and instance norm, and of batch norm where a
// channel fits on the chip: a row is one unit (A, K, B) of Geometry. Backward of layer and RMS norm.
//
// With g = dy * weight, means over the row (kernels/reference/layer_norm.py):
//     y  = (x - mean) * rstd * weight + bias
//     dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
// RMS norm (CENTERED = false) is the same with 0 for mean and mean(g).
#include "numbers.cuh"
#include "geometry.cuh"
#include "team.cuh"

// Shared memory: 64 doubles for sums, then the stash.

template <bool CENTERED>
struct RowStatistics;

template <>
struct RowStatistics<true> : Moments<1> {
  __device__ __forceinline__ void finish(double origin, double count, const Team& team, double* scratch, double& mean,
                                         double& var) {
    double all[1], m2[1];
    merge_threads(*this, {origin}, count, all, m2, [&](double(&values)[1]) { team.sum(values, scratch); });
    mean = origin + all[0] / count;
    var = in_range(m2[0]) / count;
  }
};

template <>
struct RowStatistics<false> {  // mean of squares; infinite only where x is
  double squares = 0, infinities = 0;

  __device__ __forceinline__ void add(double x) {
    squares = fma(x, x, squares);
    if (is_infinite(x)) infinities += 1;
  }
  __device__ __forceinline__ void finish(double, double count, const Team& team, double* scratch, double& mean,
                                         double& var) {
    double sums[2] = {squares, infinities};
    team.sum(sums, scratch);
    mean = 0;
    var = sums[1] > 0 ? sums[0] / count : in_range(sums[0] / count);
  }
};

template <class T, int V, bool CENTERED>
__global__ void __launch_bounds__(512, 1)
row_forward(const T* x,           // (N, A, C, B)
            T* y,                 // as x, perhaps x itself
            const void* weight,   // (C,) or null
            int weight_dtype,     //
            const void* bias,     // (C,) or null
            int bias_dtype,       //
            double eps,           //
            double* mean,         // (N, C / K) or null
            double* var,          // as mean, biased
            double* rstd,         // as mean
            Geometry g) {
  DYNAMIC_SHARED(double, scratch);
  const Stash<T, V> stash{reinterpret_cast<Pack<T, V>*>(scratch + 64), g.stash};
  const Team team(g.team);
  const Parameter w{weight, weight_dtype, 1}, b{bias, bias_dtype, 0};
  const int64 rows = g.N * g.units(), packs = g.unit_elements() / V;
  for (int64 first = int64(blockIdx.x) * team.count; first < rows; first += int64(gridDim.x) * team.count) {
    const int64 row = first + team.index, end = row < rows ? packs : 0;  // a team without a row takes part in sums
    const int64 n = end ? row / g.units() : 0, unit = end ? row - n * g.units() : 0, channel = unit * g.U;
    const T* xs = x + n * g.x.n + channel * g.x.c;
    RowStatistics<CENTERED> statistics;
    int64 j = 0;
    for (Walk<V> at(g, team.rank, end, team.size); at.more(); at.next(), ++j) {
      const Pack<T, V> pack = stash.keep(xs + at.at(g, g.x), j);
#pragma unroll
      for (int v = 0; v < V; ++v) statistics.add(widen(pack.v[v]));
    }
    double mu, variance;
    statistics.finish(widen(xs[0]), double(g.unit_elements()), team, scratch, mu, variance);
    const double rs = reciprocal_std(variance, eps);
    if (team.rank == 0 && end) {
      if (mean) mean[row] = mu;
      if (var) var[row] = variance;
      if (rstd) rstd[row] = rs;
    }
    T* ys = y + n * g.y.n + channel * g.y.c;
    j = 0;
    for (Walk<V> at(g, team.rank, end, team.size); at.more(); at.next(), ++j) {
      const Pack<T, V> pack = stash.again(xs + at.at(g, g.x), j);
      const int64 c = channel + at.channel(g);
      double weights[V], biases[V], out[V];
      if (g.B == 1 && g.U > 1) {  // neighbours are of different channels
        w.adjacent(c, weights);
        b.adjacent(c, biases);
      } else {
        const double weight_c = w[c], bias_c = b[c];
#pragma unroll
        for (int v = 0; v < V; ++v) weights[v] = weight_c, biases[v] = bias_c;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = fma((widen(pack.v[v]) - mu) * rs, weights[v], biases[v]);
      store(out, ys + at.at(g, g.y));
    }
  }
}

// -- backward of layer and RMS norm: x is (rows, K) ------------------------------------------------------------

template <class T, int V, bool CENTERED>
struct Row {  // the two visits of a row that is `end` packs long, or 0 packs
  const T *dy, *x;
  double mean, rstd;
  int64 end;

  __device__ __forceinline__ Row(const T* dy_, const T* x_, const double* mean_, const double* rstd_, int64 row,
                                 bool exists, const Geometry& g)
      : dy(dy_ + (exists ? row : 0) * g.dy.n), x(x_ + (exists ? row : 0) * g.x.n), mean(0), rstd(0), end(0) {
    if (!exists) return;
    end = g.K / V;
    rstd = rstd_[row];
    if (CENTERED) mean = mean_[row];
  }
  // dx of a pack, c1 = mean(g), c2 = mean(g * x_hat)
  __device__ __forceinline__ void dx(const Pack<T, V>& dys, const Pack<T, V>& xs, const Parameter& w, int64 column,
                                     double c1, double c2, double (&out)[V]) const {
    double weights[V];
    w.adjacent(column, weights);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double x_hat = (widen(xs.v[v]) - mean) * rstd;
      out[v] = rstd * fma(-x_hat, c2, fma(widen(dys.v[v]), weights[v], -c1));
    }
  }
};

// dx, and this block's share of the parameters' gradients. A thread's columns are the same in every row, so that it
// sums them on its own; the teams' sums are added in order. The number of blocks depends on the shape.
template <class T, int V, bool CENTERED>
__global__ void __launch_bounds__(512, 1)
row_backward(const T* dy,          // (rows, K)
             const T* x,           // (rows, K)
             const double* mean,   // (rows,), not read for RMS norm
             const double* rstd,   // (rows,)
             const void* weight,   // (K,) or null
             int weight_dtype,     //
             T* dx,                // (rows, K), perhaps dy itself
             double* partial,      // (blocks, 2, K): sums of dy * x_hat and of dy
             Geometry g) {
  DYNAMIC_SHARED(double, scratch);
  const Team team(g.team);
  const Parameter w{weight, weight_dtype, 1};
  const int64 packs = g.K / V, depth = (packs + team.size - 1) / team.size;
  double* sums = scratch + 64;  // [((j * V + v) * 2 + which) * blockDim.x + threadIdx.x]
  Pack<T, V>* kept = reinterpret_cast<Pack<T, V>*>(sums + depth * V * 2 * blockDim.x);
  const Stash<T, V> stashed_x{kept, g.stash}, stashed_dy{kept + g.stash * blockDim.x, g.stash};
  for (int64 k = 0; k < depth * V * 2; ++k) sums[k * blockDim.x + threadIdx.x] = 0;
  for (int64 first = int64(blockIdx.x) * team.count; first < g.N; first += int64(gridDim.x) * team.count) {
    const int64 r = first + team.index;
    const Row<T, V, CENTERED> row(dy, x, mean, rstd, r, r < g.N, g);
    double c[2] = {0, 0};
    int64 j = 0;
    for (int64 p = team.rank; p < row.end; p += team.size, ++j) {
      const Pack<T, V> xs = stashed_x.keep(row.x + p * V * g.x.c, j), dys = stashed_dy.keep(row.dy + p * V * g.dy.c, j);
      double weights[V];
      w.adjacent(p * V, weights);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const double x_hat = (widen(xs.v[v]) - row.mean) * row.rstd, d = widen(dys.v[v]), gv = d * weights[v];
        c[0] += gv;
        c[1] = fma(gv, x_hat, c[1]);
        double* sum = sums + (j * V + v) * 2 * blockDim.x + threadIdx.x;
        sum[0] = fma(d, x_hat, sum[0]);
        sum[blockDim.x] += d;
      }
    }
    team.sum(c, scratch);
    const double c1 = CENTERED ? c[0] / double(g.K) : 0, c2 = c[1] / double(g.K);
    j = 0;
    for (int64 p = team.rank; p < row.end; p += team.size, ++j) {
      const Pack<T, V> xs = stashed_x.again(row.x + p * V * g.x.c, j);
      const Pack<T, V> dys = stashed_dy.again(row.dy + p * V * g.dy.c, j);
      double out[V];
      row.dx(dys, xs, w, p * V, c1, c2, out);
      store(out, dx + r * g.y.n + p * V * g.y.c);
    }
  }
  __syncthreads();
  for (int64 k = threadIdx.x; k < g.K; k += blockDim.x) {
    const int64 p = k / V, v = k - p * V, j = p / team.size, rank = p - j * team.size;
    double weight_sum = 0, bias_sum = 0;
    for (int t = 0; t < team.count; ++t) {
      const double* sum = sums + (j * V + v) * 2 * blockDim.x + t * team.size + rank;
      weight_sum += sum[0];
      bias_sum += sum[blockDim.x];
    }
    partial[(int64(blockIdx.x) * 2 + 0) * g.K + k] = weight_sum;
    partial[(int64(blockIdx.x) * 2 + 1) * g.K + k] = bias_sum;
  }
}

// Rows too long for row_backward's sums: first the two means of each row, then dx by columns.
template <class T, int V, bool CENTERED>
__global__ void __launch_bounds__(512, 1)
long_row_means(const T* dy,         // (rows, K)
               const T* x,          // (rows, K)
               const double* mean,  // (rows,), not read for RMS norm
               const double* rstd,  // (rows,)
               const void* weight,  // (K,) or null
               int weight_dtype,    //
               double* means,       // (2, rows): mean(g), mean(g * x_hat)
               Geometry g) {
  DYNAMIC_SHARED(double, scratch);
  const Team team(g.team);
  const Parameter w{weight, weight_dtype, 1};
  for (int64 r = blockIdx.x; r < g.N; r += gridDim.x) {
    const Row<T, V, CENTERED> row(dy, x, mean, rstd, r, true, g);
    double c[2] = {0, 0};
    for (int64 p = team.rank; p < row.end; p += team.size) {
      const Pack<T, V> xs = load<V>(row.x + p * V * g.x.c), dys = load<V>(row.dy + p * V * g.dy.c);
      double weights[V];
      w.adjacent(p * V, weights);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const double gv = widen(dys.v[v]) * weights[v];
        c[0] += gv;
        c[1] = fma(gv, (widen(xs.v[v]) - row.mean) * row.rstd, c[1]);
      }
    }
    team.sum(c, scratch);
    if (threadIdx.x == 0) {
      means[r] = CENTERED ? c[0] / double(g.K) : 0;
      means[g.N + r] = c[1] / double(g.K);
    }
  }
}

template <class T, int V, bool CENTERED>
__global__ void __launch_bounds__(128, 1)
long_row_dx(const T* dy,          // (rows, K)
            const T* x,           // (rows, K)
            const double* mean,   // (rows,), not read for RMS norm
            const double* rstd,   // (rows,)
            const void* weight,   // (K,) or null
            int weight_dtype,     //
            const double* means,  // (2, rows), from long_row_means
            T* dx,                // (rows, K), perhaps dy itself
            double* gradients,    // (2, K): dweight, dbias
            Geometry g) {
  const Parameter w{weight, weight_dtype, 1};
  const int64 column = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= g.K) return;
  double sums[2][V] = {};
  for (int64 r = 0; r < g.N; ++r) {
    const Row<T, V, CENTERED> row(dy, x, mean, rstd, r, true, g);
    const Pack<T, V> xs = load<V>(row.x + column * g.x.c), dys = load<V>(row.dy + column * g.dy.c);
    double out[V];
    row.dx(dys, xs, w, column, means[r], means[g.N + r], out);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[0][v] = fma(widen(dys.v[v]), (widen(xs.v[v]) - row.mean) * row.rstd, sums[0][v]);
      sums[1][v] += widen(dys.v[v]);
    }
    store(out, dx + r * g.y.n + column * g.y.c);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    gradients[column + v] = sums[0][v];
    gradients[g.K + column + v] = sums[1][v];
  }
}

#include "parameter_sums.cuh"
