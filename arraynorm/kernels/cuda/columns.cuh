// The kernels by columns: a block to each part of the rows of each tile of channels.
#pragma once

// Each of the M values becomes its sum over the rows of the block, in a fixed order. shared: M * blockDim.x doubles.
template <int M>
__device__ __forceinline__ void sum_rows(double (&values)[M], double* shared, int64 lanes) {
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

// The groups that the block which finishes last has to merge: those of its tile, or of its sample where a group may
// reach over tiles.
struct Job {
  int64 index, blocks, first, last;

  __device__ __forceinline__ Job(const Geometry& g, const Tile& t, int width) {
    const int64 tiles = Tile::count(g, width), groups = g.C / g.K, end = (t.tile + 1) * g.lanes * width;
    index = g.K == 1 ? t.n * tiles + t.tile : t.n;
    blocks = g.K == 1 ? g.parts : g.parts * tiles;
    first = g.K == 1 ? t.tile * g.lanes * width : 0;
    last = g.K == 1 && end < groups ? end : groups;
  }
};

// -- reductions ------------------------------------------------------------------------------------------------

// Mean and m2 of every (sample, group).
template <class T, int V>
__global__ void __launch_bounds__(256, 1)
column_moments(const T* x,         // (N, A, C, B)
               double* partial,    // (2, N, parts, C)
               unsigned* arrived,  // one zero per job; null where a job is one block
               double* mean,       // (N, C / K), or null; the same for the next three
               double* m2,         // of squared deviations, the sum
               double* var,        // biased
               double* rstd,       //
               double eps,         //
               Geometry g) {
  DYNAMIC_SHARED(double, shared);
  const Tile tile(g, blockIdx.x, V);
  const T* xs = x + tile.n * g.x.n + (tile.inside ? tile.c : 0) * g.x.c;
  double n = 0, pivot[V] = {}, sum[V] = {}, squares[V] = {};  // as Moments, of V columns
  for (Walk<1> at(g, tile.first + tile.row, tile.inside ? tile.last : 0, tile.rows); at.more(); at.next()) {
    const Pack<T, V> pack = load<V>(xs + at.at(g, g.x));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double value = widen(pack.v[v]);
      if (n == 0) pivot[v] = value;
      const double d = value - pivot[v];
      sum[v] += d;
      squares[v] = fma(d, d, squares[v]);
    }
    n += 1;
  }
  double total[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Moments moments{n, pivot[v], sum[v], squares[v]};
    const int64 c = tile.inside ? tile.c + v : 0, leader = g.K == 1 ? c : quotient(c, g.K) * g.K;
    sum[v] = moments.about(widen(x[tile.n * g.x.n + leader * g.x.c]));
    squares[v] = moments.m2();
    total[v] = sum[v];
  }
  sum_rows(total, shared, g.lanes);
  const double count = double(tile.last - tile.first);
#pragma unroll
  for (int v = 0; v < V; ++v) squares[v] = m2_about(n, sum[v], squares[v], total[v] / count);
  sum_rows(squares, shared, g.lanes);
  const Partials partials{partial, g};
  if (tile.row == 0 && tile.inside)
#pragma unroll
    for (int v = 0; v < V; ++v) partials.put(tile.n, tile.part, tile.c + v, total[v], squares[v]);
  const Job job(g, tile, V);
  if (is_last(arrived + job.index, job.blocks))
    merge_moments(partials, x, tile.n, job.first, job.last, g.A * g.B, 1, {mean, m2, var, rstd, eps});
}

// Sums of dy and of dy * x_hat for every channel of every sample, and for every group of g = dy * weight.
template <class T, int V, bool RELU>
__global__ void __launch_bounds__(256, 1)
column_products(const T* dy,                // (N, A, C, B)
                const unsigned char* mask,  // of y > 0, if RELU (N = 1)
                const T* x,                 // (N, A, C, B)
                const double* mean,         // (N, C / K)
                const double* rstd,         // (N, C / K)
                const void* weight,         // (C,), or null for 1
                int weight_dtype,           //
                double* partial,            // (2, N, parts, C)
                unsigned* arrived,          // one zero per job; null where a job is one block
                double* sums,               // (2, N, C / K) or null
                double* means,              // (2, N, C / K) or null: of the group's elements
                Geometry g) {
  DYNAMIC_SHARED(double, shared);
  const Tile tile(g, blockIdx.x, V);
  const int64 groups = g.C / g.K, c = tile.inside ? tile.c : 0;
  const T *xs = x + tile.n * g.x.n + c * g.x.c, *dys = dy + tile.n * g.dy.n + c * g.dy.c;
  double mu[V], products[2 * V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) mu[v] = mean[tile.n * groups + quotient(c + (tile.inside ? v : 0), g.K)];
  for (Walk<1> at(g, tile.first + tile.row, tile.inside ? tile.last : 0, tile.rows); at.more(); at.next()) {
    const Pack<T, V> xv = load<V>(xs + at.at(g, g.x)), dyv = load<V>(dys + at.at(g, g.dy));
    const unsigned bits = RELU ? mask_bits<V>(mask, (at.a * g.C + c) * g.B + at.i, g.B) : 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double d = !RELU || (bits >> v & 1) ? widen(dyv.v[v]) : 0;
      products[2 * v] += d;
      products[2 * v + 1] = fma(d, widen(xv.v[v]) - mu[v], products[2 * v + 1]);
    }
  }
  sum_rows(products, shared, g.lanes);
  const Partials partials{partial, g};
  if (tile.row == 0 && tile.inside)
#pragma unroll
    for (int v = 0; v < V; ++v)
      partials.put(tile.n, tile.part, c + v, products[2 * v],
                   products[2 * v + 1] * rstd[tile.n * groups + quotient(c + v, g.K)]);
  const Job job(g, tile, V);
  if (is_last(arrived + job.index, job.blocks))
    merge_products(partials, {weight, weight_dtype, 1}, tile.n, job.first, job.last,
                   {sums, means, double(g.A * g.K * g.B)});
}

// -- maps ------------------------------------------------------------------------------------------------------

// y = x_hat * weight + bias, or max of that + addend and 0. With RELU, N = B = 1 and C is a multiple of 8.
template <class T, int V, bool RELU>
__global__ void __launch_bounds__(256, 1)
column_apply(const T* x,           // (N, A, C, B)
             const T* addend,      // as x, or null; strides g.dy
             const double* mean,   // (N, C / K)
             const double* rstd,   // (N, C / K)
             const void* weight,   // (C,) or null
             int weight_dtype,     //
             const void* bias,     // (C,) or null
             int bias_dtype,       //
             T* y,                 // as x, perhaps x itself
             unsigned char* mask,  // (A * C / 8,), if RELU
             Geometry g) {
  const Tile tile(g, blockIdx.x, V);
  const int64 c = tile.inside ? tile.c : 0;
  const T *xs = x + tile.n * g.x.n + c * g.x.c, *addends = addend + tile.n * g.dy.n + c * g.dy.c;
  T* ys = y + tile.n * g.y.n + c * g.y.c;
  const AffineArrays arrays{mean, rstd, {weight, weight_dtype, 1}, {bias, bias_dtype, 0}};
  Affine affine[V];
#pragma unroll
  for (int v = 0; v < V; ++v) affine[v] = arrays.of(g, tile.n, c + (tile.inside ? v : 0));
  for (Walk<1> at(g, tile.first + tile.row, tile.last, tile.rows); at.pack - tile.row < tile.last; at.next()) {
    const bool exists = tile.inside && at.more();
    double out[V] = {};
    if (exists) {
      const Pack<T, V> pack = load<V>(xs + at.at(g, g.x));
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = affine[v](widen(pack.v[v]));
      if (RELU && addend) {
        const Pack<T, V> more = load<V>(addends + at.at(g, g.dy));
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] += widen(more.v[v]);
      }
    }
    if (RELU) write_mask<V>(relu<T>(out), mask, at.a * g.C + c, exists);
    if (exists) store(out, ys + at.at(g, g.y));
  }
}

// dx, and daddend = dy where y > 0. Blocks from g.blocks on sum the partial products over samples and parts.
template <class T, int V, bool RELU>
__global__ void __launch_bounds__(256, 1)
column_dx(const T* dy,                // (N, A, C, B)
          const unsigned char* mask,  // of y > 0, if RELU
          const T* x,                 // as dy; null for given statistics
          const double* mean,         // (N, C / K); null for given statistics
          const double* rstd,         // (N, C / K)
          const void* weight,         // (C,) or null
          int weight_dtype,           //
          const double* means,        // (2, N, C / K)
          int weighted,               // whether the means are those of dy * weight
          T* dx,                      // as dy, perhaps dy itself
          T* daddend,                 // as dy, or null; strides g.z
          const double* partial,      // (2, N, summed, C) products, or null
          double* gradients,          // (2, C): dbias, dweight
          Geometry g) {
  if (blockIdx.x >= g.blocks) {
    sum_columns(partial, g.N * g.summed, g.C, g.C, g.N * g.summed * g.C, gradients, blockIdx.x - g.blocks);
    return;
  }
  const Tile tile(g, blockIdx.x, V);
  if (!tile.inside) return;
  const int64 c = tile.c;
  const T *xs = x + tile.n * g.x.n + c * g.x.c, *dys = dy + tile.n * g.dy.n + c * g.dy.c;
  T *dxs = dx + tile.n * g.y.n + c * g.y.c, *daddends = daddend + tile.n * g.z.n + c * g.z.c;
  const GradientArrays arrays{mean, rstd, {weight, weight_dtype, 1}, means, weighted != 0};
  Gradient gradient[V];
#pragma unroll
  for (int v = 0; v < V; ++v) gradient[v] = arrays.of(g, tile.n, c + v);
  for (Walk<1> at(g, tile.first + tile.row, tile.last, tile.rows); at.more(); at.next()) {
    const Pack<T, V> pack = load<V>(dys + at.at(g, g.dy));
    const unsigned bits = RELU ? mask_bits<V>(mask, (at.a * g.C + c) * g.B + at.i, g.B) : 0;
    double out[V], through[V];
#pragma unroll
    for (int v = 0; v < V; ++v) through[v] = !RELU || (bits >> v & 1) ? widen(pack.v[v]) : 0;
    if (x) {
      const Pack<T, V> from = load<V>(xs + at.at(g, g.x));
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient[v](through[v], widen(from.v[v]));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient[v](through[v]);
    }
    store(out, dxs + at.at(g, g.y));
    if (RELU && daddend) store(through, daddends + at.at(g, g.z));
  }
}
