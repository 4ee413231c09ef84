// Products of tall matrices with a weight. Sums are float32 for every dtype; bfloat16 is multiplied as it is where the
// CPU can.
#include "gemm-inl.h"

constexpr int64_t kPanelFloats = 6 * 1024;   // of B, read for every few rows of A: half a 48 KiB first-level cache
constexpr int64_t kBlockFloats = 16 * 1024;  // of A, read for every panel
constexpr int64_t kFewRows = 256;            // that do not pay for a copy of B

template <typename T>
void store_rows(const float* from, int64_t ld_from, int64_t rows, int64_t cols, const float* bias, T* to,
                int64_t ld_to) {
  for (int64_t i = 0; i < rows; ++i, from += ld_from, to += ld_to) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int n = std::min<int64_t>(kLanes, cols - j);
      vf value = load_some(from + j, n);
      if (bias) value += load_some(bias + j, n);
      if (n == kLanes)
        store(to + j, value);
      else
        store_first(to + j, value, n);
    }
  }
}

// out (m, n) = a (m, k) @ b (k, n) + bias, in float32 straight to where it belongs.
inline void product(Matrix<float> a, int64_t m, int64_t k, Matrix<float> b, int64_t n, const float* bias, float* out,
                    int64_t ld) {
  const bool in_place = b.col == 1 && m <= kFewRows;
  const int64_t width =
      std::min(round_up(n, 16), std::clamp<int64_t>(kPanelFloats / k / kTileCols * kTileCols, kTileCols, 256));
  const int64_t panels = (n + width - 1) / width, panel_size = k * width;
  const int64_t most = std::clamp<int64_t>(kBlockFloats / k, 64, 512);
  const int64_t blocks = (m + most - 1) / most, rows = (m + blocks - 1) / blocks;
  const int64_t group = in_place ? panels : std::max<int64_t>(1, kCachedBytes / (panel_size * sizeof(float)));
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t here = std::min(group, panels - first);
    float* packed = in_place ? nullptr : static_cast<float*>(scratch(kScratchB, here * panel_size * sizeof(float)));
    if (!in_place) {
      at::parallel_for(0, here, 1 + (1 << 18) / panel_size, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t col = (first + p) * width;
          pack_b<float>(Matrix<float>{b.at(0, col), b.row, b.col}, k, std::min(width, n - col), packed + p * panel_size,
                        width);
        }
      });
    }
    const int64_t splits = std::min<int64_t>(here, (at::get_num_threads() + blocks - 1) / blocks);
    at::parallel_for(0, blocks * splits, 1 + (1 << 20) / (2 * rows * panel_size), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / splits * rows, size = std::min(rows, m - row);
        for (int64_t p = here * (task % splits) / splits; p < here * (task % splits + 1) / splits; ++p) {
          const int64_t col = (first + p) * width, cols = std::min(width, n - col);
          float* to = out + row * ld + col;
          for (int64_t i = 0; bias && i < size; ++i) std::memcpy(to + i * ld, bias + col, cols * sizeof(float));
          tile_gemm(size, cols, k, a.at(row, 0), a.row, in_place ? b.at(0, col) : packed + p * panel_size,
                    in_place ? b.row : width, to, ld, bias != nullptr);
        }
      }
    });
  }
}

// The same by way of out.T = b.T @ a.T, for few rows and a b that lies transposed: b is read where it lies.
inline void product_turned(Matrix<float> a, int64_t m, int64_t k, Matrix<float> b, int64_t n, const float* bias,
                           float* out, int64_t ld) {
  const int64_t width = round_up(m, kTileCols), panels = width / kTileCols;
  float* packed = static_cast<float*>(scratch(kScratchB, k * width * sizeof(float)));
  for (int64_t p = 0; p < panels; ++p) {
    pack_b<float>(Matrix<float>{a.at(p * kTileCols, 0), a.col, a.row}, k, std::min(kTileCols, m - p * kTileCols),
                  packed + p * kTileCols * k, kTileCols);
  }
  at::parallel_for(0, (n + kTileRows - 1) / kTileRows, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kTileRows * kTileCols], turned[kTileCols * kTileRows];
    for (int64_t col = begin * kTileRows; col < std::min(n, end * kTileRows); col += kTileRows) {
      const int64_t cols = std::min(kTileRows, n - col);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t rows = std::min(kTileCols, m - p * kTileCols);
        tile_gemm(cols, round_up(rows, 16), k, b.at(0, col), b.col, packed + p * kTileCols * k, kTileCols, tile,
                  kTileCols, false);
        pack_transposed([&](int64_t r, int64_t c, int) { return load(tile + r * kTileCols + c); }, cols, rows, turned,
                        kTileRows);
        store_rows(turned, kTileRows, rows, cols, bias ? bias + col : nullptr, out + p * kTileCols * ld + col, ld);
      }
    }
  });
}

template <typename C, typename T>
void pointwise_kernel(Matrix<T> a, int64_t m, int64_t k, Matrix<T> b, int64_t n, const float* bias, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    const bool turned = b.col != 1 && m <= kFewRows && 2 * m <= n;
    if (turned)
      product_turned(a, m, k, b, n, bias, out, n);
    else
      product(a, m, k, b, n, bias, out, n);
  } else {
    gemm<C>(ranges(1, m, m, kTileRows), a, ranges(1, n, n, kTileCols), b, {{0, 0, k}}, false,
            [&](const Range& row, const Range& col, const float* tile) {
              store_rows(tile, kTileCols, row.size, col.size, bias ? bias + col.packed : nullptr,
                         out + row.packed * n + col.packed, n);
            });
  }
}

// sums (rows, cols) at `ld` = left (pixels, rows).T @ right (pixels, cols). The left is transposed, `step` pixels at a
// time.
template <typename C, typename T>
void add_pixels(Matrix<T> left, int64_t rows, Matrix<T> right, int64_t cols, int64_t pixels, float* sums, int64_t ld) {
  constexpr int64_t pair = kPair<C>, step = 512, block = 128, lda = step + 16 * pair;
  constexpr bool in_place = std::is_same_v<C, float> && std::is_same_v<T, float>;
  const int64_t widest = in_place ? 256 : 128, panels = (cols + widest - 1) / widest;
  const int64_t width = round_up((cols + panels - 1) / panels, 16);
  C* a = static_cast<C*>(scratch(kScratchA, block * lda * sizeof(C)));
  C* packed = in_place ? nullptr : static_cast<C*>(scratch(kScratchB, step * width * sizeof(C)));
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t height = std::min(block, rows - row);
    for (int64_t p = 0; p < pixels; p += step) {
      const int64_t size = std::min(step, pixels - p);
      pack_a<C>(Matrix<T>{left.at(p, row), 1, left.row}, height, size, a, lda);
      for (int64_t col = 0; col < cols; col += width) {
        const int64_t wide = std::min(width, cols - col);
        float* to = sums + row * ld + col;
        if constexpr (in_place) {
          tile_gemm(height, wide, size, a, lda, right.at(p, col), right.row, to, ld, p > 0);
        } else {
          pack_b<C>(Matrix<T>{right.at(p, col), right.row, 1}, size, wide, packed, width);
          tile_gemm(height, wide, round_up(size, pair), a, lda, packed, width, to, ld, p > 0);
        }
      }
    }
  }
  if constexpr (pair == 2) release_matrix_unit();
}

// dw (n, k), dense, = dy (pixels, n).T @ x (pixels, k). Of the two the one with fewer channels is transposed; threads
// share the pixels.
template <typename C, typename T>
void pointwise_gradient_kernel(Matrix<T> dy, int64_t n, Matrix<T> x, int64_t k, int64_t pixels, T* dw) {
  const bool swapped = k < n;
  const int64_t rows = swapped ? k : n, cols = swapped ? n : k;
  const int64_t threads = std::clamp<int64_t>(pixels * rows / (1 << 16), 1, at::get_num_threads());
  const bool direct = std::is_same_v<T, float> && !swapped && threads == 1;
  std::unique_ptr<float[]> owned(direct ? nullptr : new float[threads * rows * cols]);
  float* sums = owned.get();
  if constexpr (std::is_same_v<T, float>) {
    if (direct) sums = dw;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = pixels * t / threads, last = pixels * (t + 1) / threads;
      const Matrix<T> left = swapped ? x : dy, right = swapped ? dy : x;
      add_pixels<C>(Matrix<T>{left.at(first, 0), left.row, 1}, rows, Matrix<T>{right.at(first, 0), right.row, 1}, cols,
                    last - first, sums + t * rows * cols, cols);
    }
  });
  for (int64_t t = 1; t < threads; ++t) {
    for (int64_t i = 0; i < rows * cols; ++i) sums[i] += sums[t * rows * cols + i];
  }
  if (direct) return;
  if (!swapped) return store_rows(sums, cols, rows, cols, static_cast<const float*>(nullptr), dw, cols);
  for (int64_t c0 = 0; c0 < cols; c0 += kLanes) {
    const int nc = std::min<int64_t>(kLanes, cols - c0);
    for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
      const int nr = std::min<int64_t>(kLanes, rows - r0);
      vf t[kLanes];
      for (int i = 0; i < kLanes; ++i) t[i] = i < nr ? load_some(sums + (r0 + i) * cols + c0, nc) : vf{};
      transpose(t);
      for (int j = 0; j < nc; ++j) {
        if (nr == kLanes)
          store(dw + (c0 + j) * rows + r0, t[j]);
        else
          store_first(dw + (c0 + j) * rows + r0, t[j], nr);
      }
    }
  }
}
