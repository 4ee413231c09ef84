// Memory movement and small products of the recurrent kernels, once per instruction set. Before it: recurrent.h.
//
// T is the type in memory, C the type multiplied (gemm-inl.h): float, or BFloat16 in pairs.

#include "gemm-inl.h"
#include "recurrent_gates-inl.h"

template <typename T>
__attribute__((noinline, cold)) void store_rest(T* p, vf v, int64_t n) {
  if (n > 0) store_first(p, v, n);
}

// In line, but for the end of a row: a call between products (recurrent_joined-inl.h) would put all their sums into
// memory.
template <typename T>
inline __attribute__((always_inline)) void store_some(T* p, vf v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_rest(p, v, n);
  }
}

#if defined(SK_BF16)
// Rounded as store() does, but for numbers below the normal ones, which become 0.
inline __attribute__((always_inline)) void store_some(c10::BFloat16* p, vf v, int64_t n) {
  if (n >= kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy((void*)p, &rounded, sizeof(rounded));
  } else {
    store_rest(p, v, n);
  }
}
#endif

template <typename T>
inline vf load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}

// As it will be read back from memory of type T; nothing to do where it is stored as C of that type.
template <typename T, typename C = float>
inline vf rounded(vf v) {
  if constexpr (std::is_same_v<T, C>) return v;
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}

// dst (rows, cols) = src, or zeros when src is null.
template <typename T, typename S>
inline void copy_rows(const S* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (std::is_same_v<T, S> && sizeof(T) == 2) {
      if (src) {
        std::memcpy((void*)(dst + r * ldd), src + r * lds, cols * sizeof(T));
        continue;
      }
    }
    for (int64_t c = 0; c < cols; c += kLanes) {
      store_some(dst + r * ldd + c, src ? load_upto(src + r * lds + c, cols - c) : vf{}, cols - c);
    }
  }
}

// dst (rows, blocks of `part` padded to whole pairs) = src (rows, blocks of part side by side).
template <typename C, typename T>
inline void copy_blocks(const T* src, int64_t lds, C* dst, int64_t ldd, int64_t rows, int64_t blocks, int64_t part) {
  const int64_t padded = round_up(part, kPair<C>);
  if (padded == part) return copy_rows(src, lds, dst, ldd, rows, blocks * part);
  for (int64_t b = 0; b < blocks; ++b) {
    copy_rows(src + b * part, lds, dst + b * padded, ldd, rows, part);
    for (int64_t r = 0; r < rows; ++r) dst[r * ldd + b * padded + part] = C(0.0f);
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

// Rows [panel of each gate block] of w, transposed for products: dst[column][gate * panel.padded + unit]. The columns of
// each block are padded to whole pairs.
template <typename C, typename T>
void pack_gates(const T* w, int64_t ld, int64_t gates, int64_t full_hidden, const Panel& panel, int64_t blocks,
                int64_t full_part, int64_t part, C* dst) {
  const int64_t width = gates * panel.padded;
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t b = 0; b < blocks; ++b) {
      pack_b<C>(Matrix<T>{w + (g * full_hidden + panel.begin) * ld + b * full_part, 1, ld}, part, panel.count,
                dst + b * round_up(part, kPair<C>) * width + g * panel.padded * kPair<C>, width);
    }
  }
}

// Rows of all gate blocks, columns of the panel (from `column` on in w), for products: dst[gate * hidden + unit][column]. The
// rows of each gate are padded to whole pairs.
template <typename C, typename T>
void pack_columns(const T* w, int64_t ld, int64_t gates, int64_t full_hidden, int64_t hidden, int64_t column,
                  const Panel& panel, C* dst) {
  for (int64_t g = 0; g < gates; ++g) {
    pack_b<C>(Matrix<T>{w + g * full_hidden * ld + column, ld, 1}, hidden, panel.count,
              dst + g * round_up(hidden, kPair<C>) * panel.padded, panel.padded);
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

// The same for one row of a and rows of w that lie side by side: read in the order of memory, which the CPU fetches ahead by
// itself faster than four rows at a time with prefetches (198 against 227 us for 7.7 MB that are in no cache).
template <typename T>
void dot_sequential(const T* w, int64_t rows, const float* a, int64_t k, float* c, bool add) {
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t count = std::min<int64_t>(4, rows - r);
    vf found[4] = {};
    for (int64_t j = 0; j < count; ++j, w += k) {
      vf s0{}, s1{}, s2{}, s3{};
      int64_t i = 0;
      for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
        s0 += load(a + i) * load(w + i), s1 += load(a + i + kLanes) * load(w + i + kLanes);
        s2 += load(a + i + 2 * kLanes) * load(w + i + 2 * kLanes), s3 += load(a + i + 3 * kLanes) * load(w + i + 3 * kLanes);
      }
      for (; i < k; i += kLanes) s0 += load_upto(a + i, k - i) * load_upto(w + i, k - i);
      found[j] = (s0 + s1) + (s2 + s3);
    }
    const vf4 s = sums(found[0], found[1], found[2], found[3]);
    for (int64_t j = 0; j < count; ++j) c[r + j] = (add ? c[r + j] : 0.0f) + s[j];
  }
}

template <typename T>
void dot_rows(const T* w, int64_t ld, int64_t rows, const float* a, int64_t lda, int64_t m, int64_t k, float* c,
              int64_t ldc, bool add) {
  if (m == 1 && ld == k) return dot_sequential(w, rows, a, k, c, add);
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

#include "recurrent_projection-inl.h"
#include "recurrent_backward-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_joined-inl.h"
