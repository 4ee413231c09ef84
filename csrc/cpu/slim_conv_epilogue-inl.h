// What follows a convolution that PyTorch ran: residual and activation, in place, in one pass over memory in order.

template <typename T>
void add_activate_kernel(T* y, const T* residual, int64_t size, Activation activation) {
  SK_SWITCH_ACTIVATION(activation, [&] {
    at::parallel_for(0, size, 32768, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        vf v = load(y + i);
        if (residual) v += load(residual + i);
        store(y + i, activate<act>(v));
      }
      if (i < end) {
        const int n = end - i;
        vf v = load_first(y + i, n);
        if (residual) v += load_first(residual + i, n);
        store_first(y + i, activate<act>(v), n);
      }
    });
  });
}

// sums[c] = the sum of dy over pixels that lie `step` apart. Blocks of pixels are added up first, so that the error does not grow with
// their number.
template <typename T>
void channel_sums_kernel(const T* dy, int64_t pixels, int64_t channels, int64_t step, float* sums) {
  constexpr int64_t kTogether = 8, kBlockPixels = 256;
  at::parallel_for(0, (channels + kTogether * kLanes - 1) / (kTogether * kLanes), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kTogether * kLanes; c < std::min(channels, end * kTogether * kLanes); c += kTogether * kLanes) {
      const int64_t vectors = std::min(kTogether, (channels - c) / kLanes);
      const int last = vectors < kTogether ? static_cast<int>(channels - c - vectors * kLanes) : 0;
      vf totals[kTogether + 1] = {};
      for (int64_t block = 0; block < pixels; block += kBlockPixels) {
        vf part[kTogether + 1] = {};
        for (int64_t p = block; p < std::min(pixels, block + kBlockPixels); ++p) {
          const T* from = dy + p * step + c;
          if (vectors == kTogether) {
#pragma GCC unroll 8
            for (int v = 0; v < kTogether; ++v) part[v] += load(from + v * kLanes);
          } else {
            for (int v = 0; v < vectors; ++v) part[v] += load(from + v * kLanes);
            if (last > 0) part[vectors] += load_first(from + vectors * kLanes, last);
          }
        }
        for (int v = 0; v <= kTogether; ++v) totals[v] += part[v];
      }
      for (int v = 0; v < vectors; ++v) store(sums + c + v * kLanes, totals[v]);
      if (last > 0) store_first(sums + c + vectors * kLanes, totals[vectors], last);
    }
  });
}
