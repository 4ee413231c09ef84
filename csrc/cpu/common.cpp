#include "common.h"

#include <ATen/Version.h>

#include <string>

namespace slimkernels {

Isa current_isa() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Isa::kAvx512 : capability == "AVX2" ? Isa::kAvx2 : Isa::kBase;
  }();
  return isa;
}

Activation parse_activation(std::string_view op, std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  if (name == "elu") return Activation::kElu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "hardswish") return Activation::kHardswish;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  TORCH_CHECK_VALUE(false, op,
                    ": expected activation to be one of none, relu, gelu, gelu_tanh, silu, elu, relu6, hardswish, tanh, "
                    "sigmoid, got '", name, "'");
}

}  // namespace slimkernels
