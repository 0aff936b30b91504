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
void row_norm_forward(const RowNormForward&);
void row_norm_backward(const RowNormBackward&);
void quantized_batch_norm(const QuantizedBatchNorm&);
}  // namespace ARRAYNORM_ISA

const Kernels& ARRAYNORM_TABLE_NAME(ARRAYNORM_ISA)() {
    static const Kernels kernels{
        ARRAYNORM_STRING(ARRAYNORM_ISA), ARRAYNORM_ISA::batch_norm_forward, ARRAYNORM_ISA::batch_norm_backward,
        ARRAYNORM_ISA::row_norm_forward, ARRAYNORM_ISA::row_norm_backward,  ARRAYNORM_ISA::quantized_batch_norm,
    };
    return kernels;
}

}  // namespace arraynorm
