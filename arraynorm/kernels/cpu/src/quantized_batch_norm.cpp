// Quantized batch norm at one ISA level.
#include "quantized_batch_norm.hpp"

namespace arraynorm::ARRAYNORM_ISA {

void quantized_batch_norm(const QuantizedBatchNorm& call) {
    call.is_signed ? QuantizedKernel<int8_t>(call).run() : QuantizedKernel<uint8_t>(call).run();
}

}  // namespace arraynorm::ARRAYNORM_ISA
