// Patches of the output, one a pixel of x, as rows of matrices. Sums are float32 for every dtype; bfloat16 is
// multiplied as it is where the CPU can.
#include "gemm-inl.h"

// to[0..n) <- from[0..n), converted.
template <typename C, typename T>
inline void copy_run(C* to, const T* from, int64_t n) {
  if constexpr (std::is_same_v<C, T>) {
    const int64_t units = n * static_cast<int64_t>(sizeof(T)) / 4;  // of four bytes
    const float* source = (const float*)from;
    float* target = (float*)to;
    int64_t i = 0;
    for (; i + kLanes <= units; i += kLanes) store(target + i, load(source + i));
    if (i < units) store_first(target + i, load_first(source + i, units - i), units - i);
    if (sizeof(T) == 2 && n % 2) to[n - 1] = from[n - 1];
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store_first(to + i, load_first(from + i, n - i), n - i);
  }
}

// to[0..n) <- from + added, rounded.
template <typename T>
inline void add_run(T* to, const float* from, const float* added, int64_t n, bool has_bf16) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_rounded(to + i, load(from + i) + load(added + i), has_bf16);
  if (i < n) store_first(to + i, load_first(from + i, n - i) + load_first(added + i, n - i), n - i);
}

// Where row `y` of the patches of `count` pixels lies: f(i, at, offset, begin, end) for numbers begin to end of the row
// of patch i, number k of which is at + offset + k in the output (offset alone in its row); empty where the row is
// outside.
template <typename F>
inline void for_patch_rows(const PatchSizes& s, int64_t first, int64_t count, int64_t y, F f) {
  const int64_t run = s.run(), row = s.row();
  int64_t w = first % s.width, h = first / s.width % s.height, image = first / (s.width * s.height);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to = h * s.stride_height - s.pad_height + y;
    const int64_t offset = (w * s.stride_width - s.pad_width) * s.out;
    const bool inside = to >= 0 && to < s.out_height;
    const int64_t begin = std::clamp<int64_t>(-offset, 0, run), end = std::clamp<int64_t>(row - offset, begin, run);
    f(i, (image * s.out_height + to) * row, offset, begin, inside ? end : begin);
    if (++w == s.width) {
      w = 0;
      if (++h == s.height) h = 0, ++image;
    }
  }
}

// y = the patches x (pixels, in) @ weight (in, columns), added up, and bias, of which bias_row has a row of y.
template <typename C, typename T>
void patches_kernel(const PatchSizes& s, const T* x, const T* weight, const float* bias_row, T* y) {
  constexpr int64_t pair = kPair<C>;
  constexpr bool sums_in_place = std::is_same_v<T, float>;
  const int64_t depth = s.in, padded = round_up(depth, pair), lda = padded + 16 * pair;
  const int64_t width = std::clamp<int64_t>(8192 / depth / 16 * 16, 64, 128);
  const std::vector<Range> panels = ranges(s.kernel_height, s.run(), s.run(), width);
  C* packed = static_cast<C*>(scratch(kScratchB, panels.size() * padded * width * sizeof(C)));
  at::parallel_for(0, panels.size(), 1 + (1 << 18) / (padded * width), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_b<C>(Matrix<T>{weight + panels[p].full, s.columns(), 1}, depth, panels[p].size, packed + p * padded * width,
                round_up(panels[p].size, 16));
    }
  });
  const int64_t image = s.height * s.width, out_image = s.out_height * s.row();
  const int64_t together = s.apart ? kTileRows : image * std::max<int64_t>(1, kTileRows / image);
  const int64_t tasks = (s.pixels() + together - 1) / together;
  at::parallel_for(0, tasks, 1 + (1 << 20) / (2 * together * depth * s.columns()), [&](int64_t begin, int64_t end) {
    float* tile = static_cast<float*>(scratch(kScratchC, kTileRows * width * sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * together, last = std::min(s.pixels(), first + together);
      const int64_t from = s.apart ? 0 : first / image * out_image, to = s.apart ? 0 : last / image * out_image;
      float* sums = nullptr;
      if (!s.apart) {
        if constexpr (sums_in_place)
          sums = y + from;
        else
          sums = static_cast<float*>(scratch(kScratchOut, (to - from) * sizeof(float)));
        for (int64_t i = 0; i < to - from; i += s.row()) std::memcpy(sums + i, bias_row, s.row() * sizeof(float));
      }
      for (int64_t p = first; p < last; p += kTileRows) {
        const int64_t rows = std::min(kTileRows, last - p);
        const C* a = nullptr;
        int64_t ld = depth;
        if constexpr (std::is_same_v<C, T>) {
          if (depth == padded) a = x + p * depth;
        }
        if (!a) {
          C* copy = static_cast<C*>(scratch(kScratchA, kTileRows * lda * sizeof(C)));
          pack_a<C>(Matrix<T>{x + p * depth, depth, 1}, rows, depth, copy, lda);
          a = copy, ld = lda;
        }
        for (size_t i = 0; i < panels.size(); ++i) {
          const int64_t kernel_row = panels[i].full / s.run(), column = panels[i].full % s.run();
          const int64_t wide = round_up(panels[i].size, 16);
          tile_gemm(rows, wide, padded, a, ld, packed + i * padded * width, wide, tile, width, false);
          for_patch_rows(s, p, rows, kernel_row, [&](int64_t r, int64_t at, int64_t offset, int64_t low, int64_t high) {
            low = std::max(low, column), high = std::min(high, column + panels[i].size);
            if (low >= high) return;
            const float* values = tile + r * width + low - column;
            if (s.apart) return add_run(y + at + offset + low, values, bias_row + low, high - low, pair == 2);
            float* target = sums + at - from + offset + low;
            add_run(target, values, target, high - low, false);
          });
        }
      }
      if constexpr (!sums_in_place) {
        if (!s.apart) copy_run(y + from, sums, to - from);
      }
    }
    if constexpr (pair == 2) release_matrix_unit();
  });
}

// rows (count, columns) at `ld` <- the patches of dy.
template <typename C, typename T>
inline void gather_patches(const PatchSizes& s, const T* dy, int64_t first, int64_t count, C* rows, int64_t ld) {
  const int64_t run = s.run(), columns = s.columns();
  for (int64_t y = 0; y < s.kernel_height; ++y) {
    for_patch_rows(s, first, count, y, [&](int64_t i, int64_t at, int64_t offset, int64_t low, int64_t high) {
      C* to = rows + i * ld + y * run;
      if (low > 0) std::memset((void*)to, 0, low * sizeof(C));
      if (low < high) copy_run(to + low, dy + at + offset + low, high - low);
      if (high < run) std::memset((void*)(to + high), 0, (run - high) * sizeof(C));
    });
  }
  if (columns % kPair<C>) {
    for (int64_t i = 0; i < count; ++i) rows[i * ld + columns] = 0;
  }
}

// dx (pixels, in) = patches of dy @ weight.T and dw (in, columns) = x.T @ patches of dy; either may be null.
template <typename C, typename T>
void patches_backward_kernel(const PatchSizes& s, const T* dy, const T* x, const T* weight, T* dx, float* dw) {
  constexpr int64_t pair = kPair<C>, kMost = 256, kHeight = 128, kWidest = 256;
  const int64_t columns = s.columns(), padded = round_up(columns, pair), ld = padded + 16 * pair;
  // Pixels at a time: patches stay in cache, unless the gradient of the weight, which is read and written as often,
  // does not.
  const int64_t fewest = s.in * columns > (1 << 18) ? kMost : kTileRows;
  const int64_t step = std::clamp<int64_t>(32 * 1024 / columns / kTileRows * kTileRows, fewest, kMost);
  const int64_t width = std::min<int64_t>(round_up(s.in, 16), std::clamp<int64_t>(8192 / columns / 16 * 16, 64, 128));
  const std::vector<Range> panels = ranges(1, s.in, s.in, width);
  C* packed = nullptr;
  if (dx) {
    packed = static_cast<C*>(scratch(kScratchOut, panels.size() * padded * width * sizeof(C)));
    at::parallel_for(0, panels.size(), 1 + (1 << 18) / (padded * width), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        pack_b<C>(Matrix<T>{weight + panels[p].full * columns, 1, columns}, columns, panels[p].size,
                  packed + p * padded * width, width);
      }
    });
  }
  const int64_t tiles = (s.pixels() + step - 1) / step;
  const int64_t work = 1 + s.pixels() * s.in * columns / (1 << 18);
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), tiles, work});
  std::unique_ptr<float[]> others(dw && threads > 1 ? new float[(threads - 1) * s.in * columns] : nullptr);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t lda = step + 16 * pair;
    C* patches = static_cast<C*>(scratch(kScratchC, step * ld * sizeof(C)));
    C* turned = static_cast<C*>(scratch(kScratchA, std::max(s.in * lda * sizeof(C), step * width * sizeof(float))));
    C* pairs = static_cast<C*>(scratch(kScratchB, step * kWidest * sizeof(C)));
    float* tile = (float*)turned;
    for (int64_t t = begin; t < end; ++t) {
      float* sums = t == 0 ? dw : others.get() + (t - 1) * s.in * columns;
      const int64_t start = tiles * t / threads * step;
      for (int64_t p = start; p < std::min(s.pixels(), tiles * (t + 1) / threads * step); p += step) {
        const int64_t count = std::min(step, s.pixels() - p);
        gather_patches(s, dy, p, count, patches, ld);
        for (size_t i = 0; dx && i < panels.size(); ++i) {
          const Range& panel = panels[i];
          T* to = dx + p * s.in + panel.full;
          const C* b = packed + i * padded * width;
          if constexpr (std::is_same_v<T, float>) {
            tile_gemm(count, panel.size, padded, patches, ld, b, width, to, s.in, false);
          } else {
            tile_gemm(count, round_up(panel.size, 16), padded, patches, ld, b, width, tile, width, false);
            for (int64_t r = 0; r < count; ++r) copy_run(to + r * s.in, tile + r * width, panel.size);
          }
        }
        if (dw) pack_a<C>(Matrix<T>{x + p * s.in, 1, s.in}, s.in, count, turned, lda);
        for (int64_t col = 0; dw && col < columns; col += kWidest) {
          const int64_t wide = std::min(kWidest, columns - col);
          const C* b = patches + col;
          int64_t ldb = ld;
          if constexpr (pair == 2) {
            ldb = round_up(wide, 16);
            pack_b<C>(Matrix<C>{b, ld, 1}, count, wide, pairs, ldb);
            b = pairs;
          }
          for (int64_t row = 0; row < s.in; row += kHeight) {
            tile_gemm(std::min(kHeight, s.in - row), wide, round_up(count, pair), turned + row * lda, lda, b, ldb,
                      sums + row * columns + col, columns, p > start);
          }
        }
      }
    }
    if constexpr (pair == 2) release_matrix_unit();
  });
  for (int64_t t = 0; dw && t + 1 < threads; ++t) {
    for (int64_t i = 0; i < s.in * columns; ++i) dw[i] += others[t * s.in * columns + i];
  }
}

// sums[c] = the sum of dy (rows, row) over rows and pixels of `channels` numbers: rows first, in whole vectors however
// few the channels.
template <typename T>
void patches_bias_kernel(const T* dy, int64_t rows, int64_t row, int64_t channels, float* sums) {
  constexpr int64_t kTogether = 4, kBlock = 64;
  std::vector<float> totals(row);
  for (int64_t block = 0; block < rows; block += kBlock) {
    const int64_t last = std::min(rows, block + kBlock);
    int64_t c = 0;
    for (; c + kTogether * kLanes <= row; c += kTogether * kLanes) {
      vf part[kTogether] = {};
      for (int64_t r = block; r < last; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTogether; ++v) part[v] += load(dy + r * row + c + v * kLanes);
      }
      for (int v = 0; v < kTogether; ++v) store(&totals[c + v * kLanes], load(&totals[c + v * kLanes]) + part[v]);
    }
    for (; c < row; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, row - c));
      vf part{};
      for (int64_t r = block; r < last; ++r) part += load_some(dy + r * row + c, n);
      store_first(&totals[c], load_some(&totals[c], n) + part, n);
    }
  }
  std::fill_n(sums, channels, 0.0f);
  for (int64_t i = 0; i < row; i += channels) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += totals[i + c];
  }
}
