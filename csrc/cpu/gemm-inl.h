// Packing for gemm.h, once per instruction set. To be included by other "-inl.h" files; gemm.h must be included before.
//
// T is the type in memory, C the type multiplied (gemm.h): float, or BFloat16 with depth in pairs. A packed B is
// [depth / pair][columns rounded up to 16][pair], a packed A is [rows][depth rounded up to a pair]; what is added is zero.

template <typename C>
constexpr int64_t kPair = sizeof(C) == 2 ? 2 : 1;

template <int Step, int... I>
inline void butterfly(vf* r, std::integer_sequence<int, I...>) {
  constexpr vi low = {((I & Step) ? kLanes + I - Step : I)...};
  constexpr vi high = {((I & Step) ? kLanes + I : I + Step)...};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const vf a = r[i], b = r[i + Step];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + Step] = __builtin_shuffle(a, b, high);
  }
}

// Transposes kLanes vectors.
inline void transpose(vf* r) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
#if SK_LANES == 16
  butterfly<8>(r, lanes);
#endif
#if SK_LANES >= 8
  butterfly<4>(r, lanes);
#endif
  butterfly<2>(r, lanes);
  butterfly<1>(r, lanes);
}

// dst[c][r] = source(r, c) for 32-bit units; writes rows up to the next multiple of kLanes, as zeros.
// `load_row(r, c, n)` gives the n <= kLanes units from column c of row r.
template <typename LoadRow>
inline void pack_transposed(LoadRow load_row, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    const int nr = std::min<int64_t>(kLanes, rows - r0);
    for (int64_t c0 = 0; c0 < cols; c0 += kLanes) {
      const int nc = std::min<int64_t>(kLanes, cols - c0);
      vf t[kLanes];
      for (int i = 0; i < kLanes; ++i) t[i] = i < nr ? load_row(r0 + i, c0, nc) : vf{};
      transpose(t);
      for (int j = 0; j < nc; ++j) store(dst + (c0 + j) * ldd + r0, t[j]);
    }
  }
}

template <typename T>
inline vf load_some(const T* p, int n) {
  return n == kLanes ? load(p) : load_first(p, n);
}

// n pairs of 16-bit numbers as 32-bit units; the last number is missing when `odd`.
inline vf load_pairs(const c10::BFloat16* p, int n, bool odd) {
  if (n == kLanes && !odd) return load((const float*)p);
  c10::BFloat16 buffer[2 * kLanes] = {};
  std::memcpy((void*)buffer, p, (2 * n - odd) * sizeof(c10::BFloat16));
  return load((const float*)buffer);
}

// Two rows of n 16-bit numbers, interleaved to 32-bit units; `second` may be null for zeros.
inline vf interleave(const c10::BFloat16* first, const c10::BFloat16* second, int n) {
  const vu32 low = (vu32)load_some(first, n) >> 16;
  const vu32 high = second ? (vu32)load_some(second, n) : vu32{};
  return (vf)(low | high);
}

// Rounds by the CPU's own instruction where it has one; three times the instructions otherwise (simd-inl.h).
template <typename T>
inline void store_rounded(T* p, vf v, [[maybe_unused]] bool has_bf16) {
#if defined(SK_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (has_bf16) {
      __m256i halves;
      asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
      _mm256_storeu_si256((__m256i*)p, halves);
      return;
    }
  }
#endif
  store(p, v);
}

using vu16x2 = uint16_t __attribute__((vector_size(4 * SK_LANES)));  // 2 * kLanes numbers of 16 bits

// Two rows of 2 * kLanes 16-bit numbers, interleaved.
template <int... I>
inline void interleave_whole(const c10::BFloat16* first, const c10::BFloat16* second, float* dst,
                             std::integer_sequence<int, I...>) {
  constexpr vu16x2 low = {((I & 1) * 2 * kLanes + I / 2)...};
  constexpr vu16x2 high = {((I & 1) * 2 * kLanes + kLanes + I / 2)...};
  vu16x2 a, b;
  std::memcpy(&a, first, sizeof(a));
  std::memcpy(&b, second, sizeof(b));
  store(dst, (vf)__builtin_shuffle(a, b, low));
  store(dst + kLanes, (vf)__builtin_shuffle(a, b, high));
}

template <typename C, typename T>
inline void pack_b(Matrix<T> b, int64_t depth, int64_t cols, C* dst, int64_t ldd) {
  float* units = (float*)dst;
  if constexpr (kPair<C> == 1) {
    if (b.col == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t j = 0; j < cols; j += kLanes) {
          store(units + k * ldd + j, load_some(b.at(k, j), std::min<int64_t>(kLanes, cols - j)));
        }
      }
    } else {
      pack_transposed([&](int64_t r, int64_t c, int n) { return load_some(b.at(c, r), n); }, cols, depth, units, ldd);
    }
  } else {
    const int64_t pairs = (depth + 1) / 2;
    if (b.col == 1) {
      for (int64_t k = 0; k < pairs; ++k) {
        const T *first = b.at(2 * k, 0), *second = 2 * k + 1 < depth ? b.at(2 * k + 1, 0) : nullptr;
        int64_t j = 0;
        for (; second && j + 2 * kLanes <= cols; j += 2 * kLanes) {
          interleave_whole(first + j, second + j, units + k * ldd + j, std::make_integer_sequence<int, 2 * kLanes>{});
        }
        for (; j < cols; j += kLanes) {
          const int n = std::min<int64_t>(kLanes, cols - j);
          store(units + k * ldd + j, interleave(first + j, second ? second + j : nullptr, n));
        }
      }
    } else {
      pack_transposed(
          [&](int64_t r, int64_t c, int n) { return load_pairs(b.at(2 * c, r), n, 2 * (c + n) > depth); }, cols, pairs,
          units, ldd);
    }
  }
}

// `lda` counts elements of C and is at least the depth rounded up to 16 pairs when a is stored by columns.
template <typename C, typename T>
inline void pack_a(Matrix<T> a, int64_t rows, int64_t depth, C* dst, int64_t lda) {
  if (a.col == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (std::is_same_v<C, T>) {
        std::memcpy((void*)(dst + i * lda), a.at(i, 0), depth * sizeof(C));
        if (depth % kPair<C>) dst[i * lda + depth] = 0;
      } else {
        int64_t k = 0;
        for (; k + kLanes <= depth; k += kLanes) store(dst + i * lda + k, load(a.at(i, k)));
        if (k < depth) store_first(dst + i * lda + k, load_first(a.at(i, k), depth - k), depth - k);
      }
    }
  } else if constexpr (kPair<C> == 1) {
    pack_transposed([&](int64_t r, int64_t c, int n) { return load_some(a.at(c, r), n); }, depth, rows, (float*)dst, lda);
  } else {
    pack_transposed(
        [&](int64_t r, int64_t c, int n) {
          return interleave(a.at(c, 2 * r), 2 * r + 1 < depth ? a.at(c, 2 * r + 1) : nullptr, n);
        },
        (depth + 1) / 2, rows, (float*)dst, lda / 2);
  }
}

// Row tile by panel products: for each tile (rows[i], cols[j]) sums a(row, k) b(k, col) over `depth` and hands the float tile,
// row-major with leading dimension kTileCols, to epilogue(rows[i], cols[j], tile). B is packed in groups of panels that stay in
// cache, or read where it lies (`b_in_place`: float, b.col == 1; pays when there are few rows). A is read where it lies when
// its type and layout allow it.
template <typename C, typename TA, typename TB, typename Epilogue>
void gemm(const std::vector<Range>& rows, Matrix<TA> a, const std::vector<Range>& cols, Matrix<TB> b,
          const std::vector<Depth>& depth, bool b_in_place, Epilogue epilogue) {
  constexpr int64_t pair = kPair<C>;
  int64_t packed_depth = 0;
  bool a_in_place = std::is_same_v<C, TA> && a.col == 1;
  for (const Depth& d : depth) {
    packed_depth += round_up(d.size, pair);
    a_in_place &= d.size % pair == 0;
  }
  const int64_t panel_size = packed_depth * kTileCols;
  const int64_t packed_lda = packed_depth + 16 * pair;
  const int64_t group = b_in_place ? cols.size() : std::max<int64_t>(1, kCachedBytes / (panel_size * sizeof(C)));
  for (int64_t first = 0; first < static_cast<int64_t>(cols.size()); first += group) {
    const int64_t panels = std::min<int64_t>(group, cols.size() - first);
    C* packed_b = nullptr;
    if (!b_in_place) {
      packed_b = static_cast<C*>(scratch(kScratchB, panels * panel_size * sizeof(C)));
      at::parallel_for(0, panels, 1 + (1 << 18) / panel_size, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const Range& col = cols[first + p];
          const int64_t ldb = round_up(col.size, 16);
          C* dst = packed_b + p * panel_size;
          for (const Depth& d : depth) {
            pack_b<C>(Matrix<TB>{b.at(d.b, col.full), b.row, b.col}, d.size, col.size, dst, ldb);
            dst += round_up(d.size, pair) * ldb;
          }
        }
      });
    }
    const int64_t tiles = rows.size();
    const int64_t splits = std::min<int64_t>(panels, (at::get_num_threads() + tiles - 1) / tiles);
    const int64_t flops = 2 * kTileRows * panel_size * panels / splits;
    at::parallel_for(0, tiles * splits, 1 + (1 << 20) / flops, [&](int64_t begin, int64_t end) {
      float* tile = static_cast<float*>(scratch(kScratchC, kTileRows * kTileCols * sizeof(float)));
      C* packed_a = a_in_place ? nullptr : static_cast<C*>(scratch(kScratchA, kTileRows * packed_lda * sizeof(C)));
      for (int64_t task = begin; task < end; ++task) {
        const Range& row = rows[task / splits];
        const int64_t p_begin = panels * (task % splits) / splits, p_end = panels * (task % splits + 1) / splits;
        if (!a_in_place) {
          C* dst = packed_a;
          for (const Depth& d : depth) {
            pack_a<C>(Matrix<TA>{a.at(row.full, d.a), a.row, a.col}, row.size, d.size, dst, packed_lda);
            dst += round_up(d.size, pair);
          }
        }
        for (int64_t p = p_begin; p < p_end; ++p) {
          const Range& col = cols[first + p];
          const int64_t width = b_in_place ? col.size : round_up(col.size, 16);
          const C *a_next = packed_a, *b_next = b_in_place ? nullptr : packed_b + p * panel_size;
          for (size_t s = 0; s < depth.size(); ++s) {
            const Depth& d = depth[s];
            const int64_t k = round_up(d.size, pair);
            if constexpr (std::is_same_v<C, TA>) {
              if (a_in_place) a_next = a.at(row.full, d.a);
            }
            int64_t ldb = width;
            if constexpr (std::is_same_v<C, TB>) {
              if (b_in_place) b_next = b.at(d.b, col.full), ldb = b.row;
            }
            tile_gemm(row.size, width, k, a_next, a_in_place ? a.row : packed_lda, b_next, ldb, tile, kTileCols, s > 0);
            a_next += k;
            b_next += k * width;
          }
          epilogue(row, col, tile);
        }
      }
      if constexpr (pair == 2) release_matrix_unit();
    });
  }
}
