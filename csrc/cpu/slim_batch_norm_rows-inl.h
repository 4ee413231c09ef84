// Rows of channels. Narrow rows that are dense are walked several at a time, so that vectors are full: `repeat` rows make one of
// `repeat * channels` columns, and the last rows that don't make up one are a shorter row at the end.

constexpr int kTile = 4;  // vectors of columns walked together

struct RowPlan {
  int64_t channels, repeat, columns, rows, rest;  // rest: columns of the shorter last row, 0 when there is none

  RowPlan(const NormLayout& layout, bool dense) : channels(layout.channels) {
    const int64_t total = layout.samples * layout.length;
    repeat = dense ? kLanes / std::gcd<int64_t, int64_t>(channels, kLanes) : 1;
    while (dense && channels * repeat < 256) repeat *= 2;  // long enough to keep the loop overhead small
    if (total < 4 * repeat) repeat = 1;
    columns = channels * repeat;
    rows = total / repeat;
    rest = total % repeat * channels;
  }
  int64_t chunks() const { return std::clamp<int64_t>(rows * columns / 65536, 1, 16); }  // fixed: results don't depend on threads
  int64_t padded() const { return (columns + kLanes - 1) / kLanes * kLanes; }

  std::vector<float> spread(const float* values) const {
    std::vector<float> out(padded(), 0.0f);
    for (int64_t i = 0; i < columns; ++i) out[i] = values[i % channels];
    return out;
  }
};

template <bool kFull, typename T>
inline vf part(const T* p, int64_t n) {
  return kFull ? load(p) : load_tail(p, n);
}

// Adds a block of rows to the moments (double mean[], m2[]) of kVectors vectors of columns that have seen `before` rows.
template <int kVectors, bool kFull, typename T>
void add_rows(const T* x, int64_t rows, int64_t stride, int64_t width, double before, double* mean, double* m2) {
  const auto at = [&](int64_t r, int v) { return part<kFull>(x + r * stride + v * kLanes, width - v * kLanes); };
  vf total[kVectors], squares[kVectors], centre[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = squares[v] = splat(0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) total[v] = total[v] + at(r, v);
  }
  for (int v = 0; v < kVectors; ++v) centre[v] = total[v] * (1.0f / static_cast<float>(rows));
  // What the rounded centre is off by comes back as the mean of the distances.
  for (int v = 0; v < kVectors; ++v) total[v] = splat(0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const vf d = at(r, v) - centre[v];
      total[v] = total[v] + d;
      squares[v] = squares[v] + d * d;
    }
  }
  const double n = static_cast<double>(rows), share = n / (before + n), weight = before * share;
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kLanes; ++i) {
      const double off = total[v][i] / n, block_mean = centre[v][i] + off, delta = block_mean - mean[v * kLanes + i];
      mean[v * kLanes + i] += delta * share;
      m2[v * kLanes + i] += squares[v][i] - n * off * off + delta * delta * weight;
    }
  }
}

template <typename T>
void add_row_block(const T* x, int64_t rows, int64_t stride, int64_t columns, double before, double* mean, double* m2) {
  int64_t c = 0;
  for (; c + kTile * kLanes <= columns; c += kTile * kLanes) {
    add_rows<kTile, true>(x + c, rows, stride, kTile * kLanes, before, mean + c, m2 + c);
  }
  for (; c + kLanes <= columns; c += kLanes) add_rows<1, true>(x + c, rows, stride, kLanes, before, mean + c, m2 + c);
  if (c < columns) add_rows<1, false>(x + c, rows, stride, columns - c, before, mean + c, m2 + c);
}

template <typename T>
void row_statistics(const ForwardCall<T>& call, const RowPlan& plan) {
  const int64_t chunks = plan.chunks(), padded = plan.padded(), stride = call.x.outer * plan.repeat;
  std::vector<double> mean(chunks * padded, 0.0), m2(chunks * padded, 0.0);
  const auto first = [&](int64_t chunk) { return plan.rows * chunk / chunks; };
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t r = first(chunk); r < first(chunk + 1); r += kBlockRows) {
        add_row_block(call.x.row(0) + r * stride, std::min(kBlockRows, first(chunk + 1) - r), stride, plan.columns,
                      static_cast<double>(r - first(chunk)), mean.data() + chunk * padded, m2.data() + chunk * padded);
      }
    }
  });
  for (int64_t c = 0; c < plan.channels; ++c) {
    Moments moments;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double n = static_cast<double>(first(chunk + 1) - first(chunk));
      for (int64_t i = c; n > 0 && i < plan.columns; i += plan.channels) {
        moments.merge(n, mean[chunk * padded + i], m2[chunk * padded + i]);
      }
    }
    const T* last = call.x.row(0) + plan.rows * stride;
    for (int64_t i = c; i < plan.rest; i += plan.channels) moments.merge(1, static_cast<float>(last[i]), 0);
    call.mean[c] = static_cast<float>(moments.mean);
    call.var[c] = static_cast<float>(moments.m2 / moments.count);
  }
}

// Calls f(row, columns) for every (joined) row; the shorter last one too.
template <typename F>
void for_rows(const RowPlan& plan, F f) {
  const int64_t all = plan.rows + (plan.rest > 0);
  at::parallel_for(0, all, std::max<int64_t>(1, 32768 / plan.columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r, r < plan.rows ? plan.columns : plan.rest);
  });
}

inline std::vector<float> row_scale(const float* weight, const float* var, double eps, int64_t channels) {
  std::vector<float> scale(channels);
  for (int64_t c = 0; c < channels; ++c) scale[c] = weight[c] * inverse_std(var[c], eps);
  return scale;
}

template <typename T>
void forward_rows(const ForwardCall<T>& call) {
  const int64_t channels = call.layout.channels;
  const bool dense = call.x.outer == channels && call.y.outer == channels &&
                     (!call.residual.data || call.residual.outer == channels);
  const RowPlan plan(call.layout, dense);
  if (call.training) row_statistics(call, plan);
  const std::vector<float> mean = plan.spread(call.mean), shift = plan.spread(call.bias),
                           scale = plan.spread(row_scale(call.weight, call.var, call.eps, channels).data());
  const Affine<Entries> a{{mean.data()}, {scale.data()}, {shift.data()}, call.activation};
  switch_kind(call.activation, [&]<Kind kind>() {
    for_rows(plan, [&](int64_t r, int64_t columns) {
      r *= plan.repeat;
      normalize<kind>(call.x.row(r), call.residual.row(r), call.y.row(r), columns, a);
    });
  });
}

// Adds the sums over a block of rows of dz and dz * (x - mean) for kVectors vectors of columns from column c on; stores dz where asked.
template <Kind kind, bool kSaved, int kVectors, bool kFull, typename T>
void reduce_columns(const BackwardCall<T>& call, Affine<Entries> a, Operand<T> dz, int64_t begin, int64_t end, int64_t step, int64_t c,
                    int64_t width, double* sums, double* sums_x) {
  vf sum_dz[kVectors], sum_dzx[kVectors];
  for (int v = 0; v < kVectors; ++v) sum_dz[v] = sum_dzx[v] = splat(0);
  for (int64_t r = begin; r < end; r += step) {
    const T *dy = call.dy.row(r) + c, *x = call.x.row(r) + c, *saved = kSaved ? call.saved.row(r) + c : nullptr;
    T* out = dz.data ? dz.row(r) + c : nullptr;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = v * kLanes, n = width - i;
      const vf centred = part<kFull>(x + i, n) - a.mean.at(c + i);
      const vf g = gradient<kind>(part<kFull>(dy + i, n), centred, a.scale.at(c + i), a.shift.at(c + i),
                                 kSaved ? part<kFull>(saved + i, n) : splat(0), kSaved, a.which);
      sum_dz[v] = sum_dz[v] + g;
      sum_dzx[v] = sum_dzx[v] + g * centred;
      if (out) kFull ? store(out + i, g) : store_tail(out + i, g, n);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kLanes && v * kLanes + i < width; ++i) {
      sums[c + v * kLanes + i] += sum_dz[v][i];
      sums_x[c + v * kLanes + i] += sum_dzx[v][i];
    }
  }
}

// All columns of the joined rows [begin, end).
template <Kind kind, bool kSaved, typename T>
void reduce_rows(const BackwardCall<T>& call, const RowPlan& plan, Affine<Entries> a, Operand<T> dz, int64_t begin, int64_t end,
                 int64_t columns, double* sums) {
  double* sums_x = sums + plan.padded();
  begin *= plan.repeat;
  end *= plan.repeat;
  int64_t c = 0;
  for (; c + kTile * kLanes <= columns; c += kTile * kLanes) {
    reduce_columns<kind, kSaved, kTile, true>(call, a, dz, begin, end, plan.repeat, c, kTile * kLanes, sums, sums_x);
  }
  for (; c < columns; c += kLanes) {
    reduce_columns<kind, kSaved, 1, false>(call, a, dz, begin, end, plan.repeat, c, std::min<int64_t>(kLanes, columns - c), sums, sums_x);
  }
}

template <Kind kind, bool kSaved, typename T>
void backward_rows_of(const BackwardCall<T>& call, const RowPlan& plan, Affine<Entries> a, const std::vector<float>& scale) {
  const bool stash = call.dz.data || (!is_cheap(kind) && call.dx.data);
  const Operand<T> dz = !stash ? Operand<T>{} : call.dz.data ? call.dz : call.dx;
  const int64_t chunks = plan.chunks(), padded = plan.padded(), channels = plan.channels;
  std::vector<double> sums((chunks + 1) * 2 * padded, 0.0);
  if (call.need_sums || stash) {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = plan.rows * (chunk + 1) / chunks;
        for (int64_t r = plan.rows * chunk / chunks; r < last; r += kBlockRows) {
          reduce_rows<kind, kSaved>(call, plan, a, dz, r, std::min(last, r + kBlockRows), plan.columns, sums.data() + chunk * 2 * padded);
        }
      }
    });
    if (plan.rest) {
      reduce_rows<kind, kSaved>(call, plan, a, dz, plan.rows, plan.rows + 1, plan.rest, sums.data() + chunks * 2 * padded);
    }
  }
  const double count = static_cast<double>(call.layout.samples * call.layout.length);
  std::vector<float> slope(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double sum_dz = 0, sum_dzx = 0;
    for (int64_t chunk = 0; chunk <= chunks; ++chunk) {
      for (int64_t i = c; i < plan.columns; i += channels) {
        sum_dz += sums[chunk * 2 * padded + i];
        sum_dzx += sums[chunk * 2 * padded + padded + i];
      }
    }
    const double invstd = inverse_std(call.var[c], call.eps);
    call.db[c] = static_cast<float>(sum_dz);
    call.dw[c] = static_cast<float>(sum_dzx * invstd);
    slope[c] = call.training ? static_cast<float>(-sum_dzx / count * invstd * invstd * scale[c]) : 0.0f;
    offset[c] = call.training ? static_cast<float>(-sum_dz / count * scale[c]) : 0.0f;
  }
  if (!call.dx.data) return;
  const std::vector<float> slopes = plan.spread(slope.data()), offsets = plan.spread(offset.data());
  for_rows(plan, [&](int64_t r, int64_t columns) {
    r *= plan.repeat;
    const Entries s{slopes.data()}, o{offsets.data()};
    if (stash) {
      dx_segment<Kind::kNone, false, T>(dz.row(r), call.x.row(r), nullptr, call.dx.row(r), columns, a, s, o);
    } else if constexpr (is_cheap(kind)) {
      dx_segment<kind, kSaved>(call.dy.row(r), call.x.row(r), call.saved.row(r), call.dx.row(r), columns, a, s, o);
    }
  });
}

template <typename T>
void backward_rows(const BackwardCall<T>& call) {
  const int64_t channels = call.layout.channels;
  bool dense = call.dy.outer == channels && call.x.outer == channels;
  dense = dense && (!call.saved.data || call.saved.outer == channels) && (!call.dx.data || call.dx.outer == channels) &&
          (!call.dz.data || call.dz.outer == channels);
  const RowPlan plan(call.layout, dense);
  const std::vector<float> scale = row_scale(call.weight, call.var, call.eps, channels);
  const std::vector<float> means = plan.spread(call.mean), scales = plan.spread(scale.data()), shifts = plan.spread(call.bias);
  const Affine<Entries> a{{means.data()}, {scales.data()}, {shifts.data()}, call.activation};
  switch_kind(call.activation, [&]<Kind kind>() {
    if (kind != Kind::kNone && call.saved.data) {
      backward_rows_of<kind, kind != Kind::kNone>(call, plan, a, scale);
    } else {
      backward_rows_of<kind, false>(call, plan, a, scale);
    }
  });
}
