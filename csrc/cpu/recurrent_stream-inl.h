// One step of one sequence through a GRU on packed weights, once per instruction set. Before it: recurrent_stream.h.
//
// The step is bound by reading the weights: they lie in the order in which they are read, panel by panel of hidden units, for
// each input and then each previous state the weights of r, z and n of the panel side by side. Sums stay in registers, and the
// gates of a panel follow at once.

#include "recurrent_gates-inl.h"

constexpr int64_t kStreamVectors = 4;   // of a panel: with 4 sums for each all fit into 32 registers
constexpr int64_t kStreamTerms = 32;    // that are summed up one after the other: the error grows with their number
constexpr int64_t kStreamAhead = 1024;  // floats that are fetched before they are needed: a page, where the CPU's own stops

inline int64_t stream_panel_width(int64_t hidden, int64_t begin) {
  return round_up(std::min<int64_t>(hidden - begin, kStreamVectors * kLanes), kLanes);
}

inline int64_t stream_floats(int64_t in, int64_t hidden) { return round_up(hidden, kLanes) * (4 + 3 * (in + hidden)); }

inline void stream_pack(const RecurrentLayer& layer, float* dst) {
  const RecurrentWeights& w = layer.weights[0];
  const int64_t part = layer.in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t in = layer.in, hidden = layer.hidden, full = layer.full_hidden;
  for (int64_t begin = 0; begin < hidden;) {
    const int64_t width = stream_panel_width(hidden, begin), count = std::min(width, hidden - begin);
    const float *b_ih = (const float*)w.b_ih, *b_hh = (const float*)w.b_hh;
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = std::min<int64_t>(g, 2) * full + begin + j;
        const float input = b_ih && j < count && g < 3 ? b_ih[at] : 0.0f;
        dst[g * width + j] = input + (b_hh && j < count && g != 2 ? b_hh[at] : 0.0f);
      }
    }
    dst += 4 * width;
    for (int64_t g = 0; g < 3; ++g) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t row = g * full + begin + j;
        float* out = dst + g * width + j;
        for (int64_t k = 0; k < in; ++k, out += 3 * width) {
          *out = j < count ? ((const float*)w.w_ih)[row * w.ld_ih + k / part * full_part + k % part] : 0.0f;
        }
        for (int64_t k = 0; k < hidden; ++k, out += 3 * width) {
          *out = j < count ? ((const float*)w.w_hh)[row * w.ld_hh + k] : 0.0f;
        }
      }
    }
    dst += 3 * width * (in + hidden);
    begin += width;
  }
}

template <int V>
inline const float* stream_panel(const float* w, const float* x, int64_t in, const float* h, int64_t hidden, int64_t begin,
                                 float* h_next) {
  vf sums[4][V];  // r, z, n of the input, n of the state
  for (int g = 0; g < 4; ++g) {
    for (int v = 0; v < V; ++v) sums[g][v] = load(w + (g * V + v) * kLanes);
  }
  w += 4 * V * kLanes;
  const auto add = [&](const float* values, int64_t count, vf(&last)[V]) {
    for (int64_t first = 0; first < count; first += kStreamTerms) {
      vf part[3][V] = {};
      for (int64_t k = first; k < std::min(count, first + kStreamTerms); ++k, w += 3 * V * kLanes) {
        const vf s = splat(values[k]);
        for (int g = 0; g < 3; ++g) {
          for (int v = 0; v < V; ++v) {
            const int64_t at = (g * V + v) * kLanes;
            if (at % 16 == 0) __builtin_prefetch(w + at + kStreamAhead);
            part[g][v] += s * load(w + at);
          }
        }
      }
      for (int v = 0; v < V; ++v) sums[0][v] += part[0][v], sums[1][v] += part[1][v], last[v] += part[2][v];
    }
  };
  add(x, in, sums[2]);
  add(h, hidden, sums[3]);
  for (int v = 0; v < V; ++v) {
    const vf reset = gate_sigmoid(sums[0][v]), keep = gate_sigmoid(sums[1][v]);
    const vf candidate = gate_tanh(sums[2][v] + reset * sums[3][v]);
    store(h_next + begin + v * kLanes, candidate + keep * (load(h + begin + v * kLanes) - candidate));
  }
  return w;
}

// h and h_next hold whole vectors.
inline void stream_step(const float* w, const float* x, int64_t in, const float* h, int64_t hidden, float* h_next) {
  for (int64_t begin = 0; begin < hidden;) {
    const int64_t width = stream_panel_width(hidden, begin);
    switch (width / kLanes) {
      case 4: w = stream_panel<4>(w, x, in, h, hidden, begin, h_next); break;
      case 3: w = stream_panel<3>(w, x, in, h, hidden, begin, h_next); break;
      case 2: w = stream_panel<2>(w, x, in, h, hidden, begin, h_next); break;
      default: w = stream_panel<1>(w, x, in, h, hidden, begin, h_next);
    }
    begin += width;
  }
}
