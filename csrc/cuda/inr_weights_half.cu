#include "inr_weights_forward.cuh"
#include "inr_weights_operands.h"

namespace slimkernels {

int inr_forward_half(const SkInr& call, void* weights, int dtype, void* stream) {
  return forward<kSkOperandHalf>(call, weights, dtype, stream);
}

}  // namespace slimkernels
