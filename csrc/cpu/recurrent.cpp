#include "recurrent.h"

#include <ATen/Functions.h>

#include "recurrent_cache.h"
#include "recurrent_memory.h"

namespace slimkernels {

std::vector<Panel> panels_of(int64_t size, int64_t blocks, int64_t most) {
  const int64_t part = size / blocks, units = (part + 15) / 16, count = (units * 16 + most - 1) / most;
  std::vector<Panel> panels;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = units * p / count * 16, end = units * (p + 1) / count * 16;
      panels.push_back({b * part + begin, std::min(end, part) - begin, end - begin});
    }
  }
  return panels;
}

std::vector<Chunk> chunks_of(const RecurrentLayer& layer, int64_t direction, int64_t rows) {
  std::vector<Chunk> chunks;
  for (int64_t k = 0; k < layer.steps(); ++k) {
    const int64_t t = layer.visit(direction, k), n = layer.size[t];
    if (chunks.empty() || chunks.back().rows + n > rows) {
      chunks.push_back({k, k, layer.start[t], n});
    } else {
      Chunk& chunk = chunks.back();
      chunk.last = k;
      chunk.row = std::min(chunk.row, layer.start[t]);
      chunk.rows += n;
    }
  }
  return chunks;
}

bool Arena::take_kept(at::Tensor* kept) {
  if (!kept) {
    take(static_cast<char*>(scratch(kScratchA, bytes_)));
    return false;
  }
  const bool filled = kept->defined();
  if (!filled) *kept = recurrent_empty(at::empty({0}, at::kByte), {}, {bytes_});
  take(static_cast<char*>(kept->data_ptr()));
  return filled;
}

bool recurrent_takes(const at::Tensor& x, at::TensorList weights, int64_t directions) {
  const auto dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  const int64_t per = weights.size() / directions;
  if (weights.size() % directions || per < 2 || per > 5) return false;
  for (const at::Tensor& w : weights) {
    if (w.dim() == 2 && w.stride(1) != 1) return false;
  }
  return true;
}

bool recurrent_multiplies_bf16(const RecurrentLayer& layer, at::ScalarType dtype) {
#if defined(__x86_64__)
  return dtype == at::kBFloat16 && !layer.dot_state() && current_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") && gemm_takes_bf16();
#else
  return false;
#endif
}

const void* recurrent_dense(RecurrentTensors& tensors, const char* op, const char* name,
                            const std::optional<at::Tensor>& t, at::IntArrayRef shape, const at::Tensor& x) {
  if (!t.has_value() || !t->defined()) return nullptr;
  TORCH_CHECK_VALUE(t->sizes() == shape, op, ": expected ", name, " of shape ", shape, ", got ", t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type(), op, ": expected ", name, " of dtype ", x.scalar_type(),
                   " like x, got ", t->scalar_type());
  tensors.kept.push_back(t->contiguous());
  return tensors.kept.back().const_data_ptr();
}

RecurrentTensors recurrent_layer(const char* op, int64_t gates, const at::Tensor& x,
                                 const std::optional<at::Tensor>& h0, const std::optional<at::Tensor>& c0,
                                 at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
                                 bool bidirectional, int64_t hidden, int64_t proj, int64_t in_blocks) {
  RecurrentTensors tensors;
  RecurrentLayer& layer = tensors.layer;
  const bool packed = batch_sizes.has_value() && batch_sizes->defined();
  TORCH_CHECK_VALUE(x.dim() == (packed ? 2 : 3), op, ": expected x to have ", packed ? 2 : 3, " dimensions, got shape ",
                    x.sizes());
  layer.directions = bidirectional ? 2 : 1;
  layer.in = x.size(-1);
  layer.in_blocks = in_blocks;
  layer.hidden = hidden;
  layer.start.push_back(0);
  if (packed) {
    TORCH_CHECK_TYPE(batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(), op,
                     ": expected batch_sizes of dtype torch.int64 on the CPU, got ", batch_sizes->scalar_type());
    const at::Tensor sizes = batch_sizes->contiguous();
    const int64_t* data = sizes.const_data_ptr<int64_t>();
    layer.size.assign(data, data + sizes.numel());
  } else {
    layer.size.assign(x.size(0), x.size(1));
  }
  TORCH_CHECK_VALUE(!layer.size.empty(), op, ": expected x to have at least 1 step, got shape ", x.sizes());
  layer.batch = layer.size[0];
  for (size_t t = 0; t < layer.size.size(); ++t) {
    TORCH_CHECK_VALUE(!packed || (layer.size[t] >= 1 && (t == 0 || layer.size[t] <= layer.size[t - 1])), op,
                      ": expected batch_sizes to be positive and never to grow (no empty sequence), got ",
                      layer.size[t], " at step ", t);
    layer.start.push_back(layer.start.back() + layer.size[t]);
  }
  TORCH_CHECK_VALUE(!packed || layer.rows() == x.size(0), op, ": expected batch_sizes to sum to the ", x.size(0),
                    " rows of x, got ", layer.rows());

  at::Tensor rows = x;
  if (packed ? (x.stride(1) != 1)
             : (x.stride(2) != 1 || (x.size(0) > 1 && x.size(1) > 1 && x.stride(0) != x.size(1) * x.stride(1)))) {
    rows = x.contiguous();
  }
  layer.ldx = packed || x.size(1) == 1 ? rows.stride(0) : rows.stride(1);
  if (layer.ldx < layer.in) {  // one row, or an expanded view
    rows = x.contiguous();
    layer.ldx = layer.in;
  }
  tensors.kept.push_back(rows);
  layer.x = rows.const_data_ptr();

  const int64_t per = weights.size() / layer.directions;
  const bool projected = per % 2 == 1;
  tensors.biased = per >= 4;
  TORCH_CHECK_VALUE(projected == (proj != 0), op, ": expected proj_size ", projected ? "of at least 1" : "0",
                    " for these weights, got ", proj);
  const at::Tensor& states = weights[projected ? per - 1 : 1];  // w_hr (P, H), or w_hh (.., H)
  TORCH_CHECK_VALUE(states.dim() == 2, op, ": expected ", projected ? "w_hr" : "w_hh", " with 2 dimensions, got ",
                    states.sizes());
  layer.full_hidden = states.size(1);
  layer.full_state = projected ? states.size(0) : layer.full_hidden;
  layer.state = projected ? proj : hidden;
  layer.full_in = weights[0].size(-1);
  const int64_t gate_rows = gates * layer.full_hidden;
  TORCH_CHECK_VALUE(hidden >= 1 && hidden <= layer.full_hidden, op, ": expected hidden_size between 1 and ",
                    layer.full_hidden, ", got ", hidden);
  TORCH_CHECK_VALUE(layer.state >= 1 && layer.state <= layer.full_state, op, ": expected proj_size between 1 and ",
                    layer.full_state, ", got ", layer.state);
  TORCH_CHECK_VALUE(layer.in >= 1 && layer.in <= layer.full_in, op, ": expected x.shape[-1] between 1 and ",
                    layer.full_in, ", got ", layer.in);
  TORCH_CHECK_VALUE(in_blocks >= 1 && layer.full_in % in_blocks == 0, op,
                    ": expected in_blocks to divide the full input size ", layer.full_in, ", got ", in_blocks);
  TORCH_CHECK_VALUE(layer.in % in_blocks == 0, op, ": expected x.shape[-1] to be a multiple of in_blocks=", in_blocks,
                    ", got ", layer.in);
  for (int64_t d = 0; d < layer.directions; ++d) {
    RecurrentWeights w{};
    const auto take = [&](int64_t k, const char* name, int64_t rows, int64_t columns, const void*& data, int64_t* ld) {
      const at::Tensor& weight = weights[d * per + k];
      TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": expected weights of dtype ", x.scalar_type(),
                       " like x, got ", weight.scalar_type());
      const bool fits = weight.dim() == (ld ? 2 : 1) && weight.size(0) == rows && (!ld || weight.size(1) == columns);
      TORCH_CHECK_VALUE(fits, op, ": expected ", name, " with ", rows, " rows", ld ? " and its columns" : "", ", got ",
                        weight.sizes());
      tensors.kept.push_back(ld ? weight : weight.contiguous());
      data = tensors.kept.back().const_data_ptr();
      if (ld) *ld = weight.stride(0);
    };
    take(0, "w_ih", gate_rows, layer.full_in, w.w_ih, &w.ld_ih);
    take(1, "w_hh", gate_rows, layer.full_state, w.w_hh, &w.ld_hh);
    if (tensors.biased) {
      take(2, "b_ih", gate_rows, 0, w.b_ih, nullptr);
      take(3, "b_hh", gate_rows, 0, w.b_hh, nullptr);
    }
    if (projected) take(per - 1, "w_hr", layer.full_state, layer.full_hidden, w.w_hr, &w.ld_hr);
    layer.weights.push_back(w);
  }
  const int64_t h_shape[] = {layer.directions, layer.batch, layer.state};
  const int64_t c_shape[] = {layer.directions, layer.batch, hidden};
  layer.h0 = recurrent_dense(tensors, op, "h0", h0, h_shape, x);
  layer.c0 = recurrent_dense(tensors, op, "c0", c0, c_shape, x);
  return tensors;
}

std::vector<int64_t> recurrent_shape(const at::Tensor& x, std::initializer_list<int64_t> lead,
                                     std::initializer_list<int64_t> tail) {
  std::vector<int64_t> shape(lead);
  shape.insert(shape.end(), x.sizes().begin(), x.sizes().end() - 1);
  shape.insert(shape.end(), tail);
  return shape;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrent_inference(
    const char* op, int64_t gates, const at::Tensor& x, const std::optional<at::Tensor>& h0,
    const std::optional<at::Tensor>& c0, at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
    int64_t num_layers, bool bidirectional, int64_t hidden, int64_t proj, int64_t in_blocks, bool cells,
    const RecurrentRun& run) {
  TORCH_CHECK_VALUE(num_layers >= 1 && weights.size() % num_layers == 0, op, ": expected weights of ", num_layers,
                    " layers, got ", weights.size(), " tensors");
  const size_t per_layer = weights.size() / num_layers;
  at::Tensor y = x, h_n, c_n;
  RecurrentTensors states;
  const char *h_start = nullptr, *c_start = nullptr;
  const bool keeps = keeps_packed(weights);
  PackedKey key{};
  PackedPointer kept;
  std::shared_ptr<PackedWeights> made;
  for (int64_t l = 0; l < num_layers; ++l) {
    RecurrentTensors tensors =
        recurrent_layer(op, gates, y, std::nullopt, std::nullopt, weights.slice(l * per_layer, per_layer), batch_sizes,
                        bidirectional, hidden, proj, l == 0 ? in_blocks : (bidirectional ? 2 : 1));
    RecurrentLayer& layer = tensors.layer;
    if (l == 0) {
      const int64_t h_shape[] = {num_layers * layer.directions, layer.batch, layer.state};
      const int64_t c_shape[] = {num_layers * layer.directions, layer.batch, hidden};
      h_start = static_cast<const char*>(recurrent_dense(states, op, "h0", h0, h_shape, x));
      c_start = static_cast<const char*>(recurrent_dense(states, op, "c0", c0, c_shape, x));
      h_n = at::empty(h_shape, x.options());
      if (cells) c_n = at::empty(c_shape, x.options());
    }
    layer.packs = keeps && layer.rows() < kDotRows;
    if (keeps && l == 0) {
      const int64_t layout = 1 + (layer.dot_input() + 2 * layer.dot_state() + 4 * layer.joins()) +
                             8 * recurrent_multiplies_bf16(layer, x.scalar_type());
      key = {layout, gates, num_layers, layer.directions, layer.in, hidden, layer.state, in_blocks, current_isa()};
      bool seen;
      kept = find_packed(weights, key, seen);
      // Many rows pack for themselves at first: weights that change before the next call are not worth keeping.
      if (!kept && (seen || layer.packs)) made = std::make_shared<PackedWeights>(num_layers * layer.directions);
    }
    if (kept) layer.kept = const_cast<at::Tensor*>(kept->data()) + l * layer.directions;
    if (made) layer.kept = made->data() + l * layer.directions;
    const int64_t sequences = l * layer.directions * layer.batch * x.element_size();
    layer.h0 = h_start ? h_start + sequences * layer.state : nullptr;
    layer.c0 = c_start ? c_start + sequences * hidden : nullptr;
    y = recurrent_empty(y, {}, {layer.directions * layer.state});
    run(layer, {y.data_ptr(), static_cast<char*>(h_n.data_ptr()) + sequences * layer.state,
                cells ? static_cast<char*>(c_n.data_ptr()) + sequences * hidden : nullptr, nullptr, nullptr});
  }
  if (made && made->back().defined()) keep_packed(weights, key, std::move(made));
  return {y, h_n, c_n};
}

RecurrentBackward::RecurrentBackward(RecurrentTensors& tensors, const char* op, const at::Tensor& x,
                                     at::TensorList weights, const at::Tensor& y, const at::Tensor& gates,
                                     const std::optional<at::Tensor>& dy, const std::optional<at::Tensor>& dh_n,
                                     bool need_dx, bool need_dw)
    : options_(x.options()) {
  const RecurrentLayer& layer = tensors.layer;
  const int64_t d = layer.directions, h = layer.hidden, state[] = {d, layer.batch, layer.state};
  const auto y_shape = recurrent_shape(x, {}, {d * layer.state});
  grads.y = recurrent_dense(tensors, op, "y", y, y_shape, x);
  grads.gates = recurrent_dense(tensors, op, "gates", gates, recurrent_shape(x, {d}, {4, h}), x);
  grads.dy = recurrent_dense(tensors, op, "dy", dy, y_shape, x);
  grads.dh_n = recurrent_dense(tensors, op, "dh_n", dh_n, state, x);
  grads.dx.assign(d, nullptr);
  if (need_dx) {
    for (int64_t i = 0; i < d; ++i) {
      const bool given = i == 0 && x.scalar_type() == at::kFloat;
      dx_.push_back(given ? recurrent_empty(x, {}, {layer.in}) : recurrent_kept(x, at::kFloat, {}, {layer.in}));
      grads.dx[i] = dx_.back().data_ptr<float>();
    }
  }
  if (need_dw) {
    grads.dw.resize(d);
    const int64_t per = weights.size() / d;
    for (size_t i = 0; i < weights.size(); ++i) {
      dw.push_back(at::zeros(weights[i].sizes(), weights[i].options()));
      grads.dw[i / per].push_back(dw.back().data_ptr());
    }
  }
}

at::Tensor RecurrentBackward::dx() const {
  if (dx_.empty()) return at::empty({0}, options_);
  if (dx_.size() == 2) dx_[0].add_(dx_[1]);
  return dx_[0].to(options_.dtype());
}

}  // namespace slimkernels
