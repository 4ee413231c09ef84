// What a training step calls without the dispatcher: slots of gradients, and the fused node.
#include <torch/csrc/utils/pybind.h>
#include <pybind11/stl.h>

#include "python.h"
#include "slim_conv_norm.h"

namespace py = pybind11;

namespace slimkernels {
namespace {

using Slot = std::shared_ptr<GradientSlot>;

std::optional<at::Tensor> defined(at::Tensor t) { return t.defined() ? std::optional<at::Tensor>(std::move(t)) : std::nullopt; }

}  // namespace

void bind_train(py::module_& m) {
  py::class_<GradientSlot, Slot>(m, "Slot")
      .def(py::init<const at::Tensor&>())
      .def_readonly("parameter", &GradientSlot::parameter)
      .def_readonly("leaf", &GradientSlot::leaf)
      .def_readwrite("last", &GradientSlot::last)
      .def("close", &GradientSlot::close)
      .def_property(
          "total", [](const GradientSlot& slot) { return defined(slot.total); },
          [](GradientSlot& slot, const std::optional<at::Tensor>& total) { slot.total = total.value_or(at::Tensor()); })
      .def("add", [](GradientSlot& slot, at::Tensor part) { return defined(slot.add(std::move(part))); })
      .def("take", [](GradientSlot& slot) { return defined(slot.take()); });
  py::class_<ConvNormOptions>(m, "ConvNormOptions")
      .def(py::init([](std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, double eps,
                       std::string activation) {
        return ConvNormOptions{std::move(stride), std::move(padding), std::move(dilation), eps, std::move(activation)};
      }));
  m.def("slim_conv_norm",
        [](const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
           const MaybeTensor& residual, int64_t out_channels, int64_t groups, const ConvNormOptions& options,
           const Slot& weight_slot, const Slot& norm_weight_slot, const Slot& norm_bias_slot, const MaybeTensor& running_mean,
           const MaybeTensor& running_var, double momentum, bool recompute) {
          const py::gil_scoped_release released;
          return slim_conv_norm(x, weight, norm_weight, norm_bias, residual, out_channels, groups, options,
                                {weight_slot, norm_weight_slot, norm_bias_slot}, {running_mean, running_var, momentum}, recompute);
        });
}

}  // namespace slimkernels
