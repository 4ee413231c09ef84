#include "inr_weights_backward.cuh"
#include "inr_weights_gradient.cuh"
#include "inr_weights_operands.h"

namespace slimkernels {

int inr_backward_float(const SkInr& call, const SkInrBackward& wave, void* stream) {
  return backward<kSkOperandFloat>(call, wave, stream);
}

}  // namespace slimkernels
