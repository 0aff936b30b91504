"""Quantized batch norm, with the mean folded into the bias, over xq (N, C, S) or (rows, C)."""

from __future__ import annotations

import numpy as np
from numba import prange

from numba_kernels import Kernel


@Kernel
def planes(xq, a, b, low, yq):
    """a, b (C,) float32 -> clamp(rint(xq * a + b)), from `low` up."""
    N, C, S = xq.shape
    top = np.float32(255)
    for nc in prange(N * C):
        n, c = nc // C, nc % C
        for s in range(S):
            yq[n, c, s] = np.uint8(min(max(np.rint(np.float32(xq[n, c, s]) * a[c] + b[c]), low), top))


@Kernel
def columns(xq, a, b, low, yq):
    rows, C = xq.shape
    top = np.float32(255)
    for i in prange(rows):
        for c in range(C):
            yq[i, c] = np.uint8(min(max(np.rint(np.float32(xq[i, c]) * a[c] + b[c]), low), top))
