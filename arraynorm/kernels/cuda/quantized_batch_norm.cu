// Batch norm with given statistics from 8-bit integers to 8-bit integers: kernels/reference/quantized_batch_norm.py.
#include "numbers.cuh"
#include "geometry.cuh"

template <class T>
struct Limits;
template <>
struct Limits<unsigned char> {
  static constexpr double lowest = 0, highest = 255;
};
template <>
struct Limits<signed char> {
  static constexpr double lowest = -128, highest = 127;
};

struct Quantization {
  double x_scale, x_zero_point, y_scale, y_zero_point;
  int relu;

  // Each operation rounded, no fused multiply-add: the levels are those of the CPU, ties included.
  template <class T>
  __device__ __forceinline__ T operator()(T x, double a, double b) const {
    double v = (widen(x) - x_zero_point) * x_scale * a + b;
    if (v != v) v = b;  // of finite factors only an overflow times 0 gives NaN, and it means 0
    if (relu && v < 0) v = 0;
    double level = rint(v / y_scale) + y_zero_point;
    level = level < Limits<T>::lowest ? Limits<T>::lowest : level > Limits<T>::highest ? Limits<T>::highest : level;
    return static_cast<T>(static_cast<int>(level));
  }
};

template <class T, int V>
__device__ __forceinline__ void requantize(const T* from, T* to, const Quantization& q, const double (&a)[V],
                                           const double (&b)[V]) {
  const Pack<T, V> in = load<V>(from);
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.v[v] = q(in.v[v], a[v], b[v]);
  *reinterpret_cast<Pack<T, V>*>(to) = out;
}

template <class T, int V>
__global__ void __launch_bounds__(256, 1)
slab_requantize(const T* x,       // (1, A, C, B)
                const double* a,  // (C,)
                const double* b,  // (C,)
                double x_scale, double x_zero_point, double y_scale, double y_zero_point, int relu,
                T* y,  // as x, perhaps x itself
                Geometry g) {
  const Quantization q{x_scale, x_zero_point, y_scale, y_zero_point, relu};
  const Slab slab(g, blockIdx.x, V);
  double as[V], bs[V];
#pragma unroll
  for (int v = 0; v < V; ++v) as[v] = a[slab.unit], bs[v] = b[slab.unit];
  for (Walk<V> at(g, slab.first + threadIdx.x, slab.last, blockDim.x); at.more(); at.next())
    requantize(x + slab.unit * g.x.c + at.at(g, g.x), y + slab.unit * g.y.c + at.at(g, g.y), q, as, bs);
}

template <class T, int V>
__global__ void __launch_bounds__(256, 1)
column_requantize(const T* x,       // (1, A, C, B)
                  const double* a,  // (C,)
                  const double* b,  // (C,)
                  double x_scale, double x_zero_point, double y_scale, double y_zero_point, int relu,
                  T* y,  // as x, perhaps x itself
                  Geometry g) {
  const Quantization q{x_scale, x_zero_point, y_scale, y_zero_point, relu};
  const Tile tile(g, blockIdx.x, V);
  if (!tile.inside) return;
  double as[V], bs[V];
#pragma unroll
  for (int v = 0; v < V; ++v) as[v] = a[tile.c + v], bs[v] = b[tile.c + v];
  for (Walk<1> at(g, tile.first + tile.row, tile.last, tile.rows); at.more(); at.next())
    requantize(x + tile.c * g.x.c + at.at(g, g.x), y + tile.c * g.y.c + at.at(g, g.y), q, as, bs);
}
