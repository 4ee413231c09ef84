// Pooling and elementwise operations of deployed networks; included by deploy-inl.h.

// The taps of a window that lie inside [0, size): first one and one past the last.
inline std::pair<int64_t, int64_t> taps_inside(int64_t from, int64_t size, int64_t kernel, int64_t dilation) {
  if (from >= 0 && from + (kernel - 1) * dilation < size) return {0, kernel};
  const int64_t first = from < 0 ? (-from + dilation - 1) / dilation : 0;
  const int64_t end = from >= size ? 0 : (size - 1 - from) / dilation + 1;
  return {first, std::max(first, std::min(kernel, end))};
}

#if defined(SK_BF16)
// The largest of a window in `channels` channels, compared as integers: a number with its sign has the order of an
// integer once the other bits of negative ones are flipped. A NaN is above all others, or, with a sign, found as the
// largest of all patterns.
inline void max_of_window(const c10::BFloat16* window, int64_t rows, int64_t columns, int64_t step_h, int64_t step_w,
                          int64_t channels, c10::BFloat16* y) {
  constexpr int64_t kBlock = 2 * kLanes;
  constexpr int kFlipNegative = 0x78;  // a ^ (b & c)
  const __m512i others = _mm512_set1_epi16(0x7FFF);
  for (int64_t c = 0; c < channels; c += kBlock) {
    const __mmask32 mask = channels - c >= kBlock ? ~__mmask32(0) : (__mmask32(1) << (channels - c)) - 1;
    __m512i most = _mm512_set1_epi16(static_cast<int16_t>(0x807F)), pattern = _mm512_setzero_si512();  // minus infinity
    for (int64_t i = 0; i < rows; ++i) {
      const c10::BFloat16* x = window + i * step_h + c;
      for (int64_t j = 0; j < columns; ++j, x += step_w) {
        const __m512i bits = _mm512_maskz_loadu_epi16(mask, x);
        pattern = _mm512_max_epu16(pattern, bits);
        most =
            _mm512_max_epi16(most, _mm512_ternarylogic_epi32(bits, _mm512_srai_epi16(bits, 15), others, kFlipNegative));
      }
    }
    most = _mm512_ternarylogic_epi32(most, _mm512_srai_epi16(most, 15), others, kFlipNegative);
    const __mmask32 nan = _mm512_cmpgt_epu16_mask(pattern, _mm512_set1_epi16(static_cast<int16_t>(0xFF80)));
    most = _mm512_mask_mov_epi16(most, nan, pattern);
    _mm512_mask_storeu_epi16(y + c, mask, most);
  }
}
#endif

template <bool Max, typename T>
void pool_rows(const deploy::PoolJob& job, const deploy::Places& at, int64_t begin, int64_t end) {
  const int64_t step_h = job.dilation_h * job.x.row, step_w = job.dilation_w * job.x.pixel;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / job.out_h, line = task % job.out_h;
    const int64_t top = line * job.stride_h - job.pad_h;
    const auto [y_first, y_end] = taps_inside(top, job.in_h, job.kernel_h, job.dilation_h);
    const T* x_image = (const T*)at.x + image * job.x.image;
    T* y_row = (T*)at.y + image * job.y.image + line * job.y.row;
    for (int64_t j = 0; j < job.out_w; ++j) {
      const int64_t left = j * job.stride_w - job.pad_w;
      const auto [x_first, x_end] = taps_inside(left, job.in_w, job.kernel_w, job.dilation_w);
      int64_t count = (y_end - y_first) * (x_end - x_first);
      if (!Max && job.count_padding) {
        // As in PyTorch: padding counts, but not what a window has beyond it.
        count = (std::min(top + job.kernel_h, job.in_h + job.pad_h) - top) *
                (std::min(left + job.kernel_w, job.in_w + job.pad_w) - left);
      }
      const float share = 1.0f / static_cast<float>(count);
      const T* window = x_image + (top + y_first * job.dilation_h) * job.x.row + (left + x_first * job.dilation_w) * job.x.pixel;
#if defined(SK_BF16)
      if constexpr (Max && std::is_same_v<T, c10::BFloat16>) {
        max_of_window(window, y_end - y_first, x_end - x_first, step_h, step_w, job.channels, y_row + j * job.y.pixel);
        continue;
      }
#endif
      for (int64_t c = 0; c < job.channels; c += kLanes) {
        const int n = std::min<int64_t>(kLanes, job.channels - c);
        vf acc = splat(Max ? -std::numeric_limits<float>::infinity() : 0.0f);
        for (int64_t ky = 0; ky < y_end - y_first; ++ky) {
          const T* x = window + ky * step_h + c;
          for (int64_t kx = 0; kx < x_end - x_first; ++kx, x += step_w) {
            const vf value = get_some(x, n);
            if constexpr (Max) {
              acc = (value > acc) | (value != value) ? value : acc;  // a NaN stays
            } else {
              acc += value;
            }
          }
        }
        put_some(y_row + j * job.y.pixel + c, Max ? acc : acc * share, n);
      }
    }
  }
}

template <typename T>
void pool_kernel(const deploy::PoolJob& job, const deploy::Places& at) {
  const int64_t work = job.out_w * job.channels * job.kernel_h * job.kernel_w / kLanes;
  at::parallel_for(0, job.images * job.out_h, 1 + (1 << 14) / (work + 1), [&](int64_t begin, int64_t end) {
    job.max ? pool_rows<true, T>(job, at, begin, end) : pool_rows<false, T>(job, at, begin, end);
  });
}

template <typename T>
void pointwise_kernel(const deploy::PointwiseJob& job, const deploy::Places& at) {
  at::parallel_for(0, job.images * job.h, 1 + (1 << 15) / (job.w * job.channels + 1), [&](int64_t begin, int64_t stop) {
    const TileEnd<T> end = tile_end<T>(job.epilogue);
    const float *scale = job.scale, *bias = job.epilogue.bias;
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t image = task / job.h, line = task % job.h;
      const T* x = (const T*)at.x + image * job.x.image + line * job.x.row;
      T* y = (T*)at.y + image * job.y.image + line * job.y.row;
      const T* residual = residual_at<T>(at, job.residual, image, line);
      for (int64_t j = 0; j < job.w; ++j) {
        for (int64_t c = 0; c < job.channels; c += kLanes) {
          const int n = std::min<int64_t>(kLanes, job.channels - c);
          vf v = get_some(x + j * job.x.pixel + c, n);
          if (scale) v *= load(scale + c);
          if (bias) v += load(bias + c);
          finish(v, end, residual ? residual + j * job.residual.pixel + c : nullptr, y + j * job.y.pixel + c, n);
        }
      }
    }
  });
}
