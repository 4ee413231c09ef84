// Elementwise activation over contiguous memory, forward and backward.

template <typename T>
void activation_kernel(const T* x, T* y, int64_t size, Activation activation) {
  SK_SWITCH_ACTIVATION(activation, [&] {
    at::parallel_for(0, size, 32768, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) store(y + i, activate<act>(load(x + i)));
      if (i < end) store_first(y + i, activate<act>(load_first(x + i, end - i)), end - i);
    });
  });
}

template <typename T>
void activation_backward_kernel(const T* dy, const T* saved, T* dx, int64_t size, Activation activation) {
  SK_SWITCH_ACTIVATION(activation, [&] {
    at::parallel_for(0, size, 32768, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        store(dx + i, load(dy + i) * activation_derivative<act>(load(saved + i)));
      }
      if (i < end) {
        const int n = end - i;
        store_first(dx + i, load_first(dy + i, n) * activation_derivative<act>(load_first(saved + i, n)), n);
      }
    });
  });
}
