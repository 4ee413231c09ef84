// The backward kernel of inr_weights for a wave of tiles: the hidden layers are computed again, then the gradient runs
// back through them. Nothing but the wave's operands is kept: the kernels behind it (inr_weights_gradient.cuh) multiply
// them to gradients of the weights.
#pragma once

#include "inr_weights.cuh"

namespace slimkernels {

constexpr int kOutputPitch = 72;  // of a chunk of outputs, in float, in shared memory

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

// The gradient through one activation whose inputs lie in `kept`: use(m, n, e, activations, gradients at its input).
template <int kKind, typename Shape, typename Kept, typename Use>
__device__ __forceinline__ void through_kind(const float (&gradient)[2][Shape::kTiles][4], const Kept* kept,
                                             const Use& use) {
  for_pairs<Shape::kTiles>([&](int m, int n, int e) {
    const float2 z = get_pair(kept + behind_first<Shape, Shape::kHiddenUnits>(m, n, e));
    use(m, n, e, make_float2(inr_activate<kKind>(z.x), inr_activate<kKind>(z.y)),
        make_float2(gradient[m][n][e] * inr_derivative<kKind>(z.x),
                    gradient[m][n][e + 1] * inr_derivative<kKind>(z.y)));
  });
}

template <typename Shape, typename Kept, typename Use>
__device__ __forceinline__ void through_activation(const float (&gradient)[2][Shape::kTiles][4], int activation,
                                                   const Kept* kept, const Use& use) {
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

// The gradient at the outputs [chunk, chunk + kChunk), from the weights' layout, to `results`; zeros where the tile has
// no weight. `y`, in shared memory, are these outputs without their bias. Returns the thread's part of dscale.
template <int kOperand, typename Shape>
__device__ __forceinline__ float output_gradient(const SkInr& call, const SkInrBackward& wave, const InrTile& tile,
                                                 int chunk, const float* y, typename Shape::E* results) {
  const SkInrJob& job = tile.job;
  const int outputs = int(call.outputs), emitted = inr_emitted(job), from = inr_first_output(call, job);
  const float share = 1.0f / float(job.c_in * call.samples), scale = call.scale ? call.scale[job.tensor] : 1.0f;
  float dscale = 0.0f;
  for (int i = threadIdx.x; i < Shape::kRows * Shape::kChunk; i += kInrThreads) {
    const int row = i / Shape::kChunk, column = i % Shape::kChunk, k = chunk + column - from;
    float dy = 0.0f;
    if (k >= 0 && k < emitted && tile.first + row < tile.points) {
      const InrTarget target(job, tile.columns, tile.first + row, k);
      if (target.inside(job)) dy = wave.dy[job.start + target.offset(job)] * share;
    }
    dscale += dy * (y[row * kOutputPitch + column] + call.b_out[job.mlp * outputs + chunk + column]);
    results[int64_t(row) * outputs + chunk + column] = Operand<kOperand>::from(dy * scale);
  }
  return dscale;
}

template <int kOperand, int kHidden>
__global__ void __launch_bounds__(kInrThreads, 1)
    inr_backward_kernel(const __grid_constant__ SkInr call, const __grid_constant__ SkInrBackward wave) {
  using Shape = InrShape<kOperand, kHidden>;
  using E = typename Shape::E;
  SK_DYN_SMEM(unsigned char, shared);
  const InrTile& tile = InrTile::in_shared(shared, call, wave.first_tile + blockIdx.x, Shape::kRows, true);
  unsigned char* memory = shared + kInrTileBytes;
  E* left = reinterpret_cast<E*>(memory);
  E* stages = reinterpret_cast<E*>(memory + Shape::kLeftBytes);
  float* room = reinterpret_cast<float*>(stages);
  const Place at(Shape::kWarpsN);
  const int64_t mlp = tile.job.mlp;
  const int depth = int(call.depth), outputs = int(call.outputs), activation = int(call.activation);
  const int64_t rows = wave.tiles * Shape::kRows, mine = int64_t(blockIdx.x) * Shape::kRows;
  E* inputs = static_cast<E*>(wave.inputs) + mine * kHidden;  // layer d: + d * rows * kHidden
  // Of this thread's first pair; likewise a layer after another. Before the gradients, the layers' pre-activations.
  E* gradients = static_cast<E*>(wave.gradients) + mine * kHidden + first_pair<Shape, kHidden>(at);
  E* results = static_cast<E*>(wave.results) + mine * outputs;
  float* first = wave.first + mine * kHidden + first_pair<Shape, kHidden>(at);

  // Forward once more.
  float h[2][Shape::kTiles][4];
  first_layer<Shape>(h, call, tile, tile.sample, room);
  for_pairs<Shape::kTiles>([&](int m, int n, int e) {
    *reinterpret_cast<float2*>(first + behind_first<Shape, kHidden>(m, n, e)) =
        make_float2(h[m][n][e], h[m][n][e + 1]);
  });
  activate_tile(h, activation);
  for (int layer = 0; layer < depth; ++layer) {
    const int64_t which = mlp * depth + layer;
    put_tile<kOperand, Shape, Shape::kPitch>(left, h);
    put_tile<kOperand, Shape, kHidden>(inputs + layer * rows * kHidden, h);
    const float skip = call.skip[which];
    const float* bias = call.b_hidden + which * kHidden + at.unit<Shape>(0, 0);
    E* kept = gradients + layer * rows * kHidden;
    multiply_in_passes<kOperand, Shape>(
        left, stages, kHidden, [&](int pass) { return w_hidden<Shape>(call.w_hidden, which, pass); },
        [&](int tiles, float(&z)[2][Shape::kPassTiles][4]) {
          for_pairs<Shape::kPassTiles>([&](int m, int n, int e) {
            const float2 b = get_pair(bias + behind_first<Shape, kHidden>(0, tiles + n, 0));
            z[m][n][e] += b.x, z[m][n][e + 1] += b.y;
            put_pair<kOperand>(kept + behind_first<Shape, kHidden>(m, tiles + n, e), z[m][n][e], z[m][n][e + 1]);
          });
          activate_tile(z, activation);
          for_pairs<Shape::kPassTiles>([&](int m, int n, int e) {
            h[m][tiles + n][e] += skip * z[m][n][e], h[m][tiles + n][e + 1] += skip * z[m][n][e + 1];
          });
        });
  }
  put_tile<kOperand, Shape, Shape::kPitch>(left, h);
  put_tile<kOperand, Shape, kHidden>(inputs + depth * rows * kHidden, h);

  float dscale = 0.0f;
  for (int chunk = 0; chunk < outputs; chunk += Shape::kChunk) {
    float y[2][Shape::kChunkTiles][4];
    multiply<kOperand, Shape, Shape::kChunkTiles>(
        y, left, stages, static_cast<const E*>(call.w_out) + (mlp * outputs + chunk) * kHidden, kHidden);
    for_pairs<Shape::kChunkTiles>([&](int m, int n, int e) {
      *reinterpret_cast<float2*>(room + at.row(m, e) * kOutputPitch + at.column(Shape::kChunkTiles, n, e)) =
          make_float2(y[m][n][e], y[m][n][e + 1]);
    });
    __syncthreads();
    dscale += output_gradient<kOperand, Shape>(call, wave, tile, chunk, room, results);
    __syncthreads();
  }
  const float total = block_sum(dscale, room);
  if (threadIdx.x == 0) wave.dscale[blockIdx.x] = total;

  // Back through the last layer: its left operand is what was just written (a barrier lies in block_sum).
  for (int i = threadIdx.x; i < Shape::kRows * outputs; i += kInrThreads) {
    const int row = i / outputs, column = i - row * outputs;
    left[row * Shape::kPitch + column] = results[i];
  }
  multiply_in_passes<kOperand, Shape>(
      left, stages, outputs,
      [&](int pass) {
        return static_cast<const E*>(wave.w_out) + (mlp * kHidden + pass * Shape::kPassColumns) * outputs;
      },
      [&](int tiles, const float(&z)[2][Shape::kPassTiles][4]) {
        for_pairs<Shape::kPassTiles>([&](int m, int n, int e) {
          h[m][tiles + n][e] = z[m][n][e], h[m][tiles + n][e + 1] = z[m][n][e + 1];
        });
      });
  E* left_pairs = left + first_pair<Shape, Shape::kPitch>(at);
  for (int layer = depth - 1; layer >= 0; --layer) {
    const int64_t which = mlp * depth + layer;
    const float skip = call.skip[which];
    E* kept = gradients + layer * rows * kHidden;
    float dskip = 0.0f;
    through_activation<Shape>(h, activation, kept, [&](int m, int n, int e, float2 r, float2 gradient) {
      dskip += h[m][n][e] * r.x;
      dskip += h[m][n][e + 1] * r.y;
      const float x = gradient.x * skip, y = gradient.y * skip;
      put_pair<kOperand>(kept + behind_first<Shape, kHidden>(m, n, e), x, y);
      put_pair<kOperand>(left_pairs + behind_first<Shape, Shape::kPitch>(m, n, e), x, y);
    });
    const float sum = block_sum(dskip, room);
    if (threadIdx.x == 0) wave.dskip[int64_t(blockIdx.x) * depth + layer] = sum;
    multiply_in_passes<kOperand, Shape>(
        left, stages, kHidden, [&](int pass) { return w_hidden<Shape>(wave.w_hidden, which, pass); },
        [&](int tiles, const float(&z)[2][Shape::kPassTiles][4]) {
          for_pairs<Shape::kPassTiles>([&](int m, int n, int e) {
            h[m][tiles + n][e] += z[m][n][e], h[m][tiles + n][e + 1] += z[m][n][e + 1];
          });
        });
  }
  through_activation<Shape>(h, activation, first, [&](int m, int n, int e, float2, float2 gradient) {
    *reinterpret_cast<float2*>(first + behind_first<Shape, kHidden>(m, n, e)) = gradient;
  });
}

template <int kOperand, int kHidden>
int launch_backward(const SkInr& call, const SkInrBackward& wave, void* stream) {
  using Shape = InrShape<kOperand, kHidden>;
  const auto kernel = inr_backward_kernel<kOperand, kHidden>;
  const int64_t bytes = Shape::shared_bytes(0, 1 + 2 * call.bands, Shape::kRows * kOutputPitch * 4);
  const SkInr c = call;
  const SkInrBackward w = wave;
  SK_LAUNCH(kernel, dim3(unsigned(wave.tiles)), dim3(kInrThreads), bytes, stream, c, w);
  return int(cudaGetLastError());
}

}  // namespace slimkernels
