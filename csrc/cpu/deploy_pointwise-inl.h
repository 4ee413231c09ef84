// Pooling and elementwise operations of deployed networks; included by deploy-inl.h.

template <typename T>
void pool_kernel(const deploy::PoolJob& job, const deploy::Places& at) {
  const int64_t work = job.out_w * job.channels * job.kernel_h * job.kernel_w / kLanes;
  at::parallel_for(0, job.images * job.out_h, 1 + (1 << 14) / (work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / job.out_h, line = task % job.out_h;
      const int64_t top = line * job.stride_h - job.pad_h;
      const T* x_image = (const T*)at.x + image * job.x.image;
      T* y_row = (T*)at.y + image * job.y.image + line * job.y.row;
      for (int64_t j = 0; j < job.out_w; ++j) {
        const int64_t left = j * job.stride_w - job.pad_w;
        int64_t count = job.kernel_h * job.kernel_w;
        if (!job.max) {
          // As in PyTorch: padding counts, but not what a window has beyond it.
          const auto inside = [&](int64_t from, int64_t size, int64_t pad, int64_t kernel) {
            const int64_t low = job.count_padding ? from : std::max<int64_t>(from, 0);
            return std::min(from + kernel, size + (job.count_padding ? pad : 0)) - low;
          };
          count = inside(top, job.in_h, job.pad_h, job.kernel_h) * inside(left, job.in_w, job.pad_w, job.kernel_w);
        }
        const float share = 1.0f / static_cast<float>(count);
        for (int64_t c = 0; c < job.channels; c += kLanes) {
          const int n = std::min<int64_t>(kLanes, job.channels - c);
          vf acc = splat(job.max ? -std::numeric_limits<float>::infinity() : 0.0f);
          for (int64_t ky = 0; ky < job.kernel_h; ++ky) {
            const int64_t row = top + ky * job.dilation_h;
            if (row < 0 || row >= job.in_h) continue;
            for (int64_t kx = 0; kx < job.kernel_w; ++kx) {
              const int64_t column = left + kx * job.dilation_w;
              if (column < 0 || column >= job.in_w) continue;
              const vf value = get_some(x_image + row * job.x.row + column * job.x.pixel + c, n);
              acc = job.max ? ((value > acc) | (value != value) ? value : acc) : acc + value;
            }
          }
          put_some(y_row + j * job.y.pixel + c, job.max ? acc : acc * share, n);
        }
      }
    }
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
