#include "recurrent_cache.h"

#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>

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
  bool of(const at::Tensor& t) const { return impl._unsafe_get_target() == t.unsafeGetTensorImpl(); }
  bool is(const at::Tensor& t) const {
    return of(t) && data == t.const_data_ptr() && version == t._version() && numel == t.numel() && sample == sampled(t);
  }
  // The bits of the first and the last element. A write that the version does not count (through .data) changes them,
  // if it changes all elements.
  static uint64_t sampled(const at::Tensor& t) {
    const char* elements = static_cast<const char*>(t.const_data_ptr());
    const size_t size = t.element_size();
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    uint32_t bits[2] = {};
    std::memcpy(bits, elements, size);
    std::memcpy(bits + 1, elements + last * size, size);
    return uint64_t{bits[0]} << 32 | bits[1];
  }
};

struct Entry {
  std::vector<Seen> weights;
  PackedKey key;
  PackedPointer packed;  // null until a call kept them

  bool of(at::TensorList given) const { return weights.size() == given.size() && weights[0].of(given[0]); }
  bool fresh(at::TensorList given) const {
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!weights[i].is(given[i])) return false;
    }
    return true;
  }
  bool gone() const { return weights[0].impl.expired(); }
  int64_t bytes() const {
    int64_t bytes = 0;
    if (packed) {
      for (const at::Tensor& t : *packed) bytes += t.nbytes();
    }
    return bytes;
  }
};

std::mutex mutex;
std::list<Entry>& entries = *new std::list<Entry>;  // last used first; not destroyed, as PyTorch may be gone by then

std::list<Entry>::iterator find(at::TensorList weights, const PackedKey& key) {
  return std::find_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.key == key && e.of(weights); });
}

void keep_within_bounds() {
  int64_t bytes = 0;
  size_t count = 0;
  for (auto e = entries.begin(); e != entries.end();) {
    const bool keep = !e->gone() && bytes + e->bytes() <= kPackedBytes && count < kPackedEntries;
    bytes += keep ? e->bytes() : 0, count += keep;
    e = keep ? std::next(e) : entries.erase(e);
  }
}

}  // namespace

bool keeps_packed(at::TensorList weights) {
  int64_t bytes = 0;
  for (const at::Tensor& w : weights) {
    if (w.is_inference() || w.numel() == 0 || w.is_view()) return false;
    bytes += w.nbytes();
  }
  return bytes <= kPackedBytes;
}

void forget_packed() {
  std::list<Entry> gone;  // freed after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  gone.swap(entries);
}

PackedPointer find_packed(at::TensorList weights, const PackedKey& key, bool& seen) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = find(weights, key);
  seen = found != entries.end() && found->fresh(weights);
  if (seen) {
    entries.splice(entries.begin(), entries, found);
    return found->packed;
  }
  entries.remove_if([&](const Entry& e) { return e.of(weights) && !e.fresh(weights); });  // other widths, too
  Entry entry{{}, key, nullptr};
  for (const at::Tensor& w : weights) entry.weights.emplace_back(w);
  entries.push_front(std::move(entry));
  keep_within_bounds();
  return nullptr;
}

void keep_packed(at::TensorList weights, const PackedKey& key, PackedPointer packed) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = find(weights, key);
  if (found == entries.end() || !found->fresh(weights)) return;
  found->packed = std::move(packed);
  entries.splice(entries.begin(), entries, found);
  keep_within_bounds();
}

}  // namespace slimkernels
