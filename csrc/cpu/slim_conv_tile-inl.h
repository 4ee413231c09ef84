// Tiles of pixels x channel vectors in registers: each value of the input is broadcast from memory.

// Registers: accumulators of a tile, channel vectors for a broadcast, one broadcast.
#if defined(SK_AVX512)
constexpr int kTileAccumulators = 28;
#else
constexpr int kTileAccumulators = 12;
#endif
constexpr int kMaxTile = 16;

template <int V>
constexpr int tile_limit() {
  return kTileAccumulators / V < kMaxTile ? kTileAccumulators / V : kMaxTile;
}

// out (P, V * kLanes) = sum over the runs of x[p * step + k] * w[k].
template <int P, int V>
void conv_tile(const float* x, int64_t step, const Run* runs, int64_t run_count, const float* w, float* out) {
  vf acc[P][V] = {};
  for (int64_t r = 0; r < run_count; ++r) {
    const float* base[(P + 2) / 3];  // three pixels an address register: the third is base + 2 * step
#pragma GCC unroll 16
    for (int b = 0; b < (P + 2) / 3; ++b) base[b] = x + runs[r].offset + 3 * b * step;
    for (int64_t k = 0; k < runs[r].length; ++k) {
      vf weights[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weights[v] = load(w + v * kLanes);
      w += V * kLanes;
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const vf value = splat(base[p / 3][(p % 3) * step + k]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[p][v] += value * weights[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + (p * V + v) * kLanes, acc[p][v]);
  }
}

using ConvTile = void (*)(const float*, int64_t, const Run*, int64_t, const float*, float*);

// The tile for `pixels` pixels and `vectors` (1 or 2) channel vectors.
template <int V, int P = 1>
ConvTile pick_conv_tile(int64_t pixels) {
  if constexpr (P >= tile_limit<V>()) {
    return &conv_tile<P, V>;
  } else {
    return pixels == P ? &conv_tile<P, V> : pick_conv_tile<V, P + 1>(pixels);
  }
}

// dw (R, V * kLanes at row stride ld) += sum over rows and pixels of x[r] * dy: R values side by side in the packed
// input.
template <int R, int V>
void gradient_tile(const float* x, int64_t x_row, int64_t x_step, const float* dy, int64_t dy_row, int64_t dy_step,
                   int64_t rows, int64_t pixels, float* dw, int64_t ld) {
  vf acc[R][V] = {};
  for (int64_t i = 0; i < rows; ++i, x += x_row, dy += dy_row) {
    const float* value = x;
    const float* d = dy;
    for (int64_t j = 0; j < pixels; ++j, value += x_step, d += dy_step) {
      vf grad[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) grad[v] = load(d + v * kLanes);
#pragma GCC unroll 28
      for (int r = 0; r < R; ++r) {
        const vf broadcast = splat(value[r]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] += broadcast * grad[v];
      }
    }
  }
#pragma GCC unroll 28
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = dw + r * ld + v * kLanes;
      store(to, load(to) + acc[r][v]);
    }
  }
}

using GradientTile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, int64_t, float*,
                              int64_t);

template <int V, int R = 1>
GradientTile pick_gradient_tile(int64_t values) {
  if constexpr (R >= kTileAccumulators / V) {
    return &gradient_tile<R, V>;
  } else {
    return values == R ? &gradient_tile<R, V> : pick_gradient_tile<V, R + 1>(values);
  }
}

// `count` pixels in the fewest tiles of at most `limit`, as equal as can be.
inline int64_t even_tile(int64_t count, int64_t limit) {
  const int64_t tiles = (count + limit - 1) / limit;
  return (count + tiles - 1) / tiles;
}
