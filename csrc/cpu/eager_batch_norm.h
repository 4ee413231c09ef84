// The usual call of batch norm, and the update of its running statistics.
#pragma once

#include "eager.h"

namespace slimkernels {

std::optional<at::Tensor> eager_batch_norm(Arguments& args);

}  // namespace slimkernels
