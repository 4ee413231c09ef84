// What the forward and the backward kernel of inr_weights share: tiles of coordinates, the operands' storage, the
// product of a tile in shared memory with a matrix that streams through it, and the first layer.
//
// A block of 8 warps owns a tile of coordinates. The residual stream h stays in registers in float32, in the layout of
// the tensor cores' results; its rounded copy lies in shared memory as the left operand of the next layer.
#pragma once

#include "inr_coordinates.cuh"
#include "launchers.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace slimkernels {

constexpr int kInrThreads = 256;

// Storage of the operands: E numbers, kStep of them (64 bytes) a stage along k, rows kPad longer than their numbers so
// that the accesses of a warp fall into different banks.
template <int kOperand>
struct Operand;
template <>
struct Operand<kSkOperandFloat> {
  using E = float;
  static __device__ __forceinline__ E from(float x) { return x; }
};
template <>
struct Operand<kSkOperandTf32> {
  using E = float;
  static __device__ __forceinline__ E from(float x) { return round_to_tf32(x); }
};
template <>
struct Operand<kSkOperandBfloat16> {
  using E = __nv_bfloat16;
  static __device__ __forceinline__ E from(float x) { return from_float<E>(x); }
};
template <>
struct Operand<kSkOperandHalf> {
  using E = __half;
  static __device__ __forceinline__ E from(float x) { return from_float<E>(x); }
};

// A product's columns are computed in kPasses parts, one after another: all their sums beside the activations would take
// more registers than there are.
template <int kOperand, int kHidden>
struct InrShape {
  using E = typename Operand<kOperand>::E;
  static constexpr int kHiddenUnits = kHidden;
  static constexpr int kRows = kHidden <= 256 ? 64 : 32;  // coordinates a tile
  static constexpr int kWarpsM = kRows / 32, kWarpsN = 8 / kWarpsM;
  static constexpr int kStep = 64 / sizeof(E), kPad = 16 / sizeof(E);
  static constexpr int kPitch = kHidden + kPad, kStagePitch = kStep + kPad;
  static constexpr int kTiles = kHidden / kWarpsN / 8;  // 8-column tiles a warp
  static constexpr int kPasses = kHidden <= 128 ? 1 : 2, kPassTiles = kTiles / kPasses, kPassColumns = kHidden / kPasses;
  static constexpr int kChunk = 64;                     // output columns computed together
  static constexpr int kChunkTiles = kChunk / kWarpsN / 8;
  static constexpr int kStageRows = kPassColumns > kChunk ? kPassColumns : kChunk;
  static constexpr int kStages = kStageRows <= 128 ? 3 : 2;
  static constexpr int kStageBytes = kStageRows * kStagePitch * int(sizeof(E));
  static constexpr int kLeftBytes = kRows * kPitch * int(sizeof(E));

  // Bytes of shared memory: left operand, stages (whose room holds encodings, too, or what takes `other` bytes), results.
  static int64_t shared_bytes(int64_t outputs, int64_t encoded, int64_t other = 0) {
    const int64_t stages = kStages * kStageBytes, encodings = kRows * encoded * 4;
    const int64_t room = stages > encodings ? stages : encodings;
    return kInrTileBytes + kLeftBytes + (room > other ? room : other) + kRows * outputs * 4;
  }
};

// The place of a thread's numbers in a tile: tile m (16 rows), tile n (8 columns), number e of 4.
struct Place {
  int warp_m, warp_n, group, pair;
  __device__ __forceinline__ Place(int warps_n) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    warp_m = warp / warps_n, warp_n = warp % warps_n, group = lane / 4, pair = lane % 4 * 2;
  }
  __device__ __forceinline__ int row(int m, int e) const { return warp_m * 32 + m * 16 + group + (e >> 1) * 8; }
  __device__ __forceinline__ int column(int tiles, int n, int e) const {
    return (warp_n * tiles + n) * 8 + pair + (e & 1);
  }
  // Of a hidden unit, where n counts through all passes.
  template <typename Shape>
  __device__ __forceinline__ int unit(int n, int e) const {
    return n / Shape::kPassTiles * Shape::kPassColumns + column(Shape::kPassTiles, n % Shape::kPassTiles, e);
  }
};

// use(m, n, e) for every pair of neighbours (e and e + 1) that a thread has; the places are constants then.
template <int kTiles, typename Use>
__device__ __forceinline__ void for_pairs(const Use& use) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      use(m, n, 0);
      use(m, n, 2);
    }
  }
}

// Where a thread's numbers are in an array (rows, kPitch) of numbers or pairs: pair (m, n, e) lies a constant behind the
// thread's first.
template <typename Shape, int kPitch>
__device__ __forceinline__ int first_pair(const Place& at) {
  return at.row(0, 0) * kPitch + at.unit<Shape>(0, 0);
}
template <typename Shape, int kPitch>
__device__ __forceinline__ constexpr int behind_first(int m, int n, int e) {
  return (m * 16 + (e >> 1) * 8) * kPitch + n / Shape::kPassTiles * Shape::kPassColumns + n % Shape::kPassTiles * 8;
}

// Neighbours as the operands' storage has them.
template <int kOperand>
__device__ __forceinline__ void put_pair(typename Operand<kOperand>::E* to, float x, float y) {
  using E = typename Operand<kOperand>::E;
  struct alignas(2 * sizeof(E)) Pair {
    E x, y;
  };
  *reinterpret_cast<Pair*>(to) = Pair{Operand<kOperand>::from(x), Operand<kOperand>::from(y)};
}
template <typename E>
__device__ __forceinline__ float2 get_pair(const E* from) {
  struct alignas(2 * sizeof(E)) Pair {
    E x, y;
  };
  const Pair pair = *reinterpret_cast<const Pair*>(from);
  return make_float2(to_float(pair.x), to_float(pair.y));
}

// Rows [0, rows) and numbers [k0, k0 + kStep) of a matrix with rows of `pitch` numbers, to a stage.
template <typename Shape>
__device__ __forceinline__ void stage_matrix(typename Shape::E* stage, const typename Shape::E* matrix, int rows,
                                             int pitch, int k0) {
  constexpr int kVector = 16 / sizeof(typename Shape::E);
  for (int i = threadIdx.x; i < rows * 4; i += kInrThreads) {
    const int row = i / 4, column = i % 4 * kVector;
    cp_async_16(stage + row * Shape::kStagePitch + column, matrix + int64_t(row) * pitch + k0 + column, true);
  }
}

// sum[m][n][e] += left (rows, k) * stage (columns, k)^T for the kStep numbers of one stage.
template <int kOperand, typename Shape, int kTiles>
__device__ __forceinline__ void multiply_stage(float (&sum)[2][kTiles][4], const typename Shape::E* left, int k0,
                                               const typename Shape::E* stage, const Place& at) {
  using E = typename Shape::E;
  const int lane = threadIdx.x % 32;
  const E* rows = left + at.warp_m * 32 * Shape::kPitch + k0;
  const E* columns = stage + at.warp_n * kTiles * 8 * Shape::kStagePitch;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < Shape::kStep; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ldmatrix_x4<false>(a[m], rows + (m * 16 + lane % 16) * Shape::kPitch + k + lane / 16 * 8);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const E* b = columns + (n * 8 + at.group) * Shape::kStagePitch + k + at.pair;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(b), b1 = *reinterpret_cast<const uint32_t*>(b + 8);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if constexpr (kOperand == kSkOperandBfloat16) {
            mma_bf16(sum[m][n], a[m], b0, b1);
          } else {
            mma_f16(sum[m][n], a[m], b0, b1);
          }
        }
      }
    }
  } else if constexpr (kOperand == kSkOperandTf32) {
#pragma unroll
    for (int k = 0; k < Shape::kStep; k += 8) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][i] = __float_as_uint(rows[(m * 16 + at.group + i % 2 * 8) * Shape::kPitch + k + lane % 4 + i / 2 * 4]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const E* b = columns + (n * 8 + at.group) * Shape::kStagePitch + k + lane % 4;
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_tf32(sum[m][n], a[m], __float_as_uint(b[0]), __float_as_uint(b[4]));
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < Shape::kStep; k += 4) {
      float a[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load<float, 4>(rows + (i / 2 * 16 + at.group + i % 2 * 8) * Shape::kPitch + k, a[i]);
      }
#pragma unroll
      for (int n = 0; n < kTiles * 2; ++n) {
        float b[4];
        load<float, 4>(columns + (n / 2 * 8 + at.pair + n % 2) * Shape::kStagePitch + k, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i / 2][n / 2][i % 2 * 2 + n % 2] += a[i][j] * b[j];
        }
      }
    }
  }
}

// sum = left (tile, k) * matrix (columns, k)^T. The left operand is complete in shared memory before the call (a
// barrier inside makes it seen), and nobody reads it after.
template <int kOperand, typename Shape, int kTiles>
__device__ __forceinline__ void multiply(float (&sum)[2][kTiles][4], const typename Shape::E* left,
                                         typename Shape::E* stages, const typename Shape::E* matrix, int k_size) {
  const Place at(Shape::kWarpsN);
  constexpr int kRows = kTiles * 8 * Shape::kWarpsN, kStride = Shape::kStageBytes / int(sizeof(typename Shape::E));
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.0f;
    }
  }
  const int steps = k_size / Shape::kStep;
  const auto stage = [&](int step) {
    if (step < steps) {
      stage_matrix<Shape>(stages + step % Shape::kStages * kStride, matrix, kRows, k_size, step * Shape::kStep);
    }
    cp_commit();
  };
  for (int step = 0; step < Shape::kStages - 1; ++step) stage(step);
  for (int step = 0; step < steps; ++step) {
    cp_wait<Shape::kStages - 2>();
    __syncthreads();
    stage(step + Shape::kStages - 1);
    multiply_stage<kOperand, Shape, kTiles>(sum, left, step * Shape::kStep, stages + step % Shape::kStages * kStride,
                                            at);
  }
  __syncthreads();
}

// What a pass multiplies of matrix `which` of (matrices, hidden, hidden).
template <typename Shape>
__device__ __forceinline__ const typename Shape::E* w_hidden(const void* matrices, int64_t which, int pass) {
  constexpr int64_t kHidden = Shape::kHiddenUnits;
  return static_cast<const typename Shape::E*>(matrices) + (which * kHidden + pass * Shape::kPassColumns) * kHidden;
}

// use(first tile, numbers) for every pass of the product of the left operand with matrix(pass).
template <int kOperand, typename Shape, typename Matrix, typename Use>
__device__ __forceinline__ void multiply_in_passes(const typename Shape::E* left, typename Shape::E* stages, int k_size,
                                                   const Matrix& matrix, const Use& use) {
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    float z[2][Shape::kPassTiles][4];
    multiply<kOperand, Shape, Shape::kPassTiles>(z, left, stages, matrix(pass), k_size);
    use(pass * Shape::kPassTiles, z);
  }
}

// A thread's numbers of the tile, rounded, to an array with rows of kPitch operands.
template <int kOperand, typename Shape, int kPitch>
__device__ __forceinline__ void put_tile(typename Shape::E* to, const float (&h)[2][Shape::kTiles][4]) {
  to += first_pair<Shape, kPitch>(Place(Shape::kWarpsN));
  for_pairs<Shape::kTiles>([&](int m, int n, int e) {
    put_pair<kOperand>(to + behind_first<Shape, kPitch>(m, n, e), h[m][n][e], h[m][n][e + 1]);
  });
}

// Pre-activation of the first layer for the tile. `encodings` is room in shared memory for noise "element"; it is free
// before the call and again after it.
template <typename Shape>
__device__ __forceinline__ void first_layer(float (&z)[2][Shape::kTiles][4], const SkInr& call, const InrTile& tile,
                                            int64_t sample, float* encodings) {
  const Place at(Shape::kWarpsN);
  const int hidden = int(call.hidden), encoded = 1 + 2 * int(call.bands);
  if (call.noise != kNoiseElement) {
    const int64_t rows = inr_rows(tile.job);
    const float* table = call.tables + (tile.job.table_begin + sample * (rows + tile.columns)) * hidden;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = i / 2, e = i % 2 * 2;
      int64_t point = tile.first + at.row(m, e);
      if (point >= tile.points) point = tile.points - 1;
      const int64_t row = point / tile.columns, column = point - row * tile.columns;
      const float* of_row = table + row * hidden;
      const float* of_column = table + (rows + column) * hidden;
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
        const int h = at.unit<Shape>(n, 0);
        const float2 x = *reinterpret_cast<const float2*>(of_row + h);
        const float2 y = *reinterpret_cast<const float2*>(of_column + h);
        z[m][n][e] = x.x + y.x, z[m][n][e + 1] = x.y + y.y;
      }
    }
    return;
  }
  const float* bias = call.b_in + tile.job.mlp * hidden;
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) z[0][n][e] = z[1][n][e] = bias[at.unit<Shape>(n, e)];
  }
  for (int axis = 0; axis < kInrAxes; ++axis) {
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::kRows * encoded; i += kInrThreads) {
      int64_t point = tile.first + i / encoded;
      if (point >= tile.points) point = tile.points - 1;
      const int64_t row = point / tile.columns, column = point - row * tile.columns;
      const int64_t position = axis == 1 ? row : axis == 2 ? column : 0;
      encodings[i] = inr_encode(inr_value(call, tile.job, sample, axis, position, point), i % encoded);
    }
    __syncthreads();
    const float* weights = call.w_in + (tile.job.mlp * kInrAxes + axis) * encoded * hidden;
    for (int t = 0; t < encoded; ++t) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = encodings[at.row(i / 2, i % 2 * 2) * encoded + t];
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
        const float2 w =
            *reinterpret_cast<const float2*>(weights + int64_t(t) * hidden + at.unit<Shape>(n, 0));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[i / 2][n][i % 2 * 2] += x[i] * w.x, z[i / 2][n][i % 2 * 2 + 1] += x[i] * w.y;
        }
      }
    }
  }
  __syncthreads();
}

// The activations that the kernels know (others run the reference), short enough to stand in the code for every number
// of a tile. 1 / x is the hardware's, within one unit in the last place.
__device__ __forceinline__ float inr_sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

template <int kKind>
__device__ __forceinline__ float inr_activate(float x) {
  if constexpr (kKind == kRelu) return fmaxf(x, 0.0f);
  if constexpr (kKind == kElu) return x > 0.0f ? x : expf(x) - 1.0f;
  if constexpr (kKind == kGelu) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  return x * inr_sigmoid(x);
}

// The derivative, from the input.
template <int kKind>
__device__ __forceinline__ float inr_derivative(float x) {
  if constexpr (kKind == kRelu) return x > 0.0f ? 1.0f : 0.0f;
  if constexpr (kKind == kElu) return x > 0.0f ? 1.0f : expf(x);
  if constexpr (kKind == kGelu) {
    return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * 0.3989422804014327f * expf(-0.5f * x * x);
  }
  const float s = inr_sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

template <int kKind, int kTiles>
__device__ __forceinline__ void activate_all_of(float (&x)[2][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = inr_activate<kKind>(x[m][n][e]);
    }
  }
}

// Every number of the tile through the activation.
template <int kTiles>
__device__ __forceinline__ void activate_tile(float (&x)[2][kTiles][4], int activation) {
  if (activation == kRelu) {
    activate_all_of<kRelu>(x);
  } else if (activation == kElu) {
    activate_all_of<kElu>(x);
  } else if (activation == kGelu) {
    activate_all_of<kGelu>(x);
  } else {
    activate_all_of<kSilu>(x);
  }
}

}  // namespace slimkernels
