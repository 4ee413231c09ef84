// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): 16 products of 4x4 inputs make 2x2 outputs, which take 36 otherwise. Sums
// of inputs only, so that a bfloat16 rounding of what is multiplied costs little; included by deploy-inl.h.

constexpr int kSmall = deploy::kSmallOutputs + 2, kSmallMatrices = kSmall * kSmall;

inline void small_input(const vf* d, int step, vf* out, int out_step) {
  const vf d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  out[0] = d0 - d2;
  out[out_step] = d1 + d2;
  out[2 * out_step] = d2 - d1;
  out[3 * out_step] = d1 - d3;
}

// One tile's inputs of all channels to `v`. Rows and columns from `rows` and `columns` on are outside the padded image: zeros.
template <typename T>
void small_scatter(const deploy::WinogradJob& job, const T* x, int64_t rows, int64_t columns, T* v) {
  const bool whole = rows >= kSmall && columns >= kSmall;
  for (int64_t c = 0; c < job.in_c; c += kLanes) {
    const int n = std::min<int64_t>(kLanes, job.in_c - c);
    vf d[kSmallMatrices], t[kSmallMatrices];
    if (whole && n == kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kSmall; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kSmall; ++j) d[i * kSmall + j] = get(x + i * job.x.row + j * job.x.pixel + c);
      }
    } else {
      for (int i = 0; i < kSmall; ++i) {
        for (int j = 0; j < kSmall; ++j) {
          d[i * kSmall + j] = i < rows && j < columns ? get_some(x + i * job.x.row + j * job.x.pixel + c, n) : vf{};
        }
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kSmall; ++j) small_input(d + j, kSmall, t + j, kSmall);
#pragma GCC unroll 4
    for (int i = 0; i < kSmall; ++i) {
      vf row[kSmall];
      small_input(t + i * kSmall, 1, row, 1);
#pragma GCC unroll 4
      for (int j = 0; j < kSmall; ++j) put(v + (i * kSmall + j) * job.v_position + c, row[j]);
    }
  }
}

// From the sums of one tile, `wide` vectors of channels from `channel` on, to its outputs.
template <typename T>
void small_gather(const deploy::WinogradJob& job, const float* m, int64_t channel, int64_t wide, const TileEnd<T>& end, int64_t rows,
                  int64_t columns, const T* residual, T* y) {
  for (int64_t i = 0; i < wide; ++i, channel += kLanes, m += kLanes) {
    const int n = std::min<int64_t>(kLanes, job.out_c - channel);
    vf a[kSmall], b[kSmall];  // the two rows of outputs
#pragma GCC unroll 4
    for (int j = 0; j < kSmall; ++j) {
      const vf m0 = load(m + j * job.m_position), m1 = load(m + (kSmall + j) * job.m_position);
      const vf m2 = load(m + (2 * kSmall + j) * job.m_position), m3 = load(m + (3 * kSmall + j) * job.m_position);
      a[j] = m0 + m1 + m2;
      b[j] = m1 - m2 - m3;
    }
    const vf bias = load(end.bias + channel);
    const auto out = [&](int row, int column, vf value) {
      if (row >= rows || column >= columns) return;
      finish(value + bias, end, residual ? residual + row * job.residual.row + column * job.residual.pixel + channel : nullptr,
             y + row * job.y.row + column * job.y.pixel + channel, n);
    };
    out(0, 0, a[0] + a[1] + a[2]);
    out(0, 1, a[1] - a[2] - a[3]);
    out(1, 0, b[0] + b[1] + b[2]);
    out(1, 1, b[1] - b[2] - b[3]);
  }
}

template <typename T>
void small_winograd_kernel(const deploy::WinogradJob& job, const deploy::Places& at) {
  constexpr int64_t kPair = sizeof(float) / sizeof(T);
  const int64_t vectors = (job.out_c + kLanes - 1) / kLanes, panels = (vectors + job.vectors - 1) / job.vectors;
  const int64_t down = (job.out_h + 1) / 2, across = (job.out_w + 1) / 2, tiles = job.images * down * across;
  const int64_t in_step = (job.in_c + kLanes - 1) / kLanes * kLanes;
  const int64_t units = (job.in_c + kPair - 1) / kPair, vector_step = units * kLanes;
  const deploy::TapRun run{0, units, 0};
  alignas(64) static const float zeros[deploy::kMaxVectors * kLanes] = {};
  TileEnd<T> end = tile_end<T>(job.epilogue);
  end.bias = job.epilogue.bias;
  at::parallel_for(0, job.slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    TileEnd<T> none{};
    none.bias = zeros, none.tail = kLanes;
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      char* scratch = at.scratch + slot * job.slot_bytes;
      float* m = (float*)scratch;
      T* v = (T*)(m + kSmallMatrices * job.m_position);
      for (int64_t begin = slot * job.block; begin < tiles; begin += job.slots * job.block) {
        const int64_t count = std::min(job.block, tiles - begin);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down, j = (begin + t) % across;
          const T* x = (const T*)at.x + image * job.x.image + 2 * i * job.x.row + 2 * j * job.x.pixel;
          small_scatter(job, x, job.out_h + 2 - 2 * i, job.out_w + 2 - 2 * j, v + t * in_step);
        }
        const int64_t tile = std::min<int64_t>({job.tile, count, tile_limit(job.vectors)});
        for (int64_t position = 0; position < kSmallMatrices; ++position) {
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t vector = panel * job.vectors, wide = std::min(job.vectors, vectors - vector);
            const float* weight = (const float*)job.weight + (position * vectors + vector) * vector_step;
            const ConvTile<T> whole = pick_tile<T>(wide, tile);
            const bool more = job.fetch_weights && (panel + 1 < panels || position + 1 < kSmallMatrices);
            float* sums = m + position * job.m_position + vector * count * kLanes;
            const int64_t parts = more ? (count + tile - 1) / tile : 0;
            for (int64_t t = 0; t < count; t += tile) {
              fetch_weights(none, weight + wide * vector_step, wide * vector_step * 4, t / tile, parts, units);
              const ConvTile<T> run_tile = t + tile <= count ? whole : pick_tile<T>(wide, count - t);
              run_tile((const float*)(v + position * job.v_position + t * in_step), in_step / kPair, &run, 1, weight, vector_step,
                       none, sums + t * wide * kLanes, true, false, nullptr, nullptr);
            }
          }
        }
        for (int64_t t = 0; t < count; ++t) {
          const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down, j = (begin + t) % across;
          T* y = (T*)at.y + image * job.y.image + 2 * i * job.y.row + 2 * j * job.y.pixel;
          const T* residual = residual_at<T>(at, job.residual, image, 2 * i);
          if (residual) residual += 2 * j * job.residual.pixel;
          for (int64_t vector = 0; vector < vectors; vector += job.vectors) {
            const int64_t wide = std::min(job.vectors, vectors - vector);
            small_gather(job, m + (vector * count + t * wide) * kLanes, vector * kLanes, wide, end, job.out_h - 2 * i,
                         job.out_w - 2 * j, residual, y);
          }
        }
      }
    }
  });
}
