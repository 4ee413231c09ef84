// Packed weights of recurrent layers that calls without gradients keep for the next one, in the layout of the kernel
// that reads them. Training never asks here.
#pragma once

#include <memory>
#include <vector>

#include "recurrent.h"

namespace slimkernels {

// What is kept in all; the entries used least recently go first.
constexpr int64_t kPackedBytes = int64_t{256} << 20;
constexpr size_t kPackedEntries = 256;

// Beside the weights themselves, what the packed ones depend on.
struct PackedKey {
  int64_t layout, gates, layers, directions, in, hidden, state, in_blocks;
  Isa isa;
  bool operator==(const PackedKey&) const = default;
};

using PackedWeights = std::vector<at::Tensor>;
using PackedPointer = std::shared_ptr<const PackedWeights>;

// Whether copies of these weights may be kept. Views and tensors of inference mode are not: they have been made for the
// call.
bool keeps_packed(at::TensorList weights);

// What is kept for these weights as they are now, or null. `seen`: a call with this key asked before, and they are the
// same still.
PackedPointer find_packed(at::TensorList weights, const PackedKey& key, bool& seen);

// Keeps nothing any longer, of any weights.
void forget_packed();

// Keeps what was packed after find_packed, unless the weights changed meanwhile.
void keep_packed(at::TensorList weights, const PackedKey& key, PackedPointer packed);

}  // namespace slimkernels
