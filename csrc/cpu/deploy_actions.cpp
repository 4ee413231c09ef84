// From steps to jobs: strides, runs of taps, and the rule that picks a register tile.
#include <algorithm>

#include "deploy_plan.h"

namespace slimkernels::deploy {
namespace {

constexpr int64_t kBandBytes = 192 * 1024;     // input of a band: with a panel of weights it stays in a 1 MiB second-level cache
constexpr int64_t kPanelBytes = 256 * 1024;    // weights of a panel; deeper ones are summed in parts
constexpr int64_t kSummedPixels = 256;         // pixels of a band then: their sums stay in cache too
constexpr int64_t kFetchBytes = 512 * 1024;    // activations from which on the next tile's are asked for ahead
constexpr int64_t kFetchWeightBytes = 256 * 1024;  // weights from which on the next panel's are asked for ahead
constexpr int64_t kFlatRow = 112;              // pixels a row where an image is taken as one line of pixels

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

// The tile with the fewest cycles by what a core does in one: two multiply-adds, two loads; 4 until a sum can be added to
// again. What a tile costs besides (call, bias, stores) is about 20 cycles and one a vector. Measured on Zen 5, AVX-512: all
// tiles of 7 to 14 pixels by 2 to 4 vectors reach 220 to 237 of 237 GFLOP/s, one vector 200 to 216.
std::pair<int64_t, int64_t> pick_tile(const Kernels& kernels, int64_t out_w, int64_t vectors, int64_t depth) {
  std::pair<int64_t, int64_t> best{1, 1};
  double least = -1;
  for (const int64_t v : {2, 4, 3, 1}) {  // the earlier one where equal: fewer bytes of weights a multiply-add
    if (v > vectors && v > 1) continue;
    const auto tile_of = [&](int64_t width) {
      const int64_t limit = std::min(kMaxTile, kernels.tile_registers / width), tiles = (out_w + limit - 1) / limit;
      return (out_w + tiles - 1) / tiles;
    };
    const auto cycles = [&](int64_t width, int64_t pixels) {
      if (!pixels) return 0.0;
      const double unit = std::max({width * pixels * 0.5, (width + pixels) * 0.5, 4.0});
      return unit * static_cast<double>(depth) + 20.0 + static_cast<double>(width * pixels);
    };
    const auto row = [&](int64_t width) {
      const int64_t tile = std::min(tile_of(v), std::min(kMaxTile, kernels.tile_registers / width));
      return static_cast<double>(out_w / tile) * cycles(width, tile) + cycles(width, out_w % tile);
    };
    const double total = static_cast<double>(vectors / v) * row(v) + (vectors % v ? row(vectors % v) : 0.0);
    if (least < 0 || total < least * 0.999) least = total, best = {v, tile_of(v)};
  }
  return best;
}

bool Planner::native_conv(size_t step) const {
  const Weights& w = bound.weights[step];
  if (!w.packed.defined()) return false;
  const bool pairs_fit = bound.dtype != at::kBFloat16 || w.in % 2 == 0 || w.groups > 1;
  return pairs_fit || program.steps[step].inputs[0] < inputs_count();  // inputs get a zero channel more when they are copied
}

Plane Planner::plane(int value) const {
  const Value& v = plan.values[value];
  Plane p;
  p.pixel = v.pixel;
  p.row = (v.w + 2 * v.halo_w) * v.pixel;
  p.image = (v.h + 2 * v.halo_h) * p.row;
  return p;
}

int64_t Planner::first_pixel(int value) const {
  const Value& v = plan.values[value];
  const Plane p = plane(value);
  return (v.halo_h * p.row + v.halo_w * p.pixel + v.channel) * bound.element;
}

void Planner::zeros(int value) {
  const int root = plan.values[value].root;
  if (!plan.values[root].halo_h && !plan.values[root].halo_w) return;
  for (const Action& a : plan.actions) {
    if (a.runs == Runs::kZeros && a.y == root) return;
  }
  Action action;
  action.runs = Runs::kZeros;
  action.y = root;
  plan.actions.push_back(action);
}

void Planner::copy(int from, int to, int step, int64_t x_shift, int64_t y_shift, int64_t w, int64_t c) {
  const Value& x = plan.values[from];
  PointwiseJob job{};
  job.images = x.n, job.h = x.h, job.w = w, job.channels = c;
  job.x = plane(from), job.y = plane(to);
  zeros(to);
  plan.actions.push_back({Runs::kPointwise, static_cast<int>(plan.pointwises.size()), from, -1, to,
                          first_pixel(from) + x_shift * bound.element, first_pixel(to) + y_shift * bound.element, step});
  plan.pointwises.push_back(job);
}

void Planner::pointwise(int index, int from, int residual, const float* scale, const float* bias) {
  const Step& step = program.steps[index];
  const Value& x = plan.values[from];
  PointwiseJob job{};
  job.images = x.n, job.h = x.h, job.w = x.w, job.channels = x.c;
  job.x = plane(from), job.y = plane(step.output);
  if (residual >= 0) job.residual = plane(residual);
  job.scale = scale;
  job.epilogue = {step.activation, bias};
  const bool flat = !scale && !bias && job.x.pixel == x.c && job.y.pixel == x.c && (residual < 0 || job.residual.pixel == x.c);
  if (flat) job.channels *= job.w, job.w = 1;
  zeros(step.output);
  plan.actions.push_back({Runs::kPointwise, static_cast<int>(plan.pointwises.size()), from, residual, step.output,
                          first_pixel(from), first_pixel(step.output), index});
  plan.pointwises.push_back(job);
}

void Planner::depthwise(int index) {
  const Step& step = program.steps[index];
  const Weights& w = bound.weights[index];
  const Value& y = plan.values[step.output];
  DepthwiseJob job{};
  job.images = y.n, job.out_h = y.h, job.out_w = y.w, job.channels = y.c;
  job.kernel_h = w.kernel_h, job.kernel_w = w.kernel_w;
  job.stride_h = w.stride[0], job.stride_w = w.stride[1], job.dilation_h = w.dilation[0], job.dilation_w = w.dilation[1];
  job.x = plane(step.inputs[0]), job.y = plane(step.output);
  if (step.residual >= 0) job.residual = plane(step.residual);
  job.weight = w.packed.const_data_ptr<float>();
  if (w.pairs.defined()) {
    job.pairs = static_cast<const char*>(w.pairs.const_data_ptr()), job.pair_bias = w.pair_bias.const_data_ptr<float>();
  }
  job.epilogue = {step.activation, w.bias.const_data_ptr<float>()};
  const int64_t shift = first_pixel(step.inputs[0]) - (w.padding[0] * job.x.row + w.padding[1] * job.x.pixel) * bound.element;
  plan.actions.push_back({Runs::kDepthwise, static_cast<int>(plan.depthwises.size()), step.inputs[0], step.residual,
                          step.output, shift, first_pixel(step.output), index});
  plan.depthwises.push_back(job);
  plan.descriptions[index] = "depthwise, channels in the vector";
}

bool Planner::narrow(int index) {
  const Step& step = program.steps[index];
  const Weights& w = bound.weights[index];
  const int from = step.inputs[0];
  const Value &x = plan.values[from], &y = plan.values[step.output];
  if (!w.narrow.defined()) return false;
  NarrowJob job{};
  job.images = y.n, job.out_h = y.h, job.out_w = y.w, job.in_c = x.c, job.out_c = y.c;
  job.kernel_h = w.kernel_h, job.kernel_w = w.kernel_w;
  job.stride_h = w.stride[0], job.stride_w = w.stride[1], job.dilation_h = w.dilation[0], job.dilation_w = w.dilation[1];
  job.x = plane(from), job.y = plane(step.output);
  if (step.residual >= 0) job.residual = plane(step.residual);
  // A vector is read over what it needs: in the arena there is room behind every value.
  const Value& root = plan.values[x.root];
  const int64_t lanes = bound.kernels->lanes, span = (lanes / y.c - 1) * job.stride_w * job.x.pixel + x.c;
  const bool together = job.y.pixel == y.c && (step.residual < 0 || job.residual.pixel == y.c);
  if (span > lanes || !together || root.input >= 0 || root.output >= 0) return false;
  job.weight = w.narrow.const_data_ptr<float>();
  job.epilogue = {step.activation, w.narrow_bias.const_data_ptr<float>()};
  const int64_t shift = first_pixel(from) - (w.padding[0] * job.x.row + w.padding[1] * job.x.pixel) * bound.element;
  plan.actions.push_back({Runs::kNarrow, static_cast<int>(plan.narrows.size()), from, step.residual, step.output, shift,
                          first_pixel(step.output), index});
  plan.narrows.push_back(job);
  plan.descriptions[index] = std::to_string(lanes / y.c) + " pixels x " + std::to_string(y.c) + " channels in the vector, depth " +
                             std::to_string(w.kernel_h * w.kernel_w * x.c);
  return true;
}

void Planner::conv(int index) {
  const Step& step = program.steps[index];
  const Weights& w = bound.weights[index];
  const int from = step.inputs[0];
  const Value &x = plan.values[from], &y = plan.values[step.output];
  zeros(step.output);
  if (w.groups > 1) return depthwise(index);
  if (narrow(index) || winograd(index)) return;
  const int64_t pair = bound.element == 2 ? 2 : 1, lanes = bound.kernels->lanes;
  const Plane in = plane(from), out = plane(step.output);
  const Plane added = step.residual >= 0 ? plane(step.residual) : Plane{};
  const int64_t channel_units = up(x.c, pair) / pair, vectors = up(y.c, lanes) / lanes;
  const int64_t taps_y = w.transposed ? 1 : w.kernel_h, taps_x = w.transposed ? 1 : w.kernel_w;

  ConvJob job{};
  const bool stem = x.pixel % pair;  // see Planner::memory
  const int64_t row_units = (w.kernel_w * x.c + 1) / 2;
  for (int64_t ky = 0; stem && ky < taps_y; ++ky) job.runs.push_back({ky * w.dilation[0] * in.row / pair, row_units, ky * row_units});
  for (int64_t ky = 0; !stem && ky < taps_y; ++ky) {
    for (int64_t kx = 0; kx < taps_x; ++kx) {
      const int64_t offset = (ky * w.dilation[0] * in.row + kx * w.dilation[1] * in.pixel) / pair;
      const int64_t packed = (ky * taps_x + kx) * channel_units;
      if (!job.runs.empty() && job.runs.back().offset + job.runs.back().units == offset) {
        job.runs.back().units += channel_units;
      } else {
        job.runs.push_back({offset, channel_units, packed});
      }
    }
  }
  job.depth = stem ? taps_y * row_units : taps_y * taps_x * channel_units;
  job.out_c = y.c;
  job.images = x.n;
  job.out_h = w.transposed ? x.h : y.h, job.out_w = w.transposed ? x.w : y.w;
  const int64_t stride_y = w.transposed ? 1 : w.stride[0], stride_x = w.transposed ? 1 : w.stride[1];
  const int64_t spread_y = w.transposed ? w.stride[0] : 1, spread_x = w.transposed ? w.stride[1] : 1;
  job.x = {in.image / pair, stride_y * in.row / pair, stride_x * in.pixel / pair};
  job.y = {out.image, spread_y * out.row, spread_x * out.pixel};
  job.residual = {added.image, spread_y * added.row, spread_x * added.pixel};
  job.epilogue = {step.activation, w.bias.const_data_ptr<float>()};

  // Where no image or row has anything around it, all pixels are one line.
  const auto gapless = [](const Plane& p, int64_t width, int64_t height) {
    return p.row == width * p.pixel && p.image == height * p.row;
  };
  const bool flat = !w.transposed && taps_y * taps_x == 1 && stride_y == 1 && stride_x == 1 && !w.padding[0] &&
                    !w.padding[1] && gapless(in, x.w, x.h) && gapless(out, y.w, y.h) &&
                    (step.residual < 0 || gapless(added, y.w, y.h));
  int64_t rest = 0;
  if (flat) {
    const int64_t pixels = y.n * y.h * y.w;
    const bool fits = pixels * in.pixel * bound.element <= 2 * kBandBytes || pixels < 2 * kFlatRow;
    job.images = 1, job.out_w = fits ? pixels : kFlatRow, job.out_h = fits ? 1 : pixels / kFlatRow;
    rest = fits ? 0 : pixels % kFlatRow;
    job.x.row = job.out_w * job.x.pixel, job.y.row = job.out_w * job.y.pixel;
    job.residual.row = job.out_w * job.residual.pixel;
  }
  std::tie(job.vectors, job.tile) = pick_tile(*bound.kernels, job.out_w, vectors, job.depth);
  const int64_t row_bytes = std::max<int64_t>(1, std::min(job.x.row * 4, job.out_w * job.x.pixel * 4 * (w.transposed ? 1 : w.stride[0])));
  const int64_t rows = job.images * job.out_h;
  int64_t band = std::clamp<int64_t>(kBandBytes / row_bytes, 1, rows);

  job.fetch = y.n * y.h * y.w * out.pixel * bound.element > kFetchBytes;
  job.fetch_x = taps_y * taps_x == 1 && x.n * x.h * x.w * in.pixel * bound.element > kFetchBytes;
  job.fetch_weights = job.depth * vectors * lanes * 4 > kFetchWeightBytes;
  const int64_t panel = job.depth * job.vectors * lanes * 4;
  const int64_t parts = panel > kPanelBytes * 5 / 4 ? (panel + kPanelBytes - 1) / kPanelBytes : 1;
  if (parts > 1) band = std::clamp<int64_t>(kSummedPixels / job.out_w, 1, band);
  job.band = (rows + (rows + band - 1) / band - 1) / ((rows + band - 1) / band);
  const int64_t part = (job.depth + parts - 1) / parts;
  std::vector<TapRun> cut;
  job.chunks.push_back(0);
  int64_t done = 0;
  for (TapRun run : job.runs) {
    while (run.units > 0) {
      const int64_t take = std::min(run.units, part - done);
      cut.push_back({run.offset, take, run.packed});
      run.offset += take, run.packed += take, run.units -= take, done += take;
      if (done == part) job.chunks.push_back(cut.size()), done = 0;
    }
  }
  if (done) job.chunks.push_back(cut.size());
  job.runs = std::move(cut);

  const char* weight = static_cast<const char*>((stem ? w.stem : w.packed).const_data_ptr());
  const int64_t x_first = first_pixel(from), y_first = first_pixel(step.output);
  const auto add = [&](const ConvJob& given, int64_t x_shift, int64_t y_shift) {
    plan.actions.push_back({Runs::kConv, static_cast<int>(plan.convs.size()), from, step.residual, step.output,
                            x_first + x_shift, y_first + y_shift, index});
    plan.convs.push_back(given);
  };
  plan.descriptions[index] = "tile of " + std::to_string(job.tile) + " pixels x " + std::to_string(job.vectors * lanes) +
                             " channels, depth " + std::to_string(job.depth * pair);
  if (w.transposed) {
    for (int64_t ky = 0; ky < w.kernel_h; ++ky) {
      for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
        job.weight = weight + (ky * w.kernel_w + kx) * vectors * job.depth * lanes * 4;
        add(job, 0, (ky * out.row + kx * out.pixel) * bound.element);
      }
    }
    return;
  }
  job.weight = weight;
  const int64_t x_shift = -(w.padding[0] * in.row + w.padding[1] * in.pixel) * bound.element;
  add(job, x_shift, 0);
  if (rest) {
    const int64_t done_pixels = job.out_h * job.out_w;
    job.out_h = 1, job.out_w = rest, job.band = 1;
    job.tile = pick_tile(*bound.kernels, rest, vectors, job.depth).second;
    job.tile = std::min(job.tile, std::min(kMaxTile, bound.kernels->tile_registers / job.vectors));
    add(job, done_pixels * in.pixel * bound.element, done_pixels * out.pixel * bound.element);
  }
}

void Planner::actions() {
  for (int i = 0; i < inputs_count(); ++i) {
    if (!imported[i] || last_use(i) < 0) continue;
    zeros(i);
    Action action;
    action.runs = Runs::kImport;
    action.index = i, action.y = i, action.y_shift = first_pixel(i);
    plan.actions.push_back(action);
  }
  for (size_t i = 0; i < program.steps.size(); ++i) act(static_cast<int>(i));
  for (const auto& [value, output] : exported) {
    Action action;
    action.runs = Runs::kExport;
    action.x = value, action.index = output, action.x_shift = first_pixel(value);
    plan.actions.push_back(action);
  }
}

void Planner::act(int index) {
  const Step& step = program.steps[index];
  const Weights& w = bound.weights[index];
  const int from = step.inputs[0];
  const Value &x = plan.values[from], &y = plan.values[step.output];
  std::string& says = plan.descriptions[index];
  switch (step.kind) {
    case Kind::kConv:
    case Kind::kLinear:
      if (native_conv(index)) return conv(index);
      zeros(step.output);
      plan.actions.push_back({Runs::kTorchConv, index, from, step.residual, step.output, first_pixel(from),
                              first_pixel(step.output), index});
      says = "PyTorch's convolution";
      return;
    case Kind::kAffine:
      says = "one pass";
      return pointwise(index, from, step.residual, w.packed.const_data_ptr<float>(), w.bias.const_data_ptr<float>());
    case Kind::kAdd: says = "one pass"; return pointwise(index, from, step.inputs[1], nullptr, nullptr);
    case Kind::kActivation: says = "one pass"; return pointwise(index, from, step.residual, nullptr, nullptr);
    case Kind::kMaxPool:
    case Kind::kAveragePool:
    case Kind::kGlobalPool: {
      const bool global = step.kind == Kind::kGlobalPool;
      const auto& n = step.numbers;
      PoolJob job{};
      job.images = x.n, job.in_h = x.h, job.in_w = x.w, job.out_h = y.h, job.out_w = y.w, job.channels = x.c;
      job.kernel_h = global ? x.h : n[0], job.kernel_w = global ? x.w : n[1];
      job.stride_h = global ? 1 : n[2], job.stride_w = global ? 1 : n[3];
      job.pad_h = global ? 0 : n[4], job.pad_w = global ? 0 : n[5];
      job.dilation_h = global ? 1 : n[6], job.dilation_w = global ? 1 : n[7];
      job.max = step.kind == Kind::kMaxPool, job.count_padding = !global && n[9];
      job.x = plane(from), job.y = plane(step.output);
      zeros(step.output);
      plan.actions.push_back({Runs::kPool, static_cast<int>(plan.pools.size()), from, -1, step.output, first_pixel(from),
                              first_pixel(step.output), index});
      plan.pools.push_back(job);
      says = "pooling, channels in the vector";
      return;
    }
    case Kind::kCat: {
      int64_t done = 0;
      int copies = 0;
      for (const int part : step.inputs) {
        const Value& p = plan.values[part];
        const bool there = step.numbers[0] == 0 && p.root == y.root && p.channel == y.channel + done;
        if (!there) {
          copy(part, step.output, index, 0, step.numbers[0] ? done * y.pixel : done, p.w, p.c);
          ++copies;
        }
        done += step.numbers[0] ? p.w : p.c;
      }
      says = copies ? std::to_string(copies) + " of " + std::to_string(step.inputs.size()) + " parts copied"
                    : "written in place by what computes the parts";
      return;
    }
    case Kind::kNarrow: {
      const int64_t first = std::clamp<int64_t>(step.numbers[0] < 0 ? step.numbers[0] + x.w : step.numbers[0], 0, x.w);
      copy(from, step.output, index, first * x.pixel, 0, y.w, x.c);
      says = "copy";
      return;
    }
    case Kind::kFlatten:
      plan.actions.push_back({Runs::kFlatten, -1, from, -1, step.output, first_pixel(from), first_pixel(step.output), index});
      says = "copy";
      return;
  }
}

}  // namespace slimkernels::deploy
