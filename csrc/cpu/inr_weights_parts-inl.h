// The pieces of inr_weights: packed networks, first-layer tables, the element-wise parts on blocks of a tile.

// One network, padded to whole panels with zeros and laid out for the products.
template <typename T>
struct Network {
  int64_t mlp = -1;
  Buffer<float> w_in, b_in, b_hidden, w_out, b_out;
  Buffer<T> forward, backward, w_out_t, staged;

  void pack(const InrPlan& p, int64_t index, bool with_backward) {
    if (mlp == index) return;
    mlp = index;
    const int64_t h = p.hidden, hp = p.padded, d = p.depth;
    const auto zeros = [](auto& buffer, int64_t size) {
      buffer.resize(size);
      std::memset(static_cast<void*>(buffer.data()), 0, size * sizeof(buffer[0]));
    };
    pack_first(p);
    zeros(b_in, hp);
    std::copy_n(p.b_in + mlp * h, h, b_in.data());
    zeros(b_hidden, d * hp);
    for (int64_t k = 0; k < d; ++k) std::copy_n(p.b_hidden + (mlp * d + k) * h, h, b_hidden.data() + k * hp);
    forward.resize(d * hp * hp);
    if (with_backward) backward.resize(d * hp * hp);
    for (int64_t k = 0; k < d; ++k) {
      const T* w = static_cast<const T*>(p.w_hidden) + (mlp * d + k) * h * h;
      if (h != hp) {
        zeros(staged, hp * hp);
        for (int64_t i = 0; i < h; ++i) std::copy_n(w + i * h, h, staged.data() + i * hp);
        w = staged.data();
      }
      pack_panels(w, hp, true, forward.data() + k * hp * hp);
      if (with_backward) pack_panels(w, hp, false, backward.data() + k * hp * hp);
    }
    zeros(w_out_t, hp * p.padded_out + kPanel * kUnit<T>);  // the products read whole vectors
    for (int64_t o = 0; o < p.outputs; ++o) {
      const float* row = p.w_out + (mlp * p.outputs + o) * h;
      for (int64_t i = 0; i < h; ++i) {
        w_out_t[(i / kUnit<T> * p.padded_out + o) * kUnit<T> + i % kUnit<T>] = static_cast<T>(row[i]);
      }
    }
    zeros(b_out, p.padded_out);
    std::copy_n(p.b_out + mlp * p.outputs, p.outputs, b_out.data());
    if (!with_backward) return;
    zeros(w_out, p.outputs * hp);
    for (int64_t o = 0; o < p.outputs; ++o) std::copy_n(p.w_out + (mlp * p.outputs + o) * h, h, w_out.data() + o * hp);
  }

  // Transposed, the numbers of an axis together.
  void pack_first(const InrPlan& p) {
    const int64_t h = p.hidden, hp = p.padded, x = p.encoded();
    std::vector<float*> rows(p.inputs);
    w_in.resize(kInrAxes * x * hp);
    if (h != hp) std::memset(w_in.data(), 0, kInrAxes * x * hp * sizeof(float));
    for (int64_t axis = 0; axis < kInrAxes; ++axis) {
      for (int64_t t = 0; t < x; ++t) rows[p.column(axis, t)] = w_in.data() + (axis * x + t) * hp;
    }
    const T* source = static_cast<const T*>(p.w_in) + mlp * h * p.inputs;
    for (int64_t j = 0; j < h; j += kLanes) {
      for (int64_t e = 0; e < p.inputs; e += kLanes) {
        const int64_t columns = std::min<int64_t>(kLanes, p.inputs - e), count = std::min<int64_t>(kLanes, h - j);
        alignas(64) float block[kLanes * kLanes] = {}, turned[kLanes * kLanes];
        for (int64_t i = 0; i < count; ++i) {
          const T* from = source + (j + i) * p.inputs + e;
          store(block + i * kLanes, columns == kLanes ? load(from) : load_first(from, columns));
        }
        transpose_words(block, kLanes, kLanes, kLanes, turned, kLanes);
        for (int64_t c = 0; c < columns; ++c) store(rows[e + c] + j, load(turned + c * kLanes));
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

  template <typename T>
  void build(const InrPlan& p, const InrJob& job, const Network<T>& net, int64_t sample, int64_t row_begin,
             int64_t row_end) {
    const int64_t x = p.encoded(), hp = p.padded;
    first = row_begin, rows = row_end - row_begin, cols = job.cols;
    a.resize(rows * hp), b.resize(cols * hp);
    encoded_a.resize(rows * x), encoded_b.resize(cols * x), encoded_scalar.resize(kInrAxes * x);
    const auto offset = [&](int64_t axis, int64_t index) {
      return p.noise == InrNoise::kNone ? 0.0f : InrOffsets(p.seed, sample, job.tensor, axis, p.limit)(index);
    };
    for (int64_t i = 0; i < rows; ++i) {
      encode(p, inr_value(p, job, 1, first + i, offset(1, first + i)), encoded_a.data() + i * x);
    }
    for (int64_t i = 0; i < cols; ++i) encode(p, inr_value(p, job, 2, i, offset(2, i)), encoded_b.data() + i * x);
    const float* w_in = net.w_in.data();
    product<float>(rows, hp, {x, encoded_a.data(), x, 1, w_in + x * hp, hp, a.data(), hp, false});
    product<float>(cols, hp, {x, encoded_b.data(), x, 1, w_in + 2 * x * hp, hp, b.data(), hp, false});
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

// What a hidden layer keeps for backward: the activation's output or, where the derivative needs it, its input. Rows of
// `columns` valid numbers; of rows from `count` on, nothing.
template <typename T>
struct Kept {
  T* data = nullptr;
  int64_t row = 0, columns = 0, count = 0;
  void put(int64_t i, int64_t j, vf v) const {
    if (i >= count || j >= columns) return;
    if (columns - j >= kLanes) {
      store_rounded(data + i * row + j, v);
    } else {
      store_first(data + i * row + j, v, columns - j);
    }
  }
  vf get(int64_t i, int64_t j) const {
    if (i >= count || j >= columns) return splat(0.0f);
    return columns - j >= kLanes ? load(data + i * row + j) : load_first(data + i * row + j, columns - j);
  }
  Kept at(int64_t layer, int64_t step) const { return {data ? data + layer * step : nullptr, row, columns, count}; }
};

// First layer of `count` coordinates from n0, zeros up to `padded` rows. `first` (may be null) receives what its
// derivative needs.
template <Activation act, typename T>
void first_layer(const Tables& t, int64_t n0, int64_t count, int64_t padded, int64_t hp, const float* dense,
                 const Activations<T>& to, float* first) {
  const int64_t row = Activations<T>::row(hp);
  int64_t r = 0, c = 0;
  if (!dense) r = n0 / t.cols - t.first, c = n0 % t.cols;
  for (int64_t i = 0; i < padded; i += 2) {
    const float *a[2] = {}, *b[2] = {};
    for (int k = 0; k < 2; ++k) {
      if (i + k >= count) continue;
      a[k] = dense ? dense + (i + k) * row : t.a.data() + r * hp;
      b[k] = dense ? nullptr : t.b.data() + c * hp;
      if (!dense && ++c == t.cols) c = 0, ++r;
    }
    for (int64_t j = 0; j < hp; j += kLanes) {
      vf out[2];
      for (int k = 0; k < 2; ++k) {
        vf z = a[k] ? load(a[k] + j) : splat(0.0f);
        if (b[k]) z += load(b[k] + j);
        out[k] = a[k] ? activate<act>(z) : z;
        if (first) store(first + (i + k) * row + j, derivative_uses_output(act) ? out[k] : z);
      }
      to.write(i, j, out[0], out[1]);
    }
  }
}

// A block of kRows rows from i0 and kPanel columns from j0 of h_out = h_in + s * act(z + bias). z (kRows, kPanel).
template <Activation act, typename T>
void residual_block(const float* z, const float* bias, float s, const float* h_in, const Activations<T>& to,
                    const Kept<T>& kept, int64_t i0, int64_t j0) {
  const int64_t row = Activations<T>::row(to.size);
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    const vf b = load(bias + j0 + j);
    for (int64_t i = 0; i < kRows; i += 2) {
      vf h[2];
      for (int k = 0; k < 2; ++k) {
        const vf v = load(z + (i + k) * kPanel + j) + b;
        const vf r = activate<act>(v);
        h[k] = load(h_in + (i0 + i + k) * row + j0 + j) + s * r;
        if (kept.data) kept.put(i0 + i + k, j0 + j, derivative_uses_output(act) ? r : v);
      }
      to.write(i0 + i, j0 + j, h[0], h[1]);
    }
  }
}

// The same from what forward kept.
template <Activation act, typename T>
void restored_layer(const Kept<T>& kept, float s, const float* h_in, const Activations<T>& to, int64_t padded) {
  const int64_t row = Activations<T>::row(to.size);
  for (int64_t i = 0; i < padded; i += 2) {
    for (int64_t j = 0; j < to.size; j += kLanes) {
      vf h[2];
      for (int k = 0; k < 2; ++k) {
        const vf v = kept.get(i + k, j);
        h[k] = load(h_in + (i + k) * row + j) + s * (derivative_uses_output(act) ? v : activate<act>(v));
      }
      to.write(i, j, h[0], h[1]);
    }
  }
}

// A block of dz = s * dh * act'; returns the sum of dh * act, adds the column sums of dz to db.
template <Activation act, typename T>
float residual_block_backward(const float* dh, const Kept<T>& kept, float s, const Activations<T>& dz, float* db,
                              int64_t i0, int64_t j0) {
  const int64_t row = Activations<T>::row(dz.size);
  vf total = splat(0.0f);
  for (int64_t j = j0; j < j0 + kPanel; j += kLanes) {
    vf column = splat(0.0f);
    for (int64_t i = i0; i < i0 + kRows; i += 2) {
      vf g[2] = {splat(0.0f), splat(0.0f)};
      for (int k = 0; k < 2 && i + k < kept.count; ++k) {
        const vf d = load(dh + (i + k) * row + j), v = kept.get(i + k, j);
        total += d * (derivative_uses_output(act) ? v : activate<act>(v));
        g[k] = s * d * activation_derivative<act>(v);
        column += g[k];
      }
      dz.write(i, j, g[0], g[1]);
    }
    store(db + j, load(db + j) + column);
  }
  return sum(total);
}
