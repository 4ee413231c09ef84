// inr_weights forward and backward over a range of tiles; one call a thread.
#include "inr_weights_parts-inl.h"

// Everything one thread works with.
template <typename T>
struct Worker {
  const InrPlan& p;
  const bool training;
  Network<T> net;
  Tables tables, d_tables;
  Buffer<float> h, z, first_z, out, dense, kept, dh, dz, dz_t, dw, dw_t, samples, encoded_t;
  Buffer<T> operand, dz_operand, dz_t_operand, rows_operand;
  int64_t hp, first_n = 0, count = 0, padded = 0;

  Worker(const InrPlan& plan, bool backward) : p(plan), training(backward), hp(plan.padded) {
    const int64_t size = kInrTile * hp, layers = backward ? p.depth + 1 : 1;
    h.resize(layers * size), z.resize(size), out.resize(kInrTile * p.padded_out);
    if constexpr (!std::is_same_v<T, float>) operand.resize(size);
    if (p.noise == InrNoise::kElement) dense.resize(kInrTile * kInrAxes * p.encoded()), first_z.resize(size);
    if (!backward) return;
    first_z.resize(size), kept.resize(p.depth * size), dh.resize(size), dz.resize(size);
    dw.resize(kInrTile * p.padded_out), dw_t.resize(kInrTile * p.padded_out);
    if constexpr (std::is_same_v<T, float>) {
      dz_t.resize(size);
    } else {
      dz_operand.resize(size), dz_t_operand.resize(size), rows_operand.resize(size);
    }
    if (p.noise == InrNoise::kElement) encoded_t.resize(kInrTile * kInrAxes * p.encoded());
  }

  float* layer(int64_t k) { return h.data() + (training ? k * kInrTile * hp : 0); }
  const T* as_operand(float* x) {
    if constexpr (std::is_same_v<T, float>) {
      return x;
    } else {
      for (int64_t i = 0; i < padded * hp; i += kLanes) store(operand.data() + i, load(x + i));
      return operand.data();
    }
  }

  void start(const InrJob& job, int64_t sample) {
    const float* sums = nullptr;
    if (p.noise == InrNoise::kElement) {  // every coordinate has values of its own on all axes
      const int64_t x = p.encoded(), width = kInrAxes * x;
      for (int64_t axis = 0; axis < kInrAxes; ++axis) {
        const InrOffsets offset(p.seed, sample, job.tensor, axis, p.limit);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = first_n + i, position = axis == 1 ? n / job.cols : axis == 2 ? n % job.cols : 0;
          encode(p, inr_value(p, job, axis, position, offset(n)), dense.data() + i * width + axis * x);
        }
      }
      std::memset(dense.data() + count * width, 0, (padded - count) * width * sizeof(float));
      gemm(padded, hp, width, dense.data(), width, net.w_in.data(), hp, first_z.data(), hp, false);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < hp; ++j) first_z[i * hp + j] += net.b_in[j];
      }
      sums = first_z.data();
    }
    float* keep_z = training && !p.by_output && !sums ? first_z.data() : nullptr;
    SK_SWITCH_ACTIVATION(p.activation,
                         [&] { first_layer<act>(tables, first_n, count, padded, hp, sums, layer(0), keep_z); });
  }

  // The hidden layers; `saved` (may be null) receives what backward needs.
  void hidden(T* saved) {
    const T* x = as_operand(layer(0));
    const int64_t stride = p.depth * p.hidden;
    for (int64_t k = 0; k < p.depth; ++k) {
      gemm(padded, hp, hp, x, hp, net.forward.data() + k * hp * hp, hp, z.data(), hp, false);
      float* keep = training ? kept.data() + k * kInrTile * hp : nullptr;
      T* save = saved ? saved + k * p.hidden : nullptr;
      const float s = p.skip[net.mlp * p.depth + k];
      SK_SWITCH_ACTIVATION(p.activation, [&] {
        residual_layer<act, T>(z.data(), net.b_hidden.data() + k * hp, s, layer(k), layer(k + 1), operand.data(), keep,
                               save, stride, p.hidden, count, padded, hp);
      });
      if constexpr (std::is_same_v<T, float>) x = layer(k + 1);
    }
  }

  // The same from what forward saved.
  void restore(const T* saved) {
    const int64_t stride = p.depth * p.hidden;
    for (int64_t k = 0; k < p.depth; ++k) {
      float* keep = kept.data() + k * kInrTile * hp;
      const float s = p.skip[net.mlp * p.depth + k];
      SK_SWITCH_ACTIVATION(p.activation, [&] {
        for (int64_t i = 0; i < padded; ++i) {
          const T* row = saved + i * stride + k * p.hidden;
          for (int64_t j = 0; j < hp; j += kLanes) {
            const int64_t n = i < count ? std::min<int64_t>(kLanes, p.hidden - j) : 0, at = i * hp + j;
            const vf v = n >= kLanes ? load(row + j) : n > 0 ? load_first(row + j, n) : splat(0.0f);
            store(keep + at, v);
            store(layer(k + 1) + at, load(layer(k) + at) + s * (derivative_uses_output(act) ? v : activate<act>(v)));
          }
        }
      });
    }
  }

  void output(const InrJob& job) {
    const T* x = as_operand(layer(p.depth));
    const T* w = net.w_out_t.data() + job.first_out * (std::is_same_v<T, float> ? 1 : 2);
    gemm(padded, job.emitted, hp, x, hp, w, p.padded_out, out.data(), p.padded_out, false);
  }

  // fn(offset in the flat result, output row of the tile, element of the coordinate, output and input channel, kernel
  // element)
  template <typename Fn>
  void each_weight(const InrJob& job, const Fn& fn) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t a = (first_n + i) / job.cols, b = (first_n + i) % job.cols;
      for (int64_t to = 0, q = 0; to < job.tile_out; ++to) {
        for (int64_t ti = 0; ti < job.tile_in; ++ti) {
          const int64_t o = a * job.tile_out + to, c = b * job.tile_in + ti;
          const bool inside = o < job.c_out && c < job.c_in;
          const int64_t at = job.start + o * job.out_stride + c * job.in_stride;
          for (int64_t k = 0; k < job.kernel; ++k, ++q) {
            if (inside) fn(at + k * job.kernel_stride, i, q, o, c, k);
          }
        }
      }
    }
  }

  void set_tile(int64_t n, int64_t end) {
    first_n = n, count = std::min(kInrTile, end - n), padded = round_up(count, 16);
  }

  void forward_job(const InrJob& job, int64_t begin, int64_t end, float* weights, T* saved) {
    net.pack(p, job.mlp, false);
    const float over = 1.0f / (float(job.c_in) * float(p.samples));
    const int64_t length = (end - begin) * job.emitted;
    if (p.samples > 1) {
      samples.resize(length);
      std::memset(samples.data(), 0, length * sizeof(float));
    }
    for (int64_t k = 0; k < p.samples; ++k) {
      if (p.noise != InrNoise::kElement) {
        tables.build(p, job, net, p.first_sample + k, begin / job.cols, (end - 1) / job.cols + 1);
      }
      for (int64_t n = begin; n < end; n += kInrTile) {
        set_tile(n, end);
        start(job, p.first_sample + k);
        hidden(saved ? saved + job.saved_start + (k * job.points + n) * p.depth * p.hidden : nullptr);
        output(job);
        float* total = samples.data() + (n - begin) * job.emitted;
        if (p.samples > 1) {
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t q = 0; q < job.emitted; ++q) total[i * job.emitted + q] += out[i * p.padded_out + q];
          }
        }
        if (k + 1 < p.samples) continue;
        each_weight(job, [&](int64_t at, int64_t i, int64_t q, int64_t o, int64_t c, int64_t e) {
          const float y = p.samples > 1 ? total[i * job.emitted + q] : out[i * p.padded_out + q];
          const float w = (y + float(p.samples) * net.b_out[job.first_out + q]) * over * job.scale;
          weights[at] = job.base ? w + job.base[o * job.base_out + c * job.base_in + job.base_kernel[e]] : w;
        });
      }
    }
  }

  // Adds to the gradients of the tile's network; returns the gradient of the job's scale.
  double backward_tile(const InrJob& job, int64_t sample, const float* dy, const T* saved, bool need_scale,
                       InrGradients& g) {
    start(job, sample);
    saved ? restore(saved) : hidden(nullptr);
    const float over = 1.0f / (float(job.c_in) * float(p.samples));
    const int64_t po = p.padded_out;
    std::memset(dw.data(), 0, padded * po * sizeof(float));
    each_weight(job,
                [&](int64_t at, int64_t i, int64_t q, int64_t, int64_t, int64_t) { dw[i * po + q] = dy[at] * over; });
    double dscale = 0.0;
    if (need_scale) {
      output(job);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t q = 0; q < job.emitted; ++q) {
          dscale += double(dw[i * po + q]) * double(out[i * po + q] + net.b_out[job.first_out + q]);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t q = 0; q < job.emitted; ++q) {
        dw[i * po + q] *= job.scale;
        g.b_out[job.first_out + q] += dw[i * po + q];
      }
    }
    transpose(dw.data(), padded, po, po, dw_t.data(), kInrTile);
    gemm(job.emitted, hp, padded, dw_t.data(), kInrTile, layer(p.depth), hp, g.w_out.data() + job.first_out * hp, hp,
         true);
    gemm(padded, hp, job.emitted, dw.data(), po, net.w_out.data() + job.first_out * hp, hp, dh.data(), hp, false);
    for (int64_t k = p.depth - 1; k >= 0; --k) {
      const float s = p.skip[net.mlp * p.depth + k];
      SK_SWITCH_ACTIVATION(p.activation, [&] {
        g.skip[k] += residual_layer_backward<act, T>(dh.data(), kept.data() + k * kInrTile * hp, s, dz.data(),
                                                     dz_operand.data(), g.b_hidden.data() + k * hp, count, padded, hp);
      });
      float* dw_hidden = g.w_hidden.data() + k * hp * hp;
      const T* w = net.backward.data() + k * hp * hp;
      if constexpr (std::is_same_v<T, float>) {
        transpose(dz.data(), padded, hp, hp, dz_t.data(), kInrTile);
        gemm(hp, hp, padded, dz_t.data(), kInrTile, layer(k), hp, dw_hidden, hp, true);
        gemm(padded, hp, hp, dz.data(), hp, w, hp, dh.data(), hp, true);
      } else {
        transpose(dz.data(), padded, hp, hp, dz_t_operand.data(), kInrTile);
        pack_rows(layer(k), padded, hp, rows_operand.data());
        gemm(hp, hp, padded, dz_t_operand.data(), kInrTile, rows_operand.data(), hp, dw_hidden, hp, true);
        gemm(padded, hp, hp, dz_operand.data(), hp, w, hp, dh.data(), hp, true);
      }
    }
    first_layer_backward(job, g);
    return dscale;
  }

  void first_layer_backward(const InrJob& job, InrGradients& g) {
    const bool element = p.noise == InrNoise::kElement;
    const float* from = p.by_output ? layer(0) : first_z.data();
    SK_SWITCH_ACTIVATION(p.activation, [&] {
      for (int64_t i = 0; i < padded; ++i) {
        const int64_t n = first_n + i;
        float* a = element ? g.b_in.data() : d_tables.a.data() + (n / job.cols - tables.first) * hp;
        float* b = element ? nullptr : d_tables.b.data() + n % job.cols * hp;
        for (int64_t j = 0; j < hp; j += kLanes) {
          const int64_t at = i * hp + j;
          const vf d = i < count ? load(dh.data() + at) * activation_derivative<act>(load(from + at)) : splat(0.0f);
          if (element) store(dz.data() + at, d);
          if (i >= count) continue;
          store(a + j, load(a + j) + d);
          if (b) store(b + j, load(b + j) + d);
        }
      }
    });
    if (!element) return;
    const int64_t width = kInrAxes * p.encoded();
    for (int64_t i = 0; i < padded; ++i) {
      for (int64_t t = 0; t < width; ++t) encoded_t[t * kInrTile + i] = dense[i * width + t];
    }
    gemm(width, hp, padded, encoded_t.data(), kInrTile, dz.data(), hp, g.w_in.data(), hp, true);
  }

  // dw += encoded^T d_table
  void add_table_gradient(const float* encoded, const float* d_table, int64_t n, float* dw_axis) {
    const int64_t x = p.encoded();
    encoded_t.resize(64 * x);
    for (int64_t i = 0; i < n; i += 64) {
      const int64_t m = std::min<int64_t>(64, n - i);
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t t = 0; t < x; ++t) encoded_t[t * 64 + r] = encoded[(i + r) * x + t];
      }
      gemm(x, hp, m, encoded_t.data(), 64, d_table + i * hp, hp, dw_axis, hp, true);
    }
  }

  void fold_tables(InrGradients& g) {
    const int64_t x = p.encoded();
    add_table_gradient(tables.encoded_a.data(), d_tables.a.data(), round_up(tables.rows, 16), g.w_in.data() + x * hp);
    add_table_gradient(tables.encoded_b.data(), d_tables.b.data(), round_up(tables.cols, 16),
                       g.w_in.data() + 2 * x * hp);
    std::vector<float> total(hp, 0.0f);
    for (int64_t i = 0; i < tables.rows; ++i) {
      for (int64_t j = 0; j < hp; ++j) total[j] += d_tables.a[i * hp + j];
    }
    for (int64_t j = 0; j < hp; ++j) g.b_in[j] += total[j];
    for (int64_t axis : {0, 3, 4, 5}) {
      for (int64_t t = 0; t < x; ++t) {
        const float e = tables.encoded_scalar[axis * x + t];
        float* to = g.w_in.data() + (axis * x + t) * hp;
        for (int64_t j = 0; j < hp; ++j) to[j] += e * total[j];
      }
    }
  }

  double backward_job(const InrJob& job, int64_t begin, int64_t end, const float* dy, const T* saved, bool need_scale,
                      InrGradients& g) {
    net.pack(p, job.mlp, true);
    double dscale = 0.0;
    const bool element = p.noise == InrNoise::kElement;
    for (int64_t k = 0; k < p.samples; ++k) {
      if (!element) {
        tables.build(p, job, net, p.first_sample + k, begin / job.cols, (end - 1) / job.cols + 1);
        for (auto [table, n] : {std::pair{&d_tables.a, tables.rows}, std::pair{&d_tables.b, tables.cols}}) {
          table->resize(round_up(n, 16) * hp);
          std::memset(table->data(), 0, round_up(n, 16) * hp * sizeof(float));
        }
      }
      for (int64_t n = begin; n < end; n += kInrTile) {
        set_tile(n, end);
        const T* from = saved ? saved + job.saved_start + (k * job.points + n) * p.depth * p.hidden : nullptr;
        dscale += backward_tile(job, p.first_sample + k, dy, from, need_scale, g);
      }
      if (!element) fold_tables(g);
    }
    return dscale;
  }
};

// fn(job, first coordinate, end) for the part of every job that lies in tiles [first, last).
template <typename Fn>
void each_job(const InrPlan& p, int64_t first, int64_t last, const Fn& fn) {
  for (size_t j = 0; j < p.jobs.size(); ++j) {
    const int64_t from = std::max(first, p.tile_begin[j]), to = std::min(last, p.tile_begin[j + 1]);
    if (from >= to) continue;
    fn(p.jobs[j], (from - p.tile_begin[j]) * kInrTile, std::min((to - p.tile_begin[j]) * kInrTile, p.jobs[j].points));
  }
}

template <typename T>
void inr_forward(const InrPlan& p, float* weights, T* saved, int64_t first, int64_t last) {
  Worker<T> worker(p, false);
  each_job(p, first, last,
           [&](const InrJob& job, int64_t begin, int64_t end) { worker.forward_job(job, begin, end, weights, saved); });
}

template <typename T>
void inr_backward(const InrPlan& p, const float* dy, const T* saved, bool need_scale, int64_t first, int64_t last,
                  double* dscale, const InrGradientOutputs& out, std::vector<std::unique_ptr<InrGradients>>& shared) {
  Worker<T> worker(p, true);
  std::unique_ptr<InrGradients> g;
  const auto finish = [&] {
    if (!g) return;
    if (p.mlp_first[g->mlp] >= first && p.mlp_last[g->mlp] < last) {
      flush_gradients(p, *g, out);
    } else {
      shared.push_back(std::move(g));
    }
  };
  each_job(p, first, last, [&](const InrJob& job, int64_t begin, int64_t end) {
    if (!g || g->mlp != job.mlp) {
      finish();
      if (!g) g = std::make_unique<InrGradients>();
      clear_gradients(p, job.mlp, *g);
    }
    dscale[job.tensor] += worker.backward_job(job, begin, end, dy, saved, need_scale, *g);
  });
  finish();
}
