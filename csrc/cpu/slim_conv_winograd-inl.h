// F(4x4, 3x3): 36 products of 6x6 inputs make 4x4 outputs, which take 144 otherwise. For each of the 36 places of the
// transformed tile, a block of tiles is a matrix (tiles, channels) that a matrix of transformed weights (channels,
// outputs) multiplies.

#include "gemm-inl.h"
#include "slim_conv_tile-inl.h"
#include "winograd-inl.h"

// The 36 values of one tile of each channel to `v`, `position` floats apart. The tile's first input is row `top`,
// column `left` of the image; outside it are zeros.
template <bool kInside>
void winograd_scatter_tile(const WinogradConv& conv, const float* image, int64_t top, int64_t left, float* v,
                           int64_t position) {
  const float* x = image + top * conv.in_stride_h + left * conv.in_stride_w;
  int rows[6], columns[6];  // -1 inside of the image, 0 outside
  for (int i = 0; i < 6; ++i) {
    rows[i] = -(kInside || (top + i >= 0 && top + i < conv.in_h));
    columns[i] = -(kInside || (left + i >= 0 && left + i < conv.in_w));
  }
  for (int64_t c = 0; c < conv.in_channels; c += kLanes) {
    const int n = std::min<int64_t>(kLanes, conv.in_channels - c);
    vf d[36], t[36];
    if (kInside && n == kLanes) {
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) d[i * 6 + j] = load(x + i * conv.in_stride_h + j * conv.in_stride_w + c);
      }
    } else {
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
          d[i * 6 + j] = load_first(x + i * conv.in_stride_h + j * conv.in_stride_w + c, n & rows[i] & columns[j]);
        }
      }
    }
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) winograd_input(d + j, 6, t + j, 6);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      vf row[6];
      winograd_input(t + i * 6, 1, row, 1);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(v + (i * 6 + j) * position + c, row[j]);
    }
  }
}

// One vector of outputs of one tile, from its 36 sums.
template <bool kInside>
void winograd_gather_tile(const float* m, int64_t position, vf bias, float* y, int64_t row, int64_t pixel, int64_t rows,
                          int64_t columns, int n) {
  vf d[36], t[24];
#pragma GCC unroll 36
  for (int i = 0; i < 36; ++i) d[i] = load(m + i * position);
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) winograd_output(d + j, 6, t + j, 6);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (!kInside && i >= rows) break;
    vf out[4];
    winograd_output(t + i * 6, 1, out, 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (!kInside && j >= columns) break;
      float* to = y + i * row + j * pixel;
      if (n == kLanes) {
        store(to, out[j] + bias);
      } else {
        store_first(to, out[j] + bias, n);
      }
    }
  }
}

// (36, panels of two vectors of outputs, in_channels, vectors of the panel)
inline void winograd_pack(const WinogradConv& conv, const WeightView& view, const float* weight, float* out) {
  const int64_t vectors = (conv.out_channels + kLanes - 1) / kLanes, position = vectors * kLanes * conv.in_channels;
  const int64_t step_in = view.flipped ? view.stride_o : view.stride_i,
                step_out = view.flipped ? view.stride_i : view.stride_o;
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const int64_t wide = std::min<int64_t>(2, vectors - vector / 2 * 2);
    const int n = std::min<int64_t>(kLanes, conv.out_channels - vector * kLanes);
    float* panel = out + vector / 2 * 2 * kLanes * conv.in_channels + vector % 2 * kLanes;
    for (int64_t i = 0; i < conv.in_channels; ++i) {
      const float* filter = weight + i * step_in + vector * kLanes * step_out;
      vf g[9], t[18];
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t ky = view.flipped ? 2 - tap / 3 : tap / 3, kx = view.flipped ? 2 - tap % 3 : tap % 3;
        const float* from = filter + ky * view.stride_y + kx * view.stride_x;
        if (step_out == 1) {
          g[tap] = n == kLanes ? load(from) : load_first(from, n);
        } else {
          float lanes[kLanes] = {};
          for (int o = 0; o < n; ++o) lanes[o] = from[o * step_out];
          g[tap] = load(lanes);
        }
      }
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) winograd_weight(g + j, 3, t + j, 3);
#pragma GCC unroll 6
      for (int p = 0; p < 6; ++p) {
        vf row[6];
        winograd_weight(t + p * 3, 1, row, 1);
        for (int q = 0; q < 6; ++q) store(panel + (p * 6 + q) * position + i * wide * kLanes, row[q]);
      }
    }
  }
}

inline void winograd_conv_kernel(const WinogradConv& conv, const float* x, const WeightView& view, const float* weight,
                                 const float* bias, float* y) {
  const int64_t down = (conv.out_h + 3) / 4, across = (conv.out_w + 3) / 4, tiles = conv.images * down * across;
  const int64_t vectors = (conv.out_channels + kLanes - 1) / kLanes, channels = conv.in_channels;
  const int64_t in_step = (channels + kLanes - 1) / kLanes * kLanes, weights = vectors * kLanes * channels;
  // A line more than the matrix, so that the 36 of them do not share their places in the cache.
  const int64_t v_position = conv.block * in_step + 16, m_position = conv.block * vectors * kLanes + 16;
  float* packed = static_cast<float*>(scratch(kScratchB, 36 * weights * sizeof(float)));
  winograd_pack(conv, view, weight, packed);
  const int64_t blocks = (tiles + conv.block - 1) / conv.block;
  const Run run{0, channels};
  at::parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
    float* v = static_cast<float*>(scratch(kScratchA, 36 * (v_position + m_position) * sizeof(float)));
    float* m = v + 36 * v_position;
    for (int64_t begin = first_block * conv.block; begin < std::min(tiles, last_block * conv.block);
         begin += conv.block) {
      const int64_t count = std::min(conv.block, tiles - begin);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down, j = (begin + t) % across;
        const int64_t top = 4 * i - conv.pad_top, left = 4 * j - conv.pad_left;
        const bool inside = top >= 0 && left >= 0 && top + 6 <= conv.in_h && left + 6 <= conv.in_w;
        (inside ? winograd_scatter_tile<true> : winograd_scatter_tile<false>)(conv, x + image * conv.in_stride_n, top,
                                                                              left, v + t * in_step, v_position);
      }
      for (int64_t position = 0; position < 36; ++position) {
        for (int64_t vector = 0; vector < vectors; vector += 2) {
          const bool pair = vector + 1 < vectors;
          const int64_t wide = pair ? 2 : 1, tile = even_tile(count, pair ? tile_limit<2>() : tile_limit<1>());
          const ConvTile whole = pair ? pick_conv_tile<2>(tile) : pick_conv_tile<1>(tile);
          float* sums = m + position * m_position + vector * conv.block * kLanes;
          for (int64_t t = 0; t < count; t += tile) {
            const ConvTile multiply = t + tile <= count ? whole
                                      : pair            ? pick_conv_tile<2>(count - t)
                                                        : pick_conv_tile<1>(count - t);
            multiply(v + position * v_position + t * in_step, in_step, &run, 1,
                     packed + position * weights + vector * kLanes * channels, sums + t * wide * kLanes);
          }
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down, j = (begin + t) % across;
        float* to = y + image * conv.out_stride_n + 4 * i * conv.out_stride_h + 4 * j * conv.out_stride_w;
        const int64_t rows = conv.out_h - 4 * i, columns = conv.out_w - 4 * j;
        const auto gather = rows >= 4 && columns >= 4 ? winograd_gather_tile<true> : winograd_gather_tile<false>;
        for (int64_t vector = 0; vector < vectors; ++vector) {
          const int64_t pair = vector / 2 * 2, wide = std::min<int64_t>(2, vectors - pair), c = vector * kLanes;
          gather(m + (pair * conv.block + t * wide + vector - pair) * kLanes, m_position, bias ? load(bias + c) : vf{},
                 to + c, conv.out_stride_h, conv.out_stride_w, rows, columns,
                 std::min<int64_t>(kLanes, conv.out_channels - c));
        }
      }
    }
  });
}

// The 36 values of one 4x4 tile of dy of each channel, zeros outside of the image.
template <bool kInside>
void winograd_scatter_gradient(const float* dy, int64_t row, int64_t pixel, int64_t rows, int64_t columns,
                               int64_t channels, float* w, int64_t position) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int n = std::min<int64_t>(kLanes, channels - c);
    vf d[16], t[24];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const float* from = dy + i * row + j * pixel + c;
        if (kInside)
          d[i * 4 + j] = load_some(from, n);
        else
          d[i * 4 + j] = i < rows && j < columns ? load_some(from, n) : vf{};
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) winograd_output_gradient(d + j, 4, t + j, 4);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      vf out[6];
      winograd_output_gradient(t + i * 4, 1, out, 1);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(w + (i * 6 + j) * position + c, out[j]);
    }
  }
}

// From 36 matrices (in_channels, outputs) of sums to dw (outputs, 3, 3, in_channels), dense. The sums are overwritten.
inline void winograd_finish_gradient(const WinogradConv& conv, float* sums, int64_t position, float* dw) {
  const int64_t padded = (conv.out_channels + kLanes - 1) / kLanes * kLanes, channels = conv.in_channels;
  for (int64_t at = 0; at < channels * padded; at += kLanes) {
    vf s[36], t[18];
#pragma GCC unroll 36
    for (int i = 0; i < 36; ++i) s[i] = load(sums + i * position + at);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) winograd_weight_gradient(s + j, 6, t + j, 6);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      vf out[3];
      winograd_weight_gradient(t + i * 6, 1, out, 1);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) store(sums + (i * 3 + j) * position + at, out[j]);
    }
  }
  for (int64_t o = 0; o < conv.out_channels; o += kLanes) {
    const int outputs = std::min<int64_t>(kLanes, conv.out_channels - o);
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int n = std::min<int64_t>(kLanes, channels - c);
        vf t[kLanes];
        for (int i = 0; i < kLanes; ++i) t[i] = i < n ? load(sums + tap * position + (c + i) * padded + o) : vf{};
        transpose(t);
        for (int i = 0; i < outputs; ++i) {
          float* to = dw + ((o + i) * 9 + tap) * channels + c;
          if (n == kLanes)
            store(to, t[i]);
          else
            store_first(to, t[i], n);
        }
      }
    }
  }
}

constexpr int64_t kKeptBytes = 2 * 1024 * 1024;  // of sums, as far as a thread keeps them from call to call

// dw of a convolution whose output has the sizes of dy: 36 products of transformed tiles of x and dy are added up over
// the tiles.
inline void winograd_gradient_kernel(const WinogradConv& conv, const float* x, const float* dy, float* dw) {
  const int64_t down = (conv.out_h + 3) / 4, across = (conv.out_w + 3) / 4, tiles = conv.images * down * across;
  const int64_t channels = conv.in_channels, padded = (conv.out_channels + kLanes - 1) / kLanes * kLanes;
  const int64_t in_step = (channels + kLanes - 1) / kLanes * kLanes;
  const int64_t v_position = conv.block * in_step + 16, w_position = conv.block * padded + 16,
                position = channels * padded + 16;
  const int64_t blocks = (tiles + conv.block - 1) / conv.block,
                threads = std::min<int64_t>(at::get_num_threads(), blocks);
  const int64_t bytes = threads * 36 * position * sizeof(float);
  const at::DataPtr large = bytes > kKeptBytes ? c10::GetCPUAllocator()->allocate(bytes) : at::DataPtr();
  float* sums = static_cast<float*>(bytes > kKeptBytes ? large.get() : scratch(kScratchB, bytes));
  at::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    float* v = static_cast<float*>(scratch(kScratchA, 36 * (v_position + w_position) * sizeof(float)));
    float* w = v + 36 * v_position;
    for (int64_t thread = first_thread; thread < last_thread; ++thread) {
      float* own = sums + thread * 36 * position;
      std::memset(own, 0, 36 * position * sizeof(float));
      for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
        const int64_t begin = block * conv.block, count = std::min(conv.block, tiles - begin);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down,
                        j = (begin + t) % across;
          const int64_t top = 4 * i - conv.pad_top, left = 4 * j - conv.pad_left;
          const bool inside = top >= 0 && left >= 0 && top + 6 <= conv.in_h && left + 6 <= conv.in_w;
          (inside ? winograd_scatter_tile<true> : winograd_scatter_tile<false>)(conv, x + image * conv.in_stride_n, top,
                                                                                left, v + t * in_step, v_position);
          const int64_t rows = conv.out_h - 4 * i, columns = conv.out_w - 4 * j;
          (rows >= 4 && columns >= 4
               ? winograd_scatter_gradient<true>
               : winograd_scatter_gradient<false>)(dy + image * conv.out_stride_n + 4 * i * conv.out_stride_h +
                                                       4 * j * conv.out_stride_w,
                                                   conv.out_stride_h, conv.out_stride_w, rows, columns,
                                                   conv.out_channels, w + t * padded, w_position);
        }
        for (int64_t p = 0; p < 36; ++p) {
          for (int64_t c = 0; c < padded;) {
            const bool pair = c + 2 * kLanes <= padded;
            const int64_t tile = even_tile(channels, kTileAccumulators / (pair ? 2 : 1));
            for (int64_t r = 0; r < channels; r += tile) {
              const int64_t size = std::min(tile, channels - r);
              const GradientTile add = pair ? pick_gradient_tile<2>(size) : pick_gradient_tile<1>(size);
              add(v + p * v_position + r, 0, in_step, w + p * w_position + c, 0, padded, 1, count,
                  own + p * position + r * padded + c, padded);
            }
            c += pair ? 2 * kLanes : kLanes;
          }
        }
      }
    }
  });
  for (int64_t thread = 1; thread < threads; ++thread) {
    for (int64_t i = 0; i < 36 * position; ++i) sums[i] += sums[thread * 36 * position + i];
  }
  winograd_finish_gradient(conv, sums, position, dw);
}
