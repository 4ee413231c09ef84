// Gradients of a depthwise convolution with the channels in the vector. Sums are float32 for every dtype.

// The pixels [begin, end) of a line whose taps all lie inside [0, size).
inline std::pair<int64_t, int64_t> inside(const DepthwiseLine& line, int64_t size) {
  int64_t begin = 0, end = line.count;
  for (const DepthwiseTap& tap : line.taps) {
    if (tap.offset < 0) begin = std::max(begin, (-tap.offset + line.in_step - 1) / line.in_step);
    const int64_t room = size - 1 - tap.offset;
    end = std::min(end, room < 0 ? 0 : room / line.in_step + 1);
  }
  return {std::min(begin, end), end};
}

// The first n of kLanes channels, 0 in the other lanes; all of them when kWhole.
template <bool kWhole, typename T>
inline vf load_some(const T* p, int n) {
  if constexpr (kWhole) return load(p);
#if defined(SK_AVX512)
  const __mmask16 mask = (__mmask16)((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return (vf)_mm512_maskz_loadu_ps(mask, p);
  const __m256i h = _mm256_maskz_loadu_epi16(mask, p);
  if constexpr (std::is_same_v<T, c10::Half>) return (vf)_mm512_cvtph_ps(h);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#else
  return load_first(p, n);
#endif
}

// dw (taps of one kernel row, at stride `padded`) += sum over U-fold pixels of x * dy.
template <int K, int U, bool kWhole, typename T>
inline void depthwise_gradient_row(const T* x, int64_t tap_step, int64_t x_step, const T* dy, int64_t dy_step,
                                   int64_t pixels, int n, float* dw, int64_t padded) {
  vf acc[K][U] = {};
  int64_t j = 0;
  for (; j + U <= pixels; j += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const vf grad = load_some<kWhole>(dy + (j + u) * dy_step, n);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) acc[k][u] += grad * load_some<kWhole>(x + (j + u) * x_step + k * tap_step, n);
    }
  }
  for (; j < pixels; ++j) {
    const vf grad = load_some<kWhole>(dy + j * dy_step, n);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) acc[k][0] += grad * load_some<kWhole>(x + j * x_step + k * tap_step, n);
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    vf total = acc[k][0];
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) total += acc[k][u];
    store(dw + k * padded, load(dw + k * padded) + total);
  }
}

template <bool kWhole, typename T>
inline void depthwise_gradient_taps(int64_t taps, const T* x, int64_t tap_step, int64_t x_step, const T* dy,
                                    int64_t dy_step, int64_t pixels, int n, float* dw, int64_t padded) {
  for (; taps >= 7; taps -= 7, x += 7 * tap_step, dw += 7 * padded) {
    depthwise_gradient_row<7, 1, kWhole>(x, tap_step, x_step, dy, dy_step, pixels, n, dw, padded);
  }
  for (; taps >= 5; taps -= 5, x += 5 * tap_step, dw += 5 * padded) {
    depthwise_gradient_row<5, 2, kWhole>(x, tap_step, x_step, dy, dy_step, pixels, n, dw, padded);
  }
  for (; taps >= 3; taps -= 3, x += 3 * tap_step, dw += 3 * padded) {
    depthwise_gradient_row<3, 4, kWhole>(x, tap_step, x_step, dy, dy_step, pixels, n, dw, padded);
  }
  for (; taps > 0; --taps, x += tap_step, dw += padded) {
    depthwise_gradient_row<1, 4, kWhole>(x, tap_step, x_step, dy, dy_step, pixels, n, dw, padded);
  }
}

// One vector of channels, from c on, of one image's row i.
template <bool kWhole, typename T>
inline void depthwise_gradient_vector(const DepthwiseGradient& conv, const T* x, const T* dy, float* dw, float* db,
                                      int64_t image, int64_t i, int64_t c, int64_t first, int64_t last) {
  const int64_t padded = (conv.channels + 15) / 16 * 16;
  const DepthwiseLine &row = conv.row, &column = conv.column;
  const int64_t taps = column.taps.size();
  const int64_t tap_step = (taps > 1 ? column.taps[1].offset - column.taps[0].offset : 0) * conv.in_stride_w;
  const int64_t x_step = column.in_step * conv.in_stride_w, dy_step = conv.dy_stride_w;
  const int n = std::min<int64_t>(kLanes, conv.channels - c);
  const T* grads = dy + image * conv.dy_stride_n + i * conv.dy_stride_h + c;
  vf total = {};
  for (int64_t j = 0; j < column.count; ++j) total += load_some<kWhole>(grads + j * dy_step, n);
  store(db + c, load(db + c) + total);
  for (const DepthwiseTap& ty : row.taps) {
    const int64_t y = i * row.in_step + ty.offset;
    if (y < 0 || y >= conv.in_h) continue;
    const T* values = x + image * conv.in_stride_n + y * conv.in_stride_h + c;
    float* to = dw + ty.kernel * conv.kernel_w * padded + c;
    if (last > first) {
      depthwise_gradient_taps<kWhole>(taps, values + first * x_step + column.taps[0].offset * conv.in_stride_w,
                                      tap_step, x_step, grads + first * dy_step, dy_step, last - first, n, to, padded);
    }
    for (int64_t j = 0; j < column.count; ++j) {
      if (j == first) j = last;
      if (j >= column.count) break;
      const vf grad = load_some<kWhole>(grads + j * dy_step, n);
      for (const DepthwiseTap& tx : column.taps) {
        const int64_t at = j * column.in_step + tx.offset;
        if (at < 0 || at >= conv.in_w) continue;
        float* sum = to + tx.kernel * padded;
        store(sum, load(sum) + load_some<kWhole>(values + at * conv.in_stride_w, n) * grad);
      }
    }
  }
}

// dw (taps, padded channels) and db (padded channels), float32, zero on entry.
template <typename T>
void depthwise_gradient_kernel(const DepthwiseGradient& conv, const T* x, const T* dy, float* dw, float* db) {
  const auto [first, last] = inside(conv.column, conv.in_w);
  at::parallel_for(0, (conv.channels + kLanes - 1) / kLanes, 1,
                   [&, first = first, last = last](int64_t begin, int64_t end) {
                     for (int64_t image = 0; image < conv.images; ++image) {
                       for (int64_t i = 0; i < conv.row.count; ++i) {
                         for (int64_t c = begin * kLanes; c < std::min(end * kLanes, conv.channels); c += kLanes) {
                           if (conv.channels - c >= kLanes) {
                             depthwise_gradient_vector<true>(conv, x, dy, dw, db, image, i, c, first, last);
                           } else {
                             depthwise_gradient_vector<false>(conv, x, dy, dw, db, image, i, c, first, last);
                           }
                         }
                       }
                     }
                   });
}

// A tap of one pixel of dx: where its pixel of dy begins, and its weights, one a channel.
template <typename T>
struct InputTap {
  const T* dy;
  const float* weight;
};

template <typename T>
inline void store_some(T* p, vf v, int n) {
#if defined(SK_AVX512)
  if constexpr (!std::is_same_v<T, float>) {
    T rounded[kLanes];
    store(rounded, v);
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm256_loadu_si256((const __m256i*)rounded));
    return;
  }
#endif
  store_first(p, v, n);
}

// dx (channels of one pixel) = sum over `count` taps; over kTaps of them, where that is above 0.
template <int kTaps, typename T>
inline void depthwise_input_pixel(const InputTap<T>* taps, int64_t count, int64_t channels, T* dx) {
  const int64_t whole = channels - channels % kLanes, used = kTaps > 0 ? kTaps : count;
  const int n = channels - whole;
  for (int64_t c = 0; c < whole; c += kLanes) {
    vf sum = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < used; ++k) sum += load(taps[k].weight + c) * load(taps[k].dy + c);
    store(dx + c, sum);
  }
  if (n == 0) return;
  vf sum = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < used; ++k) sum += load(taps[k].weight + whole) * load_some<false>(taps[k].dy + whole, n);
  store_some(dx + whole, sum, n);
}

// dx, dense, every pixel of which gathers the pixels of dy that it was read for. `weight`: (taps, padded channels).
template <typename T>
void depthwise_input_kernel(const DepthwiseInput& conv, const T* dy, const float* weight, T* dx) {
  const int64_t padded = (conv.channels + 15) / 16 * 16;
  at::parallel_for(0, conv.images * conv.in_h, 1, [&](int64_t begin, int64_t end) {
    std::vector<InputTap<T>> taps(conv.rows.most * conv.columns.most);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / conv.in_h, y = line % conv.in_h;
      for (int64_t x = 0; x < conv.in_w; ++x) {
        int64_t count = 0;
        for (const auto& [ky, i] : conv.rows.of[y]) {
          for (const auto& [kx, j] : conv.columns.of[x]) {
            taps[count++] = {dy + image * conv.dy_stride_n + i * conv.dy_stride_h + j * conv.dy_stride_w,
                             weight + (ky * conv.kernel_w + kx) * padded};
          }
        }
        T* to = dx + (line * conv.in_w + x) * conv.channels;
        if (count == 1) {
          depthwise_input_pixel<1>(taps.data(), count, conv.channels, to);
        } else if (count == 2) {
          depthwise_input_pixel<2>(taps.data(), count, conv.channels, to);
        } else if (count == 4) {
          depthwise_input_pixel<4>(taps.data(), count, conv.channels, to);
        } else {
          depthwise_input_pixel<0>(taps.data(), count, conv.channels, to);
        }
      }
    }
  });
}
