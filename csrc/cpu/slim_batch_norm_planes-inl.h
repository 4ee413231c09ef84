// Planes. With batch statistics a channel at a time: its statistics, then its output, while what fits of it is in the cache. With
// given statistics in the order of memory, which is several times faster where planes are short.

inline Affine<Splat> plane_affine(const auto& call, int64_t c) {
  return {{call.mean[c]}, {call.weight[c] * inverse_std(call.var[c], call.eps)}, {call.bias[c]}, call.activation};
}

// Planes of one channel lie far apart: where they are short, no hardware follows them, and each would wait for memory.
// The plane beside, of the next channel, is asked for while one is written or added up.
template <typename T>
inline void ask_for_plane(const T* plane, int64_t length) {
  constexpr int64_t kShort = 4096, kLine = 64 / sizeof(T);
  if (!plane || length * static_cast<int64_t>(sizeof(T)) > kShort) return;
  for (int64_t i = 0; i < length; i += kLine) __builtin_prefetch(plane + i, 0, 2);
}

// Each block around its own mean: far from zero the gradients need the mean to its last bit.
template <typename T>
Moments plane_moments(const T* x, int64_t samples, int64_t stride, int64_t length) {
  Moments moments;
  const auto add = [&](const T* from, int64_t planes, int64_t n) {
    Moments block;
    add_block(block, from, planes, stride, n);
    moments.merge(block.count, block.mean, block.m2);
  };
  if (length >= kPiece / 2) {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t i = 0; i < length; i += kPiece) add(x + n * stride + i, 1, std::min(kPiece, length - i));
    }
  } else {
    const int64_t together = kPiece / length;
    for (int64_t n = 0; n < samples; n += together) add(x + n * stride, std::min(together, samples - n), length);
  }
  return moments;
}

template <typename T>
void forward_planes(const ForwardCall<T>& call) {
  const auto [rows, samples, channels, length] = call.layout;
  switch_kind(call.activation, [&, samples = samples, channels = channels, length = length]<Kind kind>() {
    const auto plane = [&](int64_t n, int64_t c, const Affine<Splat>& a) {
      normalize<kind>(call.x.plane(n, c), call.residual.plane(n, c), call.y.plane(n, c), length, a);
    };
    if (!call.training) {
      std::vector<Affine<Splat>> affine;
      for (int64_t c = 0; c < channels; ++c) affine.push_back(plane_affine(call, c));
      at::parallel_for(0, samples * channels, std::max<int64_t>(1, 32768 / length), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin, n = begin / channels, c = begin % channels; i < end; ++i) {
          plane(n, c, affine[c]);
          if (++c == channels) c = 0, ++n;
        }
      });
      return;
    }
    at::parallel_for(0, channels, std::max<int64_t>(1, 32768 / (samples * length)), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Moments moments = plane_moments(call.x.plane(0, c), samples, call.x.outer, length);
        call.mean[c] = static_cast<float>(moments.mean);
        call.var[c] = static_cast<float>(moments.m2 / moments.count);
        const Affine<Splat> a = plane_affine(call, c);
        for (int64_t n = 0; n < samples; ++n) {
          if (c + 1 < end) {
            ask_for_plane(call.x.plane(n, c + 1), length);
            ask_for_plane(call.residual.plane(n, c + 1), length);
          }
          plane(n, c, a);
        }
      }
    });
  });
}

template <Kind kind, bool kSaved, typename T>
void backward_channel(const BackwardCall<T>& call, int64_t c, Affine<Splat> a, float invstd) {
  const auto [rows, samples, channels, length] = call.layout;
  const bool stash = call.dz.data || (!is_cheap(kind) && call.dx.data);
  const Operand<T> dz = call.dz.data ? call.dz : call.dx;
  double sum_dz = 0, sum_dzx = 0;
  if (call.need_sums || stash) {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t i = 0; i < length; i += kPiece) {
        vf block_dz = splat(0), block_dzx = splat(0);
        // Short planes: several go into one block before the sums leave the vectors.
        const int64_t last = length < kPiece ? std::min(samples, n + std::max<int64_t>(1, kPiece / length)) : n + 1;
        for (;; ++n) {
          if (c + 1 < channels) {
            ask_for_plane(call.x.plane(n, c + 1), length);
            ask_for_plane(call.dy.plane(n, c + 1), length);
          }
          reduce_segment<kind, kSaved>(call.dy.plane(n, c) + i, call.x.plane(n, c) + i, kSaved ? call.saved.plane(n, c) + i : nullptr,
                                      stash ? dz.plane(n, c) + i : nullptr, std::min(kPiece, length - i), a, block_dz, block_dzx);
          if (n + 1 == last) break;
        }
        sum_dz += total(block_dz);
        sum_dzx += total(block_dzx);
      }
    }
  }
  call.db[c] = static_cast<float>(sum_dz);
  call.dw[c] = static_cast<float>(sum_dzx * invstd);
  if (!call.dx.data) return;
  const double count = call.training ? static_cast<double>(samples * length) : 0;
  const double mean_dz = count ? sum_dz / count : 0, mean_dzx = count ? sum_dzx * invstd * invstd / count : 0;
  const Splat slope{static_cast<float>(-mean_dzx * a.scale.value)}, offset{static_cast<float>(-mean_dz * a.scale.value)};
  for (int64_t n = 0; n < samples; ++n) {
    if (kSaved && c + 1 < channels) ask_for_plane(call.saved.plane(n, c + 1), length);
    if (stash) {
      dx_segment<Kind::kNone, false, T>(dz.plane(n, c), call.x.plane(n, c), nullptr, call.dx.plane(n, c), length, a, slope,
                                              offset);
    } else if constexpr (is_cheap(kind)) {
      dx_segment<kind, kSaved>(call.dy.plane(n, c), call.x.plane(n, c), call.saved.plane(n, c), call.dx.plane(n, c), length, a,
                              slope, offset);
    }
  }
}

template <typename T>
void backward_planes(const BackwardCall<T>& call) {
  const int64_t size = call.layout.samples * call.layout.length;
  switch_kind(call.activation, [&]<Kind kind>() {
    at::parallel_for(0, call.layout.channels, std::max<int64_t>(1, 32768 / size), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const float invstd = inverse_std(call.var[c], call.eps);
        const Affine<Splat> a{{call.mean[c]}, {call.weight[c] * invstd}, {call.bias[c]}, call.activation};
        if (kind != Kind::kNone && call.saved.data) {
          backward_channel<kind, kind != Kind::kNone>(call, c, a, invstd);
        } else {
          backward_channel<kind, false>(call, c, a, invstd);
        }
      }
    });
  });
}
