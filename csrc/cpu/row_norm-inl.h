// A row at a time, in the L1 cache from its statistics to its output.

#include "norm_segments-inl.h"

namespace {

template <Kind kind, typename T>
void forward_row(const RowNormCall<T>& call, int64_t r, double share) {  // share: 1 / columns
  const int64_t n = call.columns;
  const T *x = call.x + r * n, *residual = call.residual ? call.residual + r * n : nullptr;
  T* y = call.y + r * n;
  float mean = 0, invstd;
  if (call.mean) {
    Moments moments;
    add_block(moments, x, 1, 0, n);
    mean = call.mean[r] = static_cast<float>(moments.mean);
    invstd = inverse_std(static_cast<float>(moments.m2 * share), call.eps);
  } else {
    const int64_t full = n / kLanes * kLanes;
    vf squares = accumulate(x, full, [](vf v) { return v * v; });
    if (full < n) {
      const vf v = load_tail(x + full, n - full);
      squares = squares + v * v;
    }
    invstd = inverse_std(total(squares) / static_cast<float>(n), call.eps);
  }
  call.invstd[r] = invstd;
  const auto at = [&](vf v, vf s, int64_t i) {
    return activate_kind<kind>(call.activation, (v - mean) * invstd * load(call.weight + i) + load(call.bias + i) + s);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, at(load(x + i), residual ? load(residual + i) : splat(0), i));
  if (i < n) {
    const int64_t rest = n - i;
    store_tail(y + i, at(load_tail(x + i, rest), residual ? load_tail(residual + i, rest) : splat(0), i), rest);
  }
}

// dw and db of these columns are added up in floats over a block of rows; dz stays in `scratch` between the two passes.
template <Kind kind, typename T>
void backward_row(const RowNormBackwardCall<T>& call, int64_t r, float* dw, float* db, float* scratch) {
  const int64_t n = call.columns;
  const T *dy = call.dy + r * n, *x = call.x + r * n, *saved = call.saved ? call.saved + r * n : nullptr;
  const float mean = call.mean ? call.mean[r] : 0.0f, invstd = call.invstd[r];
  vf sum_g = splat(0), sum_gx = splat(0);
  const auto first = [&](vf g, vf v, vf s, int64_t i) {
    const vf xhat = (v - mean) * invstd, weight = load(call.weight + i);
    g = gradient<kind>(g, xhat, weight, load(call.bias + i), s, saved != nullptr, call.activation);
    store(dw + i, load(dw + i) + g * xhat);
    store(db + i, load(db + i) + g);
    sum_g = sum_g + g * weight;
    sum_gx = sum_gx + g * weight * xhat;
    store(scratch + i, g);
    return g;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf g = first(load(dy + i), load(x + i), saved ? load(saved + i) : splat(0), i);
    if (call.dz) store(call.dz + r * n + i, g);
  }
  const int64_t rest = n - i;
  if (rest) {
    const vf g = first(load_tail(dy + i, rest), load_tail(x + i, rest), saved ? load_tail(saved + i, rest) : splat(0), i);
    if (call.dz) store_tail(call.dz + r * n + i, g, rest);
  }
  if (!call.dx) return;
  T* dx = call.dx + r * n;
  const float count = static_cast<float>(n), mean_g = call.mean ? total(sum_g) / count : 0.0f, mean_gx = total(sum_gx) / count;
  const auto second = [&](vf v, int64_t at) {
    const vf xhat = (v - mean) * invstd;
    return (load(scratch + at) * load(call.weight + at) - mean_g - xhat * mean_gx) * invstd;
  };
  for (i = 0; i + kLanes <= n; i += kLanes) store(dx + i, second(load(x + i), i));
  if (rest) store_tail(dx + i, second(load_tail(x + i, rest), i), rest);
}

}  // namespace

template <typename T>
void row_norm_kernel(const RowNormCall<T>& call) {
  switch_kind(call.activation, [&]<Kind kind>() {
    at::parallel_for(0, call.rows, std::max<int64_t>(1, 32768 / call.columns), [&](int64_t begin, int64_t end) {
      const double share = 1.0 / static_cast<double>(call.columns);
      for (int64_t r = begin; r < end; ++r) forward_row<kind>(call, r, share);
    });
  });
}

template <typename T>
void row_norm_backward_kernel(const RowNormBackwardCall<T>& call) {
  const int64_t n = call.columns, padded = (n + kLanes - 1) / kLanes * kLanes;
  const int64_t chunks = std::clamp<int64_t>(call.rows * n / 65536, 1, 16);  // fixed: results don't depend on threads
  std::vector<double> sums(chunks * 2 * n, 0.0);
  switch_kind(call.activation, [&]<Kind kind>() {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(padded), dw(padded), db(padded);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* own = sums.data() + chunk * 2 * n;
        const int64_t last = call.rows * (chunk + 1) / chunks;
        for (int64_t block = call.rows * chunk / chunks; block < last; block += kBlockRows) {
          std::fill(dw.begin(), dw.end(), 0.0f);
          std::fill(db.begin(), db.end(), 0.0f);
          for (int64_t r = block; r < std::min(last, block + kBlockRows); ++r) {
            backward_row<kind>(call, r, dw.data(), db.data(), scratch.data());
          }
          for (int64_t i = 0; i < n; ++i) {
            own[i] += dw[i];
            own[n + i] += db[i];
          }
        }
      }
    });
  });
  for (int64_t i = 0; i < n; ++i) {
    double dw = 0, db = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      dw += sums[chunk * 2 * n + i];
      db += sums[chunk * 2 * n + n + i];
    }
    call.dw[i] = static_cast<float>(dw);
    call.db[i] = static_cast<float>(db);
  }
}
