// The kernels that map: a block to each part, U = 1.
#pragma once

// y = x_hat * weight + bias, or max of that + addend and 0. With RELU, N = 1, and bytes of the mask are of one warp:
// runs of slabs are multiples of 8; of tiles, B = 1 and C is a multiple of 8.
template <template <int> class Form, class T, int V, bool RELU>
__global__ void __launch_bounds__(Form<V>::THREADS, 1)
apply(const T* x,           // (N, A, C, B)
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
  constexpr int CHANNELS = Form<V>::CHANNELS;
  const Form<V> part(g, blockIdx.x);
  const T *xs = part.of(x, g.x), *addends = part.of(addend, g.dy);
  T* ys = part.of(y, g.y);
  const AffineArrays arrays{mean, rstd, {weight, weight_dtype, 1}, {bias, bias_dtype, 0}};
  Affine affine[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) affine[k] = arrays.of(g, part.n, part.c + k);
  for (auto at = part.walk(g); at.pack - part.row < part.last; at.next()) {  // as often for all threads of a warp
    double out[V] = {};
    if (at.more()) {
      const Pack<T, V> pack = load<V>(xs + at.at(g, g.x));
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = affine[v % CHANNELS](widen(pack.v[v]));
      if (RELU && addend) {
        const Pack<T, V> more = load<V>(addends + at.at(g, g.dy));
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] += widen(more.v[v]);
      }
    }
    if (RELU) write_mask<V>(relu<T>(out), mask, part.mask_index(g, at), at.more());
    if (at.more()) store(out, ys + at.at(g, g.y));
  }
}

// dx, and daddend = dy where y > 0. Blocks from g.blocks on sum the partial products over samples and parts.
template <template <int> class Form, class T, int V, bool RELU>
__global__ void __launch_bounds__(Form<V>::THREADS, 1)
dx(const T* dy,                // (N, A, C, B)
   const unsigned char* mask,  // of y > 0, if RELU
   const T* x,                 // as dy; null for given statistics
   const double* mean,         // (N, C / K); null for given statistics
   const double* rstd,         // (N, C / K)
   const void* weight,         // (C,) or null
   int weight_dtype,           //
   const double* means,        // (2, N, C / K)
   int weighted,               // whether the means are those of dy * weight
   T* to,                      // as dy, perhaps dy itself
   T* daddend,                 // as dy, or null; strides g.z
   const double* partial,      // (2, N, summed, C) products, or null
   double* gradients,          // (2, C): dbias, dweight
   Geometry g) {
  if (blockIdx.x >= g.blocks) {
    sum_columns(partial, g.N * g.summed, g.C, g.C, g.N * g.summed * g.C, gradients, blockIdx.x - g.blocks);
    return;
  }
  constexpr int CHANNELS = Form<V>::CHANNELS;
  const Form<V> part(g, blockIdx.x);
  const T *xs = part.of(x, g.x), *dys = part.of(dy, g.dy);
  T *tos = part.of(to, g.y), *daddends = part.of(daddend, g.z);
  const GradientArrays arrays{mean, rstd, {weight, weight_dtype, 1}, means, weighted != 0};
  Gradient gradient[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) gradient[k] = arrays.of(g, part.n, part.c + k);
  for (auto at = part.walk(g); at.more(); at.next()) {
    const Pack<T, V> pack = load<V>(dys + at.at(g, g.dy));
    const unsigned bits = RELU ? mask_bits<V>(mask, part.mask_index(g, at), part.apart(g)) : ~0u;
    double out[V], through[V];
#pragma unroll
    for (int v = 0; v < V; ++v) through[v] = bits >> v & 1 ? widen(pack.v[v]) : 0;
    if (x) {
      const Pack<T, V> from = load<V>(xs + at.at(g, g.x));
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient[v % CHANNELS](through[v], widen(from.v[v]));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = gradient[v % CHANNELS](through[v]);
    }
    store(out, tos + at.at(g, g.y));
    if (RELU && daddend) store(through, daddends + at.at(g, g.z));
  }
}
