// Batch norm, plus an addend, then ReLU (kernels/reference/batch_norm_add_relu.py): the kernels of reductions.cuh and
// maps.cuh with RELU = true, and a map for layouts in which a thread's elements do not fill bytes of the mask.
#include "numbers.cuh"
#include "geometry.cuh"
#include "team.cuh"
#include "parts.cuh"
#include "partials.cuh"
#include "parameter_sums.cuh"
#include "formulas.cuh"
#include "reductions.cuh"
#include "maps.cuh"

// y = max(x_hat * weight + bias + addend, 0), an element to a thread, in C order of (A, C, B): any strides, any sizes.
template <class T>
__global__ void __launch_bounds__(256, 1)
flat_apply_add_relu(const T* x,           // (1, A, C, B)
                    const T* addend,      // as x, or null; strides g.dy
                    const double* mean,   // (C,)
                    const double* rstd,   // (C,)
                    const void* weight,   // (C,) or null
                    int weight_dtype,     //
                    const void* bias,     // (C,) or null
                    int bias_dtype,       //
                    T* y,                 // as x, perhaps x itself
                    unsigned char* mask,  // (ceil(A * C * B / 8),)
                    Geometry g) {
  const AffineArrays arrays{mean, rstd, {weight, weight_dtype, 1}, {bias, bias_dtype, 0}};
  const int64 total = g.A * g.C * g.B, whole = (total + 7) / 8 * 8;
  for (int64 start = int64(blockIdx.x) * blockDim.x; start < whole; start += int64(gridDim.x) * blockDim.x) {
    const int64 index = start + threadIdx.x, ac = quotient(index, g.B), b = index - ac * g.B;
    const int64 a = quotient(ac, g.C), c = ac - a * g.C;
    double out[1] = {0};
    if (index < total) {
      out[0] = arrays.of(g, 0, c)(widen(x[a * g.x.a + c * g.x.c + b * g.x.b]));
      if (addend) out[0] += widen(addend[a * g.dy.a + c * g.dy.c + b * g.dy.b]);
    }
    write_mask<1>(relu<T>(out), mask, index, index < whole);
    if (index < total) narrow(out[0], y[a * g.y.a + c * g.y.c + b * g.y.b]);
  }
}
