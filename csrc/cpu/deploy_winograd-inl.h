// 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3): 36 products of 6x6 inputs make 4x4 outputs, which take 144 otherwise.

#include "winograd-inl.h"

// Floats between the rows and columns of the 6x6 inputs of a tile, and its vectors of channels.
struct WinogradSteps {
  int64_t row, column, vector;
};

// One tile's inputs of all channels to `v`. Rows and columns from `rows` and `columns` on are outside the padded image: zeros.
inline void winograd_scatter(const deploy::WinogradJob& job, const float* x, int64_t rows, int64_t columns,
                             const WinogradSteps& steps, float* v) {
  for (int64_t c = 0; c < job.in_c; c += kLanes) {
    const int n = std::min<int64_t>(kLanes, job.in_c - c);
    vf d[36], t[36];
    if (rows >= 6 && columns >= 6 && n == kLanes) {
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) d[i * 6 + j] = load(x + i * job.x.row + j * job.x.pixel + c);
      }
    } else {
      for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < 6; ++j) {
          d[i * 6 + j] = i < rows && j < columns ? get_some(x + i * job.x.row + j * job.x.pixel + c, n) : vf{};
        }
      }
    }
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) winograd_input(d + j, 6, t + j, 6);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      vf row[6];
      winograd_input(t + i * 6, 1, row, 1);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(v + i * steps.row + j * steps.column + c / kLanes * steps.vector, row[j]);
    }
  }
}

// The outputs of one tile and vector of channels from its sums, `position` floats apart.
inline void winograd_gather(const deploy::WinogradJob& job, const float* m, int64_t position, int64_t c, const TileEnd<float>& end,
                            int64_t rows, int64_t columns, const float* residual, float* y) {
  const int n = std::min<int64_t>(kLanes, job.out_c - c);
  vf d[36], t[24];
#pragma GCC unroll 36
  for (int i = 0; i < 36; ++i) d[i] = load(m + i * position);
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) winograd_output(d + j, 6, t + j, 6);
  const vf bias = load(end.bias + c);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (i >= rows) break;
    vf row[4];
    winograd_output(t + i * 6, 1, row, 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j >= columns) break;
      finish(row[j] + bias, end, residual ? residual + i * job.residual.row + j * job.residual.pixel + c : nullptr,
             y + i * job.y.row + j * job.y.pixel + c, n);
    }
  }
}

#include "deploy_winograd_few-inl.h"

inline void winograd_kernel(const deploy::WinogradJob& job, const deploy::Places& at) {
  if (job.few) return few_winograd_kernel(job, at);
  const int64_t vectors = (job.out_c + kLanes - 1) / kLanes, panels = (vectors + job.vectors - 1) / job.vectors;
  const int64_t down = (job.out_h + 3) / 4, across = (job.out_w + 3) / 4, tiles = job.images * down * across;
  const int64_t in_step = (job.in_c + kLanes - 1) / kLanes * kLanes, out_step = vectors * kLanes;
  const int64_t vector_step = job.in_c * kLanes;
  const WinogradSteps steps{6 * job.v_position, job.v_position, kLanes};
  const deploy::TapRun run{0, job.in_c, 0};
  alignas(64) static const float zeros[deploy::kMaxVectors * kLanes] = {};
  TileEnd<float> end = tile_end<float>(job.epilogue);
  end.bias = job.epilogue.bias;
  at::parallel_for(0, job.slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    TileEnd<float> none{};
    none.bias = zeros, none.y_pixel = out_step, none.tail = kLanes;
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      float* v = reinterpret_cast<float*>(at.scratch + slot * job.slot_bytes);
      float* m = v + 36 * job.v_position;
      for (int64_t begin = slot * job.block; begin < tiles; begin += job.slots * job.block) {
        const int64_t count = std::min(job.block, tiles - begin);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down, j = (begin + t) % across;
          const float* x = (const float*)at.x + image * job.x.image + 4 * i * job.x.row + 4 * j * job.x.pixel;
          winograd_scatter(job, x, job.out_h + 2 - 4 * i, job.out_w + 2 - 4 * j, steps, v + t * in_step);
        }
        const int64_t tile = std::min<int64_t>({job.tile, count, tile_limit(job.vectors)});
        for (int64_t position = 0; position < 36; ++position) {
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t vector = panel * job.vectors, wide = std::min(job.vectors, vectors - vector);
            const float* weight = (const float*)job.weight + (position * vectors + vector) * vector_step;
            const ConvTile<float> whole = pick_tile<float>(wide, tile);
            const bool more = job.fetch_weights && (panel + 1 < panels || position < 35);
            const int64_t parts = more ? (count + tile - 1) / tile : 0;
            for (int64_t t = 0; t < count; t += tile) {
              // The next panel lies behind this one.
              fetch_weights(none, weight + wide * vector_step, wide * vector_step * 4, t / tile, parts, job.in_c);
              const ConvTile<float> run_tile = t + tile <= count ? whole : pick_tile<float>(wide, count - t);
              run_tile(v + position * job.v_position + t * in_step, in_step, &run, 1, weight, vector_step, none, nullptr,
                       true, true, nullptr, m + position * job.m_position + t * out_step + vector * kLanes);
            }
          }
        }
        for (int64_t t = 0; t < count; ++t) {
          const int64_t image = (begin + t) / (down * across), i = (begin + t) / across % down, j = (begin + t) % across;
          float* y = (float*)at.y + image * job.y.image + 4 * i * job.y.row + 4 * j * job.y.pixel;
          const float* residual = residual_at<float>(at, job.residual, image, 4 * i);
          if (residual) residual += 4 * j * job.residual.pixel;
          for (int64_t c = 0; c < job.out_c; c += kLanes) {
            winograd_gather(job, m + t * out_step + c, job.m_position, c, end, job.out_h - 4 * i, job.out_w - 4 * j, residual, y);
          }
        }
      }
    }
  });
}
