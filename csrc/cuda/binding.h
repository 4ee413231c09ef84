// What the binding's files share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace slimkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int dtype_code(const char* op, const Tensor& t);  // SkDtype, or an error
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like);
void check_sizes(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes);
void* current_stream(const Tensor& t);
void check_launch(const char* op, int code);

}  // namespace slimkernels
