// Runs a plan: one pass over its actions, in memory that is kept for the next call.
#include <ATen/Parallel.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <ctime>

#include "deploy_plan.h"

namespace slimkernels::deploy {
namespace {

std::atomic<int64_t> held_bytes{0};

// Memory for activations, kept for the next call; every call that runs at the same time has its own.
class Arenas {
 public:
  at::Tensor take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {
        if (free_[i].numel() >= bytes) {
          at::Tensor found = free_[i];
          free_.erase(free_.begin() + i);
          return found;
        }
      }
      for (const at::Tensor& t : free_) held_bytes -= t.numel();
      free_.clear();  // too small ones; the larger one serves for them
    }
    held_bytes += bytes;
    return large_pages(bytes);
  }
  void give(at::Tensor arena) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(arena));
  }

 private:
  std::mutex mutex_;
  std::vector<at::Tensor> free_;
};

Arenas& arenas() {
  static Arenas* made = new Arenas();  // never destroyed: threads may still run at exit
  return *made;
}

at::Tensor new_output(const Value& v, at::ScalarType dtype) {
  if (!v.image) {
    std::vector<int64_t> sizes = v.lead;
    sizes.push_back(v.c);
    return at::empty(sizes, dtype);
  }
  if (v.rank == 3) return at::empty_strided({v.n, v.c, v.w}, {v.w * v.c, 1, v.c}, dtype);
  return at::empty_strided({v.n, v.c, v.h, v.w}, {v.h * v.w * v.c, 1, v.w * v.c, v.c}, dtype);
}

// Of this thread where it is the only one, which leaves out the moments in which something else had the core.
double clock_seconds() {
  timespec now;
  clock_gettime(at::get_num_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Images without a batch dimension get one; true when they did.
bool lend_batch(const Program& program, std::vector<at::Tensor>& inputs) {
  bool any = false;
  for (const Step& step : program.steps) {
    if (step.kind == Kind::kFlatten) return false;  // would flatten other dimensions
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const int rank = program.input_ranks[i];
    if (rank && inputs[i].dim() != rank - 1) return false;
    any |= rank != 0;
  }
  for (size_t i = 0; any && i < inputs.size(); ++i) {
    if (program.input_ranks[i]) inputs[i] = inputs[i].unsqueeze(0);
  }
  return any;
}

struct Run {
  const Bound& bound;
  const Plan& plan;
  std::vector<at::Tensor>& inputs;
  std::vector<at::Tensor>& outputs;
  char* arena;

  char* memory(int value) const {
    const Value& root = plan.values[plan.values[value].root];
    if (root.input >= 0) return static_cast<char*>(const_cast<void*>(inputs[root.input].const_data_ptr()));
    if (root.output >= 0) return static_cast<char*>(outputs[root.output].data_ptr());
    return arena + root.offset;
  }

  // (n, c, h, w), in place.
  at::Tensor view(int value) const {
    const Value& v = plan.values[value];
    const int64_t row = (v.w + 2 * v.halo_w) * v.pixel, image = (v.h + 2 * v.halo_h) * row;
    char* first = memory(value) + (v.halo_h * row + v.halo_w * v.pixel + v.channel) * bound.element;
    return at::from_blob(first, {v.n, v.c, v.h, v.w}, {image, 1, row, v.pixel}, at::TensorOptions(bound.dtype));
  }

  void zeros(int value) const {
    const Value& v = plan.values[value];
    const int64_t pixel = v.pixel * bound.element, row = (v.w + 2 * v.halo_w) * pixel;
    char* at = memory(value);
    for (int64_t i = 0; i < v.n; ++i) {
      std::memset(at, 0, v.halo_h * row + v.halo_w * pixel);
      at += v.halo_h * row + v.halo_w * pixel;
      for (int64_t y = 0; y + 1 < v.h; ++y) {  // the end of a row and the beginning of the next
        at += v.w * pixel;
        std::memset(at, 0, 2 * v.halo_w * pixel);
        at += 2 * v.halo_w * pixel;
      }
      at += v.w * pixel;
      std::memset(at, 0, v.halo_w * pixel + v.halo_h * row);
      at += v.halo_w * pixel + v.halo_h * row;
    }
    std::memset(at, 0, 4);  // what a pair may have beyond the last pixel
  }

  // A tensor of any strides to channels side by side; channels beyond it become zeros.
  template <typename T>
  void import(const Action& a) const {
    const Value& v = plan.values[a.y];
    const at::Tensor& t = inputs[a.index];
    const int64_t row = (v.w + 2 * v.halo_w) * v.pixel, image = (v.h + 2 * v.halo_h) * row;
    T* to = reinterpret_cast<T*>(memory(a.y) + a.y_shift);
    if (!v.image) {
      const at::Tensor rows = t.contiguous();
      const T* from = rows.const_data_ptr<T>();
      for (int64_t r = 0; r < v.w; ++r) {
        std::memcpy((void*)(to + r * v.pixel), from + r * v.c, v.c * sizeof(T));
        for (int64_t c = v.c; c < v.pixel; ++c) to[r * v.pixel + c] = T(0);
      }
      return;
    }
    const int64_t stride_c = t.stride(1), stride_w = t.stride(-1), stride_h = v.rank == 4 ? t.stride(2) : 0;
    const T* from = t.const_data_ptr<T>();
    at::parallel_for(0, v.n * v.h, 1 + 16384 / (v.w * v.c), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const T* source = from + task / v.h * t.stride(0) + task % v.h * stride_h;
        T* target = to + task / v.h * image + task % v.h * row;
        if (stride_c == 1 && stride_w == v.c && v.pixel == v.c) {
          std::memcpy((void*)target, source, v.w * v.c * sizeof(T));
          continue;
        }
        if (v.c == 3) {  // images
          for (int64_t x = 0; x < v.w; ++x, target += v.pixel, source += stride_w) {
            target[0] = source[0], target[1] = source[stride_c], target[2] = source[2 * stride_c];
            if (v.pixel > 3) target[3] = T(0);
          }
          continue;
        }
        for (int64_t x = 0; x < v.w; ++x, target += v.pixel, source += stride_w) {
          for (int64_t c = 0; c < v.c; ++c) target[c] = source[c * stride_c];
          for (int64_t c = v.c; c < v.pixel; ++c) target[c] = T(0);
        }
      }
    });
  }

  template <typename T>
  void flatten(const Action& a) const {
    const Value &x = plan.values[a.x], &y = plan.values[a.y];
    const int64_t row = (x.w + 2 * x.halo_w) * x.pixel, image = (x.h + 2 * x.halo_h) * row;
    const T* from = reinterpret_cast<const T*>(memory(a.x) + a.x_shift);
    T* to = reinterpret_cast<T*>(memory(a.y) + a.y_shift);
    for (int64_t n = 0; n < x.n; ++n) {
      for (int64_t c = 0; c < x.c; ++c) {
        for (int64_t i = 0; i < x.h; ++i) {
          const T* source = from + n * image + i * row + c;
          T* target = to + n * y.pixel + (c * x.h + i) * x.w;
          for (int64_t j = 0; j < x.w; ++j) target[j] = source[j * x.pixel];
        }
      }
    }
  }

  void torch_conv(const Action& a) const {
    const Weights& w = bound.weights[a.index];
    const Step& step = bound.program->steps[a.index];
    const std::vector<int64_t> ones{1, 1}, none{0, 0};
    at::Tensor y = view(a.y);
    at::Tensor weight = w.weight;
    const bool linear = step.kind == Kind::kLinear;
    const at::Tensor made = at::convolution(view(a.x), weight, w.full_bias.defined() ? std::optional(w.full_bias) : std::nullopt,
                                            linear ? ones : w.stride, linear ? none : w.padding, linear ? ones : w.dilation,
                                            w.transposed, linear ? none : w.output_padding, w.groups);
    y.copy_(made);
    if (a.residual < 0 && step.activation == Activation::kNone) return;
    const Value& v = plan.values[a.y];
    PointwiseJob job{};
    job.images = v.n, job.h = v.h, job.w = v.w, job.channels = v.c;
    job.x = job.y = {y.stride(0), y.stride(2), y.stride(3)};
    Places at{static_cast<const char*>(y.const_data_ptr()), nullptr, static_cast<char*>(y.data_ptr())};
    at::Tensor added;
    if (a.residual >= 0) {
      added = view(a.residual);
      job.residual = {added.stride(0), added.stride(2), added.stride(3)};
      at.residual = static_cast<const char*>(added.const_data_ptr());
    }
    job.epilogue = {step.activation, nullptr};
    bound.kernels->pointwise(job, at);
  }

  void act(const Action& a) const {
    Places at;
    if (a.x >= 0) at.x = memory(a.x) + a.x_shift;
    if (a.y >= 0) at.y = memory(a.y) + a.y_shift;
    if (a.residual >= 0) {
      const Value &v = plan.values[a.residual], &y = plan.values[a.y];
      const int64_t row = (v.w + 2 * v.halo_w) * v.pixel;
      at.residual = memory(a.residual) + (v.halo_h * row + v.halo_w * v.pixel + v.channel) * bound.element;
      // A job that begins at another pixel of y than the first one: the same pixel of the residual.
      const int64_t y_row = (y.w + 2 * y.halo_w) * y.pixel;
      const int64_t off = a.y_shift / bound.element - (y.halo_h * y_row + y.halo_w * y.pixel + y.channel);
      if (off) at.residual += (off / y_row * row + off % y_row / y.pixel * v.pixel) * bound.element;
    }
    switch (a.runs) {
      case Runs::kWinograd:
        at.scratch = arena + plan.arena_bytes - plan.scratch_bytes;
        return bound.kernels->winograd(plan.winograds[a.index], at);
      case Runs::kConv: return bound.kernels->conv(plan.convs[a.index], at);
      case Runs::kNarrow: return bound.kernels->narrow(plan.narrows[a.index], at);
      case Runs::kDepthwise: return bound.kernels->depthwise(plan.depthwises[a.index], at);
      case Runs::kPool: return bound.kernels->pool(plan.pools[a.index], at);
      case Runs::kPointwise: return bound.kernels->pointwise(plan.pointwises[a.index], at);
      case Runs::kZeros: return zeros(a.y);
      case Runs::kImport: return bound.element == 4 ? import<float>(a) : import<c10::BFloat16>(a);
      case Runs::kFlatten: return bound.element == 4 ? flatten<float>(a) : flatten<c10::BFloat16>(a);
      case Runs::kTorchConv: return torch_conv(a);
      case Runs::kExport: {
        const Value& v = plan.values[a.x];
        at::Tensor to = outputs[a.index];
        const at::Tensor from = view(a.x);
        if (!v.image) to = to.view({1, v.w, v.c, 1}).transpose(1, 2).transpose(2, 3);
        else if (v.rank == 3) to = to.unsqueeze(2);
        to.copy_(from);
        return;
      }
    }
  }
};

}  // namespace

int64_t arena_bytes_held() { return held_bytes; }

Bound::Bound(std::shared_ptr<const Program> given, std::vector<Weights> packed, at::ScalarType type)
    : program(std::move(given)), weights(std::move(packed)), dtype(type) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "deploy: expected dtype float32 or bfloat16, got ", dtype);
  kernels = dtype == at::kBFloat16 ? bfloat16_kernels() : &float_kernels();
  TORCH_CHECK(kernels, "deploy: this machine has no bfloat16 products (AVX512-BF16); use dtype=torch.float32");
  TORCH_CHECK_VALUE(weights.size() == program->steps.size(), "deploy: expected weights of ", program->steps.size(),
                    " steps, got ", weights.size());
  element = dtype == at::kBFloat16 ? 2 : 4;
  gather_weights(weights);
}

std::shared_ptr<const Plan> Bound::plan_for(const std::vector<at::Tensor>& inputs) {
  std::vector<int64_t> key;
  for (const at::Tensor& t : inputs) {
    key.push_back(t.dim());
    key.insert(key.end(), t.sizes().begin(), t.sizes().end());
    key.insert(key.end(), t.strides().begin(), t.strides().end());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = plans_.find(key);
  if (found == plans_.end()) {
    if (plans_.size() >= kMaxPlans) plans_.clear();
    found = plans_.emplace(key, make_plan(*this, inputs)).first;
  }
  return latest_ = found->second;
}

std::vector<std::string> Bound::describe() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return latest_ ? latest_->descriptions : std::vector<std::string>();
}

std::vector<at::Tensor> Bound::run(std::vector<at::Tensor> inputs) { return run_plan(std::move(inputs), nullptr); }

std::vector<StepTime> Bound::time(std::vector<at::Tensor> inputs, int64_t repeats) {
  std::vector<std::vector<double>> seconds;
  for (int64_t i = 0; i < repeats + 2; ++i) {
    if (i == 2) seconds.clear();  // warm
    run_plan(inputs, &seconds);
  }
  const std::shared_ptr<const Plan> plan = plan_for(inputs);
  std::vector<StepTime> found;
  for (size_t i = 0; i < plan->actions.size(); ++i) {
    const Action& a = plan->actions[i];
    std::sort(seconds[i].begin(), seconds[i].end());
    StepTime time{a.step, seconds[i][seconds[i].size() / 2], 0, 0};
    for (const int v : {a.runs == Runs::kZeros ? -1 : a.x, a.residual, a.runs == Runs::kZeros ? -1 : a.y}) {
      if (v < 0) continue;
      const Value& value = plan->values[v];
      time.bytes += value.n * value.h * value.w * value.c * element;
    }
    if (a.runs == Runs::kConv) {
      const ConvJob& job = plan->convs[a.index];
      time.flops = 2 * job.images * job.out_h * job.out_w * job.out_c * job.depth * (element == 2 ? 2 : 1);
      time.bytes += job.depth * 4 * job.out_c;
    } else if (a.runs == Runs::kWinograd) {
      const WinogradJob& job = plan->winograds[a.index];
      time.flops = 2 * 9 * job.images * job.out_h * job.out_w * job.out_c * job.in_c;
      const int64_t row = job.few ? 3 : job.side + 2;  // of a filter as it is read
      time.bytes += row * row * job.in_c * job.out_c * element;
    } else if (a.runs == Runs::kNarrow) {
      const NarrowJob& job = plan->narrows[a.index];
      const int64_t weights = job.kernel_h * job.kernel_w * job.in_c * job.out_c;
      time.flops = 2 * job.images * job.out_h * job.out_w * weights;
      time.bytes += weights * 4;
    } else if (a.runs == Runs::kDepthwise) {
      const DepthwiseJob& job = plan->depthwises[a.index];
      time.flops = 2 * job.images * job.out_h * job.out_w * job.channels * job.kernel_h * job.kernel_w;
      time.bytes += job.channels * job.kernel_h * job.kernel_w * 4;
    }
    found.push_back(time);
  }
  return found;
}

std::vector<at::Tensor> Bound::run_plan(std::vector<at::Tensor> inputs, std::vector<std::vector<double>>* seconds) {
  TORCH_CHECK_VALUE(inputs.size() == program->input_ranks.size(), "deploy: expected ", program->input_ranks.size(),
                    " tensors, got ", inputs.size());
  for (const at::Tensor& t : inputs) {
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, "deploy: expected an input of dtype ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device().is_cpu(), "deploy: expected an input on the CPU, got one on ", t.device());
  }
  const bool unbatched = lend_batch(*program, inputs);
  const std::shared_ptr<const Plan> plan = plan_for(inputs);
  std::vector<at::Tensor> outputs;
  for (const int v : program->outputs) outputs.push_back(new_output(plan->values[v], dtype));
  at::Tensor arena = arenas().take(plan->arena_bytes);
  char* memory = static_cast<char*>(arena.data_ptr());
  const Run run{*this, *plan, inputs, outputs, memory};
  try {
    if (seconds) seconds->resize(plan->actions.size());
    for (size_t i = 0; i < plan->actions.size(); ++i) {
      const double begin = seconds ? clock_seconds() : 0;
      run.act(plan->actions[i]);
      if (seconds) (*seconds)[i].push_back(clock_seconds() - begin);
    }
  } catch (...) {
    arenas().give(std::move(arena));
    throw;
  }
  arenas().give(std::move(arena));
  for (size_t i = 0; unbatched && i < outputs.size(); ++i) {
    if (plan->values[program->outputs[i]].image) outputs[i] = outputs[i].squeeze(0);
  }
  return outputs;
}

}  // namespace slimkernels::deploy
