// The operators of slimkernels/_cuda.abi3.so, in the namespace slimkernels_cuda: what slimkernels/cuda_kernels calls.
// Only libtorch's stable ABI is used, so one file serves every PyTorch from 2.10 on, with CUDA or without.
//
// They run below autograd and below the public functions' checks; what protects memory is checked here again.
#include "binding.h"

#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "launchers.h"

// Not there in a PyTorch without CUDA, where nothing calls it either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace slimkernels {

int dtype_code(const char* op, const Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": expected tensors of dtype float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? kSkFloat : dtype == ScalarType::BFloat16 ? kSkBfloat16 : kSkHalf;
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type() && t.is_cuda() && t.get_device_index() == like.get_device_index(), op,
      ": expected ", name, " of the dtype and on the CUDA device of the first tensor");
}

void check_sizes(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(d) == sizes[d];
  std::ostringstream wanted, got;
  for (int64_t size : sizes) wanted << size << ", ";
  for (int64_t d = 0; d < t.dim(); ++d) got << t.size(d) << ", ";
  STD_TORCH_CHECK(same, op, ": expected ", name, " of shape (", wanted.str(), "), got (", got.str(), ")");
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "slimkernels: expected a PyTorch that is built with CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* op, int code) {
  STD_TORCH_CHECK(code == 0, op, ": expected the CUDA launch to succeed, got cudaError ", code);
}

namespace {

std::vector<int64_t> strides(const Tensor& t) { return {t.strides().begin(), t.strides().end()}; }

// geometry: stride, padding and dilation, two numbers each. The tensors have four dimensions.
SkDepthwise depthwise_shape(const char* op, const Tensor& x, const Tensor& weight, const Tensor& y,
                            const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4 && weight.dim() == 4 && y.dim() == 4 && geometry.size() == 6, op,
                  ": expected CUDA tensors of 4 dimensions and 6 integers of geometry");
  check_like(op, "weight", weight, x);
  check_like(op, "the output's side", y, x);
  SkDepthwise s{};
  s.batch = x.size(0), s.channels = x.size(1), s.outputs = y.size(1);
  STD_TORCH_CHECK(s.channels >= 1 && s.outputs % s.channels == 0 && weight.size(0) >= s.outputs && weight.size(1) == 1,
                  op, ": expected a weight of one input channel a group and at least ", s.outputs, " filters");
  for (int d = 0; d < 2; ++d) {
    s.in[d] = x.size(2 + d), s.kernel[d] = weight.size(2 + d);
    s.stride[d] = geometry[d], s.padding[d] = geometry[2 + d], s.dilation[d] = geometry[4 + d];
    STD_TORCH_CHECK(s.stride[d] >= 1 && s.dilation[d] >= 1 && s.padding[d] >= 0, op,
                    ": expected stride and dilation of at least 1 and padding of at least 0");
    s.out[d] = (s.in[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1) / s.stride[d] + 1;
    constexpr int64_t kMost = int64_t(1) << 30;  // the kernels count along a dimension in 32 bits
    STD_TORCH_CHECK(s.in[d] + 2 * s.padding[d] < kMost && s.out[d] * s.stride[d] < kMost, op,
                    ": expected sizes below 2^30");
  }
  check_sizes(op, "the output's side", y, {s.batch, s.outputs, s.out[0], s.out[1]});
  std::copy_n(strides(x).begin(), 4, s.x_stride), std::copy_n(strides(y).begin(), 4, s.y_stride);
  s.weight_stride[0] = weight.stride(0), s.weight_stride[1] = weight.stride(2), s.weight_stride[2] = weight.stride(3);
  return s;
}

// Writes act(conv(x, weight) + bias + residual) to y.
void depthwise_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, Tensor y, std::vector<int64_t> geometry,
                       int64_t activation) {
  const char* op = "slim_conv";
  const SkDepthwise s = depthwise_shape(op, x, weight, y, geometry);
  if (bias) {
    check_like(op, "bias", *bias, x);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) >= s.outputs && bias->stride(0) == 1, op,
                    ": expected bias to be contiguous and to have ", s.outputs, " entries at least");
  }
  if (residual) {
    check_like(op, "residual", *residual, x);
    check_sizes(op, "residual", *residual, {s.batch, s.outputs, s.out[0], s.out[1]});
    bool same = true;  // where a dimension has one element its stride says nothing
    for (int64_t d = 0; d < y.dim(); ++d) same = same && (y.size(d) <= 1 || residual->stride(d) == y.stride(d));
    STD_TORCH_CHECK(same, op, ": expected residual with the strides of the output");
  }
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(
      op, sk_depthwise_forward(&s, x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                               residual ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr(), int(activation),
                               dtype_code(op, x), current_stream(x)));
}

void depthwise_input_gradient(const Tensor& dy, const Tensor& weight, Tensor dx, std::vector<int64_t> geometry) {
  const char* op = "slim_conv_backward";
  const SkDepthwise s = depthwise_shape(op, dx, weight, dy, geometry);
  torch::stable::accelerator::DeviceGuard guard(dx.get_device_index());
  check_launch(op, sk_depthwise_input_gradient(&s, dy.const_data_ptr(), weight.const_data_ptr(), dx.mutable_data_ptr(),
                                               dtype_code(op, dx), current_stream(dx)));
}

// Writes the first filters of dw, which has the shape of the full weight.
void depthwise_weight_gradient(const Tensor& dy, const Tensor& x, Tensor dw, std::vector<int64_t> geometry) {
  const char* op = "slim_conv_backward";
  const SkDepthwise s = depthwise_shape(op, x, dw, dy, geometry);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor scratch = torch::stable::new_empty(x, {sk_depthwise_scratch(&s)}, ScalarType::Float);
  check_launch(op, sk_depthwise_weight_gradient(&s, dy.const_data_ptr(), x.const_data_ptr(), dw.mutable_data_ptr(),
                                                static_cast<float*>(scratch.mutable_data_ptr()), dtype_code(op, x),
                                                current_stream(x)));
}

// target[leading slice of source's shape] += source, for all of them.
void slice_accumulate(std::vector<Tensor> targets, std::vector<Tensor> sources) {
  const char* op = "slice_accumulate";
  STD_TORCH_CHECK(targets.size() == sources.size(), op, ": expected as many targets as sources, got ", targets.size(),
                  " and ", sources.size());
  if (targets.empty()) return;
  std::vector<SkSlice> slices(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    check_like(op, "targets", target, targets[0]);
    check_like(op, "sources", source, sources[0]);
    STD_TORCH_CHECK(source.is_contiguous() && source.dim() == target.dim() && source.dim() <= kSkSliceDims &&
                        source.get_device_index() == target.get_device_index(),
                    op, ": expected contiguous sources of their targets' number of dimensions, ", kSkSliceDims,
                    " at most, on the same device");
    SkSlice& s = slices[i];
    s.target = target.mutable_data_ptr(), s.source = source.const_data_ptr();
    const int64_t rest = kSkSliceDims - source.dim();
    for (int64_t d = 0; d < kSkSliceDims; ++d) {
      s.size[d] = d < rest ? 1 : source.size(d - rest), s.stride[d] = d < rest ? 0 : target.stride(d - rest);
      STD_TORCH_CHECK(d < rest || s.size[d] <= target.size(d - rest), op, ": expected targets[", i,
                      "] to contain the shape of its source");
    }
  }
  torch::stable::accelerator::DeviceGuard guard(targets[0].get_device_index());
  check_launch(op, sk_slice_accumulate(slices.data(), int64_t(slices.size()), dtype_code(op, targets[0]),
                                       dtype_code(op, sources[0]), current_stream(targets[0])));
}

}  // namespace
}  // namespace slimkernels

STABLE_TORCH_LIBRARY(slimkernels_cuda, m) {
  m.def(
      "depthwise_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) y, int[] geometry, int"
      " activation) -> ()");
  m.def("depthwise_input_gradient(Tensor dy, Tensor weight, Tensor(a!) dx, int[] geometry) -> ()");
  m.def("depthwise_weight_gradient(Tensor dy, Tensor x, Tensor(a!) dw, int[] geometry) -> ()");
  m.def("slice_accumulate(Tensor(a!)[] targets, Tensor[] sources) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slimkernels_cuda, CUDA, m) {
  m.impl("depthwise_forward", TORCH_BOX(&slimkernels::depthwise_forward));
  m.impl("depthwise_input_gradient", TORCH_BOX(&slimkernels::depthwise_input_gradient));
  m.impl("depthwise_weight_gradient", TORCH_BOX(&slimkernels::depthwise_weight_gradient));
  m.impl("slice_accumulate", TORCH_BOX(&slimkernels::slice_accumulate));
}

#ifndef SK_SOURCES
#define SK_SOURCES "unknown"
#endif

// `import slimkernels._cuda` registers the operators; the module says which sources it was built from (fingerprint.py).
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* made = PyModule_Create(&module);
  if (made && PyModule_AddStringConstant(made, "sources", SK_SOURCES) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
