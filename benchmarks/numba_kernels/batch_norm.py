"""Batch norm, also with add and ReLU, over planes x (N, C, S) or over columns of a matrix (rows, C*S)."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from numba_kernels import Kernel

CHUNKS = 16  # parts of the rows that are summed on their own


@njit(fastmath=True, inline="always")
def _moments(x, c, eps):
    """Mean and 1 / sqrt(var + eps) of channel c, in two passes."""
    N, _, S = x.shape
    total = 0.0
    for n in range(N):
        part = np.float32(0)
        for s in range(S):
            part += x[n, c, s]
        total += part
    mean = np.float32(total / (N * S))
    squares = 0.0
    for n in range(N):
        part = np.float32(0)
        for s in range(S):
            part += (x[n, c, s] - mean) ** 2
        squares += part
    return mean, np.float32(1 / np.sqrt(squares / (N * S) + eps))


@Kernel
def forward(x, weight, bias, eps, y, mean, rstd):
    N, C, S = x.shape
    for c in prange(C):
        m, r = _moments(x, c, eps)
        mean[c], rstd[c] = m, r
        a, b = r * weight[c], bias[c]
        for n in range(N):
            for s in range(S):
                y[n, c, s] = (x[n, c, s] - m) * a + b


@Kernel
def apply(x, mean, rstd, weight, bias, y):
    N, C, S = x.shape
    for nc in prange(N * C):
        n, c = nc // C, nc % C
        m, a, b = mean[c], rstd[c] * weight[c], bias[c]
        for s in range(S):
            y[n, c, s] = (x[n, c, s] - m) * a + b


@Kernel
def backward(x, dy, mean, rstd, weight, dx, dweight, dbias):
    N, C, S = x.shape
    for c in prange(C):
        m, r = mean[c], rstd[c]
        db, dw = 0.0, 0.0
        for n in range(N):
            b, w = np.float32(0), np.float32(0)
            for s in range(S):
                b += dy[n, c, s]
                w += dy[n, c, s] * (x[n, c, s] - m)
            db += b
            dw += w * r
        dbias[c], dweight[c] = db, dw
        a, p, q = weight[c] * r, np.float32(db / (N * S)), np.float32(dw / (N * S)) * r
        for n in range(N):
            for s in range(S):
                dx[n, c, s] = (dy[n, c, s] - p - (x[n, c, s] - m) * q) * a


@Kernel
def add_relu_forward(x, addend, weight, bias, eps, y, mean, rstd):
    N, C, S = x.shape
    zero = np.float32(0)
    for c in prange(C):
        m, r = _moments(x, c, eps)
        mean[c], rstd[c] = m, r
        a, b = r * weight[c], bias[c]
        for n in range(N):
            for s in range(S):
                y[n, c, s] = max((x[n, c, s] - m) * a + b + addend[n, c, s], zero)


@Kernel
def add_relu_backward(x, dy, y, mean, rstd, weight, dx, daddend, dweight, dbias):
    N, C, S = x.shape
    zero = np.float32(0)
    for c in prange(C):
        m, r = mean[c], rstd[c]
        db, dw = 0.0, 0.0
        for n in range(N):
            b, w = np.float32(0), np.float32(0)
            for s in range(S):
                g = dy[n, c, s] if y[n, c, s] > zero else zero
                daddend[n, c, s] = g
                b += g
                w += g * (x[n, c, s] - m)
            db += b
            dw += w * r
        dbias[c], dweight[c] = db, dw
        a, p, q = weight[c] * r, np.float32(db / (N * S)), np.float32(dw / (N * S)) * r
        for n in range(N):
            for s in range(S):
                dx[n, c, s] = (daddend[n, c, s] - p - (x[n, c, s] - m) * q) * a


# -- columns: x (rows, M), where column j is of channel j // S ------------------------------------------------------


@Kernel
def columns_forward(x, S, weight, bias, eps, y, mean, rstd):
    rows, M = x.shape
    C = M // S
    sums = np.zeros((CHUNKS, M), np.float32)
    for k in prange(CHUNKS):
        for i in range(rows * k // CHUNKS, rows * (k + 1) // CHUNKS):
            for j in range(M):
                sums[k, j] += x[i, j]
    _fold(sums, S, mean)
    for c in range(C):
        mean[c] /= rows * S
    m = _spread(mean, S)
    for k in prange(CHUNKS):
        sums[k] = 0
        for i in range(rows * k // CHUNKS, rows * (k + 1) // CHUNKS):
            for j in range(M):
                sums[k, j] += (x[i, j] - m[j]) ** 2
    _fold(sums, S, rstd)
    for c in range(C):
        rstd[c] = 1 / np.sqrt(rstd[c] / (rows * S) + eps)
    a, b = _spread(rstd * weight, S), _spread(bias, S)
    for i in prange(rows):
        for j in range(M):
            y[i, j] = (x[i, j] - m[j]) * a[j] + b[j]


@Kernel
def columns_backward(x, dy, S, mean, rstd, weight, dx, dweight, dbias):
    rows, M = x.shape
    m = _spread(mean, S)
    sums = np.zeros((CHUNKS, M), np.float32)
    products = np.zeros((CHUNKS, M), np.float32)
    for k in prange(CHUNKS):
        for i in range(rows * k // CHUNKS, rows * (k + 1) // CHUNKS):
            for j in range(M):
                sums[k, j] += dy[i, j]
                products[k, j] += dy[i, j] * (x[i, j] - m[j])
    _fold(sums, S, dbias)
    _fold(products, S, dweight)
    dweight *= rstd
    a, p, q = _spread(rstd * weight, S), _spread(dbias / (rows * S), S), _spread(dweight * rstd / (rows * S), S)
    for i in prange(rows):
        for j in range(M):
            dx[i, j] = (dy[i, j] - p[j] - (x[i, j] - m[j]) * q[j]) * a[j]


@njit
def _fold(sums, S, total):
    """Chunks and columns -> channels."""
    for c in range(total.size):
        value = 0.0
        for k in range(sums.shape[0]):
            for s in range(S):
                value += sums[k, c * S + s]
        total[c] = value


@njit
def _spread(values, S):
    """Channels -> columns, in float32."""
    columns = np.empty(values.size * S, np.float32)
    for c in range(values.size):
        columns[c * S : (c + 1) * S] = values[c]
    return columns
