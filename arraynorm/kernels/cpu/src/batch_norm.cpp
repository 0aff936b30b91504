// Batch norm at one ISA level: from a call to the code for its storage type and layout.
#include "batch_norm_columns.hpp"
#include "batch_norm_planes.hpp"
#include "dispatch.hpp"

namespace arraynorm::ARRAYNORM_ISA {

void batch_norm_forward(const BatchNormForward& call) {
    with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        if (call.volume.layout == Volume::Layout::planes)
            forward_planes<T>(call);
        else
            forward_columns<T>(call);
    });
}

void batch_norm_backward(const BatchNormBackward& call) {
    with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        if (call.volume.layout == Volume::Layout::planes)
            call.mask ? backward_planes<T, MaskReader>(call) : backward_planes<T, NoMask>(call);
        else
            call.mask ? backward_columns<T, MaskReader>(call) : backward_columns<T, NoMask>(call);
    });
}

}  // namespace arraynorm::ARRAYNORM_ISA
