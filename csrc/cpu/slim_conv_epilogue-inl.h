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
