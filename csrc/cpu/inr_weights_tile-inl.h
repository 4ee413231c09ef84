// Products of inr_weights in registers: kRows rows by kPanel columns at a time. A row is a coordinate in the forward
// direction and for the gradient of activations, a hidden unit for the gradient of weights.
//
// Operands are counted in units of 32 bits: a float, or a pair of bfloat16 that belong to neighbouring steps of the
// sum.

#if defined(SK_AVX512)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;
static_assert(kInrTile % kRows == 0 && kRows % 2 == 0);

template <typename T>
constexpr int64_t kUnit = 4 / sizeof(T);  // numbers in a unit

template <typename T>
inline vf broadcast_unit(const T* p) {
  int32_t unit;
  std::memcpy(&unit, p, sizeof(unit));
  return (vf)splat_int(unit);
}
template <typename T>
inline vf load_units(const T* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vf add_product(vf sum, vf a, vf b, float) { return sum + a * b; }
#if defined(SK_BF16)
inline vf add_product(vf sum, vf a, vf b, c10::BFloat16) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// What a product reads and writes. `a` has a unit every a_step for the next step and every a_row for the next row, `b`
// a row of units every b_step.
template <typename T>
struct Product {
  int64_t steps;
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  bool add;
};

// c (P, V * kLanes) = or += a (P, steps) b (steps, V * kLanes)
template <typename T, int P, int V>
void product_tile(const Product<T>& t) {
  constexpr int64_t u = kUnit<T>;
  vf sums[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[p][v] = t.add ? load(t.c + p * t.c_row + v * kLanes) : vf{};
  }
  const T *a = t.a, *b = t.b;
  const int64_t a_row = t.a_row * u, a_step = t.a_step * u, b_step = t.b_step * u;
  for (int64_t k = 0; k < t.steps; ++k, a += a_step, b += b_step) {
    vf right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load_units(b + v * kLanes * u);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const vf left = broadcast_unit(a + p * a_row);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[p][v] = add_product(sums[p][v], left, right[v], T{});
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(t.c + p * t.c_row + v * kLanes, sums[p][v]);
  }
}

template <typename T, int V, int... P>
void product_of_rows(int rows, const Product<T>& t, std::integer_sequence<int, P...>) {
  using Tile = void (*)(const Product<T>&);
  static constexpr Tile tiles[] = {&product_tile<T, P + 1, V>...};
  tiles[rows - 1](t);
}

// c (rows, columns) = or += a b for any number of rows; columns are rounded up to whole vectors.
template <typename T>
void product(int64_t rows, int64_t columns, Product<T> t) {
  constexpr auto counts = std::make_integer_sequence<int, kRows>();
  constexpr int64_t u = kUnit<T>;
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Product<T> part = t;
      part.a += i * t.a_row * u;
      part.b += j * u;
      part.c += i * t.c_row + j;
      const int count = static_cast<int>(std::min<int64_t>(kRows, rows - i));
      columns - j > kLanes ? product_of_rows<T, 2>(count, part, counts) : product_of_rows<T, 1>(count, part, counts);
    }
  }
}

// y (cols, ld_y) <- x (rows, ld_x) transposed, words of 32 bits; rows and cols are multiples of kLanes.
inline void transpose_words(const float* x, int64_t rows, int64_t cols, int64_t ld_x, float* y, int64_t ld_y) {
  constexpr int stages = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
  vi low[stages], high[stages];  // lane permutations that swap blocks of 2^stage lanes between two vectors
  for (int stage = 0; stage < stages; ++stage) {
    const int distance = 1 << stage;
    for (int l = 0; l < kLanes; ++l) {
      low[stage][l] = l & distance ? kLanes + l - distance : l;
      high[stage][l] = l & distance ? kLanes + l : l + distance;
    }
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      vf v[kLanes];
      for (int l = 0; l < kLanes; ++l) v[l] = load(x + (i + l) * ld_x + j);
#pragma GCC unroll 4
      for (int stage = 0; stage < stages; ++stage) {
        const int distance = 1 << stage;
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          if (l & distance) continue;
          const vf p = v[l], q = v[l + distance];
          v[l] = __builtin_shuffle(p, q, low[stage]);
          v[l + distance] = __builtin_shuffle(p, q, high[stage]);
        }
      }
      for (int l = 0; l < kLanes; ++l) store(y + (j + l) * ld_y + i, v[l]);
    }
  }
}

#if defined(SK_BF16)
inline void store_pair_of_rows(c10::BFloat16* y, __m512i both) {  // interleaved: (even[0], odd[0], even[1], ...)
  const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
  const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
  _mm512_storeu_si512(y, _mm512_or_si512(first, second));
}
#endif

// The hidden layers' weights in panels of kPanel columns: y[panel][step][column], a unit each.
// Forward multiplies by the transposed weight, backward by the weight.
template <typename T>
void pack_panels(const T* w, int64_t size, bool transposed, T* y) {
  const int64_t units = size / kUnit<T>;
  for (int64_t j = 0; j < size; j += kPanel, y += size * kPanel) {
    if (transposed) {
      transpose_words(reinterpret_cast<const float*>(w + j * size), kPanel, units, units, reinterpret_cast<float*>(y),
                      kPanel);
      continue;
    }
    for (int64_t k = 0; k < units; ++k) {
      for (int v = 0; v < kPanel; v += kLanes) {
        T* to = y + (k * kPanel + v) * kUnit<T>;
        const T* row = w + k * kUnit<T> * size + j + v;
        if constexpr (std::is_same_v<T, float>) {
          store(to, load(row));
        } else {
          const __m256i even = _mm256_loadu_si256((const __m256i*)row);
          const __m256i odd = _mm256_loadu_si256((const __m256i*)(row + size));
          store_pair_of_rows(to, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
        }
      }
    }
  }
}

inline void store_rounded(float* p, vf v) { store(p, v); }
#if defined(SK_BF16)
inline void store_rounded(c10::BFloat16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

// Activations of a tile as the products read them: `h` in float32, and in 16 bits `operand` (row by row) and `pairs`
// (pairs of rows interleaved, for the gradient of weights). Any may be null.
template <typename T>
struct Activations {
  float* h = nullptr;
  T* operand = nullptr;
  T* pairs = nullptr;
  int64_t size = 0;  // hidden units, whole panels

  // Rows do not start a multiple of 4 KiB apart: they would share their lines of first-level cache.
  static int64_t row(int64_t size) { return size + 16; }
  static int64_t operand_row(int64_t size) { return size + 32; }

  // Vectors at column j of rows i and i + 1.
  void write(int64_t i, int64_t j, vf even, vf odd) const {
    if (h) {
      store(h + i * row(size) + j, even);
      store(h + (i + 1) * row(size) + j, odd);
    }
#if defined(SK_BF16)
    if constexpr (!std::is_same_v<T, float>) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      if (operand) {
        T* to = operand + i * operand_row(size) + j;
        _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i*)(to + operand_row(size)), _mm512_extracti64x4_epi64(both, 1));
      }
      if (pairs) store_pair_of_rows(pairs + (i / 2 * row(size) + j) * 2, both);
    }
#endif
  }

  // As left operand of a product over hidden units; as left or right operand of one over coordinates.
  const T* left() const {
    if constexpr (std::is_same_v<T, float>)
      return h;
    else
      return operand;
  }
  int64_t left_row() const { return std::is_same_v<T, float> ? row(size) : operand_row(size) / 2; }
  const T* over_rows() const {
    if constexpr (std::is_same_v<T, float>)
      return h;
    else
      return pairs;
  }
};
