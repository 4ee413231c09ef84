// The one-dimensional transforms of Winograd's F(4, 3).
// Points 0, +-sqrt(1/2), +-sqrt(2) and infinity: the squares are powers of two, the error is half that of 0, +-1, +-2.

constexpr float kPointA = 0.70710678118654752f, kPointB = 1.41421356237309505f;

inline void winograd_input(const vf* d, int step, vf* out, int out_step) {
  const vf d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const vf p = d4 - 2.0f * d2, q = kPointA * (d3 - 2.0f * d1), r = d4 - 0.5f * d2, s = kPointB * (d3 - 0.5f * d1);
  out[0] = d0 + d4 - 2.5f * d2;
  out[out_step] = p + q;
  out[2 * out_step] = p - q;
  out[3 * out_step] = r + s;
  out[4 * out_step] = r - s;
  out[5 * out_step] = d1 + d5 - 2.5f * d3;
}

inline void winograd_output(const vf* m, int step, vf* out, int out_step) {
  const vf a_sum = m[step] + m[2 * step], a_difference = m[step] - m[2 * step];
  const vf b_sum = m[3 * step] + m[4 * step], b_difference = m[3 * step] - m[4 * step];
  out[0] = m[0] + a_sum + b_sum;
  out[out_step] = kPointA * a_difference + kPointB * b_difference;
  out[2 * out_step] = 0.5f * a_sum + 2.0f * b_sum;
  out[3 * out_step] = m[5 * step] + 0.5f * kPointA * a_difference + 2.0f * kPointB * b_difference;
}

inline void winograd_weight(const vf* g, int step, vf* out, int out_step) {
  const vf g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const vf p = g0 * (-1.0f / 1.5f) + g2 * (-0.5f / 1.5f), q = g1 * (kPointA / 1.5f);
  const vf r = g0 * (1.0f / 6.0f) + g2 * (2.0f / 6.0f), s = g1 * (kPointB / 6.0f);
  out[0] = g0;
  out[out_step] = p - q;
  out[2 * out_step] = p + q;
  out[3 * out_step] = r + s;
  out[4 * out_step] = r - s;
  out[5 * out_step] = g2;
}

// For the gradient of the weight: transposed, what winograd_output and winograd_weight are.
inline void winograd_output_gradient(const vf* u, int step, vf* out, int out_step) {
  const vf u0 = u[0], u1 = u[step], u2 = u[2 * step], u3 = u[3 * step];
  const vf p = u0 + 0.5f * u2, q = kPointA * (u1 + 0.5f * u3), r = u0 + 2.0f * u2, s = kPointB * (u1 + 2.0f * u3);
  out[0] = u0;
  out[out_step] = p + q;
  out[2 * out_step] = p - q;
  out[3 * out_step] = r + s;
  out[4 * out_step] = r - s;
  out[5 * out_step] = u3;
}

inline void winograd_weight_gradient(const vf* s, int step, vf* out, int out_step) {
  const vf a_sum = s[step] + s[2 * step], a_difference = s[2 * step] - s[step];
  const vf b_sum = s[3 * step] + s[4 * step], b_difference = s[3 * step] - s[4 * step];
  out[0] = s[0] + b_sum * (1.0f / 6.0f) - a_sum * (1.0f / 1.5f);
  out[out_step] = a_difference * (kPointA / 1.5f) + b_difference * (kPointB / 6.0f);
  out[2 * out_step] = s[5 * step] + (b_sum - a_sum) * (1.0f / 3.0f);
}
