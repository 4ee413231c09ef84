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
      for (int64_t vector = 0; vector < vectors; ++vector) {
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
