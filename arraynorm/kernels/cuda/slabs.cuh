// The kernels by slabs: a block to each part of each unit.
#pragma once

// -- reductions ------------------------------------------------------------------------------------------------

// Mean and m2 of every (sample, group); U = K.
template <class T, int V>
__global__ void __launch_bounds__(512, 1)
slab_moments(const T* x,         // (N, A, C, B)
             double* partial,    // (2, N, parts, C / K)
             unsigned* arrived,  // (N, C / K) zeros; null for one part
             double* mean,       // (N, C / K), or null; the same for the next three
             double* m2,         // of squared deviations, the sum
             double* var,        // biased
             double* rstd,       //
             double eps,         //
             Geometry g) {
  DYNAMIC_SHARED(double, scratch);
  const Team team(blockDim.x);
  const Slab slab(g, blockIdx.x, V);
  const T* xs = x + slab.n * g.x.n + slab.unit * g.U * g.x.c;
  Moments moments;
  for (Walk<V> at(g, slab.first + team.rank, slab.last, team.size); at.more(); at.next()) {
    const Pack<T, V> pack = load<V>(xs + at.at(g, g.x));
#pragma unroll
    for (int v = 0; v < V; ++v) moments.add(widen(pack.v[v]));
  }
  double sum, squares;
  team_moments(moments, widen(xs[0]), double((slab.last - slab.first) * V), team, scratch, sum, squares);
  const Partials partials{partial, g};
  if (team.rank == 0) partials.put(slab.n, slab.part, slab.unit, sum, squares);
  if (is_last(arrived + slab.n * g.units() + slab.unit, g.parts))
    merge_moments(partials, x, slab.n, slab.unit, slab.unit + 1, g.unit_elements() / V, V, {mean, m2, var, rstd, eps});
}

template <class T, int V, bool RELU>
struct Products {  // a thread's sums of dy and dy * (x - mean)
  double sums[2] = {0, 0};

  __device__ __forceinline__ void add(const Pack<T, V>& dys, const Pack<T, V>& xs, unsigned bits, double mean) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double dy = !RELU || (bits >> v & 1) ? widen(dys.v[v]) : 0;
      sums[0] += dy;
      sums[1] = fma(dy, widen(xs.v[v]) - mean, sums[1]);
    }
  }
};

// Sums of dy and of dy * x_hat for every channel of every sample (U = 1), and for every group of g = dy * weight.
template <class T, int V, bool RELU>
__global__ void __launch_bounds__(512, 1)
slab_products(const T* dy,                // (N, A, C, B)
              const unsigned char* mask,  // of y > 0, if RELU (N = 1)
              const T* x,                 // (N, A, C, B)
              const double* mean,         // (N, C / K)
              const double* rstd,         // (N, C / K)
              const void* weight,         // (C,), or null for 1
              int weight_dtype,           //
              double* partial,            // (2, N, parts, C)
              unsigned* arrived,          // (N, C / K) zeros; null for one part of one channel
              double* sums,               // (2, N, C / K) or null
              double* means,              // (2, N, C / K) or null: of the group's elements
              Geometry g) {
  DYNAMIC_SHARED(double, scratch);
  const Team team(blockDim.x);
  const Slab slab(g, blockIdx.x, V);
  const int64 groups = g.C / g.K, group = g.K == 1 ? slab.unit : quotient(slab.unit, g.K);
  const T *xs = x + slab.n * g.x.n + slab.unit * g.x.c, *dys = dy + slab.n * g.dy.n + slab.unit * g.dy.c;
  const double mu = mean[slab.n * groups + group];
  Products<T, V, RELU> products;
  for (Walk<V> at(g, slab.first + team.rank, slab.last, team.size); at.more(); at.next()) {
    const unsigned bits = RELU ? mask_bits<V>(mask, (at.a * g.C + slab.unit) * g.B + at.i, 1) : 0;
    products.add(load<V>(dys + at.at(g, g.dy)), load<V>(xs + at.at(g, g.x)), bits, mu);
  }
  team.sum(products.sums, scratch);
  const Partials partials{partial, g};
  if (team.rank == 0)
    partials.put(slab.n, slab.part, slab.unit, products.sums[0], products.sums[1] * rstd[slab.n * groups + group]);
  if (is_last(arrived + slab.n * groups + group, g.K * g.parts))
    merge_products(partials, {weight, weight_dtype, 1}, slab.n, group, group + 1,
                   {sums, means, double(g.A * g.K * g.B)});
}

// -- maps: U = 1 -----------------------------------------------------------------------------------------------

// y = x_hat * weight + bias, or max of that + addend and 0. With RELU, N = 1 and runs are multiples of 8.
template <class T, int V, bool RELU>
__global__ void __launch_bounds__(512, 1)
slab_apply(const T* x,           // (N, A, C, B)
           const T* addend,      // as x, or null; strides g.dy
           const double* mean,   // (N, C / K)
           const double* rstd,   // (N, C / K)
           const void* weight,   // (C,) or null
           int weight_dtype,     //
           const void* bias,     // (C,) or null
           int bias_dtype,       //
           T* y,                 // as x, perhaps x itself
           unsigned char* mask,  // (A * C * B / 8,), if RELU
           Geometry g) {
  const Slab slab(g, blockIdx.x, V);
  const int64 c = slab.unit;
  const T *xs = x + slab.n * g.x.n + c * g.x.c, *addends = addend + slab.n * g.dy.n + c * g.dy.c;
  T* ys = y + slab.n * g.y.n + c * g.y.c;
  const Affine affine = AffineArrays{mean, rstd, {weight, weight_dtype, 1}, {bias, bias_dtype, 0}}.of(g, slab.n, c);
  for (Walk<V> at(g, slab.first + threadIdx.x, slab.last, blockDim.x); at.pack - threadIdx.x < slab.last; at.next()) {
    double out[V] = {};
    if (at.more()) {
      const Pack<T, V> pack = load<V>(xs + at.at(g, g.x));
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = affine(widen(pack.v[v]));
      if (RELU && addend) {
        const Pack<T, V> more = load<V>(addends + at.at(g, g.dy));
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] += widen(more.v[v]);
      }
    }
    if (RELU) write_mask<V>(relu<T>(out), mask, (at.a * g.C + c) * g.B + at.i, at.more());
    if (at.more()) store(out, ys + at.at(g, g.y));
  }
}

// dx, and daddend = dy where y > 0. Blocks from g.blocks on sum the partial products over samples and parts.
template <class T, int V, bool RELU>
__global__ void __launch_bounds__(512, 1)
slab_dx(const T* dy,                // (N, A, C, B)
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
  const Slab slab(g, blockIdx.x, V);
  const int64 c = slab.unit;
  const T *xs = x + slab.n * g.x.n + c * g.x.c, *dys = dy + slab.n * g.dy.n + c * g.dy.c;
  T *dxs = dx + slab.n * g.y.n + c * g.y.c, *daddends = daddend + slab.n * g.z.n + c * g.z.c;
  const GradientArrays arrays{mean, rstd, {weight, weight_dtype, 1}, means, weighted != 0};
  const Gradient gradient = arrays.of(g, slab.n, c);
  for (Walk<V> at(g, slab.first + threadIdx.x, slab.last, blockDim.x); at.more(); at.next()) {
    const Pack<T, V> pack = load<V>(dys + at.at(g, g.dy));
    const unsigned bits = RELU ? mask_bits<V>(mask, (at.a * g.C + c) * g.B + at.i, 1) : 0;
    double out[V], through[V];
#pragma unroll
    for (int v = 0; v < V; ++v) through[v] = !RELU || (bits >> v & 1) ? widen(pack.v[v]) : 0;
    if (x) {
      const Pack<T, V> from = load<V>(xs + at.at(g, g.x));
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient(through[v], widen(from.v[v]));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient(through[v]);
    }
    store(out, dxs + at.at(g, g.y));
    if (RELU && daddend) store(through, daddends + at.at(g, g.z));
  }
}
