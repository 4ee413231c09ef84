// What module.cpp binds from other files.
#pragma once

#include <pybind11/pybind11.h>

namespace slimkernels {

void bind_deploy(pybind11::module_& m);
void bind_eager(pybind11::module_& m);
void bind_train(pybind11::module_& m);

}  // namespace slimkernels
