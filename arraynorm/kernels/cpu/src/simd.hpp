// Eight elements at a time: a Pack of a computation type (float or double), loaded from and stored to any of the four
// storage types, and 8-bit integers. The files included here are the only ones that know of registers; everything above
// them is plain arithmetic on packs.
//
// Compiled once per ISA level, in a namespace of its own (ARRAYNORM_ISA). Registers are GCC and Clang vector types,
// which exist on every architecture; intrinsics stand only where those have no words, or GCC makes much of few: fused
// multiply-add, conversions, stores that bypass the cache, parts of packs, and collecting signs into bits.
#pragma once

#include "simd_access.hpp"
#include "simd_formats.hpp"
#include "simd_packs.hpp"
#include "simd_pairs.hpp"
