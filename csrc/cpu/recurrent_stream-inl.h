// One sequence through a recurrent layer on packed weights, a step at a time, once per instruction set. Before it:
// recurrent_stream.h.
//
// A step is bound by reading the weights: they lie in the order in which they are read, panel by panel of hidden units, for
// each input and then each previous state the weights of all gates of the panel side by side. Sums stay in registers, and the
// gates of a panel follow at once.

#include "recurrent_gates-inl.h"

constexpr int64_t kStreamVectors = 4;   // of a panel
constexpr int64_t kStreamTerms = 32;    // that are summed up one after the other: the error grows with their number
constexpr int64_t kStreamAhead = 4096;  // bytes that are fetched before they are needed: a page, where the CPU's own stops

// As it will be read back from memory of type T.
template <typename T>
inline vf stream_rounded(vf v) {
  if constexpr (std::is_same_v<T, float>) return v;
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}

// Four sums: r, z, n of the input, n of the state.
struct StreamGru {
  static constexpr int kGates = 3, kSums = 4;
  static constexpr int sum(int gate, bool of_state) { return gate == 2 && of_state ? 3 : gate; }

  template <typename T, int V>
  static void gates(vf (&sums)[kSums][V], const float* h, float*, float* h_next) {
    for (int v = 0; v < V; ++v) {
      const vf reset = gate_sigmoid(sums[0][v]), keep = gate_sigmoid(sums[1][v]);
      const vf candidate = gate_tanh(sums[2][v] + reset * sums[3][v]);
      store(h_next + v * kLanes, stream_rounded<T>(candidate + keep * (load(h + v * kLanes) - candidate)));
    }
  }
};

struct StreamLstm {
  static constexpr int kGates = 4, kSums = 4;
  static constexpr int sum(int gate, bool) { return gate; }

  template <typename T, int V>
  static void gates(vf (&sums)[kSums][V], const float*, float* c, float* h_next) {
    for (int v = 0; v < V; ++v) {
      const vf i = gate_sigmoid(sums[0][v]), f = gate_sigmoid(sums[1][v]), g = gate_tanh(sums[2][v]);
      const vf c_new = f * load(c + v * kLanes) + i * g;
      store(c + v * kLanes, c_new);
      store(h_next + v * kLanes, stream_rounded<T>(gate_sigmoid(sums[3][v]) * gate_tanh(c_new)));
    }
  }
};

// The product with w_hr.
struct StreamProjection {
  static constexpr int kGates = 1, kSums = 1;
  static constexpr int sum(int, bool) { return 0; }

  template <typename T, int V>
  static void gates(vf (&sums)[kSums][V], const float*, float*, float* next) {
    for (int v = 0; v < V; ++v) store(next + v * kLanes, stream_rounded<T>(sums[0][v]));
  }
};

inline int64_t stream_panel_width(int64_t units, int64_t begin) {
  return round_up(std::min<int64_t>(units - begin, kStreamVectors * kLanes), kLanes);
}

// Biases in float, then `depth` rows of weights.
template <class Cell, typename T>
inline int64_t stream_panel_bytes(int64_t width, int64_t depth) {
  return round_up(width * (Cell::kSums * sizeof(float) + Cell::kGates * depth * sizeof(T)), 64);
}

template <class Cell, typename T>
inline int64_t stream_part_bytes(int64_t units, int64_t depth) {
  int64_t bytes = 0;
  for (int64_t begin = 0; begin < units;) {
    const int64_t width = stream_panel_width(units, begin);
    bytes += stream_panel_bytes<Cell, T>(width, depth), begin += width;
  }
  return bytes;
}

// Of one direction.
template <class Cell, typename T>
inline int64_t stream_bytes(int64_t in, int64_t hidden, int64_t state, bool projects) {
  return stream_part_bytes<Cell, T>(hidden, in + state) +
         (projects ? stream_part_bytes<StreamProjection, T>(state, hidden) : 0);
}

// `column(k)` is where the weight of input k lies in the row.
template <typename T, typename Column>
inline void stream_pack_rows(const T* w, int64_t ld, int64_t gates, int64_t full, int64_t begin, int64_t count, int64_t width,
                             int64_t depth, Column column, T* dst) {
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t j = 0; j < width; ++j) {
      const T* row = w + (g * full + begin + j) * ld;
      for (int64_t k = 0; k < depth; ++k) dst[(k * gates + g) * width + j] = j < count ? row[column(k)] : T(0.0f);
    }
  }
}

template <class Cell, typename T>
inline void stream_pack(const RecurrentLayer& layer, int64_t d, char* dst) {
  const RecurrentWeights& w = layer.weights[d];
  const int64_t part = layer.in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t in = layer.in, hidden = layer.hidden, state = layer.state, full = layer.full_hidden;
  for (int64_t begin = 0; begin < hidden;) {
    const int64_t width = stream_panel_width(hidden, begin), count = std::min(width, hidden - begin);
    const T *b_ih = (const T*)w.b_ih, *b_hh = (const T*)w.b_hh;
    float* bias = (float*)dst;
    std::fill_n(bias, Cell::kSums * width, 0.0f);
    for (int64_t g = 0; b_ih && g < Cell::kGates; ++g) {
      for (int64_t j = 0; j < count; ++j) {
        bias[Cell::sum(g, false) * width + j] += static_cast<float>(b_ih[g * full + begin + j]);
        bias[Cell::sum(g, true) * width + j] += static_cast<float>(b_hh[g * full + begin + j]);
      }
    }
    T* weights = (T*)(bias + Cell::kSums * width);
    stream_pack_rows((const T*)w.w_ih, w.ld_ih, Cell::kGates, full, begin, count, width, in,
                     [&](int64_t k) { return k / part * full_part + k % part; }, weights);
    stream_pack_rows((const T*)w.w_hh, w.ld_hh, Cell::kGates, full, begin, count, width, state,
                     [](int64_t k) { return k; }, weights + in * Cell::kGates * width);
    dst += stream_panel_bytes<Cell, T>(width, in + state);
    begin += width;
  }
  for (int64_t begin = 0; layer.projects() && begin < state;) {
    const int64_t width = stream_panel_width(state, begin), count = std::min(width, state - begin);
    std::fill_n((float*)dst, width, 0.0f);
    stream_pack_rows((const T*)w.w_hr, w.ld_hr, 1, 0, begin, count, width, hidden, [](int64_t k) { return k; },
                     (T*)((float*)dst + width));
    dst += stream_panel_bytes<StreamProjection, T>(width, hidden);
    begin += width;
  }
}

template <class Cell, typename T, int V>
inline const char* stream_panel(const char* packed, const float* x, int64_t in, const float* h, int64_t state,
                                const float* h_before, float* c, float* h_next) {
  constexpr int kGates = Cell::kGates;
  vf sums[Cell::kSums][V];
  for (int g = 0; g < Cell::kSums; ++g) {
    for (int v = 0; v < V; ++v) sums[g][v] = load((const float*)packed + (g * V + v) * kLanes);
  }
  const T* w = (const T*)((const float*)packed + Cell::kSums * V * kLanes);
  const auto add = [&]<bool of_state>(std::bool_constant<of_state>, const float* values, int64_t count) {
    for (int64_t first = 0; first < count; first += kStreamTerms) {
      vf part[kGates][V] = {};
      for (int64_t k = first; k < std::min(count, first + kStreamTerms); ++k, w += kGates * V * kLanes) {
        const vf s = splat(values[k]);
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g) {
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            const int64_t at = (g * V + v) * kLanes;
            if (at * sizeof(T) % 64 == 0) __builtin_prefetch((const char*)(w + at) + kStreamAhead);
            part[g][v] += s * load(w + at);
          }
        }
      }
      for (int g = 0; g < kGates; ++g) {
        for (int v = 0; v < V; ++v) sums[Cell::sum(g, of_state)][v] += part[g][v];
      }
    }
  };
  add(std::false_type{}, x, in);
  add(std::true_type{}, h, state);
  Cell::template gates<T, V>(sums, h_before, c, h_next);
  return packed + stream_panel_bytes<Cell, T>(V * kLanes, in + state);
}

template <class Cell, typename T>
inline const char* stream_panels(const char* w, const float* x, int64_t in, const float* h, int64_t state, float* c,
                                 int64_t units, float* h_next) {
  for (int64_t begin = 0; begin < units;) {
    const int64_t width = stream_panel_width(units, begin);
    float* at = c ? c + begin : nullptr;
    switch (width / kLanes) {
      case 4: w = stream_panel<Cell, T, 4>(w, x, in, h, state, h + begin, at, h_next + begin); break;
      case 3: w = stream_panel<Cell, T, 3>(w, x, in, h, state, h + begin, at, h_next + begin); break;
      case 2: w = stream_panel<Cell, T, 2>(w, x, in, h, state, h + begin, at, h_next + begin); break;
      default: w = stream_panel<Cell, T, 1>(w, x, in, h, state, h + begin, at, h_next + begin);
    }
    begin += width;
  }
  return w;
}

// h, c and h_next hold whole vectors; `units` as well: what the gates give where a projection follows, else null.
template <class Cell, typename T>
inline void stream_step(const char* w, const float* x, int64_t in, const float* h, int64_t state, float* c, int64_t hidden,
                        float* units, float* h_next) {
  w = stream_panels<Cell, T>(w, x, in, h, state, c, hidden, units ? units : h_next);
  if (units) stream_panels<StreamProjection, T>(w, units, hidden, h, 0, nullptr, state, h_next);
}

template <typename T>
inline void stream_read(const void* src, int64_t count, float* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<float>(((const T*)src)[i]);
}
template <typename T>
inline void stream_write(const float* src, int64_t count, void* dst) {
  for (int64_t i = 0; i < count; ++i) ((T*)dst)[i] = static_cast<T>(src[i]);
}

// A layer over all steps of one sequence: x (steps, in) to y (steps, directions * state), both in float. The states are of
// type T, null for zeros. `scratch` holds four times `padded` floats, each of which holds whole vectors of units.
template <class Cell, typename T>
void stream_layer(const StreamLayer& layer, const char* w) {
  const int64_t ld = layer.directions * layer.state;
  for (int64_t d = 0; d < layer.directions; ++d) {
    float *h = layer.scratch, *h_next = h + layer.padded, *c = h_next + layer.padded, *units = c + layer.padded;
    std::fill_n(h, 4 * layer.padded, 0.0f);
    if (layer.h0) stream_read<T>((const T*)layer.h0 + d * layer.state, layer.state, h);
    if (layer.c0) stream_read<T>((const T*)layer.c0 + d * layer.hidden, layer.hidden, c);
    for (int64_t k = 0; k < layer.steps; ++k) {
      const int64_t t = d == 0 ? k : layer.steps - 1 - k;
      stream_step<Cell, T>(w, layer.x + t * layer.in, layer.in, h, layer.state, c, layer.hidden,
                           layer.projects ? units : nullptr, h_next);
      std::copy_n(h_next, layer.state, layer.y + t * ld + d * layer.state);
      std::swap(h, h_next);
    }
    stream_write<T>(h, layer.state, (T*)layer.h_n + d * layer.state);
    if (layer.c_n) stream_write<T>(c, layer.hidden, (T*)layer.c_n + d * layer.hidden);
    w += stream_bytes<Cell, T>(layer.in, layer.hidden, layer.state, layer.projects);
  }
}
