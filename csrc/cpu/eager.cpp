#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "eager_batch_norm.h"
#include "python.h"

namespace slimkernels {
namespace {

constexpr c10::DispatchKeySet kUsualThread({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
constexpr c10::DispatchKeySet kUsualTensor({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                            c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});

// The difference of two sets would keep the backends.
bool holds_only(c10::DispatchKeySet keys, c10::DispatchKeySet usual) {
  return (keys.raw_repr() & ~usual.raw_repr()) == 0;
}

bool is_usual(PyObject* value) {
  if (!THPVariable_CheckExact(value)) return false;
  const at::Tensor& t = THPVariable_Unpack(value);
  const auto dtype = t.scalar_type();
  return holds_only(t.key_set(), kUsualTensor) && t.is_cpu() && t.numel() > 0 && !t._fw_grad(0).defined() &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

template <std::optional<at::Tensor> (*body)(Arguments&)>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments arguments(args, count);
  std::optional<at::Tensor> y;
  if (is_usual_thread()) y = body(arguments);
  if (!y) Py_RETURN_NONE;
  return THPVariable_Wrap(*std::move(y));
  END_HANDLE_TH_ERRORS
}

template <std::optional<at::Tensor> (*body)(Arguments&)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<body>)), METH_FASTCALL, nullptr};
}

}  // namespace

at::Tensor Arguments::tensor() {
  PyObject* value = next();
  if (!ok || !is_usual(value)) return ok = false, at::Tensor();
  return THPVariable_Unpack(value);
}

MaybeTensor Arguments::maybe_tensor() {
  PyObject* value = next();
  if (!ok || value == Py_None) return std::nullopt;
  if (!is_usual(value)) return ok = false, std::nullopt;
  return THPVariable_Unpack(value);
}

std::optional<int64_t> Arguments::maybe_integer() {
  if (next_ < end_ && *next_ == Py_None) return ++next_, std::nullopt;
  return integer();
}

int64_t Arguments::integer() {
  PyObject* value = next();
  if (!ok || !PyLong_CheckExact(value)) return ok = false, 0;
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  ok = overflow == 0;
  return number;
}

double Arguments::number(double for_none) {
  PyObject* value = next();
  if (ok && value == Py_None) return for_none;
  if (!ok || !PyFloat_CheckExact(value)) return ok = false, 0.0;
  return PyFloat_AS_DOUBLE(value);
}

c10::DimVector Arguments::integers(int64_t count, int64_t low) {
  PyObject* value = next();
  c10::DimVector found;
  const auto add = [&](PyObject* item) {
    Arguments one(&item, 1);
    found.push_back(one.integer());
    ok = ok && one.ok && found.back() >= low;
  };
  if (PyLong_CheckExact(value)) {
    add(value);
  } else if (PyTuple_CheckExact(value) || PyList_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) add(PySequence_Fast_GET_ITEM(value, i));
  }
  if (found.size() == 1) found.resize(count, found[0]);
  ok = ok && static_cast<int64_t>(found.size()) == count;
  return found;
}

std::string_view Arguments::name() {
  PyObject* value = next();
  if (!ok || !PyUnicode_CheckExact(value)) return ok = false, std::string_view();
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(value, &size);
  if (text == nullptr) return PyErr_Clear(), ok = false, std::string_view();
  return {text, static_cast<size_t>(size)};
}

std::optional<Activation> find_activation(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> kNames[] = {
      {"none", Activation::kNone},       {"relu", Activation::kRelu},
      {"gelu", Activation::kGelu},       {"silu", Activation::kSilu},
      {"relu6", Activation::kRelu6},     {"gelu_tanh", Activation::kGeluTanh},
      {"elu", Activation::kElu},         {"tanh", Activation::kTanh},
      {"sigmoid", Activation::kSigmoid}, {"hardswish", Activation::kHardswish}};
  for (const auto& [known, activation] : kNames) {
    if (known == name) return activation;
  }
  return std::nullopt;
}

bool is_usual_thread() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return holds_only(keys.included_, kUsualThread) && keys.excluded_.has(c10::DispatchKey::AutocastCPU) &&
         !at::impl::torch_function_mode_enabled();
}

bool records_now() {
  return at::GradMode::is_enabled() && !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCPU);
}

at::Tensor activation_gradient(const at::Tensor& dy, const at::Tensor& output, Activation activation,
                               c10::string_view name) {
  static const Kernel<at::Tensor(const at::Tensor&, const at::Tensor&, c10::string_view)> kernel(
      "slimkernels::activation_backward");
  if (activation == Activation::kNone) return dy;
  return at::GradMode::is_enabled() ? kernel.recorded(dy, output, name) : kernel(dy, output, name);
}

void bind_eager(pybind11::module_& m) {
  static PyMethodDef methods[] = {method<eager_conv>("eager_slim_conv"),
                                  method<eager_conv_transpose>("eager_slim_conv_transpose"),
                                  method<eager_linear>("eager_slim_linear"),
                                  method<eager_layer_norm>("eager_slim_layer_norm"),
                                  method<eager_rms_norm>("eager_slim_rms_norm"),
                                  method<eager_group_norm>("eager_slim_group_norm"),
                                  method<eager_batch_norm>("eager_slim_batch_norm"),
                                  {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace slimkernels
