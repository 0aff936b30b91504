// Batch norm with given statistics from 8-bit integers to 8-bit integers: kernels/reference/quantized_batch_norm.py.
#include "numbers.cuh"
#include "geometry.cuh"
#include "team.cuh"
#include "parts.cuh"

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

template <template <int> class Form, class T, int V>
__global__ void __launch_bounds__(Form<V>::THREADS, 1)
requantize(const T* x,       // (1, A, C, B)
           const double* a,  // (C,)
           const double* b,  // (C,)
           double x_scale, double x_zero_point, double y_scale, double y_zero_point, int relu,
           T* y,  // as x, perhaps x itself
           Geometry g) {
  constexpr int CHANNELS = Form<V>::CHANNELS;
  const Quantization q{x_scale, x_zero_point, y_scale, y_zero_point, relu};
  const Form<V> part(g, blockIdx.x);
  const T* xs = part.of(x, g.x);
  T* ys = part.of(y, g.y);
  double as[CHANNELS], bs[CHANNELS];
#pragma unroll
  for (int k = 0; k < CHANNELS; ++k) as[k] = a[part.c + k], bs[k] = b[part.c + k];
  for (auto at = part.walk(g); at.more(); at.next()) {
    const Pack<T, V> in = load<V>(xs + at.at(g, g.x));
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.v[v] = q(in.v[v], as[v % CHANNELS], bs[v % CHANNELS]);
    *reinterpret_cast<Pack<T, V>*>(ys + at.at(g, g.y)) = out;
  }
}
