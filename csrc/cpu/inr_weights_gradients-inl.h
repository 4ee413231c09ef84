// Gradients of one network: cleared, and written out in the parameters' own order and dtype. Those of the hidden
// weights are summed in the result itself where it is float32, without padding and no other thread's.

inline void clear_gradients(const InrPlan& p, int64_t mlp, float* result, InrGradients& g) {
  g.mlp = mlp;
  const int64_t hp = p.padded;
  const auto zeros = [](Buffer<float>& buffer, int64_t size) {
    buffer.resize(size);
    std::memset(buffer.data(), 0, size * sizeof(float));
  };
  zeros(g.w_in, kInrAxes * p.encoded() * hp);
  zeros(g.b_in, hp);
  if (!result) g.w_hidden.resize(p.depth * hp * hp);
  g.hidden = result ? result : g.w_hidden.data();
  std::memset(g.hidden, 0, p.depth * hp * hp * sizeof(float));
  zeros(g.b_hidden, p.depth * hp);
  zeros(g.w_out, p.outputs * hp);
  zeros(g.b_out, p.padded_out);
  g.skip.assign(p.depth, 0.0);
}

template <typename T>
void round_rows(const float* from, int64_t rows, int64_t columns, int64_t from_row, T* to) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += columns) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store_rounded(to + j, load(from + j));
    for (; j < columns; ++j) to[j] = static_cast<T>(from[j]);
  }
}

template <typename T>
void flush_gradients(const InrPlan& p, const InrGradients& g, const InrGradientOutputs& out) {
  const int64_t h = p.hidden, hp = p.padded, x = p.encoded(), d = p.depth, m = g.mlp;
  const auto at = [](void* tensor, int64_t offset) { return static_cast<T*>(tensor) + offset; };
  std::vector<const float*> columns(round_up(p.inputs, kLanes), g.b_in.data());  // of w_in, each hp numbers
  for (int64_t axis = 0; axis < kInrAxes; ++axis) {
    for (int64_t t = 0; t < x; ++t) columns[p.column(axis, t)] = g.w_in.data() + (axis * x + t) * hp;
  }
  T* w_in = at(out.w_in, m * h * p.inputs);
  alignas(64) float block[kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t j = 0; j < h; j += kLanes) {
    for (int64_t e = 0; e < p.inputs; e += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c) store(block + c * kLanes, load(columns[e + c] + j));
      transpose_words(block, kLanes, kLanes, kLanes, turned, kLanes);
      const int64_t count = std::min<int64_t>(kLanes, p.inputs - e);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, h - j); ++i) {
        T* to = w_in + (j + i) * p.inputs + e;
        count == kLanes ? store_rounded(to, load(turned + i * kLanes))
                        : store_first(to, load(turned + i * kLanes), count);
      }
    }
  }
  round_rows(g.b_in.data(), 1, h, hp, at(out.b_in, m * h));
  for (int64_t k = 0; k < d; ++k) {
    if (g.hidden == g.w_hidden.data()) {
      round_rows(g.hidden + k * hp * hp, h, h, hp, at(out.w_hidden, (m * d + k) * h * h));
    }
    at(out.skip, m * d)[k] = static_cast<T>(static_cast<float>(g.skip[k]));
  }
  round_rows(g.b_hidden.data(), d, h, hp, at(out.b_hidden, m * d * h));
  round_rows(g.w_out.data(), p.outputs, h, hp, at(out.w_out, m * p.outputs * h));
  round_rows(g.b_out.data(), 1, p.outputs, p.padded_out, at(out.b_out, m * p.outputs));
}
