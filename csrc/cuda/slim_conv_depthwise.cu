// Depthwise convolution and its gradient by x: both are the same gather. Sums are float32, in a fixed order.
//
// Two kernels. Rows: any strides; a thread owns one 16-byte vector of channels (or one channel) and kPixels neighbours
// of an output row: for channels-last, and for whatever the other cannot take. Planes: width innermost; a block copies
// the input of its tile to shared memory in 16-byte steps, whatever the width, and computes from there.
#include <algorithm>

#include "launchers.h"
#include "numeric.cuh"

namespace slimkernels {
namespace {

constexpr int kThreads = 128;
constexpr int kPixels = 4;         // outputs a thread computes
constexpr int kShared = 48 << 10;  // bytes that every launch may use
constexpr int kBlocks = 4;  // on a multiprocessor at least; told more, ptxas spills rather than use its registers

// One spatial dimension: tap k of output i reads element (i * step + offset + k * tap_step) / divisor, where that is
// whole and inside [0, in). A convolution has divisor 1; its gradient has step 1, tap_step -dilation, and the stride as
// divisor.
struct Axis {
  int in, out, kernel, step, offset, tap_step, divisor;
};

// The element that tap `tap` of output `i` reads, or -1.
__device__ __forceinline__ int source(const Axis& a, int i, int tap) {
  int at = i * a.step + a.offset + tap * a.tap_step;
  if (a.divisor != 1) {
    if (at < 0 || at % a.divisor) return -1;
    at /= a.divisor;
  }
  return at >= 0 && at < a.in ? at : -1;
}

// y[b, c, i, j] = act(bias[c] + sum over taps and s < sources of x[b, (c * sources + s) / share, ...] *
// w[c * sources + s, tap] + residual)
struct Gather {
  const void *x, *weight, *bias, *residual;
  void* y;
  int batch, channels, sources, share, activation;
  Axis h, w;
  int64_t x_stride[4], y_stride[4], weight_stride[3];
};

template <typename T>
__device__ __forceinline__ float weight_at(const Gather& g, int channel, int tap) {
  const int row = tap / g.w.kernel, column = tap - row * g.w.kernel;
  return to_float(static_cast<const T*>(
      g.weight)[channel * g.weight_stride[0] + row * g.weight_stride[1] + column * g.weight_stride[2]]);
}

template <typename T, int V>
__device__ __forceinline__ void finish(const Gather& g, int64_t at, int channel, float (&sum)[V]) {
  if (g.bias) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += to_float(static_cast<const T*>(g.bias)[channel + v]);
  }
  if (g.residual) {
    float add[V];
    load<T, V>(static_cast<const T*>(g.residual) + at, add);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += add[v];
  }
  activate_all(sum, g.activation);
  store<T, V>(static_cast<T*>(g.y) + at, sum);
}

template <int V>
__device__ __forceinline__ void move_up(float (&sum)[kPixels][V]) {
#pragma unroll
  for (int p = 0; p + 1 < kPixels; ++p) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[p][v] = sum[p + 1][v];
  }
}

// `lanes` vectors of channels beside one another in a block, which all pixels take `blocks` blocks for; `cached`: their weights lie in shared memory, (tap,
// channel).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_rows_kernel(const __grid_constant__ Gather g, int lanes, int blocks, bool cached) {
  SK_DYN_SMEM(float, weights);
  const int across = int(blockIdx.x) / blocks, width = lanes * V, first = across * width;
  const int taps = g.h.kernel * g.w.kernel;
  if (cached) {
    for (int i = threadIdx.x; i < taps * width; i += kThreads) {
      const int channel = first + i % width;
      weights[i] = channel < g.channels ? weight_at<T>(g, channel, i / width) : 0.0f;
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % lanes, channel = first + lane * V;
  const int strips = (g.w.out + kPixels - 1) / kPixels;
  const int64_t strip = int64_t(int(blockIdx.x) - across * blocks) * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t row = strip / strips;
  const int64_t b = row / g.h.out;
  if (channel >= g.channels || b >= g.batch) return;
  const int i = int(row - b * g.h.out), j0 = int(strip - row * strips) * kPixels;
  float sum[kPixels][V] = {};
  for (int s = 0; s < g.sources; ++s) {
    const int wide = channel * g.sources + s;
    const T* x = static_cast<const T*>(g.x) + b * g.x_stride[0] + (wide / g.share) * g.x_stride[1];
    for (int r = 0; r < g.h.kernel; ++r) {
      const int at_h = source(g.h, i, r);
      if (at_h < 0) continue;
      for (int c = 0; c < g.w.kernel; ++c) {
        float w[V];
        const int tap = r * g.w.kernel + c;
#pragma unroll
        for (int v = 0; v < V; ++v)
          w[v] = cached ? weights[tap * width + lane * V + v] : weight_at<T>(g, wide + v, tap);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const int at_w = source(g.w, j0 + p, c);
          if (at_w < 0) continue;
          float value[V];
          load<T, V>(x + at_h * g.x_stride[2] + at_w * g.x_stride[3], value);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[p][v] += value[v] * w[v];
        }
      }
    }
  }
#pragma unroll 1  // the activations are long: their code once, and the sums move up instead
  for (int p = 0; p < kPixels && j0 + p < g.w.out; ++p) {
    const int64_t at = b * g.y_stride[0] + channel * g.y_stride[1] + i * g.y_stride[2] + (j0 + p) * g.y_stride[3];
    finish<T, V>(g, at, channel, sum[0]);
    move_up(sum);
  }
}

// What a block of the planes kernel works on.
struct Tile {
  int planes, rows, columns;       // of the output: planes are (batch, channel) pairs
  int in_rows, in_columns, pitch;  // of the input in shared memory; pitch in numbers
  int tiles_h, tiles_w;
};

__device__ __forceinline__ int floor_div(int a, int b) { return (a >= 0 ? a : a - b + 1) / b; }

__device__ __forceinline__ int lowest(const Axis& a, int first) {
  const int back = a.tap_step < 0 ? (a.kernel - 1) * a.tap_step : 0;
  return floor_div(first * a.step + a.offset + back, a.divisor);
}

// Where column `column` of a row that begins at `row` lies behind a 16-byte boundary, in numbers.
template <typename T>
__device__ __forceinline__ int phase(const T* row, int column) {
  return int((int64_t(reinterpret_cast<uintptr_t>(row) / sizeof(T)) + column) & (Lanes<T>::value - 1));
}

// Copies columns [low, low + columns) of a row, with zeros outside [0, width). Column low + q lands at to[phase + q].
template <typename T>
__device__ __forceinline__ void stage_row(T* to, const T* row, bool valid, int low, int columns, int width, int lane) {
  constexpr int V = Lanes<T>::value;
  const int shift = phase(row, low);
  for (int at = lane * V; at < shift + columns; at += 32 * V) {
    const int column = low - shift + at;
    if (valid && column >= 0 && column + V <= width) {
      *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(row + column);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool inside = valid && column + v >= 0 && column + v < width;
        to[at + v] = inside ? row[column + v] : from_float<T>(0.0f);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_planes_kernel(const __grid_constant__ Gather g, const __grid_constant__ Tile t) {
  SK_DYN_SMEM(T, input);
  const int taps = g.h.kernel * g.w.kernel, in_plane = t.in_rows * t.pitch;
  float* weights = reinterpret_cast<float*>(input + t.planes * in_plane);
  const int tile_w = int(blockIdx.x % t.tiles_w), tile_h = int(blockIdx.x / t.tiles_w % t.tiles_h);
  const int64_t first_plane = int64_t(blockIdx.x / t.tiles_w / t.tiles_h) * t.planes;
  const int64_t all_planes = int64_t(g.batch) * g.channels;
  const int i0 = tile_h * t.rows, j0 = tile_w * t.columns;
  const int low_h = lowest(g.h, i0), low_w = lowest(g.w, j0);
  const int outputs = t.rows * t.columns, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto input_row = [&](int64_t plane, int s, int at_h) {
    const int64_t b = plane / g.channels;
    const int64_t channel = (plane - b * g.channels) * g.sources + s;
    return static_cast<const T*>(g.x) + b * g.x_stride[0] + channel / g.share * g.x_stride[1] + at_h * g.x_stride[2];
  };
  float sum[kPixels][1] = {};
  for (int s = 0; s < g.sources; ++s) {
    if (s) __syncthreads();
    for (int r = warp; r < t.planes * t.in_rows; r += kThreads / 32) {
      const int p = r / t.in_rows, at_h = low_h + r - p * t.in_rows;
      const bool valid = first_plane + p < all_planes && at_h >= 0 && at_h < g.h.in;
      stage_row(input + r * t.pitch, input_row(valid ? first_plane + p : 0, s, valid ? at_h : 0), valid, low_w,
                t.in_columns, g.w.in, lane);
    }
    for (int q = threadIdx.x; q < t.planes * taps; q += kThreads) {
      const int64_t plane = first_plane + q / taps;
      weights[q] = plane < all_planes ? weight_at<T>(g, int(plane % g.channels) * g.sources + s, q % taps) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      const int q = k * kThreads + threadIdx.x;
      const int p = q / outputs, pixel = q - p * outputs;
      const int i = i0 + pixel / t.columns, j = j0 + pixel % t.columns;
      if (p >= t.planes || first_plane + p >= all_planes || i >= g.h.out || j >= g.w.out) continue;
      for (int r = 0; r < g.h.kernel; ++r) {
        const int at_h = source(g.h, i, r);
        if (at_h < 0) continue;
        const T* row =
            input + p * in_plane + (at_h - low_h) * t.pitch + phase(input_row(first_plane + p, s, at_h), low_w) - low_w;
        for (int c = 0; c < g.w.kernel; ++c) {
          const int at_w = source(g.w, j, c);
          if (at_w >= 0) sum[k][0] += to_float(row[at_w]) * weights[p * taps + r * g.w.kernel + c];
        }
      }
    }
  }
#pragma unroll 1
  for (int k = 0; k < kPixels; ++k, move_up(sum)) {
    const int q = k * kThreads + threadIdx.x;
    const int p = q / outputs, pixel = q - p * outputs;
    const int i = i0 + pixel / t.columns, j = j0 + pixel % t.columns;
    const int64_t plane = first_plane + p, b = plane / g.channels, channel = plane - b * g.channels;
    if (p >= t.planes || plane >= all_planes || i >= g.h.out || j >= g.w.out) continue;
    const int64_t at = b * g.y_stride[0] + channel * g.y_stride[1] + i * g.y_stride[2] + j * g.y_stride[3];
    finish<T, 1>(g, at, int(channel), sum[0]);
  }
}

// Elements of the input that `outputs` neighbours of the output span at most.
int64_t span(const Axis& a, int64_t outputs) {
  const int64_t reach = (outputs - 1) * a.step + int64_t(a.kernel - 1) * std::abs(a.tap_step);
  return std::min<int64_t>(reach / a.divisor + 2, int64_t(a.in) + reach + 2);
}

// A tile of at most kThreads * kPixels outputs whose input fits shared memory, or planes == 0.
template <typename T>
Tile choose_tile(const Gather& g, int64_t& bytes) {
  constexpr int V = Lanes<T>::value;
  const int most = kThreads * kPixels, taps = g.h.kernel * g.w.kernel;
  Tile t{};
  t.columns = std::min(g.w.out, g.h.out == 1 ? most : 64), t.rows = std::min(g.h.out, most / t.columns);
  const bool whole = t.columns == g.w.out && t.rows == g.h.out;
  const int64_t planes = std::min<int64_t>(int64_t(g.batch) * g.channels, whole ? most / (t.rows * t.columns) : 1);
  for (t.planes = int(planes);; t.planes = (t.planes + 1) / 2) {
    const int64_t rows = span(g.h, t.rows), columns = span(g.w, t.columns);
    const int64_t pitch = round_up(columns + V - 1, V);
    bytes = t.planes * (rows * pitch * int64_t(sizeof(T)) + taps * 4);
    if (bytes <= kShared) {
      t.in_rows = int(rows), t.in_columns = int(columns), t.pitch = int(pitch);
      break;
    }
    if (t.planes == 1) return Tile{};
  }
  t.tiles_h = int(ceil_div(g.h.out, t.rows)), t.tiles_w = int(ceil_div(g.w.out, t.columns));
  return t;
}

template <typename T, int V>
int launch_rows(const Gather& g, bool innermost_channels, void* stream) {
  int lanes = 1;  // neighbours in memory side by side: channels, or else pixels
  while (innermost_channels && lanes < 32 && lanes * V < g.channels) lanes *= 2;
  const int64_t taps = int64_t(g.h.kernel) * g.w.kernel;
  int64_t bytes = taps * lanes * V * 4;
  const bool cached = g.sources == 1 && bytes <= kShared;
  if (!cached) bytes = 0;
  const int64_t strips = int64_t(g.batch) * g.h.out * ceil_div(g.w.out, kPixels);
  // In one dimension: the others of a grid end at 65535.
  const int64_t blocks = ceil_div(strips, kThreads / lanes), grid = blocks * ceil_div(g.channels, lanes * V);
  if (grid > INT32_MAX) return int(cudaErrorInvalidValue);
  const auto kernel = depthwise_rows_kernel<T, V>;
  SK_LAUNCH(kernel, dim3(unsigned(grid)), dim3(kThreads), bytes, stream, g, lanes, int(blocks), cached);
  return int(cudaGetLastError());
}

template <typename T>
int launch(const Gather& g, void* stream) {
  constexpr int V = Lanes<T>::value;
  const bool innermost_channels = g.x_stride[1] == 1 && g.y_stride[1] == 1;
  if (innermost_channels && g.channels > 1) {
    const auto fits = [](const int64_t (&stride)[4]) {
      return stride[0] % V == 0 && stride[2] % V == 0 && stride[3] % V == 0;
    };
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const bool vector = g.channels % V == 0 && g.sources == 1 && g.share == 1 && fits(g.x_stride) && fits(g.y_stride) &&
                        aligned(g.x) && aligned(g.y) && aligned(g.residual);
    return vector ? launch_rows<T, V>(g, true, stream) : launch_rows<T, 1>(g, true, stream);
  }
  int64_t bytes = 0;
  const Tile t = choose_tile<T>(g, bytes);
  const int64_t blocks = t.planes ? ceil_div(int64_t(g.batch) * g.channels, t.planes) * t.tiles_h * t.tiles_w : 0;
  if (g.x_stride[3] != 1 || !t.planes || blocks > INT32_MAX) return launch_rows<T, 1>(g, false, stream);
  const auto kernel = depthwise_planes_kernel<T>;
  SK_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), bytes, stream, g, t);
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace slimkernels

static int run(const slimkernels::Gather& g, int dtype, void* stream) {
  using namespace slimkernels;
  if (int64_t(g.batch) * g.channels * g.h.out * g.w.out == 0) return int(cudaSuccess);
  if (dtype == kSkFloat) return launch<float>(g, stream);
  return dtype == kSkBfloat16 ? launch<__nv_bfloat16>(g, stream) : launch<__half>(g, stream);
}

extern "C" int sk_depthwise_forward(const SkDepthwise* s, const void* x, const void* weight, const void* bias,
                                    const void* residual, void* y, int activation, int dtype, void* stream) {
  slimkernels::Gather g{};
  g.x = x, g.weight = weight, g.bias = bias, g.residual = residual, g.y = y, g.activation = activation;
  g.batch = int(s->batch), g.channels = int(s->outputs), g.sources = 1, g.share = int(s->outputs / s->channels);
  const auto axis = [&](int d) {
    return slimkernels::Axis{int(s->in[d]),
                             int(s->out[d]),
                             int(s->kernel[d]),
                             int(s->stride[d]),
                             int(-s->padding[d]),
                             int(s->dilation[d]),
                             1};
  };
  g.h = axis(0), g.w = axis(1);
  std::copy_n(s->x_stride, 4, g.x_stride), std::copy_n(s->y_stride, 4, g.y_stride);
  std::copy_n(s->weight_stride, 3, g.weight_stride);
  return run(g, dtype, stream);
}

extern "C" int sk_depthwise_input_gradient(const SkDepthwise* s, const void* dy, const void* weight, void* dx,
                                           int dtype, void* stream) {
  slimkernels::Gather g{};
  g.x = dy, g.weight = weight, g.y = dx;
  g.batch = int(s->batch), g.channels = int(s->channels), g.sources = int(s->outputs / s->channels), g.share = 1;
  const auto axis = [&](int d) {
    return slimkernels::Axis{int(s->out[d]),     int(s->in[d]),        int(s->kernel[d]), 1,
                             int(s->padding[d]), -int(s->dilation[d]), int(s->stride[d])};
  };
  g.h = axis(0), g.w = axis(1);
  std::copy_n(s->y_stride, 4, g.x_stride), std::copy_n(s->x_stride, 4, g.y_stride);
  std::copy_n(s->weight_stride, 3, g.weight_stride);
  return run(g, dtype, stream);
}
