// slim_lstm: one layer, one or two directions. float64 and column-major weights go to the reference.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common.h"
#include "recurrent.h"
#include "recurrent_memory.h"
#include "recurrent_stream.h"
#include "reference_call.h"

#define SK_INL "slim_lstm-inl.h"
#include "foreach_isa.h"

#define SK_INL "slim_lstm-inl.h"
#include "bf16_isa.h"

namespace slimkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

void forward_layer(const RecurrentLayer& layer, const RecurrentOutputs& out, at::ScalarType dtype) {
#if defined(__x86_64__)
  if (recurrent_multiplies_bf16(layer, dtype)) {
    using T = c10::BFloat16;
    return recurrent_directions(layer, [&](int64_t d) { avx512_bf16::lstm_forward_kernel<T, T>(layer, out, d); });
  }
#endif
  AT_DISPATCH_SWITCH(dtype, "slim_lstm", SK_CASES_F32_BF16_F16([&] {
                       recurrent_directions(
                           layer, [&](int64_t d) { SK_CALL_ISA(lstm_forward_kernel<scalar_t>, layer, out, d); });
                     }));
}

void backward_layer(const RecurrentLayer& layer, const RecurrentGradients& grads, at::ScalarType dtype) {
#if defined(__x86_64__)
  if (recurrent_multiplies_bf16(layer, dtype)) {
    using T = c10::BFloat16;
    return recurrent_directions(layer, [&](int64_t d) { avx512_bf16::lstm_backward_kernel<T, T>(layer, grads, d); });
  }
#endif
  AT_DISPATCH_SWITCH(dtype, "slim_lstm_backward", SK_CASES_F32_BF16_F16([&] {
                       recurrent_directions(
                           layer, [&](int64_t d) { SK_CALL_ISA(lstm_backward_kernel<scalar_t>, layer, grads, d); });
                     }));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_lstm_inference_cpu(
    const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& batch_sizes, int64_t num_layers, bool bidirectional, int64_t hidden_size, int64_t proj_size,
    int64_t in_blocks) {
  if (!recurrent_takes(x, weights, num_layers * (bidirectional ? 2 : 1))) {
    return call_reference<decltype(slim_lstm_inference_cpu)>("slimkernels::slim_lstm_inference", x, h0, c0, weights,
                                                             batch_sizes, num_layers, bidirectional, hidden_size,
                                                             proj_size, in_blocks);
  }
  if (recurrent_streams(x, weights, batch_sizes, num_layers, bidirectional)) {
    return recurrent_stream("slim_lstm", 4, x, h0, c0, weights, num_layers, bidirectional, hidden_size, proj_size,
                            in_blocks);
  }
  return recurrent_inference("slim_lstm", 4, x, h0, c0, weights, batch_sizes, num_layers, bidirectional, hidden_size,
                             proj_size, in_blocks, true, [&](const RecurrentLayer& layer, const RecurrentOutputs& out) {
                               forward_layer(layer, out, x.scalar_type());
                             });
}

Outputs slim_lstm_cpu(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, bool bidirectional, int64_t hidden_size, int64_t proj_size,
                      int64_t in_blocks, bool save) {
  if (!recurrent_takes(x, weights, bidirectional ? 2 : 1)) {
    return call_reference<decltype(slim_lstm_cpu)>("slimkernels::slim_lstm", x, h0, c0, weights, batch_sizes,
                                                   bidirectional, hidden_size, proj_size, in_blocks, save);
  }
  const RecurrentTensors tensors =
      recurrent_layer("slim_lstm", 4, x, h0, c0, weights, batch_sizes, bidirectional, hidden_size, proj_size, in_blocks);
  const RecurrentLayer& layer = tensors.layer;
  at::Tensor y = recurrent_empty(x, {}, {layer.directions * layer.state});
  at::Tensor h_n = at::empty({layer.directions, layer.batch, layer.state}, x.options());
  at::Tensor c_n = at::empty({layer.directions, layer.batch, hidden_size}, x.options());
  at::Tensor gates = at::empty({0}, x.options()), cells = at::empty({0}, x.options());
  if (save) {
    gates = recurrent_kept(x, x.scalar_type(), {layer.directions}, {4, hidden_size});
    cells = recurrent_kept(x, x.scalar_type(), {layer.directions}, {hidden_size});
  }
  const RecurrentOutputs out{y.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), save ? gates.data_ptr() : nullptr,
                             save ? cells.data_ptr() : nullptr};
  forward_layer(layer, out, x.scalar_type());
  return {y, h_n, c_n, gates, cells};
}

Gradients slim_lstm_backward_cpu(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                 const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                 at::TensorList weights, const OptionalTensor& batch_sizes, const at::Tensor& y,
                                 const at::Tensor& gates, const at::Tensor& cells, bool bidirectional,
                                 int64_t hidden_size, int64_t proj_size, int64_t in_blocks, bool need_dx,
                                 bool need_dstate, bool need_dw) {
  if (!recurrent_takes(x, weights, bidirectional ? 2 : 1)) {
    return call_reference<decltype(slim_lstm_backward_cpu)>(
        "slimkernels::slim_lstm_backward", dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, gates, cells,
        bidirectional, hidden_size, proj_size, in_blocks, need_dx, need_dstate, need_dw);
  }
  const char* op = "slim_lstm_backward";
  RecurrentTensors tensors =
      recurrent_layer(op, 4, x, h0, c0, weights, batch_sizes, bidirectional, hidden_size, proj_size, in_blocks);
  const RecurrentLayer& layer = tensors.layer;
  RecurrentBackward backward(tensors, op, x, weights, y, gates, dy, dh_n, need_dx, need_dw);
  const int64_t cell_shape[] = {layer.directions, layer.batch, hidden_size};
  RecurrentGradients& grads = backward.grads;
  grads.dc_n = recurrent_dense(tensors, op, "dc_n", dc_n, cell_shape, x);
  grads.cells = recurrent_dense(tensors, op, "cells", cells, recurrent_shape(x, {layer.directions}, {hidden_size}), x);
  at::Tensor dh0 = at::empty({0}, x.options()), dc0 = at::empty({0}, x.options());
  if (need_dstate) {
    dh0 = at::empty({layer.directions, layer.batch, layer.state}, x.options());
    dc0 = at::empty(cell_shape, x.options());
    grads.dh0 = dh0.data_ptr(), grads.dc0 = dc0.data_ptr();
  }
  backward_layer(layer, grads, x.scalar_type());
  return {backward.dx(), dh0, dc0, backward.dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_lstm", &slim_lstm_cpu);
  m.impl("slim_lstm_inference", &slim_lstm_inference_cpu);
  m.impl("slim_lstm_backward", &slim_lstm_backward_cpu);
}

}  // namespace slimkernels
