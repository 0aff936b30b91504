"""All the math of the package, one file per norm, forward above backward, in array API operations only.

Shapes name the views of `_array`: batch norm sees x as (N, C, S), group and instance norm as (N, A, C, B), layer
and RMS norm as (rows, K). Everything is computed in float64 and rounded once, to the result's dtype: float16 and
float32 sums lose what they add, and a mean that is rounded before it is subtracted loses the deviation.

`x_hat` is the normalized input (x - mean) * rstd, `rstd` the reciprocal standard deviation, `m2` the sum of squared
deviations from the mean, as in Chan, Golub & LeVeque (1983).
"""
