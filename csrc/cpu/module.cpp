// The Python module slimkernels._C: importing it registers the kernels; what it binds itself is no op.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "common.h"
#include "python.h"
#include "recurrent_cache.h"
#include "recurrent_memory.h"

namespace {

const char* isa_name() {
  switch (slimkernels::current_isa()) {
    case slimkernels::Isa::kAvx512: return "AVX512";
    case slimkernels::Isa::kAvx2: return "AVX2";
    default: return "base";
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "slimkernels' CPU kernels.";
  m.def("isa", &isa_name, "Instruction set the kernels use on this machine: 'AVX512', 'AVX2' or 'base'.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = "g++ " __VERSION__;
    info["torch"] = TORCH_VERSION;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
  }, "Compiler, the torch version the extension was built for, and whether OpenMP is on.");
  m.def(
      "empty_cache",
      [] {
        const pybind11::gil_scoped_release released;
        slimkernels::release_spare_memory();
        slimkernels::forget_packed();
      },
      "Frees what recurrent layers keep from call to call.");
  slimkernels::bind_deploy(m);
  slimkernels::bind_eager(m);
  slimkernels::bind_train(m);
}
