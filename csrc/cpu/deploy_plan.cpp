// From the shapes of the inputs to memory and jobs. Convolutions read their input through zeros that lie around it in memory,
// so that no tap has to be tested; concatenated channels are written where they belong by what computes them.
#include <algorithm>

#include "deploy_plan.h"

namespace slimkernels::deploy {
namespace {

constexpr int64_t kSharedBytes = 1024;  // pixels as far apart, or a multiple of it, use few sets of a first-level cache
constexpr int64_t kLineBytes = 64;

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1 + (ceil ? stride - 1 : 0);
  int64_t out = room / stride + 1;
  if (ceil && (out - 1) * stride >= size + padding) --out;  // the last window has to begin inside
  return out;
}

int64_t conv_out(const Weights& w, int axis, int64_t size) {
  const int64_t kernel = axis ? w.kernel_w : w.kernel_h;
  if (w.transposed) {
    return (size - 1) * w.stride[axis] - 2 * w.padding[axis] + w.dilation[axis] * (kernel - 1) + w.output_padding[axis] + 1;
  }
  return (size + 2 * w.padding[axis] - w.dilation[axis] * (kernel - 1) - 1) / w.stride[axis] + 1;
}

bool same_shape(const Value& a, const Value& b) {
  return a.image == b.image && a.n == b.n && a.h == b.h && a.w == b.w && a.c == b.c && a.lead == b.lead;
}

}  // namespace

void Planner::shapes() {
  for (size_t i = 0; i < program.input_ranks.size(); ++i) {
    const at::Tensor& t = inputs[i];
    Value& v = plan.values[i];
    v.rank = program.input_ranks[i];
    v.image = v.rank != 0;
    if (v.image) {
      TORCH_CHECK_VALUE(t.dim() == v.rank, "deploy: expected an input of ", v.rank, " dimensions, got shape ", t.sizes());
      v.n = t.size(0), v.c = t.size(1), v.h = v.rank == 4 ? t.size(2) : 1, v.w = t.size(-1);
    } else {
      TORCH_CHECK_VALUE(t.dim() >= 1, "deploy: expected an input of at least 1 dimension, got none");
      v.rank = t.dim();
      v.lead = t.sizes().slice(0, t.dim() - 1).vec();
      v.c = t.size(-1), v.w = v.c ? t.numel() / v.c : 0;
    }
    TORCH_CHECK_VALUE(t.numel() > 0, "deploy: expected an input with elements, got shape ", t.sizes());
  }
  for (size_t i = 0; i < program.steps.size(); ++i) {
    if (!infer(program.steps[i], bound.weights[i])) throw Misfit(i);
  }
}

// Shape of the step's output; false when the step does not fit.
bool Planner::infer(const Step& step, const Weights& w) {
  const Value& x = plan.values[step.inputs[0]];
  Value& y = plan.values[step.output];
  y = Value{};
  y.image = x.image, y.rank = x.rank, y.n = x.n, y.h = x.h, y.w = x.w, y.c = x.c, y.lead = x.lead;
  const auto& n = step.numbers;
  switch (step.kind) {
    case Kind::kConv:
    case Kind::kLinear:
      if (x.c != w.in) return false;
      y.c = w.out;
      if (step.kind == Kind::kConv) y.h = conv_out(w, 0, x.h), y.w = conv_out(w, 1, x.w);
      break;
    case Kind::kAffine:
      if (x.c != w.in) return false;
      break;
    case Kind::kMaxPool:
    case Kind::kAveragePool:
      y.h = pooled(x.h, n[0], n[2], n[4], n[6], n[8]);
      y.w = pooled(x.w, n[1], n[3], n[5], n[7], n[8]);
      break;
    case Kind::kGlobalPool: y.h = y.w = 1; break;
    case Kind::kCat:
      for (size_t i = 1; i < step.inputs.size(); ++i) {
        const Value& other = plan.values[step.inputs[i]];
        const bool fits = x.image && other.image && other.n == x.n && other.h == x.h &&
                          (n[0] ? other.c == x.c : other.w == x.w);
        if (!fits) return false;
        (n[0] ? y.w : y.c) += n[0] ? other.w : other.c;
      }
      break;
    case Kind::kNarrow: {
      const auto bounded = [&](int64_t at) { return std::clamp<int64_t>(at < 0 ? at + x.w : at, 0, x.w); };
      y.w = std::max<int64_t>(0, bounded(n[1]) - bounded(n[0]));
      break;
    }
    case Kind::kFlatten:
      y.image = false, y.rank = 2, y.lead = {x.n}, y.w = x.n, y.n = y.h = 1, y.c = x.c * x.h * x.w;
      break;
    case Kind::kAdd:
    case Kind::kActivation: break;
  }
  for (const int other : {step.kind == Kind::kAdd ? step.inputs[1] : -1, step.residual}) {
    if (other >= 0 && !same_shape(plan.values[other], y)) return false;
  }
  return y.n > 0 && y.h > 0 && y.w > 0 && y.c > 0;
}

// Which values are tensors of the caller's, which are parts of a concatenation, and how much room each needs around it.
void Planner::memory() {
  auto& values = plan.values;
  const int64_t pair = bound.dtype == at::kBFloat16 ? 2 : 1;
  for (size_t v = 0; v < values.size(); ++v) values[v].root = static_cast<int>(v);
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    if (step.kind != Kind::kConv || !native_conv(i)) continue;
    const Weights& w = bound.weights[i];
    Value& x = values[step.inputs[0]];
    if (!w.transposed) {
      x.halo_h = std::max(x.halo_h, w.padding[0]);
      x.halo_w = std::max(x.halo_w, w.padding[1]);
    }
  }
  std::vector<bool> is_output(values.size(), false);
  for (const int v : program.outputs) is_output[v] = true;
  // From the last concatenation to the first: one that is a part of a later one passes its own parts on.
  for (size_t i = program.steps.size(); i-- > 0;) {
    const Step& step = program.steps[i];
    if (step.kind != Kind::kCat || step.numbers[0] != 0) continue;
    int64_t channel = 0;
    const bool even = pair == 1 || std::all_of(step.inputs.begin(), step.inputs.end(), [&](int v) { return values[v].c % 2 == 0; });
    for (const int v : step.inputs) {
      const bool once = std::count(step.inputs.begin(), step.inputs.end(), v) == 1;
      if (v >= inputs_count() && values[v].root == v && !is_output[v] && once && even) {
        values[v].root = step.output, values[v].channel = channel;
      }
      channel += values[v].c;
    }
  }
  for (size_t v = 0; v < values.size(); ++v) {
    int64_t channel = values[v].channel;
    int root = values[v].root;
    while (values[root].root != root) channel += values[root].channel, root = values[root].root;
    values[v].root = root, values[v].channel = channel;
  }
  for (const Value& v : values) {
    Value& root = values[v.root];
    root.halo_h = std::max(root.halo_h, v.halo_h), root.halo_w = std::max(root.halo_w, v.halo_w);
  }
  for (Value& v : values) v.halo_h = values[v.root].halo_h, v.halo_w = values[v.root].halo_w;
  // A tensor of the caller's is read where it lies when its channels lie side by side and nothing is needed around it.
  for (int i = 0; i < inputs_count(); ++i) {
    Value& v = values[i];
    const bool dense = v.image ? inputs[i].is_non_overlapping_and_dense() && channels_last(inputs[i]) : inputs[i].is_contiguous();
    imported[i] = !dense || v.halo_h || v.halo_w || v.c % pair;
    if (!imported[i]) v.input = i;
  }
  for (size_t o = 0; o < program.outputs.size(); ++o) {
    const int index = program.outputs[o];
    Value& v = values[index];
    // Written in place unless it needs room around it, has an odd number of channels to read, or is another output too.
    const bool direct = index >= inputs_count() && v.root == index && !v.halo_h && !v.halo_w && v.output < 0 &&
                        (v.c % pair == 0 || last_use(index) < 0);
    if (direct) v.output = static_cast<int>(o);
    else exported.push_back({index, static_cast<int>(o)});
  }
  for (Value& v : values) {
    if (&v != &values[v.root]) continue;
    v.pixel = v.output >= 0 || v.input >= 0 ? v.c : up(v.c, pair);
    // A tile's pixels would share their places in the first-level cache: a line more keeps them apart.
    const bool arena = v.output < 0 && v.input < 0;
    if (arena && v.pixel * bound.element % kSharedBytes == 0) v.pixel += kLineBytes / bound.element;
  }
  for (int i = 0; i < inputs_count(); ++i) {
    if (pair == 2 && dense_pairs(i)) values[i].pixel = values[i].c;
  }
  for (Value& v : values) v.pixel = values[v.root].pixel;
}

// The pixels under a row of taps are read as one line of pairs, the one number too many with a weight of 0. So every output has to
// begin at a pair, and there are zeros around the image, which that number may come from.
bool Planner::dense_pairs(int input) const {
  const Value& v = plan.values[input];
  const int64_t row = (v.w + 2 * v.halo_w) * v.c;
  if (!imported[input] || v.c % 2 == 0 || v.root != input || row % 2 || !v.halo_w) return false;
  for (const int o : program.outputs) {
    if (o == input) return false;
  }
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& s = program.steps[i];
    if (s.residual == input) return false;
    if (!std::count(s.inputs.begin(), s.inputs.end(), input)) continue;
    const Weights& w = bound.weights[i];
    const bool begins = (v.halo_w - w.padding[1]) % 2 == 0 && w.stride[1] % 2 == 0 && w.dilation[1] == 1;
    if (s.kind != Kind::kConv || !w.stem.defined() || w.narrow.defined() || !begins) return false;
  }
  return true;
}

bool channels_last(const at::Tensor& t) {
  int64_t expected = t.size(1);
  if (t.size(1) > 1 && t.stride(1) != 1) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) > 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return t.size(0) == 1 || t.stride(0) == expected;
}

int Planner::last_use(int value) const {
  int found = -1;
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& s = program.steps[i];
    if (s.residual == value || std::count(s.inputs.begin(), s.inputs.end(), value)) found = static_cast<int>(i);
  }
  return found;
}

// A place in the arena for every root: the lowest that is free from its first action to its last one.
void Planner::places() {
  auto& values = plan.values;
  const auto touch = [&](int v, int at) {
    if (v < 0) return;
    Value& root = values[values[v].root];
    if (root.first < 0) root.first = at;
    root.last = std::max(root.last, at);
  };
  for (size_t i = 0; i < plan.actions.size(); ++i) {
    const Action& a = plan.actions[i];
    for (const int v : {a.x, a.residual, a.y}) touch(v, static_cast<int>(i));
  }
  struct Taken {
    int64_t begin, end;
    int last;
  };
  std::vector<Taken> taken;
  std::vector<int> order;
  for (size_t v = 0; v < values.size(); ++v) {
    const Value& value = values[v];
    if (value.root == static_cast<int>(v) && value.first >= 0 && value.input < 0 && value.output < 0) order.push_back(v);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a].first < values[b].first; });
  for (const int index : order) {
    Value& v = values[index];
    const int64_t bytes = up(v.n * (v.h + 2 * v.halo_h) * (v.w + 2 * v.halo_w) * v.pixel * bound.element + 64, 64);
    std::erase_if(taken, [&](const Taken& t) { return t.last < v.first; });
    std::sort(taken.begin(), taken.end(), [](const Taken& a, const Taken& b) { return a.begin < b.begin; });
    int64_t at = 0;
    for (const Taken& t : taken) {
      if (at + bytes <= t.begin) break;
      at = std::max(at, t.end);
    }
    v.offset = at;
    taken.push_back({at, at + bytes, v.last});
    plan.arena_bytes = std::max(plan.arena_bytes, at + bytes);
  }
}

Planner::Planner(const Bound& b, const std::vector<at::Tensor>& given)
    : bound(b), program(*b.program), inputs(given), imported(given.size()) {
  plan.values.resize(program.values);
  plan.descriptions.resize(program.steps.size());
  shapes();
  memory();
  actions();
  places();
  plan.arena_bytes = up(plan.arena_bytes, 64) + plan.scratch_bytes;
}

std::shared_ptr<const Plan> make_plan(const Bound& bound, const std::vector<at::Tensor>& inputs) {
  return std::make_shared<const Plan>(std::move(Planner(bound, inputs).plan));
}

}  // namespace slimkernels::deploy
