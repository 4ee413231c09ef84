#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "deploy_jobs.h"

#define SK_INL "deploy-inl.h"
#include "foreach_isa.h"

namespace slimkernels::deploy {

const Kernels& float_kernels() {
  static const Kernels base = slimkernels::base::kernels_of<float>();
#if defined(__x86_64__)
  static const Kernels avx2 = slimkernels::avx2::kernels_of<float>(), avx512 = slimkernels::avx512::kernels_of<float>();
  if (current_isa() == Isa::kAvx512) return avx512;
  if (current_isa() == Isa::kAvx2) return avx2;
#endif
  return base;
}

}  // namespace slimkernels::deploy
