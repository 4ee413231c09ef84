#include "inr_weights.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "reference_call.h"

#define SK_INL "inr_weights-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

void add_gradients(const InrPlan& p, const InrGradients& from, InrGradients& to) {
  const int64_t hp = p.padded;
  const auto add = [](const Buffer<float>& x, const Buffer<float>& y, int64_t size) {
    for (int64_t i = 0; i < size; ++i) y[i] += x[i];
  };
  add(from.w_in, to.w_in, kInrAxes * p.encoded() * hp);
  add(from.b_in, to.b_in, hp);
  add(from.w_hidden, to.w_hidden, p.depth * hp * hp);
  add(from.b_hidden, to.b_hidden, p.depth * hp);
  add(from.w_out, to.w_out, p.outputs * hp);
  add(from.b_out, to.b_out, p.padded_out);
  for (int64_t k = 0; k < p.depth; ++k) to.skip[k] += from.skip[k];
}

constexpr int64_t kSpec = 9;  // integers a tensor, as the reference packs them

// The parameters as the kernel reads them: float32, but for the large weights when they are multiplied in 16 bits.
struct Operands {
  at::Tensor w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out;
  bool half_products;
};

Operands operands(const at::Tensor& w_in, const at::Tensor& b_in, const at::Tensor& w_hidden,
                  const at::Tensor& b_hidden, const at::Tensor& skip, const at::Tensor& w_out,
                  const at::Tensor& b_out) {
  TORCH_CHECK_VALUE(w_in.dim() == 3 && w_in.size(2) >= kInrAxes && (w_in.size(2) - kInrAxes) % (2 * kInrAxes) == 0,
                    "inr_weights: expected w_in of shape (P, H, 6 + 12 * bands), got ", w_in.sizes());
  TORCH_CHECK_VALUE(skip.dim() == 2, "inr_weights: expected skip to have 2 dimensions, got ", skip.sizes());
  TORCH_CHECK_VALUE(w_out.dim() == 3, "inr_weights: expected w_out to have 3 dimensions, got ", w_out.sizes());
  const int64_t p = w_in.size(0), h = w_in.size(1), d = skip.size(1), o = w_out.size(1);
  const auto check = [&](const char* name, const at::Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(t.sizes() == shape, "inr_weights: expected ", name, " of shape ", shape, ", got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == w_in.scalar_type(), "inr_weights: expected ", name, " of dtype ",
                     w_in.scalar_type(), " like w_in, got ", t.scalar_type());
  };
  check("b_in", b_in, {p, h});
  check("w_hidden", w_hidden, {p, d, h, h});
  check("b_hidden", b_hidden, {p, d, h});
  check("skip", skip, {p, d});
  check("w_out", w_out, {p, o, h});
  check("b_out", b_out, {p, o});
  const bool half_products = w_in.scalar_type() == at::kBFloat16 && inr_bfloat16_kernels() != nullptr;
  const auto wide = [](const at::Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const auto multiplied = [&](const at::Tensor& t) { return half_products ? t.contiguous() : wide(t); };
  return {multiplied(w_in), wide(b_in),  multiplied(w_hidden), wide(b_hidden),
          wide(skip),       wide(w_out), wide(b_out),          half_products};
}

InrPlan make_plan(const Operands& x, at::IntArrayRef active, at::IntArrayRef spec, c10::string_view activation,
                  c10::string_view order, double norm, c10::string_view noise, double limit, int64_t samples,
                  int64_t first_sample, const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& scale) {
  InrPlan p;
  p.mlps = x.w_in.size(0), p.hidden = x.w_in.size(1), p.inputs = x.w_in.size(2), p.depth = x.skip.size(1);
  p.outputs = x.w_out.size(1);
  p.bands = (p.inputs - kInrAxes) / (2 * kInrAxes);
  p.padded = round_up(p.hidden, 32), p.padded_out = round_up(p.outputs, 16);
  p.samples = samples, p.first_sample = first_sample, p.seed = seed ? seed->item<int64_t>() : 0;
  TORCH_CHECK_VALUE(samples >= 1, "inr_weights: expected samples >= 1, got ", samples);
  TORCH_CHECK_VALUE(noise == "none" || noise == "axis" || noise == "element",
                    "inr_weights: expected noise to be one of none, axis, element, got '", noise, "'");
  TORCH_CHECK_VALUE(order == "neumeta" || order == "htty",
                    "inr_weights: expected compat to be one of neumeta, htty, got '", order, "'");
  p.noise = noise == "none" ? InrNoise::kNone : noise == "axis" ? InrNoise::kAxis : InrNoise::kElement;
  p.limit = static_cast<float>(limit), p.norm = static_cast<float>(norm), p.neumeta = order == "neumeta";
  p.activation = parse_activation("inr_weights", activation);
  p.by_output = derivative_uses_output(p.activation);
  p.w_in = x.w_in.const_data_ptr(), p.b_in = x.b_in.const_data_ptr<float>();
  p.w_hidden = x.w_hidden.const_data_ptr(), p.b_hidden = x.b_hidden.const_data_ptr<float>();
  p.skip = x.skip.const_data_ptr<float>();
  p.w_out = x.w_out.const_data_ptr<float>(), p.b_out = x.b_out.const_data_ptr<float>();

  const int64_t tensors = spec.size() / kSpec;
  TORCH_CHECK_VALUE(tensors > 0 && spec.size() % kSpec == 0 && active.size() % 2 == 0,
                    "inr_weights: expected spec and active to describe at least one tensor, got ", spec.size(), " and ",
                    active.size(), " integers");
  at::Tensor scales;
  if (scale) {
    TORCH_CHECK_VALUE(scale->dim() == 1 && scale->size(0) == tensors, "inr_weights: expected scale of shape (", tensors,
                      ",), got ", scale->sizes());
    scales = scale->to(at::kFloat).contiguous();
  }
  int64_t start = 0, saved_start = 0;
  for (size_t j = 0; j < active.size() / 2; ++j) {
    const int64_t t = j % tensors;
    const auto s = spec.slice(t * kSpec, kSpec);
    InrJob job;
    job.tensor = t, job.mlp = s[0], job.layer = s[1], job.layers = s[2], job.kernel = s[3];
    job.tile_out = s[4], job.tile_in = s[5], job.layout = s[6];
    job.c_out = active[2 * j], job.c_in = active[2 * j + 1];
    TORCH_CHECK_VALUE(job.c_out >= 1 && job.c_in >= 1, "inr_weights: expected active[", j,
                      "] to be at least (1, 1), got (", job.c_out, ", ", job.c_in, ")");
    TORCH_CHECK_VALUE(s[7] >= 0 && s[8] >= 0, "inr_weights: expected tensors[", t,
                      "].positions to be two positive sizes, got (", s[7], ", ", s[8], ")");
    job.places_out = s[7] ? s[7] : job.c_out, job.places_in = s[8] ? s[8] : job.c_in;
    TORCH_CHECK_VALUE(job.mlp >= 0 && job.mlp < p.mlps, "inr_weights: expected tensors[", t, "].mlp between 0 and ",
                      p.mlps - 1, ", got ", job.mlp);
    TORCH_CHECK_VALUE(job.kernel >= 1 && job.tile_out >= 1 && job.tile_in >= 1 &&
                          job.kernel * job.tile_out * job.tile_in <= p.outputs && job.layout >= 0 && job.layout <= 3,
                      "inr_weights: expected tensors[", t, "] to take between 1 and ", p.outputs,
                      " outputs of its network, got ", job.kernel, " x ", job.tile_out, " x ", job.tile_in);
    job.rows = (job.c_out + job.tile_out - 1) / job.tile_out, job.cols = (job.c_in + job.tile_in - 1) / job.tile_in;
    job.points = job.rows * job.cols, job.emitted = job.kernel * job.tile_out * job.tile_in;
    job.first_out = (p.outputs - job.emitted) / 2;
    job.start = start, job.saved_start = saved_start;
    start += job.c_out * job.c_in * job.kernel;
    saved_start += samples * job.points * p.depth * p.hidden;
    job.out_stride = (job.layout == 1 ? 1 : job.c_in) * job.kernel;
    job.in_stride = job.layout == 1 ? job.c_out * job.kernel : job.layout == 2 ? 1 : job.kernel;
    job.kernel_stride = job.layout == 2 ? job.c_in : 1;
    if (scale) job.scale = scales.const_data_ptr<float>()[t];
    p.jobs.push_back(job);
  }
  return p;
}

void add_bases(InrPlan& p, const std::vector<at::Tensor>& base) {
  for (InrJob& job : p.jobs) {
    const at::Tensor& b = base[job.tensor];
    if (b.numel() == 0) continue;
    const int channels = job.layout == 3 ? 1 : 2;
    const int out = job.layout == 1 ? 1 : 0;
    TORCH_CHECK_VALUE(b.dim() >= channels && b.size(out) >= job.c_out &&
                          (channels == 1 || b.size(1 - out) >= job.c_in) &&
                          c10::multiply_integers(b.sizes().slice(channels)) == job.kernel,
                      "inr_weights: expected base[", job.tensor, "] to contain a slice of (", job.c_out, ", ", job.c_in,
                      ") channels and ", job.kernel, " kernel elements, got ", b.sizes());
    job.base = b.const_data_ptr<float>();
    job.base_out = b.stride(out), job.base_in = channels == 1 ? 0 : b.stride(1 - out);
    for (int64_t k = 0; k < job.kernel; ++k) {
      int64_t rest = k, offset = 0;
      for (int64_t d = b.dim() - 1; d >= channels; --d) {
        offset += rest % b.size(d) * b.stride(d);
        rest /= b.size(d);
      }
      job.base_kernel.push_back(offset);
    }
  }
}

// Jobs of one network together, cut into tiles. Returns the number of tiles.
int64_t schedule(InrPlan& p) {
  std::stable_sort(p.jobs.begin(), p.jobs.end(), [](const InrJob& a, const InrJob& b) { return a.mlp < b.mlp; });
  p.mlp_first.assign(p.mlps, -1), p.mlp_last.assign(p.mlps, -1);
  int64_t tiles = 0;
  for (const InrJob& job : p.jobs) {
    p.tile_begin.push_back(tiles);
    if (p.mlp_first[job.mlp] < 0) p.mlp_first[job.mlp] = tiles;
    tiles += (job.points + kInrTile - 1) / kInrTile;
    p.mlp_last[job.mlp] = tiles - 1;
  }
  p.tile_begin.push_back(tiles);
  return tiles;
}

// fn(part, first tile, end) over equal parts, one a thread; the parts depend on the number of threads alone.
template <typename Fn>
void in_parts(int64_t parts, int64_t tiles, const Fn& fn) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(i, tiles * i / parts, tiles * (i + 1) / parts);
  });
}

int64_t count_parts(int64_t tiles) { return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tiles)); }

std::tuple<at::Tensor, at::Tensor> inr_weights_cpu(
    const at::Tensor& w_in, const at::Tensor& b_in, const at::Tensor& w_hidden, const at::Tensor& b_hidden,
    const at::Tensor& skip, const at::Tensor& w_out, const at::Tensor& b_out, const std::optional<at::Tensor>& scale,
    at::TensorList base, const std::optional<at::Tensor>& seed, at::IntArrayRef active, at::IntArrayRef spec,
    c10::string_view activation, c10::string_view order, double norm, c10::string_view noise, double limit,
    int64_t samples, int64_t first_sample, at::ScalarType dtype, bool save) {
  if (w_in.scalar_type() == at::kDouble || dtype == at::kDouble) {
    return call_reference<decltype(inr_weights_cpu)>("slimkernels::inr_weights", w_in, b_in, w_hidden, b_hidden, skip,
                                                     w_out, b_out, scale, base, seed, active, spec, activation, order,
                                                     norm, noise, limit, samples, first_sample, dtype, save);
  }
  const Operands x = operands(w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out);
  InrPlan p = make_plan(x, active, spec, activation, order, norm, noise, limit, samples, first_sample, seed, scale);
  const InrJob& last = p.jobs.back();
  const int64_t size = last.start + last.c_out * last.c_in * last.kernel;
  const int64_t saved_size = last.saved_start + samples * last.points * p.depth * p.hidden;
  std::vector<at::Tensor> bases;
  for (const at::Tensor& b : base) bases.push_back(b.to(at::kFloat));
  TORCH_CHECK_VALUE(base.empty() || base.size() * kSpec == spec.size(), "inr_weights: expected base of ",
                    spec.size() / kSpec, " entries, one a tensor, got ", base.size());
  if (!base.empty()) add_bases(p, bases);
  const int64_t tiles = schedule(p);
  at::Tensor weights = at::empty({size}, x.b_in.options());
  at::Tensor saved = at::empty({save ? saved_size : 0}, x.w_hidden.options());
  in_parts(count_parts(tiles), tiles, [&](int64_t, int64_t begin, int64_t end) {
    float* to = weights.data_ptr<float>();
    if (x.half_products) {
      inr_bfloat16_kernels()->forward(p, to, save ? saved.data_ptr<c10::BFloat16>() : nullptr, begin, end);
    } else {
      SK_CALL_ISA(inr::inr_forward<float>, p, to, save ? saved.data_ptr<float>() : nullptr, begin, end);
    }
  });
  return {weights.to(dtype), saved.to(w_in.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
inr_weights_backward_cpu(const at::Tensor& dy, const at::Tensor& w_in, const at::Tensor& b_in,
                         const at::Tensor& w_hidden, const at::Tensor& b_hidden, const at::Tensor& skip,
                         const at::Tensor& w_out, const at::Tensor& b_out, const std::optional<at::Tensor>& scale,
                         const std::optional<at::Tensor>& seed, const at::Tensor& saved, at::IntArrayRef active,
                         at::IntArrayRef spec, c10::string_view activation, c10::string_view order, double norm,
                         c10::string_view noise, double limit, int64_t samples, int64_t first_sample) {
  if (w_in.scalar_type() == at::kDouble || dy.scalar_type() == at::kDouble) {
    return call_reference<decltype(inr_weights_backward_cpu)>(
        "slimkernels::inr_weights_backward", dy, w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out, scale, seed, saved,
        active, spec, activation, order, norm, noise, limit, samples, first_sample);
  }
  const Operands x = operands(w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out);
  InrPlan p = make_plan(x, active, spec, activation, order, norm, noise, limit, samples, first_sample, seed, scale);
  const InrJob& last = p.jobs.back();
  const int64_t size = last.start + last.c_out * last.c_in * last.kernel;
  const int64_t saved_size = last.saved_start + samples * last.points * p.depth * p.hidden;
  TORCH_CHECK_VALUE(dy.dim() == 1 && dy.size(0) == size, "inr_weights_backward: expected dy of shape (", size,
                    ",), got ", dy.sizes());
  TORCH_CHECK_VALUE(saved.numel() == 0 || saved.numel() == saved_size, "inr_weights_backward: expected saved of ",
                    saved_size, " elements, got ", saved.numel());
  const int64_t tiles = schedule(p);
  const at::Tensor dy_wide = dy.to(at::kFloat).contiguous();
  const at::Tensor kept = saved.to(x.w_hidden.scalar_type()).contiguous();
  const bool complete = std::all_of(p.mlp_first.begin(), p.mlp_first.end(), [](int64_t tile) { return tile >= 0; });
  const auto like = [&](const at::Tensor& t) {
    const auto options = x.w_hidden.options();
    return complete ? at::empty(t.sizes(), options) : at::zeros(t.sizes(), options);
  };
  std::array<at::Tensor, 7> grads = {like(w_in), like(b_in),  like(w_hidden), like(b_hidden),
                                     like(skip), like(w_out), like(b_out)};
  const InrGradientOutputs out{grads[0].data_ptr(), grads[1].data_ptr(), grads[2].data_ptr(), grads[3].data_ptr(),
                               grads[4].data_ptr(), grads[5].data_ptr(), grads[6].data_ptr()};
  const auto flush = [&](const InrGradients& g) {
    x.half_products ? inr_bfloat16_kernels()->flush(p, g, out) : SK_CALL_ISA(inr::flush_gradients<float>, p, g, out);
  };
  const int64_t parts = count_parts(tiles), tensors = spec.size() / kSpec;
  std::vector<std::vector<std::unique_ptr<InrGradients>>> shared(parts);
  std::vector<std::vector<double>> dscale(parts, std::vector<double>(tensors, 0.0));
  const bool reuse = kept.numel() > 0;
  in_parts(parts, tiles, [&](int64_t part, int64_t begin, int64_t end) {
    const float* from = dy_wide.const_data_ptr<float>();
    if (x.half_products) {
      inr_bfloat16_kernels()->backward(p, from, reuse ? kept.const_data_ptr<c10::BFloat16>() : nullptr,
                                       scale.has_value(), begin, end, dscale[part].data(), out, shared[part]);
    } else {
      SK_CALL_ISA(inr::inr_backward<float>, p, from, reuse ? kept.const_data_ptr<float>() : nullptr, scale.has_value(),
                  begin, end, dscale[part].data(), out, shared[part]);
    }
  });
  // Networks that several parts worked on: added in the order of the parts.
  std::unique_ptr<InrGradients> total;
  for (auto& part : shared) {
    for (auto& g : part) {
      if (total && total->mlp == g->mlp) {
        add_gradients(p, *g, *total);
      } else {
        if (total) flush(*total);
        total = std::move(g);
      }
    }
  }
  if (total) flush(*total);
  at::Tensor d_scale = at::empty({scale ? tensors : 0}, x.b_in.options());
  if (scale) {
    for (int64_t t = 0; t < tensors; ++t) {
      double sum = 0.0;
      for (const auto& part : dscale) sum += part[t];
      d_scale.data_ptr<float>()[t] = static_cast<float>(sum);
    }
  }
  const auto back = [&](const at::Tensor& t) { return t.to(w_in.scalar_type()); };
  return {back(grads[0]), back(grads[1]), back(grads[2]), back(grads[3]),
          back(grads[4]), back(grads[5]), back(grads[6]), back(d_scale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("inr_weights", &inr_weights_cpu);
  m.impl("inr_weights_backward", &inr_weights_backward_cpu);
}

}  // namespace slimkernels
