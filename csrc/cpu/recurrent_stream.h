// Streaming: one step of one sequence a call, float32, no gradients. The active weights of a GRU are packed in the order in
// which a step reads them, once per version and width, and kept.
#pragma once

#include "recurrent.h"

namespace slimkernels {

// What is kept of packed weights in all; the entries used least recently go first.
constexpr int64_t kStreamBytes = int64_t{256} << 20;
constexpr size_t kStreamEntries = 256;

// Whether these inputs are a streaming step that can be run on packed weights. Views and tensors of inference mode are not
// packed: they have been made for the call.
bool gru_streams(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
                 int64_t num_layers, bool bidirectional);

// y and h_n, or nothing when the weights are more than is kept.
std::optional<std::tuple<at::Tensor, at::Tensor>> gru_stream(const at::Tensor& x, const std::optional<at::Tensor>& h0,
                                                             at::TensorList weights, int64_t num_layers, int64_t hidden,
                                                             int64_t in_blocks);

}  // namespace slimkernels
