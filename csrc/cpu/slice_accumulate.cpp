// Compact gradients added to the leading slices of full-size buffers: PyTorch's addition, without its Python.
#include <torch/library.h>

#include "common.h"

namespace slimkernels {
namespace {

void slice_accumulate_cpu(at::TensorList targets, at::TensorList sources) {
  TORCH_CHECK_VALUE(targets.size() == sources.size(), "slice_accumulate_: expected sources of ", targets.size(),
                    " tensors, got ", sources.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor &target = targets[i], &source = sources[i];
    bool fits = source.dim() == target.dim();
    for (int64_t d = 0; fits && d < source.dim(); ++d) fits = source.size(d) <= target.size(d);
    TORCH_CHECK_VALUE(fits, "slice_accumulate_: expected sources[", i, "] of at most the shape ", target.sizes(),
                      " of its target, got ", source.sizes());
    target.as_strided(source.sizes(), target.strides()).add_(source);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) { m.impl("slice_accumulate_", &slice_accumulate_cpu); }

}  // namespace slimkernels
