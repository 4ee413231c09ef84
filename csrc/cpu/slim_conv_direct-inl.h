// Direct convolution with the output channels in the vector: a tile of pixels x channel vectors stays in registers while
// the taps run by, each input value broadcast from memory. Sums are float32 for every dtype.

#include "slim_conv_tile-inl.h"

constexpr int64_t kBandFloats = 48 * 1024;  // packed input of a band: a fifth of a 1 MiB L2

template <typename T>
inline void copy_as_float(const T* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  for (; i < size; ++i) to[i] = static_cast<float>(from[i]);
}

// Rows [first, first + rows) of the padded input of one image, `channels` values a pixel at every `padded_channels`.
template <typename T>
void pack_rows(const T* image, int64_t h, int64_t w, int64_t channels, int64_t stride_h, int64_t stride_w,
               int64_t first, int64_t rows, int64_t pad_left, int64_t packed_w, int64_t padded_channels, float* out) {
  for (int64_t r = 0; r < rows; ++r, out += packed_w * padded_channels) {
    const int64_t y = first + r;
    if (y < 0 || y >= h) {
      std::memset(out, 0, packed_w * padded_channels * sizeof(float));
      continue;
    }
    const int64_t begin = std::min(packed_w, std::max<int64_t>(pad_left, 0));
    const int64_t end = std::max(begin, std::min(packed_w, w + pad_left));
    std::memset(out, 0, begin * padded_channels * sizeof(float));
    std::memset(out + end * padded_channels, 0, (packed_w - end) * padded_channels * sizeof(float));
    const T* from = image + y * stride_h + (begin - pad_left) * stride_w;
    if (padded_channels == channels && stride_w == channels) {
      copy_as_float(from, out + begin * channels, (end - begin) * channels);
      continue;
    }
    for (int64_t c = begin; c < end; ++c, from += stride_w) {
      float* pixel = out + c * padded_channels;
      copy_as_float(from, pixel, channels);
      for (int64_t i = channels; i < padded_channels; ++i) pixel[i] = 0;
    }
  }
}

// Weights as the tiles read them: for each phase and block of V * kLanes outputs, (values of the runs, V * kLanes).
template <typename T>
void pack_weights(const TapConv& conv, const WeightView& view, const T* weight, float* out) {
  const int64_t lanes = conv.out_channels <= kLanes ? kLanes : 2 * kLanes;
  const int64_t step_in = view.flipped ? view.stride_o : view.stride_i;
  const int64_t step_out = view.flipped ? view.stride_i : view.stride_o;
  for (const Phase& phase : conv.phases) {
    float* to = out + phase.weights;
    for (int64_t first = 0; first < conv.out_channels; first += lanes) {
      const int64_t filled = std::min(lanes, conv.out_channels - first);
      for (const int64_t tap : phase.taps) {
        const T* from = weight + (tap / view.kernel_w) * view.stride_y + (tap % view.kernel_w) * view.stride_x +
                        first * step_out;
        for (int64_t i = 0; i < conv.in_channels; ++i, to += lanes, from += step_in) {
          for (int64_t o = 0; o < filled; ++o) to[o] = static_cast<float>(from[o * step_out]);
          for (int64_t o = filled; o < lanes; ++o) to[o] = 0;
        }
      }
    }
  }
}

// Bias, residual and activation on a tile, then the one rounding, at the store.
template <typename T>
void store_tile(const float* tile, int64_t pixels, int64_t lanes, int64_t filled, const float* bias, const T* residual,
                T* y, int64_t pixel_stride, Activation activation) {
  SK_SWITCH_ACTIVATION(activation, [&] {
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < filled; c += kLanes) {
        const int64_t at = p * pixel_stride + c;
        const int n = std::min<int64_t>(kLanes, filled - c);
        vf value = load(tile + p * lanes + c);
        if (bias) value += load(bias + c);
        if (residual) value += n == kLanes ? load(residual + at) : load_first(residual + at, n);
        value = activate<act>(value);
        if (n == kLanes) {
          store(y + at, value);
        } else {
          store_first(y + at, value, n);
        }
      }
    }
  });
}

// y = act(conv + bias + residual); residual has y's strides; bias is padded to whole vectors.
template <typename T>
void tap_conv_kernel(const TapConv& conv, const T* x, const WeightView& view, const T* weight, const float* bias,
                     const T* residual, T* y) {
  std::vector<float> weights(conv.packed_weights);
  pack_weights(conv, view, weight, weights.data());
  const int64_t lanes = conv.out_channels <= kLanes ? kLanes : 2 * kLanes;
  const int64_t channels = conv.in_channels;
  const int64_t row = conv.packed_w * channels;
  const int64_t fitting = (kBandFloats / row - conv.reach_h) / conv.in_step_h + 1;
  const int64_t band = even_tile(conv.max_count_y, std::max<int64_t>(1, std::min(fitting, conv.max_count_y)));
  const int64_t bands = (conv.max_count_y + band - 1) / band;
  at::parallel_for(0, conv.images * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(((band - 1) * conv.in_step_h + conv.reach_h) * row);
    float tile[kMaxTile * 2 * kLanes];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / bands, first = task % bands * band;
      const int64_t last = std::min(first + band, conv.max_count_y);
      pack_rows(x + image * conv.in_stride_n, conv.in_h, conv.in_w, channels, conv.in_stride_h, conv.in_stride_w,
                first * conv.in_step_h - conv.pad_top, (last - 1 - first) * conv.in_step_h + conv.reach_h,
                conv.pad_left, conv.packed_w, channels, packed.data());
      for (const Phase& phase : conv.phases) {
        const float* w = weights.data() + phase.weights;
        const int64_t values = static_cast<int64_t>(phase.taps.size()) * channels;
        for (int64_t c = 0; c < conv.out_channels; c += lanes, w += values * lanes) {
          // The last block may need only the first of its two vectors; its packed weights still have both.
          const int64_t limit = lanes == kLanes ? tile_limit<1>() : tile_limit<2>();
          const int64_t width = even_tile(phase.count_x, limit);
          for (int64_t i = first; i < std::min(last, phase.count_y); ++i) {
            const float* in_row = packed.data() + (i - first) * conv.in_step_h * row;
            const int64_t out_row = image * conv.out_stride_n + (phase.first_y + i * phase.step_y) * conv.out_stride_h;
            for (int64_t j = 0; j < phase.count_x; j += width) {
              const int64_t pixels = std::min(width, phase.count_x - j);
              const ConvTile run = lanes == kLanes ? pick_conv_tile<1>(pixels) : pick_conv_tile<2>(pixels);
              run(in_row + j * conv.in_step_w * channels, conv.in_step_w * channels, phase.runs.data(),
                  phase.runs.size(), w, tile);
              const int64_t at = out_row + (phase.first_x + j * phase.step_x) * conv.out_stride_w + c;
              store_tile(tile, pixels, lanes, std::min(lanes, conv.out_channels - c), bias ? bias + c : nullptr,
                         residual ? residual + at : nullptr, y + at, phase.step_x * conv.out_stride_w,
                         conv.activation);
            }
          }
        }
      }
    }
  });
}

// dw (kernel_h, kernel_w, in_channels, padded outputs) and db (padded outputs), float32, both zero on entry.
template <typename T>
void weight_gradient_kernel(const WeightGradient& g, const T* x, const T* dy, bool need_dw, float* dw, float* db) {
  const int64_t channels = g.in_channels;
  const int64_t padded = (g.out_channels + kLanes - 1) / kLanes * kLanes;
  const int64_t size = g.kernel_h * g.kernel_w * channels * padded;
  const int64_t row = g.packed_w * channels, dy_row = g.out_w * padded;
  const int64_t reach = (g.kernel_h - 1) * g.dilation_h + 1;
  // x and dy of a band in half a 48 KiB L1, so that every tile after the first finds them there.
  const int64_t band = std::max<int64_t>(1, std::min(g.out_h, 6 * 1024 / (row * g.stride_h + dy_row)));
  // Values that lie side by side in the packed input: a whole kernel row without dilation, else one tap.
  const int64_t runs = g.dilation_w == 1 ? 1 : g.kernel_w, run = g.kernel_w / runs * channels;
  const int64_t one = even_tile(run, kTileAccumulators), two = even_tile(run, kTileAccumulators / 2);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(1, g.images));
  std::vector<float> sums(threads * (size + padded));
  at::parallel_for(0, threads, 1, [&](int64_t thread_begin, int64_t thread_end) {
    std::vector<float> packed(((band - 1) * g.stride_h + reach) * row), grads(band * dy_row);
    for (int64_t thread = thread_begin; thread < thread_end; ++thread) {
      float* my_dw = sums.data() + thread * (size + padded);
      float* my_db = my_dw + size;
      for (int64_t image = g.images * thread / threads; image < g.images * (thread + 1) / threads; ++image) {
        for (int64_t first = 0; first < g.out_h; first += band) {
          const int64_t rows = std::min(band, g.out_h - first);
          pack_rows(dy + image * g.dy_stride_n, g.out_h, g.out_w, g.out_channels, g.dy_stride_h, g.dy_stride_w, first,
                    rows, 0, g.out_w, padded, grads.data());
          for (int64_t c = 0; c < padded; c += kLanes) {
            vf total = {};
            for (int64_t p = 0; p < rows * g.out_w; ++p) total += load(grads.data() + p * padded + c);
            store(my_db + c, load(my_db + c) + total);
          }
          if (!need_dw) continue;
          pack_rows(x + image * g.in_stride_n, g.in_h, g.in_w, channels, g.in_stride_h, g.in_stride_w,
                    first * g.stride_h - g.pad_top, (rows - 1) * g.stride_h + reach, g.pad_left, g.packed_w, channels,
                    packed.data());
          for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
            for (int64_t kx = 0; kx < runs; ++kx) {
              const float* values = packed.data() + ky * g.dilation_h * row + kx * g.dilation_w * channels;
              float* to = my_dw + (ky * g.kernel_w + kx) * channels * padded;
              for (int64_t c = 0; c < padded;) {
                const bool pair = c + 2 * kLanes <= padded;
                const int64_t tile = pair ? two : one;
                for (int64_t r = 0; r < run; r += tile) {
                  const int64_t count = std::min(tile, run - r);
                  const GradientTile add = pair ? pick_gradient_tile<2>(count) : pick_gradient_tile<1>(count);
                  add(values + r, g.stride_h * row, g.stride_w * channels, grads.data() + c, dy_row, padded, rows,
                      g.out_w, to + r * padded + c, padded);
                }
                c += pair ? 2 * kLanes : kLanes;
              }
            }
          }
        }
      }
    }
  });
  for (int64_t thread = 0; thread < threads; ++thread) {
    const float* from = sums.data() + thread * (size + padded);
    for (int64_t i = 0; i < size; ++i) dw[i] += from[i];
    for (int64_t i = 0; i < padded; ++i) db[i] += from[size + i];
  }
}
