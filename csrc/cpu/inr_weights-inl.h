// inr_weights forward and backward over a range of tiles; one call a thread.
namespace inr {

#include "inr_weights_tile-inl.h"
// in this order
#include "inr_weights_gradients-inl.h"
#include "inr_weights_parts-inl.h"

// Everything one thread works with.
template <typename T>
struct Worker {
  static constexpr bool wide = std::is_same_v<T, float>;

  const InrPlan& p;
  const bool training;
  Network<T> net;
  Tables tables, d_tables;
  Buffer<float> h, z, first, out, dense, dh, dz, dw, samples;
  Buffer<T> operand, pairs, dz_operand, dz_pairs, kept;
  int64_t hp, row, first_n = 0, count = 0, padded = 0;

  Worker(const InrPlan& plan, bool backward)
      : p(plan), training(backward), hp(plan.padded), row(Activations<T>::row(hp)) {
    const int64_t size = kInrTile * row, operand_size = kInrTile * Activations<T>::operand_row(hp);
    h.resize(size * (!wide ? 1 : training ? p.depth + 1 : 2));
    z.resize(kRows * kPanel), out.resize(kInrTile * p.padded_out);
    if constexpr (!wide) operand.resize(2 * operand_size);
    if (p.noise == InrNoise::kElement) dense.resize(kInrTile * kInrAxes * p.encoded());
    if ((training && !in_layer()) || p.noise == InrNoise::kElement) first.resize(size);
    if (!training) return;
    dh.resize(size), dw.resize(kInrTile * p.padded_out);
    if constexpr (wide) {
      dz.resize(2 * size);
    } else {
      dz_operand.resize(2 * operand_size), dz_pairs.resize(size), pairs.resize(p.depth * size);
    }
  }

  // What the derivative of the first layer's activation needs is the input of the next layer, which stays.
  bool in_layer() const { return wide && p.by_output && p.noise != InrNoise::kElement; }

  // The input of hidden layer k, or the output of the last.
  Activations<T> layer(int64_t k) {
    Activations<T> found;
    found.size = hp, found.h = h.data();
    if constexpr (wide) {
      found.h += (training ? k : k % 2) * kInrTile * row;
    } else {
      found.operand = operand.data() + k % 2 * kInrTile * Activations<T>::operand_row(hp);
      if (training && k < p.depth) found.pairs = pairs.data() + k * kInrTile * row;
    }
    return found;
  }
  // The gradient at the input of the activation of layer k.
  Activations<T> d_layer(int64_t k) {
    Activations<T> found;
    found.size = hp;
    if constexpr (wide) {
      found.h = dz.data() + k % 2 * kInrTile * row;
    } else {
      found.operand = dz_operand.data() + k % 2 * kInrTile * Activations<T>::operand_row(hp),
      found.pairs = dz_pairs.data();
    }
    return found;
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
      product<float>(count, hp, {width, dense.data(), width, 1, net.w_in.data(), hp, first.data(), row, false});
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < hp; ++j) first[i * row + j] += net.b_in[j];
      }
      sums = first.data();
    }
    float* keep = training && !in_layer() ? first.data() : nullptr;
    SK_SWITCH_ACTIVATION(p.activation,
                         [&] { first_layer<act>(tables, first_n, count, padded, hp, sums, layer(0), keep); });
  }

  // fn(first row, first column) after z or c holds that block of the left operand times a layer's packed weight.
  template <typename Fn>
  void each_block(const Activations<T>& left, const T* packed, float* c, int64_t c_row, bool add, const Fn& fn) {
    const int64_t steps = hp / kUnit<T>, a_row = left.left_row();
    for (int64_t j = 0; j < hp; j += kPanel, packed += hp * kPanel) {
      for (int64_t i = 0; i < padded; i += kRows) {
        const T* a = left.left() + i * a_row * kUnit<T>;
        product_tile<T, kRows, 2>({steps, a, a_row, 1, packed, kPanel, add ? c + i * c_row + j : c, c_row, add});
        fn(i, j);
      }
    }
  }

  // The hidden layers; `keep` (may hold nothing) receives what backward needs, a layer every `step` numbers.
  void hidden(const Kept<T>& keep, int64_t step) {
    for (int64_t k = 0; k < p.depth; ++k) {
      const Activations<T> from = layer(k), to = layer(k + 1);
      const Kept<T> kept_here = keep.at(k, step);
      const float s = p.skip[net.mlp * p.depth + k], *bias = net.b_hidden.data() + k * hp;
      SK_SWITCH_ACTIVATION(p.activation, [&] {
        each_block(from, net.forward.data() + k * hp * hp, z.data(), kPanel, false, [&](int64_t i, int64_t j) {
          residual_block<act, T>(z.data(), bias, s, from.h, to, kept_here, i, j);
        });
      });
    }
  }

  // The same from what forward saved. Left operands are needed of the last layer only.
  void restore(const Kept<T>& keep, int64_t step) {
    for (int64_t k = 0; k < p.depth; ++k) {
      Activations<T> to = layer(k + 1);
      if (!wide && k + 1 < p.depth) to.operand = nullptr;
      SK_SWITCH_ACTIVATION(p.activation, [&] {
        restored_layer<act, T>(keep.at(k, step), p.skip[net.mlp * p.depth + k], layer(k).h, to, padded);
      });
    }
  }

  void output(const InrJob& job) {
    const Activations<T> x = layer(p.depth);
    const T* w = net.w_out_t.data() + job.first_out * kUnit<T>;
    const int64_t steps = hp / kUnit<T>, po = p.padded_out;
    product<T>(padded, job.emitted, {steps, x.left(), x.left_row(), 1, w, po, out.data(), po, false});
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
    first_n = n, count = std::min(kInrTile, end - n), padded = round_up(count, kRows);
  }

  // Of the tile: what forward saves for all jobs in rows of all layers.
  Kept<T> saved_rows(T* saved, const InrJob& job, int64_t sample) const {
    const int64_t size = p.depth * p.hidden;
    return {saved ? saved + job.saved_start + (sample * job.points + first_n) * size : nullptr, size, p.hidden, count};
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
        hidden(saved_rows(saved, job, k), p.hidden);
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
    Kept<T> keep = saved_rows(const_cast<T*>(saved), job, sample);  // only read
    int64_t step = p.hidden;
    start(job, p.first_sample + sample);
    if (saved) {
      restore(keep, step);
    } else {
      step = kInrTile * hp;
      kept.resize(p.depth * step);
      keep = {kept.data(), hp, hp, count};
      hidden(keep, step);
    }
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
    const int64_t at = job.first_out * hp;
    const float* last = layer(p.depth).h;
    product<float>(job.emitted, hp, {padded, dw.data(), 1, po, last, row, g.w_out.data() + at, hp, true});
    product<float>(padded, hp, {job.emitted, dw.data(), po, 1, net.w_out.data() + at, hp, dh.data(), row, false});
    SK_SWITCH_ACTIVATION(p.activation, [&] { backward_hidden<act>(keep, step, g); });
    first_layer_backward(job, g);
    return dscale;
  }

  template <Activation act>
  void backward_hidden(const Kept<T>& keep, int64_t step, InrGradients& g) {
    const auto block = [&](int64_t k, int64_t i, int64_t j) {
      g.skip[k] += residual_block_backward<act, T>(dh.data(), keep.at(k, step), p.skip[net.mlp * p.depth + k],
                                                   d_layer(k), g.b_hidden.data() + k * hp, i, j);
    };
    for (int64_t j = 0; j < hp && p.depth > 0; j += kPanel) {
      for (int64_t i = 0; i < padded; i += kRows) block(p.depth - 1, i, j);
    }
    for (int64_t k = p.depth - 1; k >= 0; --k) {
      const Activations<T> dz_k = d_layer(k), h_k = layer(k);
      float* dw_hidden = g.hidden + k * hp * hp;
      product<T>(hp, hp, {padded / kUnit<T>, dz_k.over_rows(), 1, row, h_k.over_rows(), row, dw_hidden, hp, true});
      each_block(dz_k, net.backward.data() + k * hp * hp, dh.data(), row, true, [&](int64_t i, int64_t j) {
        if (k > 0) block(k - 1, i, j);
      });
    }
  }

  void first_layer_backward(const InrJob& job, InrGradients& g) {
    const bool element = p.noise == InrNoise::kElement;
    const float* from = in_layer() ? h.data() : first.data();
    SK_SWITCH_ACTIVATION(p.activation, [&] {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = first_n + i;
        float* a = element ? g.b_in.data() : d_tables.a.data() + (n / job.cols - tables.first) * hp;
        float* b = element ? nullptr : d_tables.b.data() + n % job.cols * hp;
        for (int64_t j = 0; j < hp; j += kLanes) {
          const int64_t at = i * row + j;
          const vf d = load(dh.data() + at) * activation_derivative<act>(load(from + at));
          if (element) store(dh.data() + at, d);
          store(a + j, load(a + j) + d);
          if (b) store(b + j, load(b + j) + d);
        }
      }
    });
    if (!element) return;
    const int64_t width = kInrAxes * p.encoded();
    product<float>(width, hp, {count, dense.data(), 1, width, dh.data(), row, g.w_in.data(), hp, true});
  }

  void fold_tables(InrGradients& g) {
    const int64_t x = p.encoded();
    float* dw_in = g.w_in.data();
    product<float>(x, hp,
                   {tables.rows, tables.encoded_a.data(), 1, x, d_tables.a.data(), hp, dw_in + x * hp, hp, true});
    product<float>(x, hp,
                   {tables.cols, tables.encoded_b.data(), 1, x, d_tables.b.data(), hp, dw_in + 2 * x * hp, hp, true});
    std::vector<float> total(hp, 0.0f);
    for (int64_t i = 0; i < tables.rows; ++i) {
      for (int64_t j = 0; j < hp; ++j) total[j] += d_tables.a[i * hp + j];
    }
    for (int64_t j = 0; j < hp; ++j) g.b_in[j] += total[j];
    for (int64_t axis : {0, 3, 4, 5}) {
      for (int64_t t = 0; t < x; ++t) {
        const float e = tables.encoded_scalar[axis * x + t];
        float* to = dw_in + (axis * x + t) * hp;
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
          table->resize(n * hp);
          std::memset(table->data(), 0, n * hp * sizeof(float));
        }
      }
      for (int64_t n = begin; n < end; n += kInrTile) {
        set_tile(n, end);
        dscale += backward_tile(job, k, dy, saved, need_scale, g);
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
  const auto owned = [&](int64_t mlp) { return p.mlp_first[mlp] >= first && p.mlp_last[mlp] < last; };
  const auto finish = [&] {
    if (!g) return;
    if (owned(g->mlp)) {
      flush_gradients<T>(p, *g, out);
    } else {
      shared.push_back(std::move(g));
    }
  };
  each_job(p, first, last, [&](const InrJob& job, int64_t begin, int64_t end) {
    if (!g || g->mlp != job.mlp) {
      finish();
      if (!g) g = std::make_unique<InrGradients>();
      const bool in_place = std::is_same_v<T, float> && p.hidden == p.padded && owned(job.mlp);
      float* result = static_cast<float*>(out.w_hidden) + job.mlp * p.depth * p.hidden * p.hidden;
      clear_gradients(p, job.mlp, in_place ? result : nullptr, *g);
    }
    dscale[job.tensor] += worker.backward_job(job, begin, end, dy, saved, need_scale, *g);
  });
  finish();
}

}  // namespace inr
