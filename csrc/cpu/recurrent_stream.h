// Streaming: a few steps of one sequence a call, without gradients. The active weights are packed in the order in which a step
// reads them, once per version and width, and kept (recurrent_cache.h).
#pragma once

#include "recurrent.h"

namespace slimkernels {

// One layer as the kernel sees it (recurrent_stream-inl.h).
struct StreamLayer {
  int64_t steps, directions, in, hidden, state;
  bool projects;
  const float* x;
  float* y;
  const void *h0, *c0;
  void *h_n, *c_n;  // c_n null without cells
  float* scratch;
  int64_t padded;
};

// Whether these inputs are so few steps of one sequence, and the packed weights may be kept.
bool recurrent_streams(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
                       int64_t num_layers, bool bidirectional);

// y, h_n and, of an LSTM (4 gates), c_n.
std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrent_stream(const char* op, int64_t gates, const at::Tensor& x,
                                                                const std::optional<at::Tensor>& h0,
                                                                const std::optional<at::Tensor>& c0, at::TensorList weights,
                                                                int64_t num_layers, bool bidirectional, int64_t hidden,
                                                                int64_t proj, int64_t in_blocks);

}  // namespace slimkernels
