// What slim_lstm and slim_gru share: the description of a layer that the kernels read, and how it is made from tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace slimkernels {

// Active slices of the weights of one direction. Everything but the two strides is as the op's T.
struct RecurrentWeights {
  const void *w_ih, *w_hh;
  const void *b_ih, *b_hh;  // null without biases
  const void* w_hr;         // null without projection
  int64_t ld_ih, ld_hh, ld_hr;  // from one row to the next
};

// One layer. Rows are (step, sequence) pairs; the sequences are sorted by length, so those running at a step are the
// first.
struct RecurrentLayer {
  int64_t batch, directions;
  int64_t in, in_blocks, full_in;  // active and full input features, in in_blocks equal parts
  int64_t hidden, full_hidden;     // h and H
  int64_t state, full_state;       // of y and of the recurrent input: p and P of a projection, else h and H
  int64_t ldx;
  const void* x;                          // (rows, i)
  const void *h0, *c0;                    // (D, batch, p) and (D, batch, h), null for zeros
  std::vector<int64_t> size;              // sequences running at each step
  std::vector<int64_t> start;             // first row of each step, and the number of rows
  std::vector<RecurrentWeights> weights;  // of each direction
  bool packs = false;                     // weights are packed for few rows, too, as they are kept
  at::Tensor* kept = nullptr;             // of each direction: packed weights to read, or to make where undefined

  // How the weights are read: where they lie, or in panels; x and state by one product.
  bool dot_input() const;
  bool dot_state() const;
  bool joins() const;
  int64_t steps() const { return size.size(); }
  bool projects() const { return weights[0].w_hr != nullptr; }
  int64_t rows() const { return start.back(); }
  // The step that the recurrence of direction d visits k-th.
  int64_t visit(int64_t d, int64_t k) const { return d == 0 ? k : steps() - 1 - k; }
};

struct RecurrentOutputs {
  void *y, *h_n, *c_n;  // (rows, D * p), (D, batch, p), (D, batch, h); p = h without projection
  void *gates, *cells;  // (D, rows, 4, h), (D, rows, h); null when not kept
};

struct RecurrentGradients {
  const void *dy, *dh_n, *dc_n;   // null for zeros
  const void *y, *gates, *cells;  // what the forward pass kept
  std::vector<float*> dx;         // (rows, i) of each direction, null when not needed
  void *dh0, *dc0;                // (D, batch, p) and (D, batch, h), null when not needed
  std::vector<std::vector<void*>>
      dw;  // of each direction: w_ih, w_hh, [b_ih, b_hh], [w_hr], zero-filled; empty when not needed
};

// `count` hidden units (or columns) from `begin` on, rounded up to whole vectors in packed memory.
struct Panel {
  int64_t begin, count, padded;
};

// Fewer rows in all: the weights are read where they lie instead of packed.
constexpr int64_t kDotRows = 24;
// Fewer sequences: the recurrent part is bound by reading the weights, which packing does not make less.
constexpr int64_t kDotBatch = 3;

// The input of so many sequences goes beside the state of LSTMs (recurrent_joined-inl.h).
constexpr int64_t kJoinedBatch = 16;

inline bool RecurrentLayer::dot_input() const { return !packs && rows() < kDotRows; }
inline bool RecurrentLayer::dot_state() const { return !packs && (rows() < kDotRows || batch < kDotBatch); }
inline bool RecurrentLayer::joins() const { return batch >= kJoinedBatch && !dot_state(); }

// Panels of at most `most`, as equal as multiples of 16 allow; of `blocks` equal parts, none crosses from one to the next.
std::vector<Panel> panels_of(int64_t size, int64_t blocks = 1, int64_t most = 64);

// Consecutive visits whose rows fill a tile of the matrix kernels.
struct Chunk {
  int64_t first, last;  // visits
  int64_t row, rows;    // rows in memory order
};
std::vector<Chunk> chunks_of(const RecurrentLayer& layer, int64_t direction, int64_t rows);

// The scratch memory of a call, given out in 64-byte aligned pieces: first all are asked for, then the memory is taken
// and each pointer set.
class Arena {
 public:
  template <typename C>
  void ask(C*& piece, int64_t count) {
    TORCH_INTERNAL_ASSERT(count_ < kPieces);
    pieces_[count_++] = {reinterpret_cast<void**>(&piece), bytes_};
    bytes_ += round_up(count * sizeof(C), 64);
  }
  void take() { take(static_cast<char*>(scratch(kScratchB, bytes_))); }
  // The same in memory that outlives the call, if there is any; true when it holds already what belongs there.
  bool take_kept(at::Tensor* kept);

 private:
  void take(char* memory) {
    for (int i = 0; i < count_; ++i) *pieces_[i].first = memory + pieces_[i].second;
  }

  static constexpr int kPieces = 24;
  std::pair<void**, int64_t> pieces_[kPieces];
  int count_ = 0;
  int64_t bytes_ = 0;
};

// Tensors of the layer, checked and kept alive while the kernels read them.
struct RecurrentTensors {
  RecurrentLayer layer;
  std::vector<at::Tensor> kept;
  bool biased = false;
};

// True when the C++ kernels take these inputs: dtype, row-major weights.
bool recurrent_takes(const at::Tensor& x, at::TensorList weights, int64_t directions);

// Checks shapes (they guard memory) and fills in the layer.
RecurrentTensors recurrent_layer(const char* op, int64_t gates, const at::Tensor& x,
                                 const std::optional<at::Tensor>& h0, const std::optional<at::Tensor>& c0,
                                 at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
                                 bool bidirectional, int64_t hidden, int64_t proj, int64_t in_blocks);

// Whether the products of this layer are those of bfloat16 pairs: the CPU has them (bf16_isa.h), and there are enough rows
// that weights are packed at all. Otherwise 16-bit inputs are converted to float.
bool recurrent_multiplies_bf16(const RecurrentLayer& layer, at::ScalarType dtype);

// A dense tensor of shape `shape` to read, or null when there is none.
const void* recurrent_dense(RecurrentTensors& tensors, const char* op, const char* name,
                            const std::optional<at::Tensor>& t, at::IntArrayRef shape, const at::Tensor& x);

// (lead..., the dimensions of x but the last, tail...).
std::vector<int64_t> recurrent_shape(const at::Tensor& x, std::initializer_list<int64_t> lead,
                                     std::initializer_list<int64_t> tail);

// All layers of a network one after the other, nothing kept for backward: y, h_n and, with `cells`, c_n. `run` is the forward
// pass of one layer. h0 and c0 hold the states of all layers.
using RecurrentRun = std::function<void(const RecurrentLayer&, const RecurrentOutputs&)>;
std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrent_inference(
    const char* op, int64_t gates, const at::Tensor& x, const std::optional<at::Tensor>& h0,
    const std::optional<at::Tensor>& c0, at::TensorList weights, const std::optional<at::Tensor>& batch_sizes,
    int64_t num_layers, bool bidirectional, int64_t hidden, int64_t proj, int64_t in_blocks, bool cells,
    const RecurrentRun& run);

// What both backward entries prepare: the dense inputs, the full-size weight gradients, and dx of each direction.
struct RecurrentBackward {
  RecurrentBackward(RecurrentTensors& tensors, const char* op, const at::Tensor& x, at::TensorList weights,
                    const at::Tensor& y, const at::Tensor& gates, const std::optional<at::Tensor>& dy,
                    const std::optional<at::Tensor>& dh_n, bool need_dx, bool need_dw);
  // The gradient of x, once the kernels ran: the sum over directions in the dtype of x, or empty.
  at::Tensor dx() const;

  RecurrentGradients grads{};
  std::vector<at::Tensor> dw;

 private:
  at::TensorOptions options_;
  std::vector<at::Tensor> dx_;  // float32, of each direction
};

// Runs fn(direction), both directions side by side where there are two.
template <typename Fn>
void recurrent_directions(const RecurrentLayer& layer, const Fn& fn) {
  if (layer.batch == 0) return;
  at::parallel_for(0, layer.directions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) fn(d);
    release_matrix_unit();
  });
}

}  // namespace slimkernels
