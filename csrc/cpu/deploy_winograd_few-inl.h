// Winograd's F(4x4, 3x3) for few tiles and many channels, where reading 36 numbers of weights in place of 9 would take
// longer than the products: the weights are transformed as they are read, for the 6 positions of a row at a time, whose
// sums of up to 4 tiles stay in registers. Included by deploy_winograd-inl.h.

constexpr int kFewTiles = 4;

// Rows of the weights' transform but for a factor, which is applied to the sums: g0 + `middle` g1 + `last` g2.
constexpr float kFewMiddle[6] = {0, kPointA, -kPointA, kPointB, -kPointB, 0}, kFewLast[6] = {0, 0.5f, 0.5f, 2, 2, 0};
constexpr float kFewScale[6] = {1, -1 / 1.5f, -1 / 1.5f, 1 / 6.0f, 1 / 6.0f, 1};

// Row R of the 36 sums of N tiles for one vector of outputs. `v` (vectors of inputs, 6, N, lanes), `m` (6, N, lanes).
template <int R, int N>
void few_row(const float* v, const float* weight, int64_t in_c, const float* ahead, float* m) {
  const int64_t tap = in_c * kLanes;
  vf acc[6][N];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) acc[j][t] = vf{};
  }
  const vf middle = splat(kFewMiddle[R]), last = splat(kFewLast[R]);
  const vf a = splat(kPointA), b = splat(kPointB), half = splat(0.5f);
  for (int64_t block = 0; block < in_c; block += kLanes, v += 6 * N * kLanes) {
    const int64_t stop = std::min<int64_t>(kLanes, in_c - block);
    for (int64_t k = 0; k < stop; ++k, weight += kLanes) {
      vf g[3];
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        g[x] = load(weight + (R == 5 ? 6 + x : x) * tap);
        if (R > 0 && R < 5) g[x] += middle * load(weight + (3 + x) * tap) + last * load(weight + (6 + x) * tap);
      }
      // Of the 9 taps of the next vector of outputs, these.
      if (ahead) {
        fetch(ahead + R * tap);
        if (R < 3) fetch(ahead + (6 + R) * tap);
        ahead += kLanes;
      }
      const vf near = g[0] + half * g[2], far = g[0] + (g[2] + g[2]);
      const vf u[6] = {g[0], near + a * g[1], near - a * g[1], far + b * g[1], far - b * g[1], g[2]};
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) acc[j][t] += splat(v[(j * N + t) * kLanes + k]) * u[j];
      }
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    const vf scale = splat(kFewScale[R] * kFewScale[j]);
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) store(m + (j * N + t) * kLanes, acc[j][t] * scale);
  }
}

template <int N>
void few_sums(const float* v, int64_t v_row, const float* weight, int64_t in_c, const float* ahead, float* m) {
  constexpr int kRow = 6 * N * kLanes;
  few_row<0, N>(v, weight, in_c, ahead, m);
  few_row<1, N>(v + v_row, weight, in_c, ahead, m + kRow);
  few_row<2, N>(v + 2 * v_row, weight, in_c, ahead, m + 2 * kRow);
  few_row<3, N>(v + 3 * v_row, weight, in_c, ahead, m + 3 * kRow);
  few_row<4, N>(v + 4 * v_row, weight, in_c, ahead, m + 4 * kRow);
  few_row<5, N>(v + 5 * v_row, weight, in_c, ahead, m + 5 * kRow);
}

inline void few_winograd_kernel(const deploy::WinogradJob& job, const deploy::Places& at) {
  const int64_t down = (job.out_h + 3) / 4, across = (job.out_w + 3) / 4, tiles = job.images * down * across;
  const int64_t in_vectors = (job.in_c + kLanes - 1) / kLanes, out_vectors = (job.out_c + kLanes - 1) / kLanes;
  const int64_t group_step = 36 * kFewTiles * in_vectors * kLanes, vector_step = 9 * job.in_c * kLanes;
  float* v = reinterpret_cast<float*>(at.scratch);
  TileEnd<float> end = tile_end<float>(job.epilogue);
  end.bias = job.epilogue.bias;
  const auto group_tiles = [&](int64_t group) { return std::min<int64_t>(kFewTiles, tiles - group * kFewTiles); };
  const auto row_step = [&](int64_t count) { return in_vectors * 6 * count * kLanes; };
  at::parallel_for(0, tiles, 1 + (1 << 12) / (in_vectors * 100), [&](int64_t first, int64_t stop) {
    for (int64_t tile = first; tile < stop; ++tile) {
      const int64_t image = tile / (down * across), i = tile / across % down, j = tile % across;
      const int64_t group = tile / kFewTiles, count = group_tiles(group);
      const WinogradSteps steps{row_step(count), count * kLanes, 6 * count * kLanes};
      const float* x = (const float*)at.x + image * job.x.image + 4 * i * job.x.row + 4 * j * job.x.pixel;
      winograd_scatter(job, x, job.out_h + 2 - 4 * i, job.out_w + 2 - 4 * j, steps,
                       v + group * group_step + tile % kFewTiles * kLanes);
    }
  });
  at::parallel_for(0, out_vectors, 1 + (1 << 15) / (job.in_c * 100), [&](int64_t first, int64_t stop) {
    alignas(64) float m[36 * kFewTiles * kLanes];
    for (int64_t vector = first; vector < stop; ++vector) {
      const float* weight = (const float*)job.weight + vector * vector_step;
      for (int64_t begin = 0; begin < tiles; begin += kFewTiles) {
        const int64_t group = begin / kFewTiles, count = group_tiles(group);
        const float* from = v + group * group_step;
        const float* ahead = job.fetch_weights && !begin && vector + 1 < stop ? weight + vector_step : nullptr;
        switch (count) {
          case 1:
            few_sums<1>(from, row_step(count), weight, job.in_c, ahead, m);
            break;
          case 2:
            few_sums<2>(from, row_step(count), weight, job.in_c, ahead, m);
            break;
          case 3:
            few_sums<3>(from, row_step(count), weight, job.in_c, ahead, m);
            break;
          default:
            few_sums<4>(from, row_step(count), weight, job.in_c, ahead, m);
        }
        for (int64_t t = 0; t < count; ++t) {
          const int64_t tile = begin + t, image = tile / (down * across), i = tile / across % down, j = tile % across;
          float* y = (float*)at.y + image * job.y.image + 4 * i * job.y.row + 4 * j * job.y.pixel;
          const float* residual = residual_at<float>(at, job.residual, image, 4 * i);
          if (residual) residual += 4 * j * job.residual.pixel;
          winograd_gather(job, m + t * kLanes, count * kLanes, vector * kLanes, end, job.out_h - 4 * i,
                          job.out_w - 4 * j, residual, y);
        }
      }
    }
  });
}
