// Usual calls of the ops from Python, checked and recorded for autograd here. What the public functions do in Python
// for the same costs as much as a small layer's kernel, and several times more once the layer before has emptied the
// caches.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/python_headers.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "common.h"

namespace slimkernels {

using MaybeTensor = std::optional<at::Tensor>;

// Reads the arguments of a call one after the other. `ok` turns false at one that is not usual (None where a tensor is
// needed, a subclass, another device, float64, one with a tangent, a symbolic integer): the public function then goes
// its long way, which also tells what is wrong with it.
class Arguments {
 public:
  Arguments(PyObject* const* args, Py_ssize_t count) : next_(args), end_(args + count) {}
  at::Tensor tensor();
  MaybeTensor maybe_tensor();
  int64_t integer();
  std::optional<int64_t> maybe_integer();
  double number(double for_none);
  // One integer a dimension, of at least `low`; a single one counts for all.
  c10::DimVector integers(int64_t count, int64_t low);
  std::string_view name();

  bool ok = true;

 private:
  PyObject* next() { return next_ < end_ ? *next_++ : (ok = false, Py_None); }
  PyObject* const* next_;
  PyObject* const* end_;
};

// No mode, transform, tracer or autocast sees the calls of this thread.
bool is_usual_thread();

bool records_now();

inline bool requires_grad(const at::Tensor& t) { return t.requires_grad(); }
inline bool requires_grad(const MaybeTensor& t) { return t && t->requires_grad(); }

// Whether a call on these is a node of autograd.
template <typename... Tensors>
bool is_recorded(const Tensors&... tensors) {
  return (requires_grad(tensors) || ...) && records_now();
}

inline MaybeTensor maybe(const at::Tensor& t) { return t.defined() ? MaybeTensor(t) : MaybeTensor(); }

// The CPU's kernel of an op with the C++ signature `Signature`, below autograd.
template <typename Signature>
class Kernel {
 public:
  explicit Kernel(const char* name)
      : op_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>()) {}
  template <typename... Args>
  auto operator()(Args&&... args) const {
    return op_.redispatch(c10::DispatchKeySet(c10::DispatchKey::CPU), std::forward<Args>(args)...);
  }
  // Through autograd, whose answer to a second derivative is that the op has none.
  template <typename... Args>
  auto recorded(Args&&... args) const {
    return op_.call(std::forward<Args>(args)...);
  }

 private:
  c10::TypedOperatorHandle<Signature> op_;
};

// The activation of that name, if there is one.
std::optional<Activation> find_activation(std::string_view name);

// Gradient at the input of the activation, from its output.
at::Tensor activation_gradient(const at::Tensor& dy, const at::Tensor& output, Activation activation,
                               c10::string_view name);

// Bodies of the functions that eager.cpp binds: the output, or nothing when the call is not usual.
std::optional<at::Tensor> eager_conv(Arguments& args);
std::optional<at::Tensor> eager_conv_transpose(Arguments& args);
std::optional<at::Tensor> eager_linear(Arguments& args);
std::optional<at::Tensor> eager_layer_norm(Arguments& args);
std::optional<at::Tensor> eager_rms_norm(Arguments& args);
std::optional<at::Tensor> eager_group_norm(Arguments& args);

}  // namespace slimkernels
