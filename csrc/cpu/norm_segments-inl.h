// Contiguous segments of the norms: moments, normalisation with activation, and the two passes of backward.
//
// Moments are merged from blocks small enough for the L1 cache: within a block the mean is taken first and then the sum of squared
// distances from it, so the second read costs no memory traffic and nothing cancels.

namespace {  // the copies in other files must not be taken for these

constexpr int64_t kPiece = 2048;    // elements of a plane per block
constexpr int64_t kBlockRows = 64;  // rows per block

// Per-channel numbers: one for a whole plane, or one per element of a row (padded to full vectors).
struct Splat {
  float value;
  vf at(int64_t) const { return splat(value); }
};
struct Entries {
  const float* values;
  vf at(int64_t i) const { return load(values + i); }
};

template <typename P>
struct Affine {  // z = (x - mean) * scale + shift
  P mean, scale, shift;
  Activation which;
};

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double n, double block_mean, double block_m2) {
    if (count == 0) {
      count = n, mean = block_mean, m2 = block_m2;
      return;
    }
    const double delta = block_mean - mean, total = count + n;
    mean += delta * (n / total);
    m2 += block_m2 + delta * delta * (count * n / total);
    count = total;
  }
};

// The loops below are compiled for no activation, for relu and relu6, and once for all the others, which are then chosen for every
// vector: loops for each of the ten made this minutes of compiling, and beside an exponential the choice costs little.
enum class Kind { kNone, kRelu, kRelu6, kOther };

template <typename F>
void switch_kind(Activation activation, F f) {
  if (activation == Activation::kNone) return f.template operator()<Kind::kNone>();
  if (activation == Activation::kRelu) return f.template operator()<Kind::kRelu>();
  if (activation == Activation::kRelu6) return f.template operator()<Kind::kRelu6>();
  f.template operator()<Kind::kOther>();
}

__attribute__((noinline)) vf activate_other(Activation which, vf x) {
  vf y = x;
  SK_SWITCH_ACTIVATION(which, [&] { y = activate<act>(x); });
  return y;
}

__attribute__((noinline)) vf derivative_other(Activation which, vf saved) {
  vf d = saved;
  SK_SWITCH_ACTIVATION(which, [&] { d = activation_derivative<act>(saved); });
  return d;
}

template <Kind kind>
inline vf activate_kind(Activation which, vf x) {
  if constexpr (kind == Kind::kNone) return x;
  else if constexpr (kind == Kind::kRelu) return activate<Activation::kRelu>(x);
  else if constexpr (kind == Kind::kRelu6) return activate<Activation::kRelu6>(x);
  else return activate_other(which, x);
}

template <Kind kind>
inline vf derivative_kind(Activation which, vf saved) {
  if constexpr (kind == Kind::kNone) return splat(1);
  else if constexpr (kind == Kind::kRelu) return activation_derivative<Activation::kRelu>(saved);
  else if constexpr (kind == Kind::kRelu6) return activation_derivative<Activation::kRelu6>(saved);
  else return derivative_other(which, saved);
}

// Ends of segments; not inlined, so that the many loops below stay small.
template <typename T>
__attribute__((noinline)) vf load_tail(const T* p, int64_t n) {
  return load_first(p, static_cast<int>(n));
}
template <typename T>
__attribute__((noinline)) void store_tail(T* p, vf v, int64_t n) {
  store_first(p, v, static_cast<int>(n));
}

#if defined(SK_AVX512)
// With masks, where the general ones copy number by number; short enough to be inlined.
inline vf load_tail(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store_tail(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
inline vf load_tail(const c10::BFloat16* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
inline vf load_tail(const c10::Half* p, int64_t n) {
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
inline void store_tail(c10::BFloat16* p, vf v, int64_t n) {
  c10::BFloat16 whole[kLanes];
  store(whole, v);
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm256_loadu_si256((const __m256i*)whole));
}
inline void store_tail(c10::Half* p, vf v, int64_t n) {
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), h);
}
inline float total(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float total(vf v) { return sum(v); }
#endif

// v, and 0 in the lanes from n on.
inline vf first_lanes(vf v, int64_t n) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < splat_int(static_cast<int32_t>(n)) ? v : splat(0);
}

template <typename T, typename F>
inline vf accumulate(const T* x, int64_t n, F f) {
  vf a = splat(0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = a + f(load(x + i));
    b = b + f(load(x + i + kLanes));
    c = c + f(load(x + i + 2 * kLanes));
    d = d + f(load(x + i + 3 * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) a = a + f(load(x + i));
  return (a + b) + (c + d);
}

// Adds the moments of `planes` segments of `n` elements each, `stride` apart, where some of the same group are known: distances
// from the mean so far take one pass. What cancels is as large as the distance between the means, which the variance holds too.
template <typename T>
void add_further_block(Moments& moments, const T* x, int64_t planes, int64_t stride, int64_t n) {
  const int64_t full = n / kLanes * kLanes, rest = n - full;
  const vf centre = splat(static_cast<float>(moments.mean));
  vf first = splat(0), second = first, first_squares = first, second_squares = first;
  const auto add = [&](vf v, vf& to, vf& squares) __attribute__((always_inline)) {
    to = to + v;
    squares = squares + v * v;
  };
  for (int64_t p = 0; p < planes; ++p) {
    const T* from = x + p * stride;
    int64_t i = 0;
    for (; i + 2 * kLanes <= full; i += 2 * kLanes) {
      add(load(from + i) - centre, first, first_squares);
      add(load(from + i + kLanes) - centre, second, second_squares);
    }
    if (i < full) add(load(from + i) - centre, first, first_squares);
    if (rest) add(first_lanes(load_tail(from + full, rest) - centre, rest), second, second_squares);
  }
  const double count = static_cast<double>(planes * n), off = total(first + second) / count;
  moments.merge(count, centre[0] + off, std::max(0.0, total(first_squares + second_squares) - count * off * off));
}

// Mean and squared distances of `planes` segments of `n` elements each, `stride` apart.
template <typename T>
void add_block(Moments& moments, const T* x, int64_t planes, int64_t stride, int64_t n) {
  if (moments.count > 0) return add_further_block(moments, x, planes, stride, n);
  const int64_t full = n / kLanes * kLanes, rest = n - full;
  vf added = splat(0);
  for (int64_t p = 0; p < planes; ++p) {
    added = added + accumulate(x + p * stride, full, [](vf v) { return v; });
    if (rest) added = added + load_tail(x + p * stride + full, rest);
  }
  const double count = static_cast<double>(planes * n), mean = total(added) / count;
  const vf centre = splat(static_cast<float>(mean));
  vf squares = splat(0);
  for (int64_t p = 0; p < planes; ++p) {
    squares = squares + accumulate(x + p * stride, full, [&](vf v) { return (v - centre) * (v - centre); });
    if (rest) {
      const vf off = first_lanes(load_tail(x + p * stride + full, rest) - centre, rest);
      squares = squares + off * off;
    }
  }
  // Distances were taken from the rounded mean.
  const double off = mean - centre[0];
  moments.merge(count, mean, total(squares) - count * off * off);
}

template <Kind kind, typename T, typename P>
void normalize(const T* x, const T* residual, T* y, int64_t n, Affine<P> a) {
  const auto at = [&](vf v, vf r, int64_t i) {
    return activate_kind<kind>(a.which, (v - a.mean.at(i)) * a.scale.at(i) + a.shift.at(i) + r);
  };
  int64_t i = 0;
  if (residual) {
    for (; i + kLanes <= n; i += kLanes) store(y + i, at(load(x + i), load(residual + i), i));
  } else {
    for (; i + kLanes <= n; i += kLanes) store(y + i, at(load(x + i), splat(0), i));
  }
  if (i < n && n > kLanes) {  // the last whole vector again: stores of a part are slow
    i = n - kLanes;
    store(y + i, at(load(x + i), residual ? load(residual + i) : splat(0), i));
  } else if (i < n) {
    store_tail(y, at(load_tail(x, n), residual ? load_tail(residual, n) : splat(0), 0), n);
  }
}

// Gradient at the activation's input. `saved` is the forward's output where the derivative can be had from it, else the residual;
// null when there was no residual: the input is recomputed from x.
template <Kind kind>
inline vf gradient(vf dy, vf centred, vf scale, vf shift, vf saved, bool has_saved, Activation which) {
  if constexpr (kind == Kind::kNone) return dy;
  if (kind != Kind::kOther || derivative_uses_output(which)) {
    return dy * derivative_kind<kind>(which, has_saved ? saved : activate_kind<kind>(which, centred * scale + shift));
  }
  return dy * derivative_kind<kind>(which, centred * scale + shift + saved);
}

// Cheap derivatives are computed in both passes of backward; for the others the first pass leaves dz in memory for the second.
constexpr bool is_cheap(Kind kind) { return kind != Kind::kOther; }

// Sums of dz and of dz * (x - mean), and dz itself where `dz` isn't null.
template <Kind kind, bool kSaved, typename T, typename P>
void reduce_segment(const T* dy, const T* x, const T* saved, T* dz, int64_t n, Affine<P> a, vf& sum_dz, vf& sum_dzx) {
  vf others_dz = splat(0), others_dzx = splat(0);  // a sum that waits for itself takes four cycles a vector
  const auto add = [&](vf g, vf v, vf s, int64_t i, vf& dz_sum, vf& dzx_sum) {
    const vf centred = v - a.mean.at(i);
    g = gradient<kind>(g, centred, a.scale.at(i), a.shift.at(i), s, kSaved, a.which);
    dz_sum = dz_sum + g;
    dzx_sum = dzx_sum + g * centred;
    return g;
  };
  const auto at = [&](vf g, vf v, vf s, int64_t i) { return add(g, v, s, i, sum_dz, sum_dzx); };
  int64_t i = 0;
  if (dz) {
    for (; i + kLanes <= n; i += kLanes) {
      store(dz + i, at(load(dy + i), load(x + i), kSaved ? load(saved + i) : splat(0), i));
    }
  } else {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const int64_t next = i + kLanes;
      at(load(dy + i), load(x + i), kSaved ? load(saved + i) : splat(0), i);
      add(load(dy + next), load(x + next), kSaved ? load(saved + next) : splat(0), next, others_dz, others_dzx);
    }
    for (; i + kLanes <= n; i += kLanes) at(load(dy + i), load(x + i), kSaved ? load(saved + i) : splat(0), i);
  }
  if (i < n) {
    const int64_t rest = n - i;
    // Lanes past the end have dy = 0, so they add nothing.
    const vf g = at(load_tail(dy + i, rest), load_tail(x + i, rest), kSaved ? load_tail(saved + i, rest) : splat(0), i);
    if (dz) store_tail(dz + i, g, rest);
  }
  sum_dz = sum_dz + others_dz;
  sum_dzx = sum_dzx + others_dzx;
}

// dx = dz * scale + (x - mean) * slope + offset.
template <Kind kind, bool kSaved, typename T, typename P>
void dx_segment(const T* dy, const T* x, const T* saved, T* dx, int64_t n, Affine<P> a, P slope, P offset) {
  const auto at = [&](vf g, vf v, vf s, int64_t i) {
    const vf centred = v - a.mean.at(i), scale = a.scale.at(i);
    g = gradient<kind>(g, centred, scale, a.shift.at(i), s, kSaved, a.which);
    return g * scale + centred * slope.at(i) + offset.at(i);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(dx + i, at(load(dy + i), load(x + i), kSaved ? load(saved + i) : splat(0), i));
  }
  if (i < n && n > kLanes && dy != dx) {
    i = n - kLanes;
    store(dx + i, at(load(dy + i), load(x + i), kSaved ? load(saved + i) : splat(0), i));
  } else if (i < n) {
    const int64_t rest = n - i;
    const vf s = kSaved ? load_tail(saved + i, rest) : splat(0);
    store_tail(dx + i, at(load_tail(dy + i, rest), load_tail(x + i, rest), s, i), rest);
  }
}

inline float inverse_std(float var, double eps) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(var) + eps)); }

}  // namespace
