// A training step's convolution, batch norm, residual and activation as one node of autograd.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gradient_slot.h"
#include "slim_conv.h"

namespace slimkernels {

// What a call does beside its tensors; stays the same for a layer.
struct ConvNormOptions {
  std::vector<int64_t> stride, padding, dilation;
  double eps;
  std::string activation;
};

struct ConvNormSlots {
  std::shared_ptr<GradientSlot> weight, norm_weight, norm_bias;  // any may be null: its gradient then has the full size
};

// Running statistics, updated in place on the active channels; undefined for none.
struct RunningStatistics {
  MaybeTensor mean, var;
  double momentum;
};

// act(batch_norm(conv(x, weight[:n, :c])) + residual) by the statistics of the batch. A weight of another dtype than x is
// rounded to it, on the slice alone. `recompute`: outputs of other such nodes are computed again in backward instead of being
// kept. Nothing when the residual has another shape than the sum it is to be added to.
std::optional<at::Tensor> slim_conv_norm(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& norm_weight,
                          const MaybeTensor& norm_bias, const MaybeTensor& residual, int64_t out_channels, int64_t groups,
                          const ConvNormOptions& options, const ConvNormSlots& slots, const RunningStatistics& running,
                          bool recompute);

}  // namespace slimkernels
