// Matrix products on oneDNN's brgemm, as PyTorch exports it. The packing routines that go with it are in gemm-inl.h.
//
// Measured on one AVX-512 core: 225 to 240 GFLOP/s in float32 and 430 to 470 in bfloat16 for every tile of 16 to 128 rows and
// 16 to 256 columns at any depth from 16 and any leading dimension; 0.05 us a call; 42 us the first time a thread meets a new
// (m, n, k, lda, ldb, ldc). Columns that are no multiple of 16 cost as much as the next multiple.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"

#if !defined(CPUBLAS_BRGEMM_F32F32F32)
#error "this torch has no float32 brgemm; install torch 2.11 or newer, or set SLIMKERNELS_CPP=0"
#endif

namespace slimkernels {

constexpr int64_t kTileRows = 64;
constexpr int64_t kTileCols = 64;
constexpr int64_t kCachedBytes = 512 * 1024;  // what may stay in the second-level cache beside the rest

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// c (m, n) = a (m, k) @ b (k, n), or c += that. All row-major.
inline void tile_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
}

// The same with b in pairs of rows: b[k / 2][n][2]; k even. Only where gemm_takes_bf16().
inline void tile_gemm(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, true);
}

// Gives the matrix unit back at the end of a parallel region (needed with AMX, nothing elsewhere).
inline void release_matrix_unit() { at::native::cpublas::brgemm_release(true); }

// Whether bfloat16 tiles are multiplied natively; otherwise they are converted to float32 when packed.
bool gemm_takes_bf16();

// Memory of the calling thread, 64-byte aligned and kept for its next call; each slot is one buffer.
enum ScratchSlot { kScratchB, kScratchA, kScratchC, kScratchOut, kScratchBias, kScratchSlots };
void* scratch(ScratchSlot slot, int64_t bytes);

// Part of a dimension: where it begins in the full-width tensor and in the packed (active) one.
struct Range {
  int64_t full, packed, size;
};

// Part of the summed dimension of a product: where it begins in either operand.
struct Depth {
  int64_t a, b, size;
};

// The active entries of a dimension of `blocks` equal parts of `full_part` entries each, cut to `active_part`, in pieces of at
// most `step` that never cross a block.
inline std::vector<Range> ranges(int64_t blocks, int64_t full_part, int64_t active_part, int64_t step) {
  std::vector<Range> out;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < active_part; i += step) {
      out.push_back({block * full_part + i, block * active_part + i, std::min(step, active_part - i)});
    }
  }
  return out;
}

// A matrix by its strides.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, col;
  const T* at(int64_t r, int64_t c) const { return data + r * row + c * col; }
  Matrix transposed() const { return {data, col, row}; }
};

}  // namespace slimkernels
