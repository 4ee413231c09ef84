#include "gemm-inl.h"

// One activation of finish_tile. Not inlined: beside the nine others its loop ran on spilled registers, at 2 ns a
// vector.
template <Activation act, typename T>
__attribute__((noinline)) void finish_rows(const Finish<T>& f, int64_t row, int64_t col, int64_t rows, int64_t cols,
                                           const float* tile) {
  const bool has_bf16 = std::is_same_v<T, c10::BFloat16> && gemm_takes_bf16();
  const int64_t whole = cols / kLanes * kLanes;
  const int rest = static_cast<int>(cols - whole);
  const float* bias = f.bias ? f.bias + col : nullptr;
  for (int64_t i = 0; i < rows; ++i, tile += kTileCols) {
    T* out = f.out + (row + i) * f.ld_out + col;
    const T* residual = f.residual ? f.residual + (row + i) * f.ld_residual + col : nullptr;
    for (int64_t j = 0; j < whole; j += kLanes) {
      vf v = load(tile + j);
      if (bias) v += load(bias + j);
      if (residual) v += load(residual + j);
      store_rounded(out + j, activate<act>(v), has_bf16);
    }
    if (rest == 0) continue;
    vf v = load(tile + whole);
    if (bias) v += load_first(bias + whole, rest);
    if (residual) v += load_first(residual + whole, rest);
    store_first(out + whole, activate<act>(v), rest);
  }
}

// Bias, residual, activation and the store of a float tile whose first element belongs to (row, col) of the output.
template <typename T>
void finish_tile(const Finish<T>& f, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* tile) {
  SK_SWITCH_ACTIVATION(f.activation, [&] { finish_rows<act>(f, row, col, rows, cols, tile); });
}

// The same for a tile that holds the output transposed: its rows are the output's columns.
template <typename T>
void finish_transposed_tile(const Finish<T>& f, const Range& out_col, const Range& out_row, const float* tile) {
  alignas(64) float turned[kTileCols * kTileRows];
  pack_transposed([&](int64_t r, int64_t c, int) { return load(tile + r * kTileCols + c); }, out_col.size, out_row.size,
                  turned, kTileCols);
  finish_tile(f, out_row.packed, out_col.packed, out_row.size, out_col.size, turned);
}

// out = finish(x @ weight.T), x of few rows: each row of the weight is read once and multiplied with all M rows of x.
template <int M, typename T>
void few_rows_kernel(Matrix<T> x, Matrix<T> weight, const std::vector<Range>& cols, const std::vector<Depth>& depth,
                     const Finish<T>& finish) {
  constexpr int m_lanes = M == 3 ? 4 : M;  // a lane of the summed vector for each (weight row, x row)
  constexpr int r = m_lanes <= kLanes ? kLanes / m_lanes : 1;
  at::parallel_for(0, cols.size(), 4, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[M * kTileCols];
    for (int64_t t = begin; t < end; ++t) {
      const Range& col = cols[t];
      for (int64_t j = 0; j < col.size; j += r) {
        const int rows = std::min<int64_t>(r, col.size - j);
        vf acc[kLanes] = {};
        for (const Depth& d : depth) {
          const T* x_rows[M];
          const T* w_rows[r];
          for (int i = 0; i < M; ++i) x_rows[i] = x.at(i, d.a);
          for (int i = 0; i < r; ++i) w_rows[i] = weight.at(col.full + j + std::min(i, rows - 1), d.b);
          int64_t k = 0;
          for (; k + kLanes <= d.size; k += kLanes) {
            vf xv[M];
            for (int i = 0; i < M; ++i) xv[i] = load(x_rows[i] + k);
#pragma GCC unroll 16
            for (int q = 0; q < r; ++q) {
              const vf w = load(w_rows[q] + k);
              for (int i = 0; i < M; ++i) acc[q * m_lanes + i] += w * xv[i];
            }
          }
          if (k < d.size) {
            const int n = d.size - k;
            for (int q = 0; q < r; ++q) {
              const vf w = load_first(w_rows[q] + k, n);
              for (int i = 0; i < M; ++i) acc[q * m_lanes + i] += w * load_first(x_rows[i] + k, n);
            }
          }
        }
        transpose(acc);
        vf total = acc[0];
        for (int i = 1; i < kLanes; ++i) total += acc[i];
        float sums[kLanes];
        store(sums, total);
        for (int q = 0; q < rows; ++q) {
          for (int i = 0; i < M; ++i) tile[i * kTileCols + j + q] = sums[q * m_lanes + i];
        }
      }
      finish_tile(finish, 0, col.packed, M, col.size, tile);
    }
  });
}

// dw = dy.T @ x and db = the sums of dy's columns. A task is a block of dw that stays in cache while all rows of dy and x
// pass by; rows are also divided among tasks when there are too few blocks for the threads. dy and x are contiguous by rows.
template <typename C, typename T>
void weight_gradient_kernel(Matrix<T> dy, Matrix<T> x, int64_t m, const std::vector<Range>& rows,
                            const std::vector<Range>& cols, T* dw, int64_t ld_dw, T* db) {
  constexpr int64_t chunk = 256, pair = kPair<C>, lda = chunk + 16 * pair;
  const int64_t tasks = rows.size() * cols.size();
  const int64_t splits = std::clamp<int64_t>(at::get_num_threads() / tasks, 1, (m + chunk - 1) / chunk);
  constexpr int64_t block = kGradientRows * kGradientCols + kGradientRows;  // of dw, and of db behind it
  std::vector<float> partial(splits > 1 ? tasks * splits * block : 0);
  const auto store_block = [&](const float* sums, const Range& row, const Range& col) {
    for (int64_t i = 0; i < row.size; ++i) {
      T* out = dw + (row.full + i) * ld_dw + col.full;
      int64_t j = 0;
      for (; j + kLanes <= col.size; j += kLanes) store_rounded(out + j, load(sums + i * kGradientCols + j), pair == 2);
      if (j < col.size) store_first(out + j, load(sums + i * kGradientCols + j), col.size - j);
    }
    if (!db || col.packed > 0) return;
    for (int64_t i = 0; i < row.size; ++i) db[row.full + i] = sums[kGradientRows * kGradientCols + i];
  };
  const int64_t flops = 2 * kGradientRows * kGradientCols * (m / splits);
  at::parallel_for(0, tasks * splits, 1 + (1 << 20) / flops, [&](int64_t begin, int64_t end) {
    C* a = static_cast<C*>(scratch(kScratchA, kGradientRows * lda * sizeof(C)));
    C* b = static_cast<C*>(scratch(kScratchB, chunk * kGradientCols * sizeof(C)));
    for (int64_t task = begin; task < end; ++task) {
      const Range &row = rows[task / splits / cols.size()], &col = cols[task / splits % cols.size()];
      const int64_t width = round_up(col.size, 16);
      const bool with_db = db && col.packed == 0;
      float* sums = splits > 1 ? partial.data() + task * block : static_cast<float*>(scratch(kScratchC, block * sizeof(float)));
      float* db_sums = sums + kGradientRows * kGradientCols;
      std::fill_n(db_sums, kGradientRows, 0.0f);
      const int64_t m_begin = m * (task % splits) / splits, m_end = m * (task % splits + 1) / splits;
      for (int64_t m0 = m_begin; m0 < m_end; m0 += chunk) {
        const int64_t size = std::min(chunk, m_end - m0), depth = round_up(size, pair);
        pack_a<C>(Matrix<T>{dy.at(m0, row.packed), 1, dy.row}, row.size, size, a, lda);
        pack_b<C>(Matrix<T>{x.at(m0, col.packed), x.row, 1}, size, col.size, b, width);
        tile_gemm(row.size, width, depth, a, lda, b, width, sums, kGradientCols, m0 > m_begin);
        for (int64_t i = 0; with_db && i < row.size; ++i) {
          vf total{};
          int64_t k = 0;
          for (; k + kLanes <= size; k += kLanes) total += load(a + i * lda + k);
          if (k < size) total += load_first(a + i * lda + k, size - k);
          db_sums[i] += sum(total);
        }
      }
      if (splits == 1) store_block(sums, row, col);
    }
    if constexpr (pair == 2) release_matrix_unit();
  });
  for (int64_t task = 0; splits > 1 && task < tasks; ++task) {
    float* sums = partial.data() + task * splits * block;
    for (int64_t s = 1; s < splits; ++s) {
      for (int64_t i = 0; i < block; ++i) sums[i] += sums[s * block + i];
    }
    store_block(sums, rows[task / cols.size()], cols[task % cols.size()]);
  }
}

// out = finish(x @ weight.T) on brgemm. `turned`: the product is computed transposed, with the weight as the operand that is
// read where it lies and x packed, which is cheaper when x has fewer rows than the weight.
template <typename C, typename T>
void linear_kernel(Matrix<T> x, int64_t m, Matrix<T> weight, const std::vector<Range>& cols,
                   const std::vector<Depth>& depth, bool turned, const Finish<T>& finish) {
  const std::vector<Range> rows = ranges(1, m, m, kTileRows);
  if (turned) {
    std::vector<Depth> swapped = depth;
    for (Depth& d : swapped) std::swap(d.a, d.b);
    gemm<C>(cols, weight, rows, x.transposed(), swapped, false,
            [&](const Range& out_col, const Range& out_row, const float* tile) {
              finish_transposed_tile(finish, out_col, out_row, tile);
            });
  } else {
    gemm<C>(rows, x, cols, weight.transposed(), depth, false, [&](const Range& row, const Range& col, const float* tile) {
      finish_tile(finish, row.packed, col.packed, row.size, col.size, tile);
    });
  }
}

// dx = dy @ weight.
template <typename C, typename T>
void input_gradient_kernel(Matrix<T> dy, int64_t m, Matrix<T> weight, const std::vector<Range>& cols,
                           const std::vector<Depth>& depth, const Finish<T>& finish) {
  // A panel of the weight is packed unless each of its elements is used by a few rows only.
  const bool in_place = std::is_same_v<C, float> && std::is_same_v<T, float> && weight.col == 1 && m <= 4 * kTileRows;
  gemm<C>(ranges(1, m, m, kTileRows), dy, cols, weight, depth, in_place,
          [&](const Range& row, const Range& col, const float* tile) {
            finish_tile(finish, row.packed, col.packed, row.size, col.size, tile);
          });
}
