// A part of a network as a flat list of steps that runs without Python between them. A Program is what all widths share, a
// Bound has the packed weights of one width, a Plan the memory and jobs for one set of input shapes.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "deploy_jobs.h"

namespace slimkernels::deploy {

enum class Kind { kConv, kLinear, kAffine, kAdd, kActivation, kMaxPool, kAveragePool, kGlobalPool, kCat, kNarrow, kFlatten };

struct Step {
  Kind kind;
  std::vector<int> inputs;
  int output;
  int residual;  // value added before the activation, or -1
  Activation activation;
  std::vector<int64_t> numbers;  // pools: kernel, stride, padding, dilation (2 each), ceil, count padding; cat: 0 channels,
                                 // 1 the last dimension; narrow: first and end, as in a Python slice
};

struct Program {
  std::vector<Step> steps;
  std::vector<int> input_ranks;  // 3 or 4: images, channels second; 0: rows of any rank, channels last
  std::vector<int> outputs;
  int values;  // the inputs are the first ones
};

// Thrown where a step does not fit the shapes of its inputs (added tensors that are broadcast, say): the caller runs it apart.
struct Misfit : std::runtime_error {
  explicit Misfit(size_t step) : std::runtime_error(std::to_string(step)) {}
};

// Weights of one step.
struct Weights {
  at::Tensor packed, bias;       // as the kernels read them
  at::Tensor winograd;           // for 3x3 by Winograd's algorithm, beside `packed`
  int64_t winograd_side = 0;     // its outputs in a row of a tile
  at::Tensor pairs, pair_bias;     // depthwise with bfloat16, two rows of taps at a time
  at::Tensor stem;                 // bfloat16, an odd number of channels: the taps of a row one after the other
  at::Tensor narrow, narrow_bias;  // for few outputs, several pixels in a vector
  at::Tensor weight, full_bias;  // as PyTorch reads them, where it runs the step
  int64_t out = 0, in = 0, groups = 1, kernel_h = 1, kernel_w = 1;
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed = false;
};

// A value for given input shapes: images (n, h, w, c); rows are one image of one row.
struct Value {
  bool image = true;
  int64_t rank = 4, n = 1, h = 1, w = 1, c = 1;
  std::vector<int64_t> lead;  // rows: the sizes but the last
  // Memory: a value may be some channels of a wider one, its root (itself otherwise).
  int root = -1;
  int64_t channel = 0, halo_h = 0, halo_w = 0;
  int first = -1, last = -1;  // steps between which a root lives
  int input = -1, output = -1;  // a root that is an input or output tensor itself
  int64_t offset = 0, pixel = 0;
};

enum class Runs { kConv, kWinograd, kNarrow, kDepthwise, kPool, kPointwise, kZeros, kImport, kExport, kFlatten, kTorchConv };

// One action of a plan; `index` is that of its job.
struct Action {
  Runs runs;
  int index = -1;
  int x = -1, residual = -1, y = -1;  // values
  int64_t x_shift = 0, y_shift = 0;   // bytes from a value's first pixel to where the job begins
  int step = -1;
};

struct Plan {
  std::vector<Value> values;
  std::vector<Action> actions;
  std::vector<ConvJob> convs;
  std::vector<WinogradJob> winograds;
  std::vector<NarrowJob> narrows;
  std::vector<DepthwiseJob> depthwises;
  std::vector<PoolJob> pools;
  std::vector<PointwiseJob> pointwises;
  int64_t arena_bytes = 0, scratch_bytes = 0;  // the scratch memory lies behind the values
  std::vector<std::string> descriptions;  // of every step
};

// One action of a step: seconds (median), operations of its products, bytes of what it reads and writes once.
struct StepTime {
  int step;  // -1: moving an input or output, zeros around it
  double seconds;
  int64_t flops, bytes;
};

class Bound {
 public:
  Bound(std::shared_ptr<const Program> program, std::vector<Weights> weights, at::ScalarType dtype);
  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs);
  std::vector<StepTime> time(std::vector<at::Tensor> inputs, int64_t repeats);
  int64_t bytes() const;
  std::vector<std::string> describe();  // what each step ran on when it ran last

  std::shared_ptr<const Program> program;
  std::vector<Weights> weights;
  at::ScalarType dtype;
  const Kernels* kernels;
  int64_t element;  // bytes

 private:
  std::vector<at::Tensor> run_plan(std::vector<at::Tensor> inputs, std::vector<std::vector<double>>* seconds);
  std::shared_ptr<const Plan> plan_for(const std::vector<at::Tensor>& inputs);
  std::mutex mutex_;
  std::map<std::vector<int64_t>, std::shared_ptr<const Plan>> plans_;
  std::shared_ptr<const Plan> latest_;
};

constexpr size_t kMaxPlans = 32;  // input shapes that a width keeps a plan for

// Weights as the kernels read them; `groups` other than 1 and the channels stays PyTorch's.
Weights pack_conv(const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> output_padding,
                  int64_t groups, bool transposed, at::ScalarType dtype, bool winograd, bool normed);
// The side of the tiles that Winograd's algorithm takes (0: it never pays), and the weights for it.
int64_t winograd_side(const at::Tensor& weight, at::ScalarType dtype, bool normed);
at::Tensor pack_winograd(const at::Tensor& weight, int64_t side, int64_t lanes, at::ScalarType dtype);
Weights pack_affine(const at::Tensor& scale, const at::Tensor& shift);

std::shared_ptr<const Plan> make_plan(const Bound& bound, const std::vector<at::Tensor>& inputs);
at::Tensor large_pages(int64_t bytes);  // new memory, in large pages where the system gives them
void gather_weights(std::vector<Weights>& weights);  // what the kernels read, one after the other in one such piece
int64_t arena_bytes_held();  // by all programs together

}  // namespace slimkernels::deploy
