// Memory of deployed networks. Weights are read once a call, and a tile touches a page of activations for every few
// pixels: in small pages much of the time goes to finding them.
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "deploy.h"

namespace slimkernels::deploy {

at::Tensor large_pages(int64_t bytes) {
  const at::Tensor made = at::empty({bytes}, at::kByte);
#if defined(__linux__)
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(made.data_ptr()), first = (begin + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kLarge * kLarge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // it may decline
#endif
  return made;
}

void gather_weights(std::vector<Weights>& weights) {
  constexpr int64_t kLine = 64;
  const auto room = [](const at::Tensor& t) {
    return t.defined() ? (static_cast<int64_t>(t.nbytes()) + kLine - 1) / kLine * kLine : 0;
  };
  int64_t bytes = 0, done = 0;
  for (const Weights& w : weights) bytes += room(w.packed) + room(w.winograd) + room(w.stem);
  if (!bytes) return;
  const at::Tensor all = large_pages(bytes);
  for (Weights& w : weights) {
    for (at::Tensor* t : {&w.packed, &w.winograd, &w.stem}) {
      if (!t->defined()) continue;
      const at::Tensor place =
          all.narrow(0, done, static_cast<int64_t>(t->nbytes())).view(t->scalar_type()).view(t->sizes());
      place.copy_(*t);
      done += room(*t);
      *t = place;
    }
  }
}

}  // namespace slimkernels::deploy
