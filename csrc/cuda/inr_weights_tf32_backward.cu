#include "inr_weights_backward.cuh"
#include "inr_weights_gradient.cuh"
#include "inr_weights_operands.h"

namespace slimkernels {

int inr_backward_tf32(const SkInr& call, const SkInrBackward& wave, void* stream) {
  return backward<kSkOperandTf32>(call, wave, stream);
}

}  // namespace slimkernels
