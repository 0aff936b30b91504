// The kernels that reduce: a block to each part, and the block that finishes last merges.
#pragma once

// Mean and m2 of every (sample, group). Slabs: U = K.
template <template <int> class Form, class T, int V>
__global__ void __launch_bounds__(Form<V>::THREADS, 1)
moments(const T* x,         // (N, A, C, B)
        double* partial,    // (2, N, parts, C / U)
        unsigned* arrived,  // one zero per job; null where a job is one block
        double* mean,       // (N, C / K), or null; the same for the next three
        double* m2,         // of squared deviations, the sum
        double* var,        // biased
        double* rstd,       //
        double eps,         //
        Geometry g) {
  DYNAMIC_SHARED(double, shared);
  constexpr int CHANNELS = Form<V>::CHANNELS, STEP = Form<V>::STEP;
  const Form<V> part(g, blockIdx.x);
  const T* xs = part.of(x, g.x);
  Moments<CHANNELS> mine;
  for (auto at = part.walk(g); at.more(); at.next()) {
    const Pack<T, V> pack = load<V>(xs + at.at(g, g.x));
#pragma unroll
    for (int v = 0; v < V; ++v) mine.add(widen(pack.v[v]), v % CHANNELS);
  }
  double origin[CHANNELS], sum[CHANNELS], squares[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) {
    const int64 c = part.c + k, leader = g.K == 1 ? c : quotient(c, g.K) * g.K;
    origin[k] = widen(x[part.n * g.x.n + leader * g.x.c]);
  }
  merge_threads(mine, origin, double((part.last - part.first) * STEP), sum, squares,
                [&](double(&values)[CHANNELS]) { part.sum(values, shared); });
  const Partials partials{partial, g};
  if (part.row == 0 && part.inside)
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) partials.put(part.n, part.part, part.unit + k, sum[k], squares[k]);
  const Job job = part.job(g);
  if (is_last(arrived + job.index, job.blocks))
    merge_moments(partials, x, part.n, job, STEP, {mean, m2, var, rstd, eps});
}

// A thread's sums of dy and dy * (x - mean), of CHANNELS channels.
template <int CHANNELS>
struct Products {
  double sums[2 * CHANNELS] = {};

  __device__ __forceinline__ void add(double dy, double deviation, int k = 0) {
    sums[2 * k] += dy;
    sums[2 * k + 1] = fma(dy, deviation, sums[2 * k + 1]);
  }
};

// Sums of dy and of dy * x_hat for every channel of every sample (U = 1), and for every group of g = dy * weight.
template <template <int> class Form, class T, int V, bool RELU>
__global__ void __launch_bounds__(Form<V>::THREADS, 1)
products(const T* dy,                // (N, A, C, B)
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
  constexpr int CHANNELS = Form<V>::CHANNELS;
  const Form<V> part(g, blockIdx.x);
  const T *xs = part.of(x, g.x), *dys = part.of(dy, g.dy);
  double mu[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) mu[k] = mean[g.group(part.n, part.c + k)];
  Products<CHANNELS> mine;
  for (auto at = part.walk(g); at.more(); at.next()) {
    const Pack<T, V> xv = load<V>(xs + at.at(g, g.x)), dyv = load<V>(dys + at.at(g, g.dy));
    const unsigned bits = RELU ? mask_bits<V>(mask, part.mask_index(g, at), part.apart(g)) : ~0u;
#pragma unroll
    for (int v = 0; v < V; ++v)
      mine.add(bits >> v & 1 ? widen(dyv.v[v]) : 0, widen(xv.v[v]) - mu[v % CHANNELS], v % CHANNELS);
  }
  part.sum(mine.sums, shared);
  const Partials partials{partial, g};
  if (part.row == 0 && part.inside)
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k)
      partials.put(part.n, part.part, part.c + k, mine.sums[2 * k],
                   mine.sums[2 * k + 1] * rstd[g.group(part.n, part.c + k)]);
  const Job job = part.job(g);
  if (is_last(arrived + job.index, job.blocks))
    merge_products(partials, {weight, weight_dtype, 1}, part.n, job, {sums, means, double(g.A * g.K * g.B)});
}
