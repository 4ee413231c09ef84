#include "recurrent_memory.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <limits>
#include <list>
#include <mutex>

#include "recurrent.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace slimkernels {
namespace {

// What is given back stays for the next call, up to so much in all. Smaller pieces the C heap keeps by itself; and it
// would keep less of everything else, as the largest piece freed tells it how much to keep.
constexpr int64_t kSpareBytes = int64_t{256} << 20;
constexpr int64_t kSpareFrom = int64_t{32} << 20;

// What is kept for backward is tens of megabytes: with pages of 4 KiB the faults of fresh memory take a third of the
// time of the kernels. A hint only; failing changes nothing.
void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), page);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end >= begin + 2 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Piece {
  at::DataPtr data;
  int64_t bytes;

  // PyTorch's profiler counts memory in use: a spare piece is not.
  void report(int64_t change) const { c10::reportMemoryUsageToProfiler(data.get(), change, 0, 0, at::kCPU); }
};

// Large pages make the faults few, but the system still clears all of this memory at each step and may have to get it
// from elsewhere first (a virtual machine's host): between 2 and 15 % of the time of a step. So it is kept from step to
// step.
class Spare {
 public:
  // A piece of at least `bytes`, and not so large that another call will miss it.
  Piece take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = pieces_.end();
      for (auto p = pieces_.begin(); p != pieces_.end(); ++p) {
        if (p->bytes >= bytes && p->bytes <= 2 * bytes && (best == pieces_.end() || p->bytes < best->bytes)) best = p;
      }
      if (best != pieces_.end()) {
        Piece piece = std::move(*best);
        pieces_.erase(best);
        piece.report(piece.bytes);
        return piece;
      }
    }
    Piece piece{c10::GetCPUAllocator()->allocate(bytes), bytes};
    ask_for_large_pages(piece.data.get(), bytes);
    return piece;
  }

  void give(Piece piece) {
    std::list<Piece> gone;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    piece.report(-piece.bytes);
    pieces_.push_front(std::move(piece));
    int64_t bytes = 0;
    for (auto p = pieces_.begin(); p != pieces_.end();) {
      bytes += p->bytes;
      const auto next = std::next(p);
      if (bytes > kSpareBytes) {
        p->report(p->bytes);  // the allocator reports it as freed
        gone.splice(gone.end(), pieces_, p);
      }
      p = next;
    }
  }

  void clear() {
    std::list<Piece> gone;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Piece& piece : pieces_) piece.report(piece.bytes);  // the allocator reports it as freed
    gone.swap(pieces_);
  }

 private:
  std::mutex mutex_;
  std::list<Piece> pieces_;  // given back last first
};

Spare& spare = *new Spare;  // not destroyed: tensors may outlive it

}  // namespace

void release_spare_memory() { spare.clear(); }

at::Tensor recurrent_empty(const at::Tensor& x, std::initializer_list<int64_t> lead,
                           std::initializer_list<int64_t> tail) {
  const at::Tensor fresh = at::empty(recurrent_shape(x, lead, tail), x.options());
  ask_for_large_pages(fresh.data_ptr(), fresh.nbytes());
  return fresh;
}

at::Tensor recurrent_kept(const at::Tensor& x, at::ScalarType dtype, std::initializer_list<int64_t> lead,
                          std::initializer_list<int64_t> tail) {
  const std::vector<int64_t> shape = recurrent_shape(x, lead, tail);
  const at::TensorOptions options = x.options().dtype(dtype);
  int64_t bytes = c10::elementSize(dtype);
  for (const int64_t size : shape) bytes *= size;
  if (bytes < kSpareFrom) return at::empty(shape, options);
  auto* piece = new Piece(spare.take(bytes));
  at::Tensor kept = at::from_blob(
      piece->data.get(), shape,
      [piece](void*) {
        spare.give(std::move(*piece));
        delete piece;
      },
      options);
  // As at::empty does.
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory()) {
    kept.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return kept;
}

}  // namespace slimkernels
