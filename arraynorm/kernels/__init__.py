"""Kernels: the math of every norm (`reference/`), and where a library has one, a faster way to the same numbers.

A kernel is positional, complete and unchecked; the functional layer above has checked everything once.
"""

from arraynorm.kernels._kernel import Kernel, only

__all__ = ["Kernel", "only"]
