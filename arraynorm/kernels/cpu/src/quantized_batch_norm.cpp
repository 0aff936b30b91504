// Quantized batch norm at one ISA level.
#include "quantized_batch_norm.hpp"

namespace arraynorm::ARRAYNORM_ISA {

template <class Q>
void quantized_batch_norm(const QuantizedBatchNorm& call) {
    const QuantizedKernel<Q> kernel(call);
    if (call.volume.plane_size() >= worth_a_table)
        kernel.template run<Table<Q>>();
    else
        kernel.template run<Requantization<Q>>();
}

void quantized_batch_norm(const QuantizedBatchNorm& call) {
    call.is_signed ? quantized_batch_norm<int8_t>(call) : quantized_batch_norm<uint8_t>(call);
}

}  // namespace arraynorm::ARRAYNORM_ISA
