// The backward kernel of inr_weights for a wave of tiles: the hidden layers are computed again, then the gradient runs
// back through them. Nothing but the wave's operands is kept: the second kernel (inr_weights_gradient.cuh) multiplies
// them to gradients of the weights.
#pragma once

#include "inr_weights.cuh"

namespace slimkernels {

// Sum over the block's threads, in a fixed order; `room` holds 8 floats. Ends with a barrier.
__device__ __forceinline__ float block_sum(float x, float* room) {
#pragma unroll
  for (int by = 16; by; by /= 2) x += __shfl_down_sync(0xffffffffu, x, by);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kInrThreads / 32; ++i) total += room[i];
  __syncthreads();
  return total;
}

// For every number of the tile: use(row, column, activation(z), derivative(z), gradient) with z = kept(row, column).
// Nothing stays in registers but the gradient.
template <int kKind, typename Shape, typename Kept, typename Use>
__device__ __forceinline__ void through_kind(const float (&gradient)[2][Shape::kTiles][4], const Kept& kept,
                                             const Use& use) {
  const Place at(Shape::kWarpsN);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = at.row(m, e), column = at.column(Shape::kTiles, n, e);
        const float z = kept(row, column);
        use(row, column, inr_activate<kKind>(z), inr_derivative<kKind>(z), gradient[m][n][e]);
      }
    }
  }
}

template <typename Shape, typename Kept, typename Use>
__device__ __forceinline__ void through_activation(const float (&gradient)[2][Shape::kTiles][4], int activation,
                                                   const Kept& kept, const Use& use) {
  if (activation == kRelu) {
    through_kind<kRelu, Shape>(gradient, kept, use);
  } else if (activation == kElu) {
    through_kind<kElu, Shape>(gradient, kept, use);
  } else if (activation == kGelu) {
    through_kind<kGelu, Shape>(gradient, kept, use);
  } else {
    through_kind<kSilu, Shape>(gradient, kept, use);
  }
}

// Rows of `buffer` (coordinates, hidden) belong to the tile; neighbours of a thread's numbers are written in pairs.
template <typename Shape, typename To, typename Convert>
__device__ __forceinline__ void write_tile(To* buffer, const float (&x)[2][Shape::kTiles][4], int hidden,
                                           const Convert& convert) {
  const Place at(Shape::kWarpsN);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        buffer[int64_t(at.row(m, e)) * hidden + at.column(Shape::kTiles, n, e)] = convert(x[m][n][e]);
    }
  }
}

template <int kOperand, int kHidden>
__global__ void __launch_bounds__(kInrThreads, 1)
    inr_backward_kernel(const __grid_constant__ SkInr call, const __grid_constant__ SkInrBackward wave) {
  using Shape = InrShape<kOperand, kHidden, 32>;  // more rows would spill
  using E = typename Shape::E;
  SK_DYN_SMEM(unsigned char, shared);
  const InrTile& tile = InrTile::in_shared(shared, call, wave.first_tile + blockIdx.x, Shape::kRows, true);
  unsigned char* memory = shared + kInrTileBytes;
  E* left = reinterpret_cast<E*>(memory);
  E* stages = reinterpret_cast<E*>(memory + Shape::kLeftBytes);
  float* room = reinterpret_cast<float*>(stages);
  const Place at(Shape::kWarpsN);
  const SkInrJob& job = tile.job;
  const int depth = int(call.depth), outputs = int(call.outputs), activation = int(call.activation);
  const int64_t rows = wave.tiles * Shape::kRows, mine = int64_t(blockIdx.x) * Shape::kRows;
  E* inputs = static_cast<E*>(wave.inputs) + mine * kHidden;        // layer d: + d * rows * kHidden
  E* gradients = static_cast<E*>(wave.gradients) + mine * kHidden;  // likewise; before, the pre-activation of the layer
  E* results = static_cast<E*>(wave.results) + mine * outputs;
  float* first = wave.first + mine * kHidden;
  const auto rounded = [](float x) { return Operand<kOperand>::from(x); };

  // Forward once more.
  float h[2][Shape::kTiles][4];
  {
    float z[2][Shape::kTiles][4];
    first_layer<Shape>(h, call, tile, tile.sample, room);
    write_tile<Shape>(first, h, kHidden, [](float x) { return x; });
    activate_tile(h, activation);
    for (int layer = 0; layer < depth; ++layer) {
      const int64_t which = job.mlp * depth + layer;
      put_left<kOperand, Shape>(left, h);
      write_tile<Shape>(inputs + layer * rows * kHidden, h, kHidden, rounded);
      multiply<kOperand, Shape, Shape::kTiles>(
          z, left, stages, static_cast<const E*>(call.w_hidden) + which * kHidden * kHidden, kHidden);
      const float* bias = call.b_hidden + which * kHidden;
      const float skip = call.skip[which];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) z[m][n][e] += bias[at.column(Shape::kTiles, n, e)];
        }
      }
      write_tile<Shape>(gradients + layer * rows * kHidden, z, kHidden, rounded);
      activate_tile(z, activation);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) h[m][n][e] += skip * z[m][n][e];
        }
      }
    }
    put_left<kOperand, Shape>(left, h);
    write_tile<Shape>(inputs + depth * rows * kHidden, h, kHidden, rounded);
  }

  // The gradient of the outputs, from the weights' layout; zeros where the tile has no weight.
  const int emitted = inr_emitted(job), from = inr_first_output(call, job);
  const float share = 1.0f / float(job.c_in * call.samples), scale = call.scale ? call.scale[job.tensor] : 1.0f;
  float dscale = 0.0f;
  for (int chunk = 0; chunk < outputs; chunk += Shape::kChunk) {
    float y[2][Shape::kChunkTiles][4];
    multiply<kOperand, Shape, Shape::kChunkTiles>(
        y, left, stages, static_cast<const E*>(call.w_out) + (job.mlp * outputs + chunk) * kHidden, kHidden);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kChunkTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = chunk + at.column(Shape::kChunkTiles, n, e), row = at.row(m, e), k = column - from;
          float dy = 0.0f;
          if (k >= 0 && k < emitted && tile.first + row < tile.points) {
            const InrTarget target(job, tile.columns, tile.first + row, k);
            if (target.inside(job)) dy = wave.dy[job.start + target.offset(job)] * share;
          }
          dscale += dy * (y[m][n][e] + call.b_out[job.mlp * outputs + column]);
          results[int64_t(row) * outputs + column] = rounded(dy * scale);
        }
      }
    }
  }
  const float total = block_sum(dscale, room);
  if (threadIdx.x == 0) wave.dscale[blockIdx.x] = total;

  // Back through the last layer: its left operand is what was just written.
  for (int i = threadIdx.x; i < Shape::kRows * outputs; i += kInrThreads) {
    const int row = i / outputs, column = i - row * outputs;
    if (column < kHidden) left[row * Shape::kPitch + column] = results[i];
  }
  multiply<kOperand, Shape, Shape::kTiles>(h, left, stages,
                                           static_cast<const E*>(wave.w_out) + job.mlp * kHidden * outputs, outputs);
  for (int layer = depth - 1; layer >= 0; --layer) {
    const int64_t which = job.mlp * depth + layer;
    const float skip = call.skip[which];
    E* kept = gradients + layer * rows * kHidden;
    float dskip = 0.0f;
    through_activation<Shape>(
        h, activation, [&](int row, int column) { return to_float(kept[int64_t(row) * kHidden + column]); },
        [&](int row, int column, float r, float derivative, float gradient) {
          dskip += gradient * r;
          const E dz = rounded(gradient * skip * derivative);
          kept[int64_t(row) * kHidden + column] = left[row * Shape::kPitch + column] = dz;
        });
    const float sum = block_sum(dskip, room);
    if (threadIdx.x == 0) wave.dskip[int64_t(blockIdx.x) * depth + layer] = sum;
    float z[2][Shape::kTiles][4];
    multiply<kOperand, Shape, Shape::kTiles>(z, left, stages,
                                             static_cast<const E*>(wave.w_hidden) + which * kHidden * kHidden, kHidden);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) h[m][n][e] += z[m][n][e];
      }
    }
  }
  through_activation<Shape>(
      h, activation, [&](int row, int column) { return first[int64_t(row) * kHidden + column]; },
      [&](int row, int column, float, float derivative, float gradient) {
        first[int64_t(row) * kHidden + column] = gradient * derivative;
      });
}

template <int kOperand, int kHidden>
int launch_backward(const SkInr& call, const SkInrBackward& wave, void* stream) {
  using Shape = InrShape<kOperand, kHidden, 32>;  // more rows would spill
  const auto kernel = inr_backward_kernel<kOperand, kHidden>;
  const int64_t bytes = Shape::shared_bytes(0, 1 + 2 * call.bands);
  const SkInr c = call;
  const SkInrBackward w = wave;
  SK_LAUNCH(kernel, dim3(unsigned(wave.tiles)), dim3(kInrThreads), bytes, stream, c, w);
  return int(cudaGetLastError());
}

template <int kOperand>
int backward(const SkInr& call, const SkInrBackward& wave, void* stream) {
  if (call.hidden == 64) return launch_backward<kOperand, 64>(call, wave, stream);
  if (call.hidden == 128) return launch_backward<kOperand, 128>(call, wave, stream);
  if (call.hidden == 256) return launch_backward<kOperand, 256>(call, wave, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace slimkernels
