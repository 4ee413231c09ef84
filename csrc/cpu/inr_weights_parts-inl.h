// The pieces of inr_weights: packed networks, first-layer tables, elementwise epilogues, transposes.

template <typename T>
inline void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
}

// Position of element (k, n) of the right operand of gemm: plain rows, or pairs of rows interleaved for 16 bits.
template <typename T>
inline int64_t operand_at(int64_t k, int64_t n, int64_t ld) {
  return std::is_same_v<T, float> ? k * ld + n : (k / 2 * ld + n) * 2 + k % 2;
}

// y (k, ld) <- x (n, ld_x) transposed, as right operand of gemm.
template <typename T, typename S>
void pack_transposed(const S* x, int64_t n, int64_t k, int64_t ld_x, T* y, int64_t ld) {
  constexpr int64_t block = 32;
  for (int64_t n0 = 0; n0 < n; n0 += block) {
    for (int64_t k0 = 0; k0 < k; k0 += block) {
      for (int64_t i = k0; i < std::min(k, k0 + block); ++i) {
        for (int64_t j = n0; j < std::min(n, n0 + block); ++j) {
          y[operand_at<T>(i, j, ld)] = static_cast<T>(x[j * ld_x + i]);
        }
      }
    }
  }
}

// One network, padded to whole vectors with zeros and laid out for gemm.
template <typename T>
struct Network {
  int64_t mlp = -1;
  Buffer<float> w_in, b_in, b_hidden, w_out, b_out;
  Buffer<T> forward, backward, w_out_t;

  void pack(const InrPlan& p, int64_t index, bool with_backward) {
    if (mlp == index) return;
    mlp = index;
    const int64_t h = p.hidden, hp = p.padded, x = p.encoded(), d = p.depth;
    const auto zeros = [](auto& buffer, int64_t size) {
      buffer.resize(size);
      std::memset(static_cast<void*>(buffer.data()), 0, size * sizeof(buffer[0]));
    };
    zeros(w_in, kInrAxes * x * hp);
    const float* source = p.w_in + mlp * h * p.inputs;
    for (int64_t j0 = 0; j0 < h; j0 += 16) {
      for (int64_t axis = 0; axis < kInrAxes; ++axis) {
        for (int64_t t = 0; t < x; ++t) {
          const float* column = source + p.column(axis, t);
          for (int64_t j = j0; j < std::min(h, j0 + 16); ++j) w_in[(axis * x + t) * hp + j] = column[j * p.inputs];
        }
      }
    }
    zeros(b_in, hp);
    std::copy_n(p.b_in + mlp * h, h, b_in.data());
    zeros(b_hidden, d * hp);
    for (int64_t k = 0; k < d; ++k) std::copy_n(p.b_hidden + (mlp * d + k) * h, h, b_hidden.data() + k * hp);
    const T* hidden = static_cast<const T*>(p.w_hidden) + mlp * d * h * h;
    if (h == hp) {
      forward.resize(d * hp * hp);
    } else {
      zeros(forward, d * hp * hp);
    }
    for (int64_t k = 0; k < d; ++k) pack_transposed(hidden + k * h * h, h, h, h, forward.data() + k * hp * hp, hp);
    zeros(w_out_t, hp * p.padded_out);
    pack_transposed(p.w_out + mlp * p.outputs * h, p.outputs, h, h, w_out_t.data(), p.padded_out);
    zeros(b_out, p.padded_out);
    std::copy_n(p.b_out + mlp * p.outputs, p.outputs, b_out.data());
    if (!with_backward) return;
    zeros(w_out, p.outputs * hp);
    for (int64_t o = 0; o < p.outputs; ++o) std::copy_n(p.w_out + (mlp * p.outputs + o) * h, h, w_out.data() + o * hp);
    zeros(backward, d * hp * hp);
    for (int64_t k = 0; k < d; ++k) {
      for (int64_t i = 0; i < h; ++i) {
        const T* row = hidden + (k * h + i) * h;
        T* to = backward.data() + k * hp * hp;
        for (int64_t j = 0; j < h; ++j) to[operand_at<T>(i, j, hp)] = row[j];
      }
    }
  }
};

// sin and cos to float32 accuracy for any float32 angle: reduced by pi / 2 in double.
inline void sincos(float angle, float& sine, float& cosine) {
  const double x = angle;
  const double shifted = x * 0.63661977236758134308 + 6755399441055744.0;  // rounds to an integer
  const double k = shifted - 6755399441055744.0;
  const double r = x - k * 1.57079632673412561417e+00 - k * 6.07710050650619224932e-11;
  int64_t quadrant;
  std::memcpy(&quadrant, &shifted, sizeof(quadrant));
  const double r2 = r * r;
  const double s = r * (1.0 + r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880)))));
  const double c = 1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 - r2 * (1.0 / 3628800)))));
  const double even = quadrant & 1 ? c : s, odd = quadrant & 1 ? s : c;
  sine = static_cast<float>(quadrant & 2 ? -even : even);
  cosine = static_cast<float>((quadrant + 1) & 2 ? -odd : odd);
}

inline void encode(const InrPlan& plan, float v, float* out) {
  out[0] = v;
  float frequency = static_cast<float>(M_PI);
  for (int64_t f = 0; f < plan.bands; ++f, frequency *= 2.0f) sincos(v * frequency, out[1 + 2 * f], out[2 + 2 * f]);
}

// The first layer of a job for one sample: z[o, i] = a[o] + b[i], for output rows from `first`.
struct Tables {
  int64_t first = 0, rows = 0, cols = 0;
  Buffer<float> a, b, encoded_a, encoded_b, encoded_scalar;

  static void multiply(const float* encoded, int64_t n, int64_t x, const float* w, int64_t hp, float* out) {
    for (int64_t i = 0; i < n; i += 64) {
      gemm(std::min<int64_t>(64, n - i), hp, x, encoded + i * x, x, w, hp, out + i * hp, hp, false);
    }
  }

  template <typename T>
  void build(const InrPlan& p, const InrJob& job, const Network<T>& net, int64_t sample, int64_t row_begin,
             int64_t row_end) {
    const int64_t x = p.encoded(), hp = p.padded;
    first = row_begin, rows = row_end - row_begin, cols = job.cols;
    const int64_t rows_p = round_up(rows, 16), cols_p = round_up(cols, 16);
    a.resize(rows_p * hp), b.resize(cols_p * hp);
    encoded_a.resize(rows_p * x), encoded_b.resize(cols_p * x), encoded_scalar.resize(kInrAxes * x);
    const auto offset = [&](int64_t axis, int64_t index) {
      return p.noise == InrNoise::kNone ? 0.0f : InrOffsets(p.seed, sample, job.tensor, axis, p.limit)(index);
    };
    std::memset(encoded_a.data(), 0, rows_p * x * sizeof(float));
    std::memset(encoded_b.data(), 0, cols_p * x * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
      encode(p, inr_value(p, job, 1, first + i, offset(1, first + i)), encoded_a.data() + i * x);
    }
    for (int64_t i = 0; i < cols; ++i) encode(p, inr_value(p, job, 2, i, offset(2, i)), encoded_b.data() + i * x);
    multiply(encoded_a.data(), rows_p, x, net.w_in.data() + x * hp, hp, a.data());
    multiply(encoded_b.data(), cols_p, x, net.w_in.data() + 2 * x * hp, hp, b.data());
    std::vector<float> c(net.b_in.data(), net.b_in.data() + hp);
    for (int64_t axis : {0, 3, 4, 5}) {
      float* e = encoded_scalar.data() + axis * x;
      encode(p, inr_value(p, job, axis, 0, offset(axis, 0)), e);
      for (int64_t t = 0; t < x; ++t) {
        const float* w = net.w_in.data() + (axis * x + t) * hp;
        for (int64_t j = 0; j < hp; ++j) c[j] += e[t] * w[j];
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < hp; ++j) a[i * hp + j] += c[j];
    }
  }
};

// y (cols, ld_y) <- x (rows, ld_x) transposed; rows and cols are multiples of 16.
template <typename T>
void transpose(const float* x, int64_t rows, int64_t cols, int64_t ld_x, T* y, int64_t ld_y) {
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

// y <- x in pairs of rows: the right operand of gemm whose rows are coordinates.
inline void pack_rows(const float* x, int64_t rows, int64_t ld, c10::BFloat16* y) {
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t j = 0; j < ld; j += kLanes) {
      c10::BFloat16 even[kLanes], odd[kLanes];
      store(even, load(x + i * ld + j));
      store(odd, load(x + (i + 1) * ld + j));
      vu16 e, o;
      std::memcpy(&e, even, sizeof(e));
      std::memcpy(&o, odd, sizeof(o));
      const vu32 both = __builtin_convertvector(e, vu32) | (__builtin_convertvector(o, vu32) << 16);
      std::memcpy(static_cast<void*>(y + i * ld + 2 * j), &both, sizeof(both));
    }
  }
}

template <typename T>
inline void store_valid(T* p, vf v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else if (n > 0) {
    store_first(p, v, n);
  }
}

// h <- act(first layer) for `count` coordinates from n0, zeros up to `padded` rows; z (may be null) receives its input.
template <Activation act>
void first_layer(const Tables& t, int64_t n0, int64_t count, int64_t padded, int64_t hp, const float* dense, float* h,
                 float* z) {
  int64_t row = 0, col = 0;
  if (!dense) row = n0 / t.cols - t.first, col = n0 % t.cols;
  for (int64_t i = 0; i < padded; ++i) {
    float* to = h + i * hp;
    if (i >= count) {
      std::memset(to, 0, hp * sizeof(float));
      if (z) std::memset(z + i * hp, 0, hp * sizeof(float));
      continue;
    }
    const float* a = dense ? dense + i * hp : t.a.data() + row * hp;
    const float* b = dense ? nullptr : t.b.data() + col * hp;
    for (int64_t j = 0; j < hp; j += kLanes) {
      const vf v = b ? load(a + j) + load(b + j) : load(a + j);
      store(to + j, activate<act>(v));
      if (z) store(z + i * hp + j, v);
    }
    if (!dense && ++col == t.cols) col = 0, ++row;
  }
}

// v = z + bias, r = act(v), h_out = h_in + s * r. Keeps r, or v where the derivative needs it, in `kept` and in
// `saved`.
template <Activation act, typename T>
void residual_layer(const float* z, const float* bias, float s, const float* h_in, float* h_out, T* operand,
                    float* kept, T* saved, int64_t saved_stride, int64_t hidden, int64_t count, int64_t padded,
                    int64_t hp) {
  for (int64_t i = 0; i < padded; ++i) {
    T* keep = saved && i < count ? saved + i * saved_stride : nullptr;
    for (int64_t j = 0; j < hp; j += kLanes) {
      const int64_t at = i * hp + j;
      const vf v = load(z + at) + load(bias + j);
      const vf r = activate<act>(v);
      const vf h = load(h_in + at) + s * r;
      const vf k = derivative_uses_output(act) ? r : v;
      store(h_out + at, h);
      if constexpr (!std::is_same_v<T, float>) store(operand + at, h);
      if (kept) store(kept + at, k);
      if (keep) store_valid(keep + j, k, hidden - j);
    }
  }
}

// dz = s * dh * act'; returns sum of dh * act, adds the column sums of dz to db.
template <Activation act, typename T>
double residual_layer_backward(const float* dh, const float* kept, float s, float* dz, T* dz_operand, float* db,
                               int64_t count, int64_t padded, int64_t hp) {
  double total = 0.0;
  for (int64_t i = 0; i < padded; ++i) {
    vf row = splat(0.0f);
    for (int64_t j = 0; j < hp; j += kLanes) {
      const int64_t at = i * hp + j;
      if (i >= count) {
        store(dz + at, splat(0.0f));
        if constexpr (!std::is_same_v<T, float>) store(dz_operand + at, splat(0.0f));
        continue;
      }
      const vf d = load(dh + at), k = load(kept + at);
      const vf r = derivative_uses_output(act) ? k : activate<act>(k);
      const vf g = s * d * activation_derivative<act>(k);
      row += d * r;
      store(dz + at, g);
      if constexpr (!std::is_same_v<T, float>) store(dz_operand + at, g);
      store(db + j, load(db + j) + g);
    }
    total += sum(row);
  }
  return total;
}
