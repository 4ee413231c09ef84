#include "gemm.h"

#include <c10/core/CPUAllocator.h>

#include <exception>

namespace slimkernels {

bool gemm_takes_bf16() {
  static const bool takes = [] {
    alignas(64) c10::BFloat16 a[32] = {}, b[32] = {};
    alignas(64) float c[256] = {};
    try {
      tile_gemm(1, 16, 2, a, 2, b, 16, c, 16, false);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;  // there is no query: torch refuses the type, or oneDNN has no kernel for this CPU
    }
    return true;
  }();
  return takes;
}

void* scratch(ScratchSlot slot, int64_t bytes) {
  struct Buffer {
    at::DataPtr data;
    int64_t bytes = 0;
  };
  static thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    buffer.data.clear();
    buffer.bytes = round_up(bytes, 64 * 1024);
    buffer.data = c10::GetCPUAllocator()->allocate(buffer.bytes);
  }
  return buffer.data.get();
}

}  // namespace slimkernels
