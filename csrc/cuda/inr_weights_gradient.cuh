// The gradients of the hidden layers and the last one: products of what the backward kernel wrote, grouped over
// networks, layers and segments in one launch. A segment's product is a partial sum; inr_weights_sums.cu adds them.
#pragma once

#include "inr_segments.cuh"
#include "inr_weights_backward.cuh"

namespace slimkernels {

// A block makes a tile of a matrix (outputs of the layer, inputs of the layer); warps have 32 x 32 of it.
template <int kOperand, int kHidden>
struct InrGradientShape {
  using E = typename Operand<kOperand>::E;
  static constexpr int kRows = 64, kColumns = kHidden == 64 ? 64 : 128, kThreads = kColumns * 2;
  static constexpr int kWarpsN = kColumns / 32, kStep = 32, kStages = 3, kPad = 8;
  static constexpr int kLeftPitch = kRows + kPad, kRightPitch = kColumns + kPad;
  static constexpr int kStage = kStep * (kLeftPitch + kRightPitch);  // numbers
  static constexpr int kBytes = kStages * kStage * int(sizeof(E));
};

// kStep rows of `width` numbers of a matrix with rows of `pitch` numbers, to a stage.
template <typename E, int kWidth, int kTo, int kStep, int kThreads>
__device__ __forceinline__ void stage_rows(E* stage, const E* matrix, int64_t pitch) {
  constexpr int kVector = 16 / sizeof(E), kVectors = kWidth / kVector;
  for (int i = threadIdx.x; i < kStep * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector;
    cp_async_16(stage + row * kTo + column, matrix + row * pitch + column, true);
  }
}

// sum += left^T right for the coordinates of one stage, both (coordinates, numbers). `left` and `right` begin with the
// warp's part. Where its numbers lie is what gradient_place says.
template <int kOperand, typename Shape>
__device__ __forceinline__ void multiply_coordinates(float (&sum)[2][4][4], const typename Shape::E* left,
                                                     const typename Shape::E* right) {
  const int lane = threadIdx.x % 32, group = lane / 4;
  if constexpr (sizeof(typename Shape::E) == 2) {
#pragma unroll
    for (int k = 0; k < Shape::kStep; k += 16) {
      const int of_eight = lane / 8, row = lane % 8;
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ldmatrix_x4<true>(a[m], left + (k + of_eight / 2 * 8 + row) * Shape::kLeftPitch + m * 16 + of_eight % 2 * 8);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        ldmatrix_x4<true>(b[n], right + (k + of_eight % 2 * 8 + row) * Shape::kRightPitch + n * 16 + of_eight / 2 * 8);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if constexpr (kOperand == kSkOperandBfloat16) {
            mma_bf16(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          } else {
            mma_f16(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
    }
  } else if constexpr (kOperand == kSkOperandTf32) {
#pragma unroll
    for (int k = 0; k < Shape::kStep; k += 8) {
      const float *of_left = left + (k + lane % 4) * Shape::kLeftPitch + group,
                  *of_right = right + (k + lane % 4) * Shape::kRightPitch + group;
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][i] = __float_as_uint(of_left[i / 2 * 4 * Shape::kLeftPitch + m * 16 + i % 2 * 8]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t b0 = __float_as_uint(of_right[n * 8]),
                       b1 = __float_as_uint(of_right[4 * Shape::kRightPitch + n * 8]);
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_tf32(sum[m][n], a[m], b0, b1);
      }
    }
  } else {
#pragma unroll 4
    for (int k = 0; k < Shape::kStep; ++k) {
      float a[4], b[8];
      load<float, 4>(left + k * Shape::kLeftPitch + group * 4, a);
      load<float, 4>(right + k * Shape::kRightPitch + lane % 4 * 8, reinterpret_cast<float(&)[4]>(b[0]));
      load<float, 4>(right + k * Shape::kRightPitch + lane % 4 * 8 + 4, reinterpret_cast<float(&)[4]>(b[4]));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i] * b[j];
      }
    }
  }
}

// Row and column, in the warp's part, of the pair (m, n, e) of its sums.
template <int kOperand>
__device__ __forceinline__ int2 gradient_place(int m, int n, int e) {
  const int lane = threadIdx.x % 32, group = lane / 4;
  if constexpr (kOperand == kSkOperandFloat) return make_int2(group * 4 + m * 2 + e / 2, lane % 4 * 8 + n * 2);
  return make_int2(m * 16 + group + e / 2 * 8, n * 8 + lane % 4 * 2);
}

template <int kOperand, int kHidden>
__global__ void __launch_bounds__((InrGradientShape<kOperand, kHidden>::kThreads), 2)
    inr_gradient_kernel(const __grid_constant__ SkInr call, const __grid_constant__ SkInrBackward wave) {
  using Shape = InrGradientShape<kOperand, kHidden>;
  using E = typename Shape::E;
  SK_DYN_SMEM(E, stages);
  constexpr int kAcross = kHidden / Shape::kColumns, kDown = kHidden / Shape::kRows;
  const int depth = int(call.depth), outputs = int(call.outputs);
  const int parts = (depth * kDown + outputs / Shape::kRows) * kAcross;
  const int64_t segment = blockIdx.x / parts;
  const int part = blockIdx.x - int(segment) * parts;
  const InrSegment of(wave.runs, wave.run_count, wave.first_segment + segment, kInrSegmentRows / wave.tile_rows);
  const int64_t begin = (of.first - wave.first_tile) * wave.tile_rows, rows = wave.tiles * wave.tile_rows;
  const int steps = int(of.count * wave.tile_rows / Shape::kStep);
  // The matrix: hidden layer `layer`, or the last one.
  const int column0 = part % kAcross * Shape::kColumns, down = part / kAcross, layer = down / kDown;
  const bool last = layer >= depth;
  const int matrix = last ? depth : layer, row0 = (down - matrix * kDown) * Shape::kRows;
  const int64_t pitch = last ? outputs : kHidden;
  const E* left = last ? static_cast<const E*>(wave.results)
                       : static_cast<const E*>(wave.gradients) + matrix * rows * kHidden;
  left += begin * pitch + row0;
  const E* right = static_cast<const E*>(wave.inputs) + (matrix * rows + begin) * kHidden + column0;

  const auto stage = [&](int step) {
    if (step < steps) {
      E* to = stages + step % Shape::kStages * Shape::kStage;
      stage_rows<E, Shape::kRows, Shape::kLeftPitch, Shape::kStep, Shape::kThreads>(
          to, left + step * Shape::kStep * pitch, pitch);
      stage_rows<E, Shape::kColumns, Shape::kRightPitch, Shape::kStep, Shape::kThreads>(
          to + Shape::kStep * Shape::kLeftPitch, right + int64_t(step) * Shape::kStep * kHidden, kHidden);
    }
    cp_commit();
  };
  for (int step = 0; step < Shape::kStages - 1; ++step) stage(step);
  const int warp = threadIdx.x / 32, warp_m = warp / Shape::kWarpsN * 32, warp_n = warp % Shape::kWarpsN * 32;
  constexpr int kGroups = Shape::kThreads / Shape::kRows;  // that share the bias' sum
  const int bias_row = threadIdx.x % Shape::kRows, bias_group = threadIdx.x / Shape::kRows;
  float sum[2][4][4] = {}, bias = 0.0f;
  for (int step = 0; step < steps; ++step) {
    cp_wait<Shape::kStages - 2>();
    __syncthreads();
    stage(step + Shape::kStages - 1);
    const E* here = stages + step % Shape::kStages * Shape::kStage;
    multiply_coordinates<kOperand, Shape>(sum, here + warp_m, here + Shape::kStep * Shape::kLeftPitch + warp_n);
    if (column0 == 0) {
      for (int k = bias_group; k < Shape::kStep; k += kGroups) bias += to_float(here[k * Shape::kLeftPitch + bias_row]);
    }
  }

  float* partial = wave.partial + segment * wave.numbers;
  const int64_t biases = (int64_t(depth) * kHidden + outputs) * kHidden;
  float* matrix_sum = partial + (int64_t(matrix) * kHidden + row0) * kHidden + column0;
  for_pairs<4>([&](int m, int n, int e) {
    const int2 at = gradient_place<kOperand>(m, n, e);
    *reinterpret_cast<float2*>(matrix_sum + int64_t(warp_m + at.x) * kHidden + warp_n + at.y) =
        make_float2(sum[m][n][e], sum[m][n][e + 1]);
  });
  if (column0) return;
  __syncthreads();
  float* room = reinterpret_cast<float*>(stages);
  room[bias_group * Shape::kRows + bias_row] = bias;
  __syncthreads();
  if (bias_group == 0) {
    for (int g = 1; g < kGroups; ++g) bias += room[g * Shape::kRows + bias_row];
    partial[biases + matrix * kHidden + row0 + bias_row] = bias;
  }
  if (row0 || threadIdx.x) return;
  float* skips = partial + biases + depth * kHidden + outputs;
  if (last) {
    for (float* unused = skips + depth; unused < partial + wave.numbers; ++unused) *unused = 0.0f;
  } else {
    float skip = 0.0f;
    for (int64_t tile = of.first - wave.first_tile; tile < of.first - wave.first_tile + of.count; ++tile) {
      skip += wave.dskip[tile * depth + layer];
    }
    skips[layer] = skip;
  }
}

template <int kOperand, int kHidden>
int launch_gradient(const SkInr& call, const SkInrBackward& wave, void* stream) {
  using Shape = InrGradientShape<kOperand, kHidden>;
  const auto kernel = inr_gradient_kernel<kOperand, kHidden>;
  const int64_t parts = (call.depth * kHidden + call.outputs) / Shape::kRows * (kHidden / Shape::kColumns);
  const SkInr c = call;
  const SkInrBackward w = wave;
  SK_LAUNCH(kernel, dim3(unsigned(wave.segments * parts)), dim3(Shape::kThreads), Shape::kBytes, stream, c, w);
  return int(cudaGetLastError());
}

template <int kOperand, int kHidden>
int backward_of_size(const SkInr& call, const SkInrBackward& wave, void* stream) {
  const int code = launch_backward<kOperand, kHidden>(call, wave, stream);
  return code ? code : launch_gradient<kOperand, kHidden>(call, wave, stream);
}

// A wave, but for the sums of its segments and its first layer.
template <int kOperand>
int backward(const SkInr& call, const SkInrBackward& wave, void* stream) {
  if (call.hidden == 64) return backward_of_size<kOperand, 64>(call, wave, stream);
  if (call.hidden == 128) return backward_of_size<kOperand, 128>(call, wave, stream);
  if (call.hidden == 256) return backward_of_size<kOperand, 256>(call, wave, stream);
  if (call.hidden == 512) return backward_of_size<kOperand, 512>(call, wave, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace slimkernels
