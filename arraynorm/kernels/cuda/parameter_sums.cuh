// The second stage of the parameters' gradients: partial sums over blocks, samples or parts, added in a fixed order.
#pragma once

// Column k of two (rows, columns) matrices, `apart` doubles from one to the other and `pitch` from row to row, summed
// into out[k] and out[columns + k]. A block takes 32 columns from 32 * block on, a row for each of its warps, of which
// there are 16 at most.
__device__ __forceinline__ void sum_columns(const double* matrices, int64 rows, int64 columns, int64 pitch, int64 apart,
                                            double* out, int64 block) {
  SHARED(double, sums, 2 * 512);
  const int lane = threadIdx.x & 31, line = threadIdx.x >> 5, lines = blockDim.x >> 5;
  const int64 k = block * 32 + lane;
  double a = 0, b = 0;
  if (k < columns)
    for (int64 r = line; r < rows; r += lines) {
      a += matrices[r * pitch + k];
      b += matrices[r * pitch + apart + k];
    }
  sums[threadIdx.x] = a;
  sums[512 + threadIdx.x] = b;
  __syncthreads();
  if (line == 0 && k < columns) {
    for (int l = 1; l < lines; ++l) {
      a += sums[l * 32 + lane];
      b += sums[512 + l * 32 + lane];
    }
    out[k] = a;
    out[columns + k] = b;
  }
}

__global__ void __launch_bounds__(256, 1)
parameter_sums(const double* matrices,  // two (rows, columns)
               int64 rows, int64 columns, int64 pitch, int64 apart,
               double* out) {  // (2, columns)
  sum_columns(matrices, rows, columns, pitch, apart, out, blockIdx.x);
}
