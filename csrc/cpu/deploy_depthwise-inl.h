// Depthwise convolution of deployed networks, channels in the vector; included by deploy-inl.h.

// P output pixels of one row and kLanes channels; every input value is loaded once for all the pixels that it belongs to.
template <typename T, int K, int S, int P>
void depthwise_tile(const T* x, int64_t row, int64_t pixel, int64_t kernel_h, const float* w, vf bias, const TileEnd<T>& end,
                    const T* residual, int64_t residual_pixel, T* y, int64_t y_pixel, int n) {
  vf acc[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) acc[p] = bias;
  for (int64_t i = 0; i < kernel_h; ++i, x += row, w += K * kLanes) {
    vf weights[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) weights[k] = load(w + k * kLanes);
#pragma GCC unroll 32
    for (int j = 0; j < (P - 1) * S + K; ++j) {
      const vf value = get_some(x + j * pixel, n);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        if (j >= k && (j - k) % S == 0 && (j - k) / S < P) acc[(j - k) / S] += value * weights[k];
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    finish(acc[p], end, residual ? residual + p * residual_pixel : nullptr, y + p * y_pixel, n);
  }
}

template <typename T>
void depthwise_any(const deploy::DepthwiseJob& job, const T* x, const float* w, vf bias, const TileEnd<T>& end,
                   const T* residual, T* y, int n) {
  vf acc = bias;
  for (int64_t i = 0; i < job.kernel_h; ++i) {
    for (int64_t k = 0; k < job.kernel_w; ++k, w += kLanes) {
      acc += get_some(x + i * job.dilation_h * job.x.row + k * job.dilation_w * job.x.pixel, n) * load(w);
    }
  }
  finish(acc, end, residual, y, n);
}

template <typename T>
using DepthwiseTile = void (*)(const T*, int64_t, int64_t, int64_t, const float*, vf, const TileEnd<T>&, const T*, int64_t,
                               T*, int64_t, int);

template <typename T, int P>
DepthwiseTile<T> pick_depthwise(int64_t kernel, int64_t stride) {
  if (kernel == 3 && stride == 1) return &depthwise_tile<T, 3, 1, P>;
  if (kernel == 3 && stride == 2) return &depthwise_tile<T, 3, 2, P>;
  if (kernel == 5 && stride == 1) return &depthwise_tile<T, 5, 1, P>;
  if (kernel == 5 && stride == 2) return &depthwise_tile<T, 5, 2, P>;
  if (kernel == 7 && stride == 1) return &depthwise_tile<T, 7, 1, P>;
  return nullptr;
}

#if defined(SK_BF16)
// P output pixels of one row and two vectors of channels, in products of pairs: the taps of two rows. Interleaving two vectors of
// bfloat16 costs half of making floats of them; it leaves channels 0 to 3 of every 8 in one vector and 4 to 7 in the other.
template <int K, int S, int P, bool Two>
void add_row_pair(const c10::BFloat16* x, int64_t row, int64_t pixel, const c10::BFloat16* w, __mmask32 mask, __m512 (&acc)[P][2]) {
  __m512bh weights[K][2];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    weights[k][0] = (__m512bh)_mm512_loadu_si512(w + k * 4 * kLanes);
    weights[k][1] = (__m512bh)_mm512_loadu_si512(w + k * 4 * kLanes + 2 * kLanes);
  }
#pragma GCC unroll 32
  for (int j = 0; j < (P - 1) * S + K; ++j) {
    const __m512i a = _mm512_maskz_loadu_epi16(mask, x + j * pixel);
    const __m512i b = Two ? _mm512_maskz_loadu_epi16(mask, x + row + j * pixel) : _mm512_setzero_si512();
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      if (j >= k && (j - k) % S == 0 && (j - k) / S < P) {
        acc[(j - k) / S][0] = _mm512_dpbf16_ps(acc[(j - k) / S][0], low, weights[k][0]);
        acc[(j - k) / S][1] = _mm512_dpbf16_ps(acc[(j - k) / S][1], high, weights[k][1]);
      }
    }
  }
}

template <int K, int S, int P>
void depthwise_pairs(const c10::BFloat16* x, int64_t row, int64_t pixel, int64_t kernel_h, const c10::BFloat16* w,
                     const float* bias, const TileEnd<c10::BFloat16>& end, c10::BFloat16* y, int64_t y_pixel, __mmask32 mask) {
  __m512 acc[P][2];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) acc[p][0] = _mm512_loadu_ps(bias), acc[p][1] = _mm512_loadu_ps(bias + kLanes);
  int64_t i = 0;
  for (; i + 2 <= kernel_h; i += 2, x += 2 * row, w += K * 4 * kLanes) add_row_pair<K, S, P, true>(x, row, pixel, w, mask, acc);
  if (i < kernel_h) add_row_pair<K, S, P, false>(x, row, pixel, w, mask, acc);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    vf a = (vf)acc[p][0], b = (vf)acc[p][1];
    if (end.clamps) {
      a = clamp_above(clamp_below(a, 0.0f), end.high), b = clamp_above(clamp_below(b, 0.0f), end.high);
    } else if (end.other) {
      a = end.other(a), b = end.other(b);
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    _mm512_mask_storeu_epi16(y + p * y_pixel, mask, _mm512_permutexvar_epi64(order, both));
  }
}

using DepthwisePairs = void (*)(const c10::BFloat16*, int64_t, int64_t, int64_t, const c10::BFloat16*, const float*,
                                const TileEnd<c10::BFloat16>&, c10::BFloat16*, int64_t, __mmask32);

template <int P>
DepthwisePairs pick_pairs(int64_t kernel, int64_t stride) {
  if (kernel == 3 && stride == 1) return &depthwise_pairs<3, 1, P>;
  if (kernel == 3 && stride == 2) return &depthwise_pairs<3, 2, P>;
  if (kernel == 5 && stride == 1) return &depthwise_pairs<5, 1, P>;
  if (kernel == 5 && stride == 2) return &depthwise_pairs<5, 2, P>;
  return nullptr;
}

// The row of outputs whose first input is x; returns how many vectors of channels it has done. One vector alone is left over: half
// of the lanes would be empty.
inline int64_t depthwise_pairs_row(const deploy::DepthwiseJob& job, const TileEnd<c10::BFloat16>& end, const c10::BFloat16* x,
                                   c10::BFloat16* y) {
  constexpr int kWide = 7, kBlock = 2 * kLanes;
  const DepthwisePairs wide = pick_pairs<kWide>(job.kernel_w, job.stride_w), single = pick_pairs<1>(job.kernel_w, job.stride_w);
  if (!wide) return 0;
  const int64_t blocks = (job.channels + kLanes - 1) / kBlock;
  const int64_t block_weights = (job.kernel_h + 1) / 2 * job.kernel_w * 2 * kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t c = block * kBlock, n = std::min<int64_t>(kBlock, job.channels - c);
    const __mmask32 mask = n == kBlock ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
    const auto* w = (const c10::BFloat16*)job.pairs + block * block_weights;
    for (int64_t j = 0; j < job.out_w;) {
      const bool fits = j + kWide <= job.out_w;
      (fits ? wide : single)(x + j * job.stride_w * job.x.pixel + c, job.dilation_h * job.x.row, job.x.pixel, job.kernel_h, w,
                             job.pair_bias + c, end, y + j * job.y.pixel + c, job.y.pixel, mask);
      j += fits ? kWide : 1;
    }
  }
  return 2 * blocks;
}
#endif

template <typename T>
void depthwise_kernel(const deploy::DepthwiseJob& job, const deploy::Places& at) {
  constexpr int kWide = kLanes == 16 ? 7 : 3;
  const bool plain = job.dilation_w == 1;
  const DepthwiseTile<T> wide = plain ? pick_depthwise<T, kWide>(job.kernel_w, job.stride_w) : nullptr;
  const DepthwiseTile<T> single = plain ? pick_depthwise<T, 1>(job.kernel_w, job.stride_w) : nullptr;
  const int64_t vectors = (job.channels + kLanes - 1) / kLanes, taps = job.kernel_h * job.kernel_w;
  const int64_t work = job.out_w * vectors * taps;
  at::parallel_for(0, job.images * job.out_h, 1 + (1 << 15) / (work + 1), [&](int64_t begin, int64_t stop) {
    const TileEnd<T> end = tile_end<T>(job.epilogue);
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t image = task / job.out_h, line = task % job.out_h;
      const T* x_row = (const T*)at.x + image * job.x.image + line * job.stride_h * job.x.row;
      T* y_row = (T*)at.y + image * job.y.image + line * job.y.row;
      const T* residual_row = residual_at<T>(at, job.residual, image, line);
      int64_t vector = 0;
#if defined(SK_BF16)
      if (job.pairs && plain && !residual_row) vector = depthwise_pairs_row(job, end, x_row, y_row);
#endif
      for (; vector < vectors; ++vector) {
        const int64_t c = vector * kLanes;
        const int n = std::min<int64_t>(kLanes, job.channels - c);
        const float* w = job.weight + c * taps;
        const vf bias = load(job.epilogue.bias + c);
        for (int64_t j = 0; j < job.out_w;) {
          const T* x = x_row + j * job.stride_w * job.x.pixel + c;
          const T* residual = residual_row ? residual_row + j * job.residual.pixel + c : nullptr;
          T* y = y_row + j * job.y.pixel + c;
          if (!wide) {
            depthwise_any(job, x, w, bias, end, residual, y, n);
            ++j;
            continue;
          }
          const bool fits = j + kWide <= job.out_w;
          (fits ? wide : single)(x, job.dilation_h * job.x.row, job.x.pixel, job.kernel_h, w, bias, end, residual,
                                 job.residual.pixel, y, job.y.pixel, n);
          j += fits ? kWide : 1;
        }
      }
    }
  });
}
