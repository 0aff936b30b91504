// Layer, RMS, group and instance norm at one ISA level: from a call to the code for its storage type and layout.
#include "dispatch.hpp"
#include "row_norm_columns.hpp"
#include "row_norm_elements_backward.hpp"
#include "row_norm_planes.hpp"

namespace arraynorm::ARRAYNORM_ISA {

void row_norm_forward(const RowNormForward& call) {
    with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        switch (call.rows.layout) {
            case Rows::Layout::elements:
                return call.mean ? forward_elements<T, true>(call) : forward_elements<T, false>(call);
            case Rows::Layout::planes: return forward_planes<T>(call);
            case Rows::Layout::columns: return forward_columns<T>(call);
        }
    });
}

void row_norm_backward(const RowNormBackward& call) {
    with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        switch (call.rows.layout) {
            case Rows::Layout::elements:
                return call.mean ? backward_elements<T, true>(call) : backward_elements<T, false>(call);
            case Rows::Layout::planes: return backward_planes<T>(call);
            case Rows::Layout::columns: return backward_columns<T>(call);
        }
    });
}

}  // namespace arraynorm::ARRAYNORM_ISA
