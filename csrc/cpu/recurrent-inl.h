// Memory movement and small products of the recurrent kernels, once per instruction set. Before it: recurrent.h.

#include "gemm-inl.h"
#include "recurrent_gates-inl.h"

template <typename T>
inline void store_some(T* p, vf v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else if (n > 0) {
    store_first(p, v, n);
  }
}

template <typename T>
inline vf load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}

// As it will be read back from memory of type T.
template <typename T>
inline vf rounded(vf v) {
  if constexpr (std::is_same_v<T, float>) return v;
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}

// dst (rows, cols) = src, or zeros when src is null.
template <typename T, typename S>
inline void copy_rows(const S* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      store_some(dst + r * ldd + c, src ? load_upto(src + r * lds + c, cols - c) : vf{}, cols - c);
    }
  }
}

// dst (cols, rows) = src (rows, cols) transposed, converted to T; nothing outside is written.
template <typename T, typename S>
inline void transpose_rows(const S* src, int64_t lds, int64_t rows, int64_t cols, T* dst, int64_t ldd) {
  for (int64_t c0 = 0; c0 < cols; c0 += kLanes) {
    const int64_t nc = std::min<int64_t>(kLanes, cols - c0);
    for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
      const int64_t nr = std::min<int64_t>(kLanes, rows - r0);
      vf t[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) t[i] = i < nr ? load_upto(src + (r0 + i) * lds + c0, nc) : vf{};
      transpose(t);
      for (int64_t j = 0; j < nc; ++j) store_some(dst + (c0 + j) * ldd + r0, t[j], nr);
    }
  }
}

// Rows [panel of each gate block] of w, transposed: dst[column][gate * panel.padded + unit].
template <typename T>
void pack_gates(const T* w, int64_t ld, int64_t gates, int64_t full_hidden, const Panel& panel, int64_t blocks,
                int64_t full_part, int64_t part, float* dst) {
  const int64_t width = gates * panel.padded;
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t b = 0; b < blocks; ++b) {
      const T* source = w + (g * full_hidden + panel.begin) * ld + b * full_part;
      pack_transposed([&](int64_t r, int64_t c, int n) { return load_some(source + r * ld + c, n); }, panel.count, part,
                      dst + b * part * width + g * panel.padded, width);
    }
  }
}

// Rows of all gate blocks, columns of the panel, as they lie: dst[gate * hidden + unit][column].
template <typename T>
void pack_columns(const T* w, int64_t ld, int64_t gates, int64_t full_hidden, int64_t hidden, const Panel& panel,
                  int64_t full_part, int64_t part, float* dst) {
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t b = panel.begin / part; b * part < panel.begin + panel.count; ++b) {
      const int64_t begin = std::max(panel.begin, b * part), end = std::min(panel.begin + panel.count, (b + 1) * part);
      copy_rows(w + g * full_hidden * ld + b * full_part + begin - b * part, ld,
                dst + g * hidden * panel.padded + begin - panel.begin, panel.padded, hidden, end - begin);
    }
  }
}

using vf4 = float __attribute__((vector_size(16)));
inline vf4 fold(vf v) {
#if SK_LANES == 16
  return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7)) +
         (__builtin_shufflevector(v, v, 8, 9, 10, 11) + __builtin_shufflevector(v, v, 12, 13, 14, 15));
#elif SK_LANES == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// The sums of four vectors.
inline vf4 sums(vf a, vf b, vf c, vf d) {
  const vf4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  const vf4 ab = __builtin_shufflevector(fa, fb, 0, 4, 1, 5) + __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
  const vf4 cd = __builtin_shufflevector(fc, fd, 0, 4, 1, 5) + __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// c[m][r] (+)= sum over k of a[m][k] w[r][k]: for few rows of a, where packing w would cost more than the product.
template <int M, typename T>
inline void dot_tile(const T* w, int64_t ld, int64_t rows, const float* a, int64_t lda, int64_t k, float* c,
                     int64_t ldc, bool add) {
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t left = rows - r;
    const T* w0 = w + r * ld;
    const T* w1 = left > 1 ? w0 + ld : w0;
    const T* w2 = left > 2 ? w1 + ld : w0;
    const T* w3 = left > 3 ? w2 + ld : w0;
    vf acc[M][4] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
      const vf v0 = load(w0 + i), v1 = load(w1 + i), v2 = load(w2 + i), v3 = load(w3 + i);
      if constexpr (M == 1) {  // bound by reading w: the next rows are fetched while these are summed
        for (int64_t j = 4; j < 8; ++j) __builtin_prefetch(w0 + j * ld + i);
      }
      for (int m = 0; m < M; ++m) {
        const vf am = load(a + m * lda + i);
        acc[m][0] += am * v0, acc[m][1] += am * v1, acc[m][2] += am * v2, acc[m][3] += am * v3;
      }
    }
    if (i < k) {
      const int n = k - i;
      const vf v0 = load_first(w0 + i, n), v1 = load_first(w1 + i, n), v2 = load_first(w2 + i, n),
               v3 = load_first(w3 + i, n);
      for (int m = 0; m < M; ++m) {
        const vf am = load_first(a + m * lda + i, n);
        acc[m][0] += am * v0, acc[m][1] += am * v1, acc[m][2] += am * v2, acc[m][3] += am * v3;
      }
    }
    for (int m = 0; m < M; ++m) {
      const vf4 s = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
      float* out = c + m * ldc + r;
      if (left >= 4) {
        vf4 before{};
        if (add) std::memcpy(&before, out, sizeof(before));
        const vf4 after = before + s;
        std::memcpy(out, &after, sizeof(after));
      } else {
        for (int64_t j = 0; j < left; ++j) out[j] = (add ? out[j] : 0.0f) + s[j];
      }
    }
  }
}

template <typename T>
void dot_rows(const T* w, int64_t ld, int64_t rows, const float* a, int64_t lda, int64_t m, int64_t k, float* c,
              int64_t ldc, bool add) {
  int64_t at = 0;
  for (; at + 4 <= m; at += 4) dot_tile<4>(w, ld, rows, a + at * lda, lda, k, c + at * ldc, ldc, add);
  for (; at < m; ++at) dot_tile<1>(w, ld, rows, a + at * lda, lda, k, c + at * ldc, ldc, add);
}

// tile[m][gate * panel.padded + unit] (+)= a (m, blocks * part) times the panel's rows of w.
template <typename T>
void dot_gates(const T* w, int64_t ld, int64_t gates, int64_t full_hidden, const Panel& panel, int64_t blocks,
               int64_t full_part, int64_t part, const float* a, int64_t lda, int64_t m, float* tile, bool add) {
  const int64_t width = gates * panel.padded;
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t b = 0; b < blocks; ++b) {
      dot_rows(w + (g * full_hidden + panel.begin) * ld + b * full_part, ld, panel.count, a + b * part, lda, m, part,
               tile + g * panel.padded, width, add || b > 0);
    }
  }
}

#include "recurrent_backward-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_joined-inl.h"
