// Kernels of deployed networks, once per instruction set: register tiles of pixels by output channels whose bias, residual and
// activation are applied before the only store.

#if defined(SK_AVX512)
constexpr int kTileRegisters = 28;
#else
constexpr int kTileRegisters = 10;
#endif
constexpr int tile_limit(int vectors) {
  return kTileRegisters / vectors < deploy::kMaxTile ? kTileRegisters / vectors : deploy::kMaxTile;
}

#if defined(SK_BF16)
inline vf get(const c10::BFloat16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline vf get_first(const c10::BFloat16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
inline void put(c10::BFloat16* p, vf v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
inline void put_first(c10::BFloat16* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
// Products of a pair of bfloat16 (the same for all lanes) with a pair a lane, added to acc.
inline vf multiply_add(vf acc, vf unit, vf weights, c10::BFloat16) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)unit, (__m512bh)weights);
}
#endif
inline vf get(const float* p) { return load(p); }
inline vf get_first(const float* p, int n) { return load_first(p, n); }
inline void put(float* p, vf v) { store(p, v); }
inline void put_first(float* p, vf v, int n) { store_first(p, v, n); }
inline vf multiply_add(vf acc, vf unit, vf weights, float) { return acc + unit * weights; }

template <typename T>
inline vf get_some(const T* p, int n) {
  return n == kLanes ? get(p) : get_first(p, n);
}
template <typename T>
inline void put_some(T* p, vf v, int n) {
  n == kLanes ? put(p, v) : put_first(p, v, n);
}

// V vectors side by side, `tail` lanes of the last.
template <typename T, int V>
inline void put_vectors(T* y, const vf (&a)[V], int tail) {
#if defined(SK_BF16)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < V; v += 2) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)a[v + 1], (__m512)a[v]);
      if (v + 2 < V || tail == kLanes)
        _mm512_storeu_si512(y + v * kLanes, both);
      else
        _mm512_mask_storeu_epi16(y + v * kLanes, (__mmask32(1) << (kLanes + tail)) - 1, both);
    }
    if (V % 2) put_some(y + (V - 1) * kLanes, a[V - 1], tail);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int v = 0; v < V - 1; ++v) put(y + v * kLanes, a[v]);
  put_some(y + (V - 1) * kLanes, a[V - 1], tail);
}

template <Activation A>
vf activate_vector(vf x) {
  return activate<A>(x);
}
using Activate = vf (*)(vf);
inline Activate pick_activation(Activation activation) {
  Activate found = nullptr;
  SK_SWITCH_ACTIVATION(activation, [&] { found = &activate_vector<act>; });
  return found;
}

// What is the same for all tiles of a panel of outputs.
template <typename T>
struct TileEnd {
  const float* bias;
  int64_t y_pixel, residual_pixel;
  float low, high;  // of a clamp: ReLU and ReLU6
  bool clamps;
  Activate other;  // any other activation
  int tail;        // outputs in the last vector
  bool fetch_x;    // asks for the input of the next tile while it works on this one
  const char *fetch_w, *fetch_w_end;  // weights that come later, asked for in equal parts; null: none
  int64_t fetch_w_step;               // bytes for every kLine / 4 units
};

constexpr int kLine = 64;  // bytes

// Asks for memory that is read, or written in full, a tile later: hardware follows fewer streams than a tile has pixels.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void fetch_to_write(void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" ::"m"(*(const char*)p));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// y (P, V * kLanes) = act(sum over the runs of x[p * step + k] * w[k] + bias + residual). `sums` (P, V * kLanes): where the sums
// of earlier runs are taken from and these are put, when the depth is worked on in parts.
template <typename T, int P, int V>
void conv_tile(const float* x, int64_t step, const deploy::TapRun* runs, int64_t run_count, const float* w,
               int64_t vector_step, const TileEnd<T>& end, float* sums, bool first, bool last, const T* residual, T* y) {
  vf acc[P][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vf bias = first ? load(end.bias + v * kLanes) : vf{};
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) acc[p][v] = first ? bias : load(sums + (p * V + v) * kLanes);
  }
  const char* next_w = end.fetch_w;
  for (int64_t r = 0; r < run_count; ++r) {
    const float* from = x + runs[r].offset;
    const float* weights = w + runs[r].packed * kLanes;
    const int64_t units = runs[r].units;
    for (int64_t k = 0; k < units;) {
      int64_t stop = units;
      if (end.fetch_w || end.fetch_x) {
        stop = std::min<int64_t>(units, k + kLine / 4);
        const char* to = std::min(next_w + end.fetch_w_step, end.fetch_w_end);
        for (; next_w < to; next_w += kLine) fetch(next_w);
        for (int p = 0; end.fetch_x && p < P; ++p) fetch(from + (p + P) * step + k);
      }
      for (; k < stop; ++k, weights += kLanes) {
        vf b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load(weights + v * vector_step);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const vf unit = splat(from[p * step + k]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[p][v] = multiply_add(acc[p][v], unit, b[v], T{});
        }
      }
    }
  }
  if (!last) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(sums + (p * V + v) * kLanes, acc[p][v]);
    }
    return;
  }
  if (residual) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[p][v] += get_some(residual + p * end.residual_pixel + v * kLanes, v == V - 1 ? end.tail : kLanes);
      }
    }
  }
  if (end.clamps) {
    const vf low = splat(end.low), high = splat(end.high);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        vf a = acc[p][v];
        a = a < low ? low : a;  // a NaN stays
        acc[p][v] = a > high ? high : a;
      }
    }
  }
  if (end.other) {
    vf kept[P][V];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) kept[p][v] = acc[p][v];
    }
    for (int i = 0; i < P * V; ++i) (&kept[0][0])[i] = end.other((&kept[0][0])[i]);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[p][v] = kept[p][v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) put_vectors(y + p * end.y_pixel, acc[p], end.tail);
}

template <typename T>
using ConvTile = void (*)(const float*, int64_t, const deploy::TapRun*, int64_t, const float*, int64_t, const TileEnd<T>&,
                          float*, bool, bool, const T*, T*);

template <typename T, int V, int P = 1>
ConvTile<T> pick_pixels(int64_t pixels) {
  if constexpr (P >= tile_limit(V)) {
    return &conv_tile<T, P, V>;
  } else {
    return pixels == P ? &conv_tile<T, P, V> : pick_pixels<T, V, P + 1>(pixels);
  }
}
template <typename T>
ConvTile<T> pick_tile(int64_t vectors, int64_t pixels) {
  switch (vectors) {
    case 1: return pick_pixels<T, 1>(pixels);
    case 2: return pick_pixels<T, 2>(pixels);
    case 3: return pick_pixels<T, 3>(pixels);
    default: return pick_pixels<T, 4>(pixels);
  }
}

template <typename T>
TileEnd<T> tile_end(const deploy::Epilogue& epilogue) {
  TileEnd<T> end{};
  const Activation act = epilogue.activation;
  end.clamps = act == Activation::kRelu || act == Activation::kRelu6;
  end.low = 0;
  end.high = act == Activation::kRelu6 ? 6.0f : std::numeric_limits<float>::infinity();
  end.other = end.clamps || act == Activation::kNone ? nullptr : pick_activation(act);
  return end;
}

// Asks for the part `index` of `count` of the weights behind `first` while a tile works on `units` units; none where `index` is
// `count` or more.
template <typename T>
void fetch_weights(TileEnd<T>& end, const float* first, int64_t bytes, int64_t index, int64_t count, int64_t units) {
  end.fetch_w = nullptr, end.fetch_w_end = nullptr;
  if (index >= count) return;
  const int64_t lines = (bytes + kLine - 1) / kLine, begin = lines * index / count, stop = lines * (index + 1) / count;
  const int64_t blocks = (units * 4 + kLine - 1) / kLine;
  end.fetch_w = (const char*)first + begin * kLine, end.fetch_w_end = (const char*)first + stop * kLine;
  end.fetch_w_step = (stop - begin + blocks - 1) / blocks * kLine;
}

template <typename T>
const T* residual_at(const deploy::Places& at, const deploy::Plane& plane, int64_t image, int64_t row) {
  return at.residual ? (const T*)at.residual + image * plane.image + row * plane.row : nullptr;
}

// What a tile writes and adds, one tile before it does.
template <typename T>
void fetch_tile(T* y, int64_t y_pixel, const T* residual, int64_t residual_pixel, int64_t pixels, int64_t channels) {
  constexpr int64_t kStep = kLine / sizeof(T);
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; c += kStep) fetch_to_write(y + p * y_pixel + c);
  }
  for (int64_t p = 0; residual && p < pixels; ++p) {
    for (int64_t c = 0; c < channels; c += kStep) fetch(residual + p * residual_pixel + c);
  }
}

template <typename T>
void conv_kernel(const deploy::ConvJob& job, const deploy::Places& at) {
  const int64_t all_vectors = (job.out_c + kLanes - 1) / kLanes;
  const int64_t panels = (all_vectors + job.vectors - 1) / job.vectors;
  const int64_t rows = job.images * job.out_h, bands = (rows + job.band - 1) / job.band;
  // Bands are the parts of threads; where there are fewer bands than threads, panels are too.
  const int64_t threads = at::get_num_threads();
  const int64_t splits = bands >= threads ? 1 : std::min(panels, (threads + bands - 1) / bands);
  const int64_t parts = static_cast<int64_t>(job.chunks.size()) - 1;
  const int64_t vector_step = job.depth * kLanes, part_units = (job.depth + parts - 1) / parts;
  const int64_t work = job.band * job.out_w * job.depth * all_vectors / splits;
  at::parallel_for(0, bands * splits, 1 + (1 << 15) / (work + 1), [&](int64_t task_begin, int64_t task_end) {
    std::vector<float> sums(parts > 1 ? job.band * job.out_w * job.vectors * kLanes : 0);
    TileEnd<T> end = tile_end<T>(job.epilogue);
    end.y_pixel = job.y.pixel;
    end.residual_pixel = job.residual.pixel;
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t row_begin = task / splits * job.band, row_end = std::min(rows, row_begin + job.band);
      const int64_t split = task % splits;
      for (int64_t panel = panels * split / splits; panel < panels * (split + 1) / splits; ++panel) {
        const int64_t vector = panel * job.vectors, vectors = std::min(job.vectors, all_vectors - vector);
        const int64_t channel = vector * kLanes;
        end.bias = job.epilogue.bias + channel;
        end.tail = std::min<int64_t>(kLanes, job.out_c - (vector + vectors - 1) * kLanes);
        end.fetch_x = job.fetch_x && panel == panels * split / splits;
        const float* weight = (const float*)job.weight + vector * vector_step;
        const int64_t tile = std::min<int64_t>(job.tile, tile_limit(vectors));
        const int64_t rest = job.out_w % tile;
        const ConvTile<T> whole = pick_tile<T>(vectors, tile), part_tile = pick_tile<T>(vectors, rest ? rest : 1);
        for (int64_t part = 0; part < parts; ++part) {
          const deploy::TapRun* runs = job.runs.data() + job.chunks[part];
          const int64_t run_count = job.chunks[part + 1] - job.chunks[part];
          float* sum = sums.data();
          // The weights that come next: of every vector the same number of pieces, one with each of the tiles.
          const bool deeper = part + 1 < parts, more = job.fetch_weights && (deeper || panel + 1 < panels);
          const float* ahead = weight + (deeper ? (part + 1) * part_units * kLanes : vectors * vector_step);
          const int64_t ahead_units = std::min(part_units, job.depth - (deeper ? (part + 1) * part_units : 0));
          const int64_t pieces = std::max<int64_t>(1, (row_end - row_begin) * (job.out_w / tile) / vectors);
          int64_t fetched = more ? 0 : pieces * vectors;
          for (int64_t row = row_begin; row < row_end; ++row) {
            const int64_t image = row / job.out_h, line = row % job.out_h;
            const float* x = (const float*)at.x + image * job.x.image + line * job.x.row;
            T* y = (T*)at.y + image * job.y.image + line * job.y.row + channel;
            const T* residual = residual_at<T>(at, job.residual, image, line);
            if (residual) residual += channel;
            int64_t j = 0;
            for (; j + tile <= job.out_w; j += tile) {
              if (job.fetch && part == parts - 1) {
                fetch_tile(y + (j + tile) * job.y.pixel, job.y.pixel,
                           residual ? residual + (j + tile) * job.residual.pixel : nullptr, job.residual.pixel, tile,
                           vectors * kLanes);
              }
              const int64_t piece = fetched < pieces * vectors ? fetched % pieces : pieces;
              fetch_weights(end, ahead + fetched / pieces * vector_step, ahead_units * kLanes * 4, piece, pieces, part_units);
              ++fetched;
              whole(x + j * job.x.pixel, job.x.pixel, runs, run_count, weight, vector_step, end, sum, part == 0,
                    part == parts - 1, residual ? residual + j * job.residual.pixel : nullptr, y + j * job.y.pixel);
              if (parts > 1) sum += tile * vectors * kLanes;
            }
            if (rest) {
              end.fetch_w = end.fetch_w_end = nullptr;
              part_tile(x + j * job.x.pixel, job.x.pixel, runs, run_count, weight, vector_step, end, sum, part == 0,
                        part == parts - 1, residual ? residual + j * job.residual.pixel : nullptr, y + j * job.y.pixel);
              if (parts > 1) sum += rest * vectors * kLanes;
            }
          }
        }
      }
    }
  });
}

template <typename T>
inline void finish(vf v, const TileEnd<T>& end, const T* residual, T* y, int n) {
  if (residual) v += get_some(residual, n);
  if (end.clamps) {
    v = clamp_below(v, 0.0f);
    v = clamp_above(v, end.high);
  } else if (end.other) {
    v = end.other(v);
  }
  put_some(y, v, n);
}

#include "deploy_depthwise-inl.h"
#include "deploy_narrow-inl.h"
#include "deploy_pointwise-inl.h"
#include "deploy_winograd-inl.h"
#include "deploy_winograd_small-inl.h"

template <typename T>
deploy::Kernels kernels_of() {
  constexpr bool wide = std::is_same_v<T, float>;
  const auto winograd = wide ? &winograd_kernel : &small_winograd_kernel<T>;
  return {kLanes,          kTileRegisters,      &conv_kernel<T>, winograd, &narrow_kernel<T>, &depthwise_kernel<T>,
          &pool_kernel<T>, &pointwise_kernel<T>};
}
