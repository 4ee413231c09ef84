#include "recurrent_stream.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "recurrent_cache.h"
#include "recurrent_memory.h"

#define SK_INL "recurrent_stream-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

// The kernels of a cell and dtype of the instruction set in use.
struct StreamKernels {
  int64_t (*bytes)(int64_t in, int64_t hidden, int64_t state, bool projects);
  void (*pack)(const RecurrentLayer& layer, int64_t d, char* dst);
  void (*layer)(const StreamLayer& layer, const char* w);
  void (*read)(const void* src, int64_t count, float* dst);
  void (*write)(const float* src, int64_t count, void* dst);
};

#define SK_STREAM_KERNELS(ISA, CELL)                                                                           \
  StreamKernels {                                                                                              \
    &ISA::stream_bytes<ISA::CELL, T>, &ISA::stream_pack<ISA::CELL, T>, &ISA::stream_layer<ISA::CELL, T>,       \
        &ISA::stream_read<T>, &ISA::stream_write<T>                                                            \
  }
#define SK_STREAM_CELL(ISA) gates == 4 ? SK_STREAM_KERNELS(ISA, StreamLstm) : SK_STREAM_KERNELS(ISA, StreamGru)
template <typename T>
StreamKernels kernels_of(int64_t gates) {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512) return SK_STREAM_CELL(avx512);
  if (current_isa() == Isa::kAvx2) return SK_STREAM_CELL(avx2);
#endif
  return SK_STREAM_CELL(base);
}
#undef SK_STREAM_CELL
#undef SK_STREAM_KERNELS

StreamKernels kernels(at::ScalarType dtype, int64_t gates) {
  switch (dtype) {
    case at::kBFloat16: return kernels_of<c10::BFloat16>(gates);
    case at::kHalf: return kernels_of<c10::Half>(gates);
    default: return kernels_of<float>(gates);
  }
}

PackedPointer packed_weights(const char* op, const StreamKernels& kernels, const PackedKey& key, const at::Tensor& x,
                             at::TensorList weights, int64_t proj) {
  bool seen;
  if (PackedPointer found = find_packed(weights, key, seen)) return found;
  const size_t per = weights.size() / key.layers;
  std::vector<RecurrentTensors> layers;
  at::Tensor row = x;
  int64_t total = 0;
  for (int64_t l = 0; l < key.layers; ++l) {
    const auto of_layer = weights.slice(l * per, per);
    layers.push_back(recurrent_layer(op, key.gates, row, std::nullopt, std::nullopt, of_layer, std::nullopt,
                                     key.directions == 2, key.hidden, proj, l == 0 ? key.in_blocks : key.directions));
    total += key.directions * kernels.bytes(layers.back().layer.in, key.hidden, key.state, proj != 0);
    row = at::empty({1, 1, key.directions * key.state}, x.options());
  }
  at::Tensor packed = recurrent_empty(at::empty({0}, at::kByte), {}, {total});
  char* at = static_cast<char*>(packed.data_ptr());
  for (const RecurrentTensors& tensors : layers) {
    for (int64_t d = 0; d < key.directions; ++d) {
      kernels.pack(tensors.layer, d, at);
      at += kernels.bytes(tensors.layer.in, key.hidden, key.state, tensors.layer.projects());
    }
  }
  const auto made = std::make_shared<const PackedWeights>(PackedWeights{packed});
  keep_packed(weights, key, made);
  return made;
}

}  // namespace

bool recurrent_streams(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
                       int64_t num_layers, bool bidirectional) {
  return x.dim() == 3 && x.size(0) >= 1 && x.size(0) < kDotRows && x.size(1) == 1 && x.size(2) > 0 &&
         !(batch_sizes.has_value() && batch_sizes->defined()) && num_layers >= 1 && weights.size() > 0 &&
         weights.size() % (num_layers * (bidirectional ? 2 : 1)) == 0 && keeps_packed(weights);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrent_stream(const char* op, int64_t gates, const at::Tensor& x,
                                                                const std::optional<at::Tensor>& h0,
                                                                const std::optional<at::Tensor>& c0, at::TensorList weights,
                                                                int64_t num_layers, bool bidirectional, int64_t hidden,
                                                                int64_t proj, int64_t in_blocks) {
  const at::ScalarType dtype = x.scalar_type();
  const StreamKernels run = kernels(dtype, gates);
  const int64_t directions = bidirectional ? 2 : 1, steps = x.size(0), state = proj ? proj : hidden;
  const int64_t layout = 1000 + 2 * static_cast<int64_t>(dtype) + (proj != 0);  // apart from those of recurrent_inference
  const PackedKey key{layout, gates, num_layers, directions, x.size(2), hidden, state, in_blocks, current_isa()};
  const PackedPointer packed = packed_weights(op, run, key, x, weights, proj);
  RecurrentTensors kept;
  const int64_t h_shape[] = {num_layers * directions, 1, state}, c_shape[] = {num_layers * directions, 1, hidden};
  const char* h_start = static_cast<const char*>(recurrent_dense(kept, op, "h0", h0, h_shape, x));
  const char* c_start = static_cast<const char*>(recurrent_dense(kept, op, "c0", c0, c_shape, x));
  const at::Tensor h_n = at::empty(h_shape, x.options()), y = at::empty({steps, 1, directions * state}, x.options());
  const at::Tensor c_n = gates == 4 ? at::empty(c_shape, x.options()) : at::Tensor();
  const at::Tensor input = x.contiguous();

  StreamLayer layer{steps, directions, x.size(2), hidden, state, proj != 0};
  layer.padded = round_up(std::max(hidden, state), 64);
  const int64_t width = steps * std::max(x.size(2), directions * state);
  float* given = static_cast<float*>(scratch(kScratchB, (2 * width + 4 * layer.padded) * sizeof(float)));
  float* next = given + width;
  layer.scratch = next + width;
  run.read(input.const_data_ptr(), input.numel(), given);
  const char* w = static_cast<const char*>(packed->front().const_data_ptr());
  for (int64_t l = 0; l < num_layers; ++l) {
    const int64_t sequences = l * directions * x.element_size();
    layer.x = given, layer.y = next;
    layer.h0 = h_start ? h_start + sequences * state : nullptr;
    layer.c0 = c_start ? c_start + sequences * hidden : nullptr;
    layer.h_n = static_cast<char*>(h_n.data_ptr()) + sequences * state;
    layer.c_n = gates == 4 ? static_cast<char*>(c_n.data_ptr()) + sequences * hidden : nullptr;
    run.layer(layer, w);
    w += directions * run.bytes(layer.in, hidden, state, layer.projects);
    layer.in = directions * state;
    std::swap(given, next);
  }
  run.write(given, steps * directions * state, y.data_ptr());
  return {y, h_n, c_n};
}

}  // namespace slimkernels
