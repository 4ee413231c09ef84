// Vectors of SK_LANES floats on GCC's vector extensions: the same source is SSE, AVX2 or AVX-512 (see foreach_isa.h).
// Arithmetic and comparisons are the compiler's own operators; a comparison gives a vi that `mask ? a : b` selects with.

constexpr int kLanes = SK_LANES;
using vf = float __attribute__((vector_size(4 * SK_LANES)));
using vi = int32_t __attribute__((vector_size(4 * SK_LANES)));
using vu16 = uint16_t __attribute__((vector_size(2 * SK_LANES)));
using vu32 = uint32_t __attribute__((vector_size(4 * SK_LANES)));

// Minus zero, not plus: s - 0 is s for every s, -0 included, so that the compiler drops it and broadcasts straight from memory.
inline vf splat(float s) { return s - vf{}; }
inline vi splat_int(int32_t s) { return vi{} + s; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
// NaN-keeping clamp from below / above: a NaN in `a` stays.
inline vf clamp_below(vf a, float low) { return a < splat(low) ? splat(low) : a; }
inline vf clamp_above(vf a, float high) { return a > splat(high) ? splat(high) : a; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

inline vf load(const c10::BFloat16* p) {
  vu16 h;
  std::memcpy(&h, p, sizeof(h));
  return (vf)(__builtin_convertvector(h, vu32) << 16);
}
// Round to nearest even; NaN becomes the quiet NaN 0x7FC0, as c10::BFloat16 does.
inline void store(c10::BFloat16* p, vf v) {
  const vu32 u = (vu32)v;
  const vu32 rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu32 nan = (vu32)(v != v);
  const vu16 h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0u), vu16);
  std::memcpy(p, &h, sizeof(h));
}

#if defined(SK_AVX512)
inline vf load(const c10::Half* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(c10::Half* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(SK_AVX2)
inline vf load(const c10::Half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(c10::Half* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
inline vf load(const c10::Half* p) {
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
inline void store(c10::Half* p, vf v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<c10::Half>(v[i]);
}
#endif

// The first n < kLanes elements; the other lanes are 0 when loaded and untouched in memory when stored.
template <typename T>
inline vf load_first(const T* p, int n) {
  T buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
inline void store_first(T* p, vf v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#if defined(SK_AVX512)
inline vf load_first(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store_first(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
#endif

inline float sum(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// e^x to 1 ulp or two: x = n ln2 + r, |r| <= ln2 / 2, polynomial of degree 6 (the usual Cephes coefficients), scaled by 2^n in
// two steps so that results below FLT_MIN keep their bits. +inf above 88.73, 0 below -104, NaN stays.
inline vf exp(vf x) {
  const vf clamped = clamp_above(clamp_below(x, -104.0f), 88.8f);
  const vf t = clamped * 1.44269504088896341f;
  const vf shifted = t + 12582912.0f;  // rounds to an integer in the low mantissa bits
  const vf n = shifted - 12582912.0f;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi e = ((vi)shifted) - 0x4B400000;  // n as an integer
  const vi e1 = e >> 1;
  const vf s1 = (vf)((e1 + 127) << 23);
  const vf s2 = (vf)((e - e1 + 127) << 23);
  return x != x ? x : p * s1 * s2;
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Polynomial near 0 (keeps the relative error), exponentials elsewhere.
inline vf tanh(vf x) {
  const vf a = (vf)((vi)x & 0x7FFFFFFF);
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf small = x + x * z * p;
  const vf large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  const vf signed_large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
  return a < splat(0.625f) ? small : signed_large;
}

// Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
inline vf erf(vf x) {
  const vf a = (vf)((vi)x & 0x7FFFFFFF);
  const vf t = 1.0f / (1.0f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf y = 1.0f - p * t * exp(-a * a);
  return (vf)((vi)y | ((vi)x & (int32_t)0x80000000));
}

constexpr float kInvSqrt2 = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;

template <Activation A>
inline vf activate(vf x) {
  if constexpr (A == Activation::kNone) return x;
  if constexpr (A == Activation::kRelu) return clamp_below(x, 0.0f);
  if constexpr (A == Activation::kRelu6) return clamp_above(clamp_below(x, 0.0f), 6.0f);
  if constexpr (A == Activation::kElu) return x > splat(0.0f) ? x : exp(x) - 1.0f;
  if constexpr (A == Activation::kTanh) return tanh(x);
  if constexpr (A == Activation::kSigmoid) return sigmoid(x);
  if constexpr (A == Activation::kSilu) return x * sigmoid(x);
  if constexpr (A == Activation::kHardswish) return x * clamp_above(clamp_below(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
  if constexpr (A == Activation::kGelu) return 0.5f * x * (1.0f + erf(x * kInvSqrt2));
  if constexpr (A == Activation::kGeluTanh) return 0.5f * x * (1.0f + tanh(kSqrt2OverPi * (x + 0.044715f * x * x * x)));
}

// Derivative at the activation's input; `saved` is the output where derivative_uses_output(A), else the input.
template <Activation A>
inline vf activation_derivative(vf saved) {
  const vf zero = splat(0.0f), one = splat(1.0f);
  if constexpr (A == Activation::kNone) return one;
  if constexpr (A == Activation::kRelu) return saved > zero ? one : zero;
  if constexpr (A == Activation::kRelu6) return ((saved > zero) & (saved < splat(6.0f))) ? one : zero;
  if constexpr (A == Activation::kElu) return saved > zero ? one : saved + 1.0f;
  if constexpr (A == Activation::kTanh) return 1.0f - saved * saved;
  if constexpr (A == Activation::kSigmoid) return saved * (1.0f - saved);
  if constexpr (A == Activation::kSilu) {
    const vf s = sigmoid(saved);
    return s * (1.0f + saved * (1.0f - s));
  }
  if constexpr (A == Activation::kHardswish) {
    const vf slope = saved * (1.0f / 3.0f) + 0.5f;
    return saved <= splat(-3.0f) ? zero : (saved < splat(3.0f) ? slope : one);
  }
  if constexpr (A == Activation::kGelu) {
    return 0.5f * (1.0f + erf(saved * kInvSqrt2)) + saved * kInvSqrt2Pi * exp(-0.5f * saved * saved);
  }
  if constexpr (A == Activation::kGeluTanh) {
    const vf t = tanh(kSqrt2OverPi * (saved + 0.044715f * saved * saved * saved));
    return 0.5f * (1.0f + t) + 0.5f * saved * (1.0f - t * t) * kSqrt2OverPi * (1.0f + 0.134145f * saved * saved);
  }
}
