// The gate arithmetic of the LSTM; the walk over time is in recurrent_forward-inl.h and recurrent_backward-inl.h.

#include "recurrent-inl.h"

struct LstmCell {
  static constexpr int64_t kGates = 4;
  static constexpr bool kAdds = true;  // the recurrent part is added to the input part before anything else

  // What a gate's sum is multiplied by for its exponential of base 2.
  static constexpr float scale(int64_t gate) { return gate == 2 ? kTanhScale : kSigmoidScale; }

  // Both biases together, scaled.
  template <typename T>
  static void pack_bias(const T* b_ih, const T* b_hh, int64_t full, const Panel& p, float* bias) {
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t j = 0; j < p.padded; j += kLanes) {
        const int64_t left = p.count - j, at = g * full + p.begin + j;
        store(bias + g * p.padded + j,
              b_ih && left > 0 ? scale(g) * (load_upto(b_ih + at, left) + load_upto(b_hh + at, left)) : vf{});
      }
    }
  }

  template <typename T, typename C>
  static void forward(int64_t n, const Panel& p, const float*, const float* z, const float* bias, const C*, C* h_next,
                      int64_t ld, float* c, int64_t ldc, const StepOutputs<T>& out) {
    const int64_t width = p.padded;
    for (int64_t m = 0; m < n; ++m, z += 4 * width) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const auto sum = [&](int64_t g) { return load(z + g * width + j) * scale(g) + load(bias + g * width + j); };
        // With i = 1 / i_below, f = 1 / f_below, o = 1 / o_below and g = g_above / (g_above + 2), products of two gates
        // take one reciprocal.
        const vf i_below = one_plus_exp2(sum(0)), f_below = one_plus_exp2(sum(1)), o_below = one_plus_exp2(sum(3));
        const vf g_above = exp2_minus_one(sum(2)), g_below = g_above + 2.0f;
        const vf f = reciprocal(f_below), ig = reciprocal(i_below * g_below);
        const vf c_new = f * load(c + m * ldc + j) + g_above * ig;
        const vf c_above = exp2_minus_one(c_new * kTanhScale), c_below = c_above + 2.0f;
        const vf oc = reciprocal(o_below * c_below);
        const vf h_new = c_above * oc;
        const int64_t left = p.count - j;
        store(c + m * ldc + j, c_new);
        store(h_next + m * ld + j, rounded<T, C>(h_new));
        if (out.y) store_some(out.y + m * out.ldy + j, h_new, left);
        if (out.gates) {
          T* gates = out.gates + m * 4 * out.hidden + j;
          store_some(gates, g_below * ig, left);
          store_some(gates + out.hidden, f, left);
          store_some(gates + 2 * out.hidden, g_above * i_below * ig, left);
          store_some(gates + 3 * out.hidden, c_below * oc, left);
          store_some(out.cells + m * out.hidden + j, c_new, left);
        }
      }
    }
  }

  // dz of the four gates from the gradients at h and c; dc becomes the gradient at the previous c.
  template <typename T, typename C>
  static void backward(int64_t n, const StepGradients<T, C>& s) {
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t j = 0; j < s.hidden; j += kLanes) {
        const int64_t left = s.hidden - j;
        const T* gates = s.gates + m * 4 * s.hidden + j;
        const vf i = load_upto(gates, left), f = load_upto(gates + s.hidden, left);
        const vf g = load_upto(gates + 2 * s.hidden, left), o = load_upto(gates + 3 * s.hidden, left);
        const vf tanh_c = gate_tanh(load_upto(s.cells + m * s.hidden + j, left));
        const vf dy = s.dy ? load_upto(s.dy + m * s.ldy + j, left) : vf{};
        const vf dh = load(s.dh + m * s.ldh + j) + dy;
        const vf dc = load(s.dc + m * s.ldc + j) + dh * o * (1.0f - tanh_c * tanh_c);
        C* dz = s.dz + m * s.ldz + j;
        store_some(dz, dc * g * i * (1.0f - i), left);
        store_some(dz + s.block, dc * load(s.c_previous + m * s.ldc + j) * f * (1.0f - f), left);
        store_some(dz + 2 * s.block, dc * i * (1.0f - g * g), left);
        store_some(dz + 3 * s.block, dh * tanh_c * o * (1.0f - o), left);
        store(s.dc + m * s.ldc + j, dc * f);
        if (s.h) store_some(s.h + m * s.ld + j, o * tanh_c, left);
      }
    }
  }

  // Which of the four blocks of dz belong to the rows of w_hh: all of them; those of w_ih always are the first.
  static constexpr int64_t kStateSplit = 4;
};

template <typename T, typename C = float>
void lstm_forward_kernel(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  if (layer.batch >= kJoinedBatch && layer.rows() >= kDotRows) {
    recurrent_joined_kernel<LstmCell, T, C>(layer, out, d);
  } else {
    recurrent_forward_kernel<LstmCell, T, C>(layer, out, d);
  }
}

template <typename T, typename C = float>
void lstm_backward_kernel(const RecurrentLayer& layer, const RecurrentGradients& grads, int64_t d) {
  recurrent_backward_kernel<LstmCell, T, C>(layer, grads, d);
}
