// The table of one ISA level's kernels.
#include "calls.hpp"

namespace arraynorm {

#define ARRAYNORM_TABLE_NAME_(isa) isa##_kernels
#define ARRAYNORM_TABLE_NAME(isa) ARRAYNORM_TABLE_NAME_(isa)
#define ARRAYNORM_STRING_(isa) #isa
#define ARRAYNORM_STRING(isa) ARRAYNORM_STRING_(isa)

namespace ARRAYNORM_ISA {
void batch_norm_forward(const BatchNormForward&);
void batch_norm_backward(const BatchNormBackward&);
}  // namespace ARRAYNORM_ISA

const Kernels& ARRAYNORM_TABLE_NAME(ARRAYNORM_ISA)() {
    static const Kernels kernels{
        ARRAYNORM_STRING(ARRAYNORM_ISA),
        ARRAYNORM_ISA::batch_norm_forward,
        ARRAYNORM_ISA::batch_norm_backward,
    };
    return kernels;
}

}  // namespace arraynorm
