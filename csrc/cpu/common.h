// What every CPU kernel file shares: argument checks, activation names, the choice of instruction set.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <string_view>

namespace slimkernels {

enum class Isa { kBase, kAvx2, kAvx512 };

// The instruction set in use; obeys ATEN_CPU_CAPABILITY like PyTorch itself.
Isa current_isa();

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kElu, kRelu6, kHardswish, kTanh, kSigmoid };

// ValueError for a name that is not in the list above.
Activation parse_activation(std::string_view op, std::string_view name);

// True when the derivative can be computed from the output; otherwise backward needs the activation's input.
constexpr bool derivative_uses_output(Activation a) {
  return a == Activation::kNone || a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kElu ||
         a == Activation::kTanh || a == Activation::kSigmoid;
}

}  // namespace slimkernels

// Calls the copy of `fn` compiled for the running CPU (see foreach_isa.h).
#if defined(__x86_64__)
#define SK_CALL_ISA(fn, ...)                                                     \
  (::slimkernels::current_isa() == ::slimkernels::Isa::kAvx512 ? avx512::fn(__VA_ARGS__) \
   : ::slimkernels::current_isa() == ::slimkernels::Isa::kAvx2 ? avx2::fn(__VA_ARGS__)   \
                                                               : base::fn(__VA_ARGS__))
#else
#define SK_CALL_ISA(fn, ...) base::fn(__VA_ARGS__)
#endif

// The dtypes the kernels take, for AT_DISPATCH_SWITCH; everything else goes to the reference (reference_call.h).
#define SK_CASES_F32_BF16_F16(...)            \
  AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)   \
  AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
  AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)

// Runs the rest of its arguments with `act` a compile-time Activation equal to the run-time value.
#define SK_ACTIVATION_CASE(NAME, ...)                  \
  case ::slimkernels::Activation::NAME: {              \
    constexpr auto act = ::slimkernels::Activation::NAME; \
    __VA_ARGS__();                                     \
    break;                                             \
  }
#define SK_SWITCH_ACTIVATION(VALUE, ...)          \
  switch (VALUE) {                                \
    SK_ACTIVATION_CASE(kNone, __VA_ARGS__)        \
    SK_ACTIVATION_CASE(kRelu, __VA_ARGS__)        \
    SK_ACTIVATION_CASE(kGelu, __VA_ARGS__)        \
    SK_ACTIVATION_CASE(kGeluTanh, __VA_ARGS__)    \
    SK_ACTIVATION_CASE(kSilu, __VA_ARGS__)        \
    SK_ACTIVATION_CASE(kElu, __VA_ARGS__)         \
    SK_ACTIVATION_CASE(kRelu6, __VA_ARGS__)       \
    SK_ACTIVATION_CASE(kHardswish, __VA_ARGS__)   \
    SK_ACTIVATION_CASE(kTanh, __VA_ARGS__)        \
    SK_ACTIVATION_CASE(kSigmoid, __VA_ARGS__)     \
  }
