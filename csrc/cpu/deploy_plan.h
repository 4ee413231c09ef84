// The making of a Plan.
#pragma once

#include <utility>

#include "deploy.h"

namespace slimkernels::deploy {

enum class WinogradForm { kNone, kWhole, kFew };  // direct; weights transformed ahead; as they are read

class Planner {
 public:
  Planner(const Bound& bound, const std::vector<at::Tensor>& inputs);

  Plan plan;

 private:
  const Bound& bound;
  const Program& program;
  const std::vector<at::Tensor>& inputs;
  std::vector<char> imported;                  // inputs that are copied first
  std::vector<std::pair<int, int>> exported;   // values that are copied to an output at the end

  int inputs_count() const { return static_cast<int>(program.input_ranks.size()); }
  bool native_conv(size_t step) const;
  bool dense_pairs(int input) const;  // whether pixels of an odd number of bfloat16 may lie side by side
  int last_use(int value) const;
  void shapes();
  bool infer(const Step& step, const Weights& weights);
  void memory();
  void places();
  void actions();
  void act(int step);
  void conv(int step);
  void depthwise(int step);
  bool narrow(int step);    // false where its pixels do not lie as the kernel takes them
  bool winograd(int step);  // false where it does not pay
  WinogradForm pick_winograd(int64_t side, int64_t tiles, int64_t pixels, int64_t in, int64_t out) const;
  void zeros(int value);
  void copy(int from, int to, int step, int64_t x_shift, int64_t y_shift, int64_t w, int64_t c);
  void pointwise(int step, int x, int residual, const float* scale, const float* bias);
  Plane plane(int value) const;
  int64_t first_pixel(int value) const;  // bytes from a root's memory to the value's first pixel
};

// Strides of a channels-last tensor without gaps; sizes of 1 may have any.
bool channels_last(const at::Tensor& t);

// Register tile of a convolution: vectors of outputs, pixels.
std::pair<int64_t, int64_t> pick_tile(const Kernels& kernels, int64_t out_w, int64_t vectors, int64_t depth);

}  // namespace slimkernels::deploy
