// 3x3 convolution of stride 1 with bfloat16 products by Winograd's F(3x3, 3x3) and F(2x2, 3x3): 25 products of 5x5
// inputs make 3x3 outputs, which take 81 otherwise; 16 of 4x4 make 2x2 in place of 36. What is multiplied is rounded to
// bfloat16 after the transform, so that a larger tile costs bits: see deploy_winograd.cpp. Included by deploy-inl.h.

// One-dimensional transforms of F(2, 3), points 0, +-1 and infinity, and F(3, 3), points +-p, +-q and infinity.
template <int O>
inline void small_input(const vf* d, int step, vf* out, int out_step) {
  const vf d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  if constexpr (O == 2) {
    out[0] = d0 - d2;
    out[out_step] = d1 + d2;
    out[2 * out_step] = d2 - d1;
    out[3 * out_step] = d1 - d3;
  } else {
    constexpr float p = deploy::kSmallPointP, q = deploy::kSmallPointQ;
    const vf even_p = d2 - q * q * d0, odd_p = d3 - q * q * d1, even_q = d2 - p * p * d0, odd_q = d3 - p * p * d1;
    out[0] = odd_p + p * even_p;
    out[out_step] = odd_p - p * even_p;
    out[2 * out_step] = odd_q + q * even_q;
    out[3 * out_step] = odd_q - q * even_q;
    out[4 * out_step] = d[4 * step] - (p * p + q * q) * d2 + p * p * q * q * d0;
  }
}

template <int O>
inline void small_output(const vf* m, int step, vf* out, int out_step) {
  const vf m0 = m[0], m1 = m[step], m2 = m[2 * step], m3 = m[3 * step];
  if constexpr (O == 2) {
    out[0] = m0 + m1 + m2;
    out[out_step] = m1 - m2 - m3;
  } else {
    constexpr float p = deploy::kSmallPointP, q = deploy::kSmallPointQ;
    const vf sum_p = m0 + m1, sum_q = m2 + m3, difference_p = m0 - m1, difference_q = m2 - m3;
    out[0] = sum_p + sum_q;
    out[out_step] = p * difference_p + q * difference_q;
    out[2 * out_step] = m[4 * step] + p * p * sum_p + q * q * sum_q;
  }
}

// One vector of channels of a tile's inputs to `v`. Edge: rows and columns from `rows` and `columns` on are outside the
// padded image, and zeros.
template <typename T, int O, bool Edge>
inline void small_scatter_vector(const deploy::WinogradJob& job, const T* x, int64_t rows, int64_t columns, T* v) {
  constexpr int S = O + 2;
  alignas(64) static const T zeros[kLanes] = {};
  vf t[S * S];
#pragma GCC unroll 5
  for (int j = 0; j < S; ++j) {
    vf d[S];
#pragma GCC unroll 5
    for (int i = 0; i < S; ++i) {
      const T* from = x + i * job.x.row + j * job.x.pixel;
      d[i] = get(!Edge || (i < rows && j < columns) ? from : zeros);
    }
    small_input<O>(d, 1, t + j, S);
  }
#pragma GCC unroll 5
  for (int i = 0; i < S; ++i) {
    vf row[S];
    small_input<O>(t + i * S, 1, row, 1);
#pragma GCC unroll 5
    for (int j = 0; j < S; ++j) put(v + (i * S + j) * job.v_position, row[j]);
  }
}

// One tile's inputs of all channels to `v`.
template <typename T, int O>
void small_scatter(const deploy::WinogradJob& job, const T* x, int64_t rows, int64_t columns, T* v) {
  constexpr int S = O + 2;
  const bool whole = rows >= S && columns >= S;
  int64_t c = 0;
  if (whole) {
    for (; c + kLanes <= job.in_c; c += kLanes) small_scatter_vector<T, O, false>(job, x + c, rows, columns, v + c);
  } else {
    for (; c + kLanes <= job.in_c; c += kLanes) small_scatter_vector<T, O, true>(job, x + c, rows, columns, v + c);
  }
  if (c == job.in_c) return;
  // Part of a vector: through a copy whose other channels are zeros.
  T copy[S * S * kLanes];
  deploy::WinogradJob part = job;
  part.x.pixel = kLanes, part.x.row = S * kLanes;
  for (int i = 0; i < S; ++i) {
    for (int j = 0; j < S; ++j) {
      const bool inside = i < rows && j < columns;
      put(copy + (i * S + j) * kLanes,
          inside ? get_first(x + i * job.x.row + j * job.x.pixel + c, job.in_c - c) : vf{});
    }
  }
  small_scatter_vector<T, O, false>(part, copy, S, S, v + c);
}

// sums (tiles, P, V, lanes) = x (tiles, P, units) * w, and what `ahead` asks for, in equal parts.
template <typename T, int P, int V>
void small_products(const float* x, int64_t step, int64_t units, const float* w, int64_t vector_step, int64_t tiles,
                    TileEnd<T>& ahead, float* sums) {
  for (int64_t tile = 0; tile < tiles; ++tile, x += P * step, sums += P * V * kLanes) {
    vf acc[P][V];
#pragma GCC unroll 14
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[p][v] = vf{};
    }
    const float* weights = w;
    for (int64_t k = 0; k < units;) {
      int64_t stop = units;
      if (ahead.fetch_w) {
        stop = std::min<int64_t>(units, k + kLine / 4);
        const char* to = std::min(ahead.fetch_w + ahead.fetch_w_step, ahead.fetch_w_end);
        for (; ahead.fetch_w < to; ahead.fetch_w += kLine) fetch(ahead.fetch_w);
      }
      for (; k < stop; ++k, weights += kLanes) {
        vf b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load(weights + v * vector_step);
#pragma GCC unroll 14
        for (int p = 0; p < P; ++p) {
          const vf unit = splat(x[p * step + k]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[p][v] = multiply_add(acc[p][v], unit, b[v], T{});
        }
      }
    }
#pragma GCC unroll 14
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(sums + (p * V + v) * kLanes, acc[p][v]);
    }
  }
}

template <typename T>
using SmallProducts = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, TileEnd<T>&, float*);

template <typename T, int V, int P = 1>
SmallProducts<T> pick_small_pixels(int64_t pixels) {
  if constexpr (P >= tile_limit(V)) {
    return &small_products<T, P, V>;
  } else {
    return pixels == P ? &small_products<T, P, V> : pick_small_pixels<T, V, P + 1>(pixels);
  }
}
template <typename T>
SmallProducts<T> pick_small_products(int64_t vectors, int64_t pixels) {
  switch (vectors) {
    case 1:
      return pick_small_pixels<T, 1>(pixels);
    case 2:
      return pick_small_pixels<T, 2>(pixels);
    case 3:
      return pick_small_pixels<T, 3>(pixels);
    default:
      return pick_small_pixels<T, 4>(pixels);
  }
}

// The outputs of one tile and vector of channels, those inside the image and the channels, from its sums.
template <typename T, int O>
void small_finish(const deploy::WinogradJob& job, vf (&out)[O * O], const TileEnd<T>& end, int64_t rows,
                  int64_t columns, int n, const T* residual, T* y) {
  if (n == kLanes && !end.other) {
    const vf low = splat(end.low), high = splat(end.high);
#pragma GCC unroll 3
    for (int i = 0; i < O; ++i) {
      if (i >= rows) break;
#pragma GCC unroll 3
      for (int j = 0; j < O; ++j) {
        if (j >= columns) break;
        vf v = out[i * O + j];
        if (residual) v += get(residual + i * job.residual.row + j * job.residual.pixel);
        if (end.clamps) {
          v = v < low ? low : v;  // a NaN stays
          v = v > high ? high : v;
        }
        put(y + i * job.y.row + j * job.y.pixel, v);
      }
    }
    return;
  }
  for (int i = 0; i < std::min<int64_t>(O, rows); ++i) {
    for (int j = 0; j < std::min<int64_t>(O, columns); ++j) {
      finish(out[i * O + j], end, residual ? residual + i * job.residual.row + j * job.residual.pixel : nullptr,
             y + i * job.y.row + j * job.y.pixel, n);
    }
  }
}

// From the sums of one tile, `wide` vectors of channels from `channel` on, to its outputs.
template <typename T, int O>
void small_gather(const deploy::WinogradJob& job, const float* m, int64_t channel, int64_t wide, const TileEnd<T>& end,
                  int64_t rows, int64_t columns, const T* residual, T* y) {
  constexpr int S = O + 2;
  for (int64_t i = 0; i < wide; ++i, channel += kLanes, m += kLanes) {
    const vf bias = load(end.bias + channel);
    vf t[O * S], out[O * O];
#pragma GCC unroll 5
    for (int j = 0; j < S; ++j) {
      vf d[S];
#pragma GCC unroll 5
      for (int k = 0; k < S; ++k) d[k] = load(m + (k * S + j) * job.m_position);
      small_output<O>(d, 1, t + j, S);
    }
#pragma GCC unroll 3
    for (int k = 0; k < O; ++k) {
      small_output<O>(t + k * S, 1, out + k * O, 1);
#pragma GCC unroll 3
      for (int j = 0; j < O; ++j) out[k * O + j] += bias;
    }
    small_finish<T, O>(job, out, end, rows, columns, std::min<int64_t>(kLanes, job.out_c - channel),
                       residual ? residual + channel : nullptr, y + channel);
  }
}

// The tiles of all images one after the other.
struct SmallPlace {
  int64_t down, across, image, i, j;
  SmallPlace(int64_t down, int64_t across, int64_t tile)
      : down(down), across(across), image(tile / (down * across)), i(tile / across % down), j(tile % across) {}
  void next() {
    if (++j < across) return;
    j = 0;
    if (++i < down) return;
    i = 0, ++image;
  }
};

template <typename T, int O>
void small_winograd(const deploy::WinogradJob& job, const deploy::Places& at) {
  constexpr int64_t kPair = sizeof(float) / sizeof(T), kMatrices = (O + 2) * (O + 2);
  const int64_t vectors = (job.out_c + kLanes - 1) / kLanes, panels = (vectors + job.vectors - 1) / job.vectors;
  const int64_t down = (job.out_h + O - 1) / O, across = (job.out_w + O - 1) / O, tiles = job.images * down * across;
  const int64_t in_step = (job.in_c + kLanes - 1) / kLanes * kLanes;
  const int64_t units = (job.in_c + kPair - 1) / kPair, vector_step = units * kLanes;
  TileEnd<T> end = tile_end<T>(job.epilogue);
  end.bias = job.epilogue.bias;
  at::parallel_for(0, job.slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    TileEnd<T> ahead{};
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      char* scratch = at.scratch + slot * job.slot_bytes;
      float* m = (float*)scratch;
      T* v = (T*)(m + kMatrices * job.m_position);
      for (int64_t begin = slot * job.block; begin < tiles; begin += job.slots * job.block) {
        const int64_t count = std::min(job.block, tiles - begin);
        SmallPlace in(down, across, begin);
        for (int64_t t = 0; t < count; ++t, in.next()) {
          const T* x = (const T*)at.x + in.image * job.x.image + O * in.i * job.x.row + O * in.j * job.x.pixel;
          small_scatter<T, O>(job, x, job.out_h + 2 - O * in.i, job.out_w + 2 - O * in.j, v + t * in_step);
        }
        const int64_t tile = std::min<int64_t>({job.tile, count, tile_limit(job.vectors)});
        const int64_t whole = count / tile, rest = count % tile;
        for (int64_t position = 0; position < kMatrices; ++position) {
          const float* from = (const float*)(v + position * job.v_position);
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t vector = panel * job.vectors, wide = std::min(job.vectors, vectors - vector);
            const float* weight = (const float*)job.weight + (position * vectors + vector) * vector_step;
            float* sums = m + position * job.m_position + vector * count * kLanes;
            // The next panel lies behind this one.
            const bool more = job.fetch_weights && (panel + 1 < panels || position + 1 < kMatrices);
            fetch_weights(ahead, weight + wide * vector_step, wide * vector_step * 4, more ? 0 : 1, 1, whole * units);
            pick_small_products<T>(wide, tile)(from, in_step / kPair, units, weight, vector_step, whole, ahead, sums);
            ahead.fetch_w = nullptr;
            if (!rest) continue;
            pick_small_products<T>(wide, rest)(from + whole * tile * in_step / kPair, in_step / kPair, units, weight,
                                               vector_step, 1, ahead, sums + whole * tile * wide * kLanes);
          }
        }
        SmallPlace out(down, across, begin);
        for (int64_t t = 0; t < count; ++t, out.next()) {
          T* y = (T*)at.y + out.image * job.y.image + O * out.i * job.y.row + O * out.j * job.y.pixel;
          const T* residual = residual_at<T>(at, job.residual, out.image, O * out.i);
          if (residual) residual += O * out.j * job.residual.pixel;
          for (int64_t vector = 0; vector < vectors; vector += job.vectors) {
            const int64_t wide = std::min(job.vectors, vectors - vector);
            small_gather<T, O>(job, m + (vector * count + t * wide) * kLanes, vector * kLanes, wide, end,
                               job.out_h - O * out.i, job.out_w - O * out.j, residual, y);
          }
        }
      }
    }
  });
}

template <typename T>
void small_winograd_kernel(const deploy::WinogradJob& job, const deploy::Places& at) {
  job.side == 3 ? small_winograd<T, 3>(job, at) : small_winograd<T, 2>(job, at);
}
