// A row at a time, in the L1 cache from its statistics to its output.

#include "norm_segments-inl.h"

namespace {

constexpr int kRowsTogether = 4;     // in backward
constexpr int64_t kShortRow = 256;  // bytes; longer rows are faster one after the other

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
  if (i < n && n > kLanes) {  // the last whole vector again: stores of a part are slow
    i = n - kLanes;
    store(y + i, at(load(x + i), residual ? load(residual + i) : splat(0), i));
  } else if (i < n) {
    store_tail(y, at(load_tail(x, n), residual ? load_tail(residual, n) : splat(0), 0), n);
  }
}

// R rows at once, so that the sums of dw and db (floats over a block of rows) are read and written once for all of them. The
// second pass computes dz again where that is cheap; else it stays in `scratch` (R rows, `padded` apart).
template <Kind kind, int R, typename T>
void backward_rows(const RowNormBackwardCall<T>& call, int64_t r, float* dw, float* db, float* scratch, int64_t padded) {
  const int64_t n = call.columns, rest = n % kLanes, full = n - rest, start = r * n;
  const T *dy = call.dy + start, *x = call.x + start, *saved = call.saved ? call.saved + start : nullptr;
  float mean[R], invstd[R];
  vf sum_g[R], sum_gx[R];
  for (int j = 0; j < R; ++j) {
    mean[j] = call.mean ? call.mean[r + j] : 0.0f;
    invstd[j] = call.invstd[r + j];
    sum_g[j] = sum_gx[j] = splat(0);
  }
  const auto at = [&](const T* from, int64_t i, bool tail) { return tail ? load_tail(from + i, rest) : load(from + i); };
  const auto dz = [&](int j, int64_t i, vf xhat, vf weight, vf bias, bool tail) {
    const vf s = saved ? at(saved + j * n, i, tail) : splat(0);
    return gradient<kind>(at(dy + j * n, i, tail), xhat, weight, bias, s, saved != nullptr, call.activation);
  };
  const auto first = [&](int64_t i, bool tail) __attribute__((always_inline)) {
    const vf weight = load(call.weight + i), bias = kind == Kind::kNone ? splat(0) : load(call.bias + i);
    vf to_dw = load(dw + i), to_db = load(db + i);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      // Rows in turn are no stream that hardware follows: the next ones are asked for, in the order of memory.
      if constexpr (R > 1) {
        __builtin_prefetch(dy + R * (n + i) + j * kLanes);
        __builtin_prefetch(x + R * (n + i) + j * kLanes);
      }
      const vf xhat = (at(x + j * n, i, tail) - mean[j]) * invstd[j], g = dz(j, i, xhat, weight, bias, tail), gw = g * weight;
      to_dw = to_dw + g * xhat;
      to_db = to_db + g;
      sum_g[j] = sum_g[j] + gw;
      sum_gx[j] = sum_gx[j] + gw * xhat;
      if constexpr (!is_cheap(kind)) store(scratch + j * padded + i, g);
      if (call.dz) tail ? store_tail(call.dz + start + j * n + i, g, rest) : store(call.dz + start + j * n + i, g);
    }
    store(dw + i, to_dw);
    store(db + i, to_db);
  };
  for (int64_t i = 0; i < full; i += kLanes) first(i, false);
  if (rest) first(full, true);
  if (!call.dx) return;
  for (int j = 0; j < R; ++j) {
    T* dx = call.dx + start + j * n;
    const float count = static_cast<float>(n), mean_g = call.mean ? total(sum_g[j]) / count : 0.0f, mean_gx = total(sum_gx[j]) / count;
    const auto second = [&](int64_t i, bool tail) __attribute__((always_inline)) {
      const vf xhat = (at(x + j * n, i, tail) - mean[j]) * invstd[j], weight = load(call.weight + i);
      vf g;
      if constexpr (is_cheap(kind)) g = dz(j, i, xhat, weight, kind == Kind::kNone ? splat(0) : load(call.bias + i), tail);
      else g = load(scratch + j * padded + i);
      return (g * weight - mean_g - xhat * mean_gx) * invstd[j];
    };
    for (int64_t i = 0; i < full; i += kLanes) store(dx + i, second(i, false));
    if (rest && full) store(dx + n - kLanes, second(n - kLanes, false));
    else if (rest) store_tail(dx, second(0, true), rest);
  }
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
  const bool together = n * static_cast<int64_t>(sizeof(T)) <= kShortRow;
  std::vector<double> sums(chunks * 2 * n, 0.0);
  switch_kind(call.activation, [&]<Kind kind>() {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(is_cheap(kind) ? 0 : kRowsTogether * padded), dw(padded), db(padded);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* own = sums.data() + chunk * 2 * n;
        const int64_t last = call.rows * (chunk + 1) / chunks;
        for (int64_t block = call.rows * chunk / chunks; block < last; block += kBlockRows) {
          std::fill(dw.begin(), dw.end(), 0.0f);
          std::fill(db.begin(), db.end(), 0.0f);
          const int64_t end_row = std::min(last, block + kBlockRows);
          int64_t r = block;
          for (; together && r + kRowsTogether <= end_row; r += kRowsTogether) {
            backward_rows<kind, kRowsTogether>(call, r, dw.data(), db.data(), scratch.data(), padded);
          }
          for (; r < end_row; ++r) backward_rows<kind, 1>(call, r, dw.data(), db.data(), scratch.data(), padded);
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
