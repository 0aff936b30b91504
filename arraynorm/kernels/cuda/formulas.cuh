// The formulas of batch norm per element, as in kernels/reference/batch_norm.py, and ReLU's mask. Instance norm and the
// second halves of group norm are the same, with statistics per sample.
#pragma once

// The constants of one channel, or one channel of one sample.
struct Affine {
  double mean, rstd, weight, bias;

  __device__ __forceinline__ double operator()(double x) const { return fma((x - mean) * rstd, weight, bias); }
};

struct AffineArrays {
  const double *mean, *rstd;  // (N, C / K)
  Parameter weight, bias;     // (C,)

  __device__ __forceinline__ Affine of(const Geometry& g, int64 n, int64 c) const {
    const int64 group = g.group(n, c);
    return {mean[group], rstd[group], weight[c], bias[c]};
  }
};

// dx = rstd * (dy * weight - mean(g) - x_hat * mean(g * x_hat)), g = dy * weight: in batch norm weight is the same for
// all of a set, and the given means are those of dy and dy * x_hat. Given statistics: no means.
struct Gradient {
  double mean, rstd, weight, c1, c2;

  __device__ __forceinline__ double operator()(double dy, double x) const {
    return rstd * fma(-((x - mean) * rstd), c2, fma(dy, weight, -c1));
  }
  __device__ __forceinline__ double operator()(double dy) const { return rstd * (dy * weight); }
};

struct GradientArrays {
  const double *mean, *rstd;  // (N, C / K); mean is null for given statistics
  Parameter weight;           // (C,)
  const double* means;        // (2, N, C / K)
  bool weighted;              // the means are those of g and g * x_hat

  __device__ __forceinline__ Gradient of(const Geometry& g, int64 n, int64 c) const {
    const int64 group = g.group(n, c), plane = g.N * (g.C / g.K);
    const double w = weight[c], by = weighted ? 1 : w;
    if (mean == nullptr) return {0, rstd[group], w, 0, 0};
    return {mean[group], rstd[group], w, by * means[group], by * means[plane + group]};
  }
};

// -- ReLU's mask: one bit per element, in C order of the logical (A, C, B), the least significant first -----------

// Bits `index`, `index + apart`, ... of V elements. With apart = 1 they are in one byte: index is a multiple of V.
template <int V>
__device__ __forceinline__ unsigned mask_bits(const unsigned char* mask, int64 index, int64 apart) {
  if (apart == 1 && V > 1) return mask[index >> 3] >> (index & 7);
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) bits |= (mask[(index + v * apart) >> 3] >> ((index + v * apart) & 7) & 1u) << v;
  return bits;
}

// max(v, 0), rounded in place; the bits of what is left above 0: a v that underflows in T is at the kink. NaN stays.
template <class T, int V>
__device__ __forceinline__ unsigned relu(double (&values)[V]) {
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    T rounded;
    narrow(values[v] <= 0 ? 0 : values[v], rounded);
    values[v] = widen(rounded);
    bits |= unsigned(values[v] > 0) << v;
  }
  return bits;
}

// 8 / V adjacent lanes have the bits of one byte. All lanes of a warp call it; those without elements give 0.
template <int V>
__device__ __forceinline__ void write_mask(unsigned bits, unsigned char* mask, int64 index, bool exists) {
  const int lane = threadIdx.x % (8 / V);
  bits <<= V * lane;
#pragma unroll
  for (int distance = 1; distance < 8 / V; distance *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, distance);
  if (lane == 0 && exists) mask[index >> 3] = static_cast<unsigned char>(bits);
}
