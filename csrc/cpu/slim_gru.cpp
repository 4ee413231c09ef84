// slim_gru: one layer, one or two directions. float64 and column-major weights go to the reference.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common.h"
#include "recurrent.h"
#include "recurrent_memory.h"
#include "recurrent_stream.h"
#include "reference_call.h"

#define SK_INL "slim_gru-inl.h"
#include "foreach_isa.h"

#define SK_INL "slim_gru-inl.h"
#include "bf16_isa.h"

namespace slimkernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

void forward_layer(const RecurrentLayer& layer, const RecurrentOutputs& out, at::ScalarType dtype) {
#if defined(__x86_64__)
  if (recurrent_multiplies_bf16(layer, dtype)) {
    using T = c10::BFloat16;
    return recurrent_directions(layer, [&](int64_t d) { avx512_bf16::gru_forward_kernel<T, T>(layer, out, d); });
  }
#endif
  AT_DISPATCH_SWITCH(dtype, "slim_gru", SK_CASES_F32_BF16_F16([&] {
                       recurrent_directions(
                           layer, [&](int64_t d) { SK_CALL_ISA(gru_forward_kernel<scalar_t>, layer, out, d); });
                     }));
}

void backward_layer(const RecurrentLayer& layer, const RecurrentGradients& grads, at::ScalarType dtype) {
#if defined(__x86_64__)
  if (recurrent_multiplies_bf16(layer, dtype)) {
    using T = c10::BFloat16;
    return recurrent_directions(layer, [&](int64_t d) { avx512_bf16::gru_backward_kernel<T, T>(layer, grads, d); });
  }
#endif
  AT_DISPATCH_SWITCH(dtype, "slim_gru_backward", SK_CASES_F32_BF16_F16([&] {
                       recurrent_directions(
                           layer, [&](int64_t d) { SK_CALL_ISA(gru_backward_kernel<scalar_t>, layer, grads, d); });
                     }));
}

std::tuple<at::Tensor, at::Tensor> slim_gru_inference_cpu(const at::Tensor& x, const OptionalTensor& h0,
                                                          at::TensorList weights, const OptionalTensor& batch_sizes,
                                                          int64_t num_layers, bool bidirectional, int64_t hidden_size,
                                                          int64_t in_blocks) {
  if (!recurrent_takes(x, weights, num_layers * (bidirectional ? 2 : 1))) {
    return call_reference<decltype(slim_gru_inference_cpu)>("slimkernels::slim_gru_inference", x, h0, weights,
                                                            batch_sizes, num_layers, bidirectional, hidden_size,
                                                            in_blocks);
  }
  if (recurrent_streams(x, weights, batch_sizes, num_layers, bidirectional)) {
    auto found = recurrent_stream("slim_gru", 3, x, h0, std::nullopt, weights, num_layers, bidirectional, hidden_size, 0,
                                  in_blocks);
    return {std::get<0>(found), std::get<1>(found)};
  }
  auto found = recurrent_inference("slim_gru", 3, x, h0, std::nullopt, weights, batch_sizes, num_layers, bidirectional,
                                   hidden_size, 0, in_blocks, false,
                                   [&](const RecurrentLayer& layer, const RecurrentOutputs& out) {
                                     forward_layer(layer, out, x.scalar_type());
                                   });
  return {std::get<0>(found), std::get<1>(found)};
}

Outputs slim_gru_cpu(const at::Tensor& x, const OptionalTensor& h0, at::TensorList weights,
                     const OptionalTensor& batch_sizes, bool bidirectional, int64_t hidden_size, int64_t in_blocks,
                     bool save) {
  if (!recurrent_takes(x, weights, bidirectional ? 2 : 1)) {
    return call_reference<decltype(slim_gru_cpu)>("slimkernels::slim_gru", x, h0, weights, batch_sizes, bidirectional,
                                                  hidden_size, in_blocks, save);
  }
  const RecurrentTensors tensors =
      recurrent_layer("slim_gru", 3, x, h0, std::nullopt, weights, batch_sizes, bidirectional, hidden_size, 0, in_blocks);
  const RecurrentLayer& layer = tensors.layer;
  at::Tensor y = recurrent_empty(x, {}, {layer.directions * hidden_size});
  at::Tensor h_n = at::empty({layer.directions, layer.batch, hidden_size}, x.options());
  at::Tensor gates = at::empty({0}, x.options());
  if (save) gates = recurrent_kept(x, x.scalar_type(), {layer.directions}, {4, hidden_size});
  const RecurrentOutputs out{y.data_ptr(), h_n.data_ptr(), nullptr, save ? gates.data_ptr() : nullptr, nullptr};
  forward_layer(layer, out, x.scalar_type());
  return {y, h_n, gates};
}

Gradients slim_gru_backward_cpu(const OptionalTensor& dy, const OptionalTensor& dh_n, const at::Tensor& x,
                                const OptionalTensor& h0, at::TensorList weights, const OptionalTensor& batch_sizes,
                                const at::Tensor& y, const at::Tensor& gates, bool bidirectional, int64_t hidden_size,
                                int64_t in_blocks, bool need_dx, bool need_dstate, bool need_dw) {
  if (!recurrent_takes(x, weights, bidirectional ? 2 : 1)) {
    return call_reference<decltype(slim_gru_backward_cpu)>("slimkernels::slim_gru_backward", dy, dh_n, x, h0, weights,
                                                           batch_sizes, y, gates, bidirectional, hidden_size, in_blocks,
                                                           need_dx, need_dstate, need_dw);
  }
  const char* op = "slim_gru_backward";
  RecurrentTensors tensors =
      recurrent_layer(op, 3, x, h0, std::nullopt, weights, batch_sizes, bidirectional, hidden_size, 0, in_blocks);
  const RecurrentLayer& layer = tensors.layer;
  RecurrentBackward backward(tensors, op, x, weights, y, gates, dy, dh_n, need_dx, need_dw);
  at::Tensor dh0 = at::empty({0}, x.options());
  if (need_dstate) {
    dh0 = at::empty({layer.directions, layer.batch, hidden_size}, x.options());
    backward.grads.dh0 = dh0.data_ptr();
  }
  backward_layer(layer, backward.grads, x.scalar_type());
  return {backward.dx(), dh0, backward.dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_gru", &slim_gru_cpu);
  m.impl("slim_gru_inference", &slim_gru_inference_cpu);
  m.impl("slim_gru_backward", &slim_gru_backward_cpu);
}

}  // namespace slimkernels
