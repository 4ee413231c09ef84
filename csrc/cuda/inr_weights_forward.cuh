// The forward kernel of inr_weights: all layers of a tile of coordinates in one block, all tensors in one launch.
#pragma once

#include "inr_weights.cuh"

namespace slimkernels {

template <typename T>
__device__ __forceinline__ void finish(float w, const void* base, int64_t source, void* weights, int64_t to) {
  if (base) w += to_float(static_cast<const T*>(base)[source]);
  static_cast<T*>(weights)[to] = from_float<T>(w);
}

template <int kOperand, int kHidden>
__global__ void __launch_bounds__(kInrThreads, 1)
    inr_forward_kernel(const __grid_constant__ SkInr call, void* weights, int dtype) {
  using Shape = InrShape<kOperand, kHidden>;
  using E = typename Shape::E;
  SK_DYN_SMEM(unsigned char, shared);
  const InrTile& tile = InrTile::in_shared(shared, call, blockIdx.x, Shape::kRows, false);
  unsigned char* memory = shared + kInrTileBytes;
  E* left = reinterpret_cast<E*>(memory);
  E* stages = reinterpret_cast<E*>(memory + Shape::kLeftBytes);
  const int outputs = int(call.outputs), depth = int(call.depth), encoded = 1 + 2 * int(call.bands);
  const int64_t stage_bytes = Shape::kStages * Shape::kStageBytes, encoding_bytes = Shape::kRows * encoded * 4;
  float* results = reinterpret_cast<float*>(memory + Shape::kLeftBytes +
                                            (stage_bytes > encoding_bytes ? stage_bytes : encoding_bytes));
  const Place at(Shape::kWarpsN);
  const SkInrJob& job = tile.job;
  for (int i = threadIdx.x; i < Shape::kRows * outputs; i += kInrThreads) results[i] = 0.0f;
  const float share = 1.0f / float(job.c_in * call.samples);
  for (int sample = 0; sample < call.samples; ++sample) {
    float h[2][Shape::kTiles][4];
    first_layer<Shape>(h, call, tile, sample, reinterpret_cast<float*>(stages));
    activate_tile(h, int(call.activation));
    for (int layer = 0; layer < depth; ++layer) {
      const int64_t which = job.mlp * depth + layer;
      put_tile<kOperand, Shape, Shape::kPitch>(left, h);
      const float* bias = call.b_hidden + which * kHidden + at.unit<Shape>(0, 0);
      const float skip = call.skip[which];
      multiply_in_passes<kOperand, Shape>(
          left, stages, kHidden, [&](int pass) { return w_hidden<Shape>(call.w_hidden, which, pass); },
          [&](int tiles, float(&z)[2][Shape::kPassTiles][4]) {
            for_pairs<Shape::kPassTiles>([&](int m, int n, int e) {
              const float2 b = get_pair(bias + behind_first<Shape, kHidden>(0, tiles + n, 0));
              z[m][n][e] += b.x, z[m][n][e + 1] += b.y;
            });
            activate_tile(z, int(call.activation));
            for_pairs<Shape::kPassTiles>([&](int m, int n, int e) {
              h[m][tiles + n][e] += skip * z[m][n][e], h[m][tiles + n][e + 1] += skip * z[m][n][e + 1];
            });
          });
    }
    put_tile<kOperand, Shape, Shape::kPitch>(left, h);
    for (int chunk = 0; chunk < outputs; chunk += Shape::kChunk) {
      float y[2][Shape::kChunkTiles][4];
      const E* matrix = static_cast<const E*>(call.w_out) + (job.mlp * outputs + chunk) * kHidden;
      multiply<kOperand, Shape, Shape::kChunkTiles>(y, left, stages, matrix, kHidden);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < Shape::kChunkTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = chunk + at.column(Shape::kChunkTiles, n, e);
            results[at.row(m, e) * outputs + column] += (y[m][n][e] + call.b_out[job.mlp * outputs + column]) * share;
          }
        }
      }
    }
  }
  __syncthreads();
  const int emitted = inr_emitted(job), from = inr_first_output(call, job);
  const float scale = call.scale ? call.scale[job.tensor] : 1.0f;
  for (int i = threadIdx.x; i < Shape::kRows * emitted; i += kInrThreads) {
    const int row = i / emitted, k = i - row * emitted;
    const int64_t point = tile.first + row;
    if (point >= tile.points) continue;
    const InrTarget target(job, tile.columns, point, k);
    if (!target.inside(job)) continue;
    float w = results[row * outputs + from + k] * scale;
    const int64_t source = target.out * job.base_out + target.in * job.base_in + target.element * job.base_kernel;
    const int64_t to = job.start + target.offset(job);
    if (dtype == kSkFloat) {
      finish<float>(w, job.base, source, weights, to);
    } else if (dtype == kSkBfloat16) {
      finish<__nv_bfloat16>(w, job.base, source, weights, to);
    } else {
      finish<__half>(w, job.base, source, weights, to);
    }
  }
}

template <int kOperand, int kHidden>
int launch_forward(const SkInr& call, void* weights, int dtype, void* stream) {
  using Shape = InrShape<kOperand, kHidden>;
  const auto kernel = inr_forward_kernel<kOperand, kHidden>;
  const int64_t bytes = Shape::shared_bytes(call.outputs, 1 + 2 * call.bands);
  const SkInr copy = call;
  SK_LAUNCH(kernel, dim3(unsigned(call.tiles)), dim3(kInrThreads), bytes, stream, copy, weights, dtype);
  return int(cudaGetLastError());
}

// The tables of the first layer are there.
template <int kOperand>
int forward(const SkInr& call, void* weights, int dtype, void* stream) {
  if (call.hidden == 64) return launch_forward<kOperand, 64>(call, weights, dtype, stream);
  if (call.hidden == 128) return launch_forward<kOperand, 128>(call, weights, dtype, stream);
  if (call.hidden == 256) return launch_forward<kOperand, 256>(call, weights, dtype, stream);
  if (call.hidden == 512) return launch_forward<kOperand, 512>(call, weights, dtype, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace slimkernels
