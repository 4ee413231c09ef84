// One group of one sample at a time: contiguous memory, in the cache from its statistics to its output.

#include "norm_segments-inl.h"

namespace {

// While a group is written, the next one comes nearer: the other pass over it would wait for memory.
template <typename Call, typename T>
inline void ask_for_next(const Call& call, const T* x, int64_t at) {
  const int64_t end = std::min(at + call.length, call.samples * call.channels * call.length);
  for (; at < end; at += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(x + at, 0, 2);
}

template <Kind kind, typename T>
void forward_group(const GroupNormCall<T>& call, int64_t n, int64_t g) {
  const int64_t first = g * call.group_size, last = std::min(call.channels, first + call.group_size);
  const int64_t start = (n * call.channels + first) * call.length, size = (last - first) * call.length;
  Moments moments;
  for (int64_t i = 0; i < size; i += kPiece) add_block(moments, call.x + start + i, 1, 0, std::min(kPiece, size - i));
  const float mean = static_cast<float>(moments.mean);
  const float invstd = inverse_std(static_cast<float>(moments.m2 / moments.count), call.eps);
  call.mean[n * call.groups() + g] = mean;
  call.invstd[n * call.groups() + g] = invstd;
  for (int64_t c = first; c < last; ++c) {
    const int64_t at = (n * call.channels + c) * call.length;
    const Affine<Splat> a{{mean}, {call.weight[c] * invstd}, {call.bias[c]}, call.activation};
    ask_for_next(call, call.x, at + size);
    normalize<kind>(call.x + at, call.residual ? call.residual + at : nullptr, call.y + at, call.length, a);
  }
}

template <Kind kind, bool kSaved, typename T>
void backward_group(const GroupNormBackwardCall<T>& call, int64_t n, int64_t g) {
  const int64_t first = g * call.group_size, last = std::min(call.channels, first + call.group_size), length = call.length;
  const float mean = call.mean[n * call.groups() + g], invstd = call.invstd[n * call.groups() + g];
  T* dz = call.dz ? call.dz : is_cheap(kind) ? nullptr : call.dx;  // where the first pass leaves dz for the second
  double sum_g = 0, sum_gx = 0;
  for (int64_t c = first; c < last; ++c) {
    const int64_t at = (n * call.channels + c) * length;
    const Affine<Splat> a{{mean}, {call.weight[c] * invstd}, {call.bias[c]}, call.activation};
    double sum_dz = 0, sum_dzx = 0;
    for (int64_t i = at; i < at + length; i += kPiece) {
      vf block_dz = splat(0), block_dzx = splat(0);
      reduce_segment<kind, kSaved>(call.dy + i, call.x + i, kSaved ? call.saved + i : nullptr, dz ? dz + i : nullptr,
                                  std::min(kPiece, at + length - i), a, block_dz, block_dzx);
      sum_dz += total(block_dz);
      sum_dzx += total(block_dzx);
    }
    call.db[n * call.channels + c] = sum_dz;
    call.dw[n * call.channels + c] = sum_dzx * invstd;
    sum_g += sum_dz * call.weight[c];
    sum_gx += sum_dzx * invstd * call.weight[c];
  }
  if (!call.dx) return;
  const double count = static_cast<double>((last - first) * length);
  const Splat slope{static_cast<float>(-sum_gx / count * invstd * invstd)}, offset{static_cast<float>(-sum_g / count * invstd)};
  for (int64_t c = first; c < last; ++c) {
    const int64_t at = (n * call.channels + c) * length;
    const Affine<Splat> a{{mean}, {call.weight[c] * invstd}, {call.bias[c]}, call.activation};
    ask_for_next(call, call.x, at + (last - first) * length);
    ask_for_next(call, call.dy, at + (last - first) * length);
    if (dz) {
      dx_segment<Kind::kNone, false, T>(dz + at, call.x + at, nullptr, call.dx + at, length, a, slope, offset);
    } else if constexpr (is_cheap(kind)) {
      dx_segment<kind, kSaved>(call.dy + at, call.x + at, kSaved ? call.saved + at : nullptr, call.dx + at, length, a, slope, offset);
    }
  }
}

template <typename Call, typename F>
void for_groups(const Call& call, F f) {
  const int64_t groups = call.groups(), size = call.group_size * call.length;
  at::parallel_for(0, call.samples * groups, std::max<int64_t>(1, 32768 / size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / groups, i % groups);
  });
}

}  // namespace

template <typename T>
void slim_group_norm_kernel(const GroupNormCall<T>& call) {
  switch_kind(call.activation, [&]<Kind kind>() {
    for_groups(call, [&](int64_t n, int64_t g) { forward_group<kind>(call, n, g); });
  });
}

template <typename T>
void slim_group_norm_backward_kernel(const GroupNormBackwardCall<T>& call) {
  switch_kind(call.activation, [&]<Kind kind>() {
    for_groups(call, [&](int64_t n, int64_t g) {
      kind != Kind::kNone && call.saved ? backward_group<kind, kind != Kind::kNone>(call, n, g)
                                             : backward_group<kind, false>(call, n, g);
    });
  });
}
