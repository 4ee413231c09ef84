#include "recurrent_stream.h"

#include <ATen/Functions.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>

#define SK_INL "recurrent_stream-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

// A tensor as it was when it was packed. The weak pointer keeps its address from being used for another tensor.
struct Seen {
  c10::weak_intrusive_ptr<c10::TensorImpl> impl;
  const void* data;
  int64_t version, numel;
  uint64_t sample;

  explicit Seen(const at::Tensor& t)
      : impl(t.getIntrusivePtr()),
        data(t.const_data_ptr()),
        version(t._version()),
        numel(t.numel()),
        sample(sampled(t)) {}
  bool is(const at::Tensor& t) const {
    return impl._unsafe_get_target() == t.unsafeGetTensorImpl() && data == t.const_data_ptr() &&
           version == t._version() && numel == t.numel() && sample == sampled(t);
  }
  // The bits of the first and the last element. A write that the version does not count (through .data) changes them, if it
  // changes all elements.
  static uint64_t sampled(const at::Tensor& t) {
    const float* elements = t.const_data_ptr<float>();
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    uint32_t bits[2];
    std::memcpy(bits, elements, sizeof(float));
    std::memcpy(bits + 1, elements + last, sizeof(float));
    return uint64_t{bits[0]} << 32 | bits[1];
  }
};

struct Entry {
  std::vector<Seen> weights;
  int64_t in, hidden, in_blocks;
  Isa isa;
  at::Tensor packed;

  bool fits(at::TensorList given, int64_t in_, int64_t hidden_, int64_t in_blocks_) const {
    return in == in_ && hidden == hidden_ && in_blocks == in_blocks_ && isa == current_isa() &&
           weights.size() == given.size() &&
           weights[0].impl._unsafe_get_target() == given[0].unsafeGetTensorImpl();
  }
  bool fresh(at::TensorList given) const {
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!weights[i].is(given[i])) return false;
    }
    return true;
  }
  bool gone() const { return weights[0].impl.expired(); }
};

std::mutex mutex;
std::list<Entry>& entries = *new std::list<Entry>;  // last used first; not destroyed, as PyTorch may be gone by then

at::Tensor pack(const at::Tensor& x, at::TensorList weights, int64_t num_layers, int64_t hidden, int64_t in_blocks) {
  const size_t per = weights.size() / num_layers;
  std::vector<RecurrentTensors> layers;
  std::vector<int64_t> sizes;
  int64_t total = 0;
  at::Tensor row = x;
  for (int64_t l = 0; l < num_layers; ++l) {
    layers.push_back(recurrent_layer("slim_gru", 3, row, std::nullopt, std::nullopt, weights.slice(l * per, per),
                                     std::nullopt, false, hidden, 0, l == 0 ? in_blocks : 1));
    sizes.push_back(SK_CALL_ISA(stream_floats, layers.back().layer.in, hidden));
    total += sizes.back();
    row = at::empty({1, 1, hidden}, x.options());
  }
  if (total * int64_t{sizeof(float)} > kStreamBytes) return {};
  const at::Tensor packed = recurrent_empty(at::empty({0}, x.options()), {}, {total});
  float* at = packed.data_ptr<float>();
  for (int64_t l = 0; l < num_layers; ++l) {
    SK_CALL_ISA(stream_pack, layers[l].layer, at);
    at += sizes[l];
  }
  return packed;
}

at::Tensor packed_weights(const at::Tensor& x, at::TensorList weights, int64_t num_layers, int64_t hidden,
                          int64_t in_blocks) {
  const int64_t in = x.size(2);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find_if(entries.begin(), entries.end(),
                                  [&](const Entry& e) { return e.fits(weights, in, hidden, in_blocks); });
  if (found != entries.end()) {
    if (found->fresh(weights)) {
      entries.splice(entries.begin(), entries, found);
      return found->packed;
    }
    entries.erase(found);
  }
  Entry entry{{}, in, hidden, in_blocks, current_isa(), pack(x, weights, num_layers, hidden, in_blocks)};
  const at::Tensor packed = entry.packed;
  if (!packed.defined()) return packed;
  for (const at::Tensor& w : weights) entry.weights.emplace_back(w);
  entries.push_front(std::move(entry));
  int64_t bytes = 0;
  size_t count = 0;
  for (auto e = entries.begin(); e != entries.end();) {
    const bool keep = !e->gone() && bytes + int64_t(e->packed.nbytes()) <= kStreamBytes && count < kStreamEntries;
    bytes += keep ? e->packed.nbytes() : 0, count += keep;
    e = keep ? std::next(e) : entries.erase(e);
  }
  return packed;
}

}  // namespace

bool gru_streams(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
                 int64_t num_layers, bool bidirectional) {
  if (x.dim() != 3 || x.size(0) != 1 || x.size(1) != 1 || x.size(2) == 0 || x.scalar_type() != at::kFloat || bidirectional ||
      (batch_sizes.has_value() && batch_sizes->defined()) || num_layers < 1 || weights.size() % num_layers) {
    return false;
  }
  for (const at::Tensor& w : weights) {
    if (w.scalar_type() != at::kFloat || w.is_inference() || w.numel() == 0 || w.is_view()) return false;
  }
  return true;
}

std::optional<std::tuple<at::Tensor, at::Tensor>> gru_stream(const at::Tensor& x, const std::optional<at::Tensor>& h0,
                                                             at::TensorList weights, int64_t num_layers, int64_t hidden,
                                                             int64_t in_blocks) {
  const at::Tensor packed = packed_weights(x, weights, num_layers, hidden, in_blocks);
  if (!packed.defined()) return std::nullopt;
  RecurrentTensors kept;
  const int64_t shape[] = {num_layers, 1, hidden};
  const float* start = static_cast<const float*>(recurrent_dense(kept, "slim_gru", "h0", h0, shape, x));
  const at::Tensor h_n = at::empty(shape, x.options()), y = at::empty({1, 1, hidden}, x.options());
  const at::Tensor input = x.contiguous();
  const int64_t padded = round_up(hidden, 64);
  float* h = static_cast<float*>(scratch(kScratchB, 3 * padded * sizeof(float)));
  float *out = h + padded, *spare = out + padded;
  std::fill_n(h, 3 * padded, 0.0f);
  const float *w = packed.const_data_ptr<float>(), *given = input.const_data_ptr<float>();
  int64_t in = x.size(2);
  for (int64_t l = 0; l < num_layers; ++l) {
    if (start) std::copy_n(start + l * hidden, hidden, h);
    SK_CALL_ISA(stream_step, w, given, in, h, hidden, out);
    std::copy_n(out, hidden, h_n.data_ptr<float>() + l * hidden);
    w += SK_CALL_ISA(stream_floats, in, hidden);
    given = out, in = hidden;
    std::swap(out, spare);
  }
  std::copy_n(given, hidden, y.data_ptr<float>());
  return std::make_tuple(y, h_n);
}

}  // namespace slimkernels
