// The gate arithmetic of the GRU; the walk over time is in recurrent_forward-inl.h and recurrent_backward-inl.h.

#include "recurrent-inl.h"

struct GruCell {
  static constexpr int64_t kGates = 3;
  static constexpr bool kAdds = false;  // r multiplies the recurrent part of n alone

  // r and z with both biases, n with the input's, then the recurrent one of n.
  template <typename T>
  static void pack_bias(const T* b_ih, const T* b_hh, int64_t full, const Panel& p, float* bias) {
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t j = 0; j < p.padded; j += kLanes) {
        const int64_t left = p.count - j, at = std::min<int64_t>(g, 2) * full + p.begin + j;
        vf b{};
        if (b_ih && left > 0) {
          if (g < 3) b = load_upto(b_ih + at, left);
          if (g != 2) b += load_upto(b_hh + at, left);
        }
        store(bias + g * p.padded + j, b);
      }
    }
  }

  template <typename T, typename C>
  static void forward(int64_t n, const Panel& p, float* x, float* s, const float* bias, const C* h,
                      C* h_next, int64_t ld, float*, int64_t, const StepOutputs<T>& out) {
    const int64_t width = p.padded;
    for (int64_t m = 0; m < n; ++m, x += 3 * width, s += 3 * width) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const vf r = gate_sigmoid(load(x + j) + load(s + j) + load(bias + j));
        const vf z = gate_sigmoid(load(x + width + j) + load(s + width + j) + load(bias + width + j));
        const vf hn = load(s + 2 * width + j) + load(bias + 3 * width + j);
        const vf candidate = gate_tanh(load(x + 2 * width + j) + load(bias + 2 * width + j) + r * hn);
        const vf h_new = candidate + z * (load(h + m * ld + j) - candidate);
        const int64_t left = p.count - j;
        store(h_next + m * ld + j, rounded<T, C>(h_new));
        store_some(out.y + m * out.ldy + j, h_new, left);
        if (out.gates) {
          T* gates = out.gates + m * 4 * out.hidden + j;
          store_some(gates, r, left);
          store_some(gates + out.hidden, z, left);
          store_some(gates + 2 * out.hidden, candidate, left);
          store_some(gates + 3 * out.hidden, hn, left);
        }
      }
    }
  }

  // dz blocks: r, z, n at the input half, n at the recurrent half; dh becomes what goes past the products to the
  // previous h.
  template <typename T, typename C>
  static void backward(int64_t n, const StepGradients<T, C>& s) {
    const int64_t ahead = s.ahead();
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t j = 0; j < s.hidden; j += kLanes) {
        const int64_t left = s.hidden - j;
        s.fetch(m + ahead, j);
        const T* gates = s.gates + m * 4 * s.hidden + j;
        const vf r = load_upto(gates, left), z = load_upto(gates + s.hidden, left);
        const vf candidate = load_upto(gates + 2 * s.hidden, left), hn = load_upto(gates + 3 * s.hidden, left);
        const vf dy = s.dy ? load_upto(s.dy + m * s.ldy + j, left) : vf{};
        const vf dh = load(s.dh + m * s.ldh + j) + dy;
        const vf dn = dh * (1.0f - z) * (1.0f - candidate * candidate);
        C* dz = s.dz + m * s.ldz + j;
        store_some(dz, dn * hn * r * (1.0f - r), left);
        store_some(dz + s.block, dh * (load(s.h_previous + m * s.ld_previous + j) - candidate) * z * (1.0f - z), left);
        store_some(dz + 2 * s.block, dn, left);
        store_some(dz + 3 * s.block, dn * r, left);
        store(s.dh + m * s.ldh + j, dh * z);
      }
    }
  }

  // Blocks 0 and 1 of dz, then block 3, belong to the rows of w_hh; the first three to those of w_ih.
  static constexpr int64_t kStateSplit = 2;
};

template <typename T, typename C = float>
void gru_forward_kernel(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  recurrent_forward_kernel<GruCell, T, C>(layer, out, d);
}

template <typename T, typename C = float>
void gru_backward_kernel(const RecurrentLayer& layer, const RecurrentGradients& grads, int64_t d) {
  recurrent_backward_kernel<GruCell, T, C>(layer, grads, d);
}
