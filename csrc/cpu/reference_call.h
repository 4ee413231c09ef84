// How a CPU kernel hands an input it does not take (float64, an unusual layout) to the op's PyTorch reference.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace slimkernels {

// Calls the kernel registered under "default" (the reference) for `name`. Signature is that of the calling C++ entry, e.g.
//   return call_reference<decltype(slim_linear_cpu)>("slimkernels::slim_linear", x, weight, ...);
// The op is looked up once a signature: two ops with the same one tell themselves apart by `variant`.
// An empty key set selects the dispatcher's Undefined slot, which a CompositeExplicitAutograd kernel fills.
template <typename Signature, int variant = 0, typename... Args>
auto call_reference(const char* name, Args&&... args) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.redispatch(c10::DispatchKeySet(), std::forward<Args>(args)...);
}

}  // namespace slimkernels
