"""Norms over rows x (R, K): element k of row r has the parameters' element r % P * Q + k // S.

Layer and RMS norm: P = 1, Q = K, S = 1. Group norm: P groups of Q channels of S elements. Instance norm: Q = 1.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from numba_kernels import Kernel

PARTS = 16  # of the rows, each with sums of its own for dweight and dbias


@Kernel
def forward(x, P, S, weight, bias, eps, y, mean, rstd):
    R, K = x.shape
    Q = K // S
    for r in prange(R):
        total = np.float32(0)
        for k in range(K):
            total += x[r, k]
        m = total / np.float32(K)
        squares = np.float32(0)
        for k in range(K):
            squares += (x[r, k] - m) ** 2
        v = np.float32(1 / np.sqrt(squares / K + eps))
        mean[r], rstd[r] = m, v
        first = r % P * Q
        if S == 1:
            for k in range(K):
                y[r, k] = (x[r, k] - m) * v * weight[first + k] + bias[first + k]
        else:
            for j in range(Q):
                a, b = v * weight[first + j], bias[first + j]
                for k in range(j * S, (j + 1) * S):
                    y[r, k] = (x[r, k] - m) * a + b


@Kernel
def backward(x, dy, P, S, mean, rstd, weight, dx, dweight, dbias):
    R, K = x.shape
    Q = K // S
    parts = min(PARTS, R)
    dw, db = np.zeros((parts, P * Q), np.float32), np.zeros((parts, P * Q), np.float32)
    for part in prange(parts):
        for r in range(R * part // parts, R * (part + 1) // parts):
            m, v, first = mean[r], rstd[r], r % P * Q
            total, product = np.float32(0), np.float32(0)
            if S == 1:
                for k in range(K):
                    g = dy[r, k] * weight[first + k]
                    total += g
                    product += g * (x[r, k] - m)
                    db[part, first + k] += dy[r, k]
                    dw[part, first + k] += dy[r, k] * (x[r, k] - m) * v
            else:
                for j in range(Q):
                    b, w = np.float32(0), np.float32(0)
                    for k in range(j * S, (j + 1) * S):
                        b += dy[r, k]
                        w += dy[r, k] * (x[r, k] - m)
                    db[part, first + j] += b
                    dw[part, first + j] += w * v
                    total += b * weight[first + j]
                    product += w * weight[first + j]
            p, q = total / np.float32(K), product * v * v / np.float32(K)
            if S == 1:
                for k in range(K):
                    dx[r, k] = (dy[r, k] * weight[first + k] - p - (x[r, k] - m) * q) * v
            else:
                for j in range(Q):
                    a = weight[first + j]
                    for k in range(j * S, (j + 1) * S):
                        dx[r, k] = (dy[r, k] * a - p - (x[r, k] - m) * q) * v
    for k in range(P * Q):
        dweight[k], dbias[k] = 0, 0
    for part in range(parts):
        for k in range(P * Q):
            dweight[k] += dw[part, k]
            dbias[k] += db[part, k]


@Kernel
def rms_forward(x, weight, eps, y, rstd):
    R, K = x.shape
    for r in prange(R):
        squares = np.float32(0)
        for k in range(K):
            squares += x[r, k] ** 2
        v = np.float32(1 / np.sqrt(squares / K + eps))
        rstd[r] = v
        for k in range(K):
            y[r, k] = x[r, k] * v * weight[k]


@Kernel
def rms_backward(x, dy, rstd, weight, dx, dweight):
    R, K = x.shape
    parts = min(PARTS, R)
    dw = np.zeros((parts, K), np.float32)
    for part in prange(parts):
        for r in range(R * part // parts, R * (part + 1) // parts):
            v, product = rstd[r], np.float32(0)
            for k in range(K):
                product += dy[r, k] * weight[k] * x[r, k]
                dw[part, k] += dy[r, k] * x[r, k] * v
            q = product * v * v / np.float32(K)
            for k in range(K):
                dx[r, k] = (dy[r, k] * weight[k] - x[r, k] * q) * v
    for k in range(K):
        dweight[k] = 0
    for part in range(parts):
        for k in range(K):
            dweight[k] += dw[part, k]
