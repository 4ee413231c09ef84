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

  // The arithmetic of kLanes units of one row, in parts that hold few registers each, so that other work can be put between
  // them. z: the sums of the four gates, `step` from one to the next; the parts leave there what they give to each other. With
  // i = 1 / i_below, f = 1 / f_below, o = 1 / o_below and g = g_above / (g_above + 2), products of two gates take one
  // reciprocal.
  static constexpr int kParts = 6;

  template <int Part, typename T, typename C>
  static inline __attribute__((always_inline)) void part(float* z, int64_t step, const float* bias, float* c, C* h_next,
                                                         const StepOutputs<T>& out, int64_t left) {
    const auto sum = [&](int64_t g) { return load(z + g * step) * scale(g) + load(bias + g * step); };
    if constexpr (Part == 0) store(z, one_plus_exp2(sum(0)));
    if constexpr (Part == 1) store(z + step, one_plus_exp2(sum(1)));
    if constexpr (Part == 2) store(z + 2 * step, exp2_minus_one(sum(2)));
    if constexpr (Part == 3) {
      const vf i_below = load(z), g_above = load(z + 2 * step), g_below = g_above + 2.0f;
      const vf f = reciprocal(load(z + step)), ig = reciprocal(i_below * g_below);
      const vf c_new = f * load(c) + g_above * ig;
      store(c, c_new);
      if (out.gates) {
        store_some(out.gates, g_below * ig, left);
        store_some(out.gates + out.hidden, f, left);
        store_some(out.gates + 2 * out.hidden, g_above * i_below * ig, left);
        store_some(out.cells, c_new, left);
      }
    }
    if constexpr (Part == 4) store(z + 3 * step, one_plus_exp2(sum(3)));
    if constexpr (Part == 5) {
      const vf c_above = exp2_minus_one(load(c) * kTanhScale), c_below = c_above + 2.0f;
      const vf oc = reciprocal(load(z + 3 * step) * c_below), h_new = c_above * oc;
      store_some(h_next, rounded<T, C>(h_new), kLanes);
      if (out.y) store_some(out.y, h_new, left);
      if (out.gates) store_some(out.gates + 3 * out.hidden, c_below * oc, left);
    }
  }

  // Part by part for a row at a time: what depends on each other is far enough apart for the CPU to find enough to do.
  template <typename T, typename C>
  static void forward(int64_t n, const Panel& p, float*, float* z, const float* bias, const C*, C* h_next, int64_t ld,
                      float* c, int64_t ldc, const StepOutputs<T>& out) {
    const int64_t width = p.padded;
    const auto run = [&]<int Part>(std::integral_constant<int, Part>, int64_t m) {
      for (int64_t j = 0; j < width; j += kLanes) {
        part<Part>(z + m * 4 * width + j, width, bias + j, c + m * ldc + j, h_next + m * ld + j, out.at(m, j), p.count - j);
      }
    };
    for (int64_t m = 0; m < n; ++m) {
      [&]<int... Part>(std::integer_sequence<int, Part...>) {
        (run(std::integral_constant<int, Part>{}, m), ...);
      }(std::make_integer_sequence<int, kParts>{});
    }
  }

  // dz of the four gates from the gradients at h and c; dc becomes the gradient at the previous c.
  template <typename T, typename C>
  static void backward(int64_t n, const StepGradients<T, C>& s) {
    const int64_t ahead = s.ahead();
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t j = 0; j < s.hidden; j += kLanes) {
        const int64_t left = s.hidden - j;
        s.fetch(m + ahead, j);
        const T* gates = s.gates + m * 4 * s.hidden + j;
        const vf i = load_upto(gates, left), f = load_upto(gates + s.hidden, left);
        const vf g = load_upto(gates + 2 * s.hidden, left), o = load_upto(gates + 3 * s.hidden, left);
        const vf tanh_c = gate_tanh(load_upto(s.cells + m * s.hidden + j, left));
        const vf dy = s.dy ? load_upto(s.dy + m * s.ldy + j, left) : vf{};
        const vf dh = load(s.dh + m * s.ldh + j) + dy;
        const vf dc = load(s.dc + m * s.ldc + j) + dh * o * (1.0f - tanh_c * tanh_c);
        C* dz = s.dz + m * s.ldz + j;
        store_some(dz, dc * g * i * (1.0f - i), left);
        const vf c_previous = s.c_previous ? load_upto(s.c_previous + m * s.hidden + j, left) : vf{};
        store_some(dz + s.block, dc * c_previous * f * (1.0f - f), left);
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
  if (layer.joins()) {
    recurrent_joined_kernel<LstmCell, T, C>(layer, out, d);
  } else {
    recurrent_forward_kernel<LstmCell, T, C>(layer, out, d);
  }
}

template <typename T, typename C = float>
void lstm_backward_kernel(const RecurrentLayer& layer, const RecurrentGradients& grads, int64_t d) {
  recurrent_backward_kernel<LstmCell, T, C>(layer, grads, d);
}
