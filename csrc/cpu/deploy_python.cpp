// What slimkernels.elastic.deploy calls.
#include <torch/csrc/utils/pybind.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>

#include "deploy.h"
#include "python.h"

namespace py = pybind11;

namespace slimkernels {
namespace {

using deploy::Kind;

Kind parse_kind(const std::string& name) {
  static const std::map<std::string, Kind> kinds{
      {"conv", Kind::kConv},           {"linear", Kind::kLinear},      {"affine", Kind::kAffine},
      {"add", Kind::kAdd},             {"activation", Kind::kActivation}, {"max_pool", Kind::kMaxPool},
      {"avg_pool", Kind::kAveragePool}, {"global_pool", Kind::kGlobalPool}, {"cat", Kind::kCat},
      {"narrow", Kind::kNarrow},       {"flatten", Kind::kFlatten}};
  const auto found = kinds.find(name);
  TORCH_CHECK_VALUE(found != kinds.end(), "deploy: expected the kind of a step, got ", name);
  return found->second;
}

size_t numbers_of(Kind kind) {
  if (kind == Kind::kMaxPool || kind == Kind::kAveragePool) return 10;
  return kind == Kind::kNarrow ? 2 : kind == Kind::kCat ? 1 : 0;
}

using StepTuple = std::tuple<std::string, std::vector<int>, int, int, std::string, std::vector<int64_t>>;

std::shared_ptr<deploy::Program> make_program(const std::vector<StepTuple>& steps, std::vector<int> ranks,
                                              std::vector<int> outputs) {
  auto program = std::make_shared<deploy::Program>();
  program->values = static_cast<int>(ranks.size());
  for (const auto& [kind, inputs, output, residual, activation, numbers] : steps) {
    deploy::Step step{parse_kind(kind), inputs, output, residual, parse_activation("deploy", activation), numbers};
    // Every value is computed once, before it is used: the plan relies on it.
    bool fits = output == program->values && !inputs.empty() && residual < output && numbers.size() == numbers_of(step.kind);
    for (const int v : inputs) fits &= v >= 0 && v < output;
    fits &= inputs.size() == (step.kind == Kind::kAdd ? 2u : step.kind == Kind::kCat ? inputs.size() : 1u);
    TORCH_CHECK_VALUE(fits, "deploy: expected steps whose values are numbered as they are computed, got a ", kind);
    program->values = output + 1;
    program->steps.push_back(std::move(step));
  }
  for (const int v : outputs) {
    TORCH_CHECK_VALUE(v >= 0 && v < program->values, "deploy: expected the number of a value, got ", v);
  }
  program->input_ranks = std::move(ranks);
  program->outputs = std::move(outputs);
  return program;
}

// Versions and addresses of tensors: changes when one of them was written to, or was given other memory.
class Watch {
 public:
  explicit Watch(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)), seen_(stamp()) {}
  bool changed() {
    const uint64_t now = stamp();
    const bool differs = now != seen_;
    seen_ = now;
    return differs;
  }

 private:
  uint64_t stamp() const {
    // After a call none of it is in a near cache: all tensors are asked for at once, then what they point to.
    constexpr size_t kLine = 64;
    for (const at::Tensor& t : tensors_) {
      const auto* impl = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
      for (size_t at = 0; at < sizeof(c10::TensorImpl); at += kLine) __builtin_prefetch(impl + at);
    }
    for (const at::Tensor& t : tensors_)
      __builtin_prefetch(t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    uint64_t sum = 1469598103934665603ull;
    for (const at::Tensor& t : tensors_) {
      const uint64_t version = t.is_inference() ? 0 : static_cast<uint64_t>(t._version());
      for (const uint64_t part : {version, reinterpret_cast<uint64_t>(t.const_data_ptr())}) {
        sum = (sum ^ part) * 1099511628211ull;
      }
    }
    return sum;
  }
  std::vector<at::Tensor> tensors_;
  uint64_t seen_;
};

at::ScalarType scalar_type(const py::object& dtype) {
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

}  // namespace

void bind_deploy(py::module_& m) {
  using deploy::Bound;
  using deploy::Program;
  using deploy::Weights;
  py::register_exception<deploy::Misfit>(m, "DeployMisfit");
  py::class_<Weights>(m, "DeployWeights");
  m.def("deploy_no_weights", [] { return Weights(); });
  m.def("deploy_pack_conv",
        [](const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::vector<int64_t> stride,
           std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> output_padding,
           int64_t groups, bool transposed, const py::object& dtype, bool winograd, bool normed) {
          return deploy::pack_conv(weight, bias, stride, padding, dilation, output_padding, groups, transposed,
                                   scalar_type(dtype), winograd, normed);
        });
  m.def("deploy_pack_affine", &deploy::pack_affine);
  m.def("deploy_has_bfloat16", [] { return deploy::bfloat16_kernels() != nullptr; });
  m.def("deploy_arena_bytes", &deploy::arena_bytes_held, "Memory for activations that all deployed networks hold together.");
  py::class_<Program, std::shared_ptr<Program>>(m, "DeployProgram").def(py::init(&make_program));
  py::class_<Bound, std::shared_ptr<Bound>>(m, "DeployBound")
      .def(py::init([](std::shared_ptr<Program> program, std::vector<Weights> weights, const py::object& dtype) {
        return std::make_shared<Bound>(std::move(program), std::move(weights), scalar_type(dtype));
      }))
      .def("run", &Bound::run, py::call_guard<py::gil_scoped_release>())
      .def("time", [](Bound& bound, std::vector<at::Tensor> inputs, int64_t repeats) {
        std::vector<std::tuple<int, double, int64_t, int64_t>> found;
        for (const deploy::StepTime& t : bound.time(std::move(inputs), repeats)) {
          found.emplace_back(t.step, t.seconds, t.flops, t.bytes);
        }
        return found;
      })
      .def("describe", &Bound::describe)
      .def_property_readonly("bytes", &Bound::bytes);
  py::class_<Watch>(m, "DeployWatch").def(py::init<std::vector<at::Tensor>>()).def("changed", &Watch::changed);
}

}  // namespace slimkernels
