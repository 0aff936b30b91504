// From a storage type's number to the type.
#pragma once

#include "types.hpp"

namespace arraynorm {

template <class F>
inline void with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::float16: return f(float16{});
        case DType::bfloat16: return f(bfloat16{});
        case DType::float32: return f(float{});
        case DType::float64: return f(double{});
    }
}

}  // namespace arraynorm
