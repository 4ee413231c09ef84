// Sigmoid and tanh of the recurrent gates, where they take a fifth to a third of the time of a narrow layer: one exponential
// each, of a single reduction step, and no division with AVX-512. To 2 ulp or so; tanh keeps its relative error near 0. A
// sigmoid is never below 1e-24. NaN stays.
//
// With AVX-512 the exponential takes 16ths of its exponent from a table in a register, and most of its instructions run beside
// products: three of them are multiplications, where a polynomial alone takes six.

constexpr float kSigmoidScale = -1.44269504088896341f;  // 2^(kSigmoidScale x) = e^-x
constexpr float kTanhScale = 2.88539008177792681f;      // 2^(kTanhScale x) = e^2x

// 2^t = scale + scale * rest for t <= limit, a limit of 80 at most.
struct Exponential {
  vf scale, rest;
};

#if defined(SK_AVX512)
alignas(64) constexpr float kSixteenths[16] = {  // 2^(i / 16)
    1.0f,         1.0442737341f, 1.0905077457f, 1.1387885809f, 1.1892070770f, 1.2418577671f, 1.2968395948f, 1.3542555571f,
    1.4142135382f, 1.4768261909f, 1.5422108173f, 1.6104903221f, 1.6817928553f, 1.7562521696f, 1.8340080976f, 1.9152065516f};

inline Exponential exp2_parts(vf t, float limit) {
  t = (vf)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)t);  // gives its second operand when that is NaN
  constexpr int kNearest16th = 4 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const vf f = (vf)_mm512_reduce_ps((__m512)t, kNearest16th);  // t - rounded, 0 for infinities
  const vf n = t - f, shifted = n + 786432.0f;                 // 16ths in the low mantissa bits
  const __m512 part = _mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(kSixteenths));
  const vf scale = (vf)_mm512_scalef_ps(part, (__m512)n);
  return {scale, ((f * 5.550410971e-2f + 2.402335554e-1f) * f + 6.931471825e-1f) * f};  // 2^f - 1, relative error 1e-7
}
#else
inline Exponential exp2_parts(vf t, float limit) {
  t = clamp_below(clamp_above(t, limit), -120.0f);
  const vf shifted = t + 12582912.0f;  // rounds to an integer in the low mantissa bits
  const vf scale = (vf)((((vi)shifted) - 0x4B400000 + 127) << 23);
  const vf f = t - (shifted - 12582912.0f);
  vf q = splat(1.5395252557937056e-4f);  // 2^f - 1 = f q(f), relative error 2e-8
  q = q * f + 1.3390700332820415e-3f;
  q = q * f + 9.618262760341167e-3f;
  q = q * f + 5.550357699394226e-2f;
  q = q * f + 2.4022649228572845e-1f;
  q = q * f + 6.931471824645996e-1f;
  return {scale, q * f};
}
#endif

// 1 / d for d in [1, 1e37].
inline vf reciprocal(vf d) {
#if defined(SK_AVX512)
  const vf r = (vf)_mm512_rcp14_ps((__m512)d);
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}

// sigmoid(x) = 1 / one_plus_exp2(kSigmoidScale x).
inline vf one_plus_exp2(vf t) {
  const Exponential e = exp2_parts(t, 80.0f);
  return 1.0f + (e.scale * e.rest + e.scale);
}

// 2^t - 1 with its relative error, for t <= 40; tanh(x) = a / (a + 2) for a = exp2_minus_one(kTanhScale x).
inline vf exp2_minus_one(vf t) {
  const Exponential e = exp2_parts(t, 40.0f);
  return e.scale * e.rest + (e.scale - 1.0f);  // exact terms only where t is near 0
}

inline vf gate_sigmoid(vf x) { return reciprocal(one_plus_exp2(x * kSigmoidScale)); }

inline vf gate_tanh(vf x) {
  const vf a = exp2_minus_one(x * kTanhScale);
  return a * reciprocal(a + 2.0f);
}
