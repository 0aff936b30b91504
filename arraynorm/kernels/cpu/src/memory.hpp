// Memory for results: aligned to cache lines, and recycled.
//
// A fresh block above glibc's threshold is a new mapping whose pages the kernel has to clear one by one, which takes as
// long as the norm itself. So large blocks that arrays give back are kept, up to a limit, for the next result of about
// their size. Arrays made of them own their data as any other (NumPy's NEP 49).
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <span>

namespace arraynorm {

// The capsule for PyDataMem_SetHandler (borrowed).
PyObject* memory_handler();

// What this thread's next blocks will be written while reading: they are placed so that neither slows the other. The
// span must last until others are given; what the addresses point to is not looked at.
std::span<const void* const> exchange_read_beside(std::span<const void* const> addresses);

// Bytes kept at most, and now; what is kept can be given back.
void set_memory_limit(int64_t bytes);
int64_t memory_limit();
int64_t memory_kept();
void release_memory();

}  // namespace arraynorm
