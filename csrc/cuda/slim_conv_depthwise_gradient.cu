// The weight gradient of a depthwise convolution, deterministic: a block sums a chunk of the pixels for some channels
// and kTaps<V> taps and writes its partial sums; a second kernel adds the chunks in order.
#include <algorithm>

#include "launchers.h"
#include "numeric.cuh"

namespace slimkernels {
namespace {

constexpr int kThreads = 128;
constexpr int kTargetBlocks = 1024;
template <int V>
constexpr int kTaps = V == 1 ? 9 : 32 / V;  // sums a thread keeps: kTaps * V

struct Axis {
  int in, out, kernel, step, offset, tap_step;
};

struct Gradient {
  const void *x, *dy;
  void* dw;
  float* partial;  // (chunks, channels, taps)
  int batch, channels, share, lanes, chunks, tiles;
  int64_t chunk;  // pixels a chunk
  Axis h, w;
  int64_t x_stride[4], dy_stride[4], weight_stride[3];
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) depthwise_gradient_kernel(const __grid_constant__ Gradient g) {
  SK_DYN_SMEM(float, shared);  // (groups, lanes * V)
  constexpr int kOwn = kTaps<V>;
  // In one dimension, as the others of a grid end at 65535: chunks, tiles of channels, groups of taps.
  const int chunk = int(blockIdx.x) % g.chunks, tile = int(blockIdx.x) / g.chunks % g.tiles;
  const int width = g.lanes * V, lane = threadIdx.x % g.lanes, group = threadIdx.x / g.lanes;
  const int groups = kThreads / g.lanes, channel = tile * width + lane * V;
  const int taps = g.h.kernel * g.w.kernel, first_tap = int(blockIdx.x) / g.chunks / g.tiles * kOwn;
  const int own = taps - first_tap < kOwn ? taps - first_tap : kOwn;
  const int64_t plane = int64_t(g.h.out) * g.w.out, pixels = g.batch * plane;
  const int64_t begin = chunk * g.chunk, end = begin + g.chunk < pixels ? begin + g.chunk : pixels;
  const T* dy = static_cast<const T*>(g.dy) + channel * g.dy_stride[1];
  const T* x = static_cast<const T*>(g.x) + channel / g.share * g.x_stride[1];
  float sum[kOwn][V] = {};
  if (channel < g.channels) {
    for (int64_t pixel = begin + group; pixel < end; pixel += groups) {
      const int64_t b = pixel / plane;
      const int at = int(pixel - b * plane), i = at / g.w.out, j = at - i * g.w.out;
      float grad[V];
      load<T, V>(dy + b * g.dy_stride[0] + i * g.dy_stride[2] + j * g.dy_stride[3], grad);
      int r = first_tap / g.w.kernel, c = first_tap - r * g.w.kernel;
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
        const int at_h = i * g.h.step + g.h.offset + r * g.h.tap_step;
        const int at_w = j * g.w.step + g.w.offset + c * g.w.tap_step;
        if (t < own && at_h >= 0 && at_h < g.h.in && at_w >= 0 && at_w < g.w.in) {
          float value[V];
          load<T, V>(x + b * g.x_stride[0] + at_h * g.x_stride[2] + at_w * g.x_stride[3], value);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[t][v] += grad[v] * value[v];
        }
        if (++c == g.w.kernel) c = 0, ++r;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kOwn; ++t) {
    __syncthreads();
#pragma unroll
    for (int v = 0; v < V; ++v) shared[group * width + lane * V + v] = sum[t][v];
    __syncthreads();
    for (int k = threadIdx.x; k < width; k += kThreads) {
      float total = 0.0f;
      for (int q = 0; q < groups; ++q) total += shared[q * width + k];
      const int64_t row = int64_t(chunk) * g.channels + tile * width + k;
      if (t < own && tile * width + k < g.channels) g.partial[row * taps + first_tap + t] = total;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) depthwise_gradient_sum_kernel(const __grid_constant__ Gradient g) {
  const int taps = g.h.kernel * g.w.kernel;
  const int64_t all = int64_t(g.channels) * taps, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= all) return;
  float total = 0.0f;
  for (int chunk = 0; chunk < g.chunks; ++chunk) total += g.partial[chunk * all + at];
  const int64_t channel = at / taps;
  const int tap = int(at - channel * taps), r = tap / g.w.kernel, c = tap - r * g.w.kernel;
  static_cast<T*>(g.dw)[channel * g.weight_stride[0] + r * g.weight_stride[1] + c * g.weight_stride[2]] =
      from_float<T>(total);
}

struct Shape {
  int64_t blocks;
  int lanes, chunks, tiles;
  int64_t chunk;
};

// Depends on the sizes alone, so the order of the sums does too.
template <int V>
Shape shape(const SkDepthwise& s) {
  int lanes = 1;  // neighbours in memory side by side: channels, or else pixels
  while (s.y_stride[1] == 1 && lanes < 32 && lanes * V < s.outputs) lanes *= 2;
  const int64_t pixels = s.batch * s.out[0] * s.out[1], groups = kThreads / lanes;
  const int64_t tiles = ceil_div(s.outputs, lanes * V), tap_groups = ceil_div(s.kernel[0] * s.kernel[1], kTaps<V>);
  const int64_t most =
      std::max<int64_t>(1, std::min(kTargetBlocks / (tiles * tap_groups), ceil_div(pixels, groups * 8)));
  const int64_t chunk = ceil_div(pixels, most), chunks = ceil_div(pixels, chunk);
  return {chunks * tiles * tap_groups, lanes, int(chunks), int(tiles), chunk};
}

template <typename T, int V>
int launch(const SkDepthwise& s, Gradient g, void* stream) {
  const Shape size = shape<V>(s);
  g.lanes = size.lanes, g.chunks = size.chunks, g.tiles = size.tiles, g.chunk = size.chunk;
  if (size.blocks > INT32_MAX) return int(cudaErrorInvalidValue);
  const auto kernel = depthwise_gradient_kernel<T, V>;
  SK_LAUNCH(kernel, dim3(unsigned(size.blocks)), dim3(kThreads), kThreads * V * 4, stream, g);
  const auto sum = depthwise_gradient_sum_kernel<T>;
  const int64_t weights = s.outputs * s.kernel[0] * s.kernel[1];
  SK_LAUNCH(sum, dim3(unsigned(ceil_div(weights, kThreads))), dim3(kThreads), 0, stream, g);
  return int(cudaGetLastError());
}

template <typename T>
int dispatch(const SkDepthwise& s, const Gradient& g, void* stream) {
  constexpr int V = Lanes<T>::value;
  const auto fits = [](const int64_t (&s)[4]) { return s[1] == 1 && s[0] % V == 0 && s[2] % V == 0 && s[3] % V == 0; };
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector =
      s.outputs % V == 0 && g.share == 1 && fits(g.x_stride) && fits(g.dy_stride) && aligned(g.x) && aligned(g.dy);
  return vector ? launch<T, V>(s, g, stream) : launch<T, 1>(s, g, stream);
}

bool empty(const SkDepthwise& s) { return s.batch * s.outputs * s.out[0] * s.out[1] == 0; }

}  // namespace
}  // namespace slimkernels

extern "C" int64_t sk_depthwise_scratch(const SkDepthwise* s) {
  using namespace slimkernels;
  if (empty(*s)) return 0;
  const int chunks = std::max({shape<1>(*s).chunks, shape<4>(*s).chunks, shape<8>(*s).chunks});
  return chunks * s->outputs * s->kernel[0] * s->kernel[1];
}

extern "C" int sk_depthwise_weight_gradient(const SkDepthwise* s, const void* dy, const void* x, void* dw,
                                            float* scratch, int dtype, void* stream) {
  using namespace slimkernels;
  if (empty(*s)) return int(cudaSuccess);
  Gradient g{};
  g.x = x, g.dy = dy, g.dw = dw, g.partial = scratch;
  g.batch = int(s->batch), g.channels = int(s->outputs), g.share = int(s->outputs / s->channels);
  const auto axis = [&](int d) {
    return Axis{int(s->in[d]),     int(s->out[d]),      int(s->kernel[d]),
                int(s->stride[d]), int(-s->padding[d]), int(s->dilation[d])};
  };
  g.h = axis(0), g.w = axis(1);
  std::copy_n(s->x_stride, 4, g.x_stride), std::copy_n(s->y_stride, 4, g.dy_stride);
  std::copy_n(s->weight_stride, 3, g.weight_stride);
  if (dtype == kSkFloat) return dispatch<float>(*s, g, stream);
  return dtype == kSkBfloat16 ? dispatch<__nv_bfloat16>(*s, g, stream) : dispatch<__half>(*s, g, stream);
}
