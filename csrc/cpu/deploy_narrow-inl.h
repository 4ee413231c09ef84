// Convolution with 4 or 8 outputs of which a vector holds those of several pixels side by side: inputs are read as they lie, and
// a shuffle gives every lane the input of its pixel; included by deploy-inl.h.

constexpr int kNarrowRows = kLanes == 16 ? 8 : 3;  // outputs of a column that share the shuffled inputs

// What is the same for all tiles.
template <typename T>
struct Narrow {
  const deploy::NarrowJob& job;
  TileEnd<T> end;
  vf bias;
  int64_t pixels, step;   // pixels of a vector; from one to the next in x
  vi places[kLanes];      // of each input channel, per lane

  explicit Narrow(const deploy::NarrowJob& given) : job(given), end(tile_end<T>(given.epilogue)), bias(load(given.epilogue.bias)) {
    pixels = kLanes / job.out_c, step = pixels * job.stride_w * job.x.pixel;
    for (int c = 0; c < std::min<int64_t>(job.in_c, kLanes); ++c) {
      for (int lane = 0; lane < kLanes; ++lane) places[c][lane] = lane / job.out_c * job.stride_w * job.x.pixel + c;
    }
  }
};

// R rows of V vectors, each `count` numbers wide (all lanes but in the last vector of a row): 3x3, of stride 1 down the image.
template <typename T, int R, int V>
void narrow_three(const Narrow<T>& n, const T* x, const T* residual, T* y, int count) {
  const deploy::NarrowJob& job = n.job;
  const int64_t tap = job.in_c * kLanes;
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = n.bias;
  }
  for (int64_t k = 0; k < 3; ++k) {
    const T* column = x + k * job.dilation_w * job.x.pixel;
    for (int64_t c = 0; c < job.in_c; ++c) {
      const float* w = job.weight + k * tap + c * kLanes;
      const vf top = load(w), middle = load(w + 3 * tap), bottom = load(w + 6 * tap);
      const vi place = n.places[c];
#pragma GCC unroll 10
      for (int r = 0; r < R + 2; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const vf unit = __builtin_shuffle(get(column + r * job.x.row + v * n.step), place);
          if (r < R) acc[r][v] += unit * top;
          if (r >= 1 && r <= R) acc[r - 1][v] += unit * middle;
          if (r >= 2) acc[r - 2][v] += unit * bottom;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      finish(acc[r][v], n.end, residual ? residual + r * job.residual.row + v * kLanes : nullptr,
             y + r * job.y.row + v * kLanes, count);
    }
  }
}

// V vectors of one row.
template <typename T, int V>
void narrow_any(const Narrow<T>& n, const T* x, const T* residual, T* y, int count) {
  const deploy::NarrowJob& job = n.job;
  vf acc[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) acc[v] = n.bias;
  const float* w = job.weight;
  for (int64_t i = 0; i < job.kernel_h; ++i) {
    for (int64_t k = 0; k < job.kernel_w; ++k) {
      const T* from = x + i * job.dilation_h * job.x.row + k * job.dilation_w * job.x.pixel;
      for (int64_t c = 0; c < job.in_c; ++c, w += kLanes) {
        const vf weight = load(w);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[v] += __builtin_shuffle(get(from + v * n.step), n.places[c]) * weight;
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    finish(acc[v], n.end, residual ? residual + v * kLanes : nullptr, y + v * kLanes, count);
  }
}

template <typename T>
void narrow_kernel(const deploy::NarrowJob& job, const deploy::Places& at) {
  const Narrow<T> n(job);
  const bool three = job.kernel_h == 3 && job.kernel_w == 3 && job.stride_h == 1 && job.dilation_h == 1;
  const int64_t high = three ? kNarrowRows : 1, blocks = (job.out_h + high - 1) / high;
  const int64_t vectors = job.out_w / n.pixels;
  const int rest = static_cast<int>(job.out_w % n.pixels * job.out_c);
  const int64_t work = high * job.out_w * job.out_c * job.kernel_h * job.kernel_w * job.in_c / kLanes;
  at::parallel_for(0, job.images * blocks, 1 + (1 << 15) / (work + 1), [&](int64_t begin, int64_t stop) {
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t image = task / blocks, first = task % blocks * high, last = std::min(job.out_h, first + high);
      const bool whole = three && last - first == kNarrowRows;
      for (int64_t line = first; line < last; line += whole ? kNarrowRows : 1) {
        const T* x = (const T*)at.x + image * job.x.image + line * job.stride_h * job.x.row;
        const T* residual = residual_at<T>(at, job.residual, image, line);
        T* y = (T*)at.y + image * job.y.image + line * job.y.row;
        const auto run = [&](auto tile, int64_t v, int count) {
          tile(n, x + v * n.step, residual ? residual + v * kLanes : nullptr, y + v * kLanes, count);
        };
        constexpr int kWide = 4;
        int64_t v = 0;
        if (whole) {
          for (; v + 2 <= vectors; v += 2) run(&narrow_three<T, kNarrowRows, 2>, v, kLanes);
          for (; v < vectors; ++v) run(&narrow_three<T, kNarrowRows, 1>, v, kLanes);
          if (rest) run(&narrow_three<T, kNarrowRows, 1>, v, rest);
        } else {
          for (; v + kWide <= vectors; v += kWide) run(&narrow_any<T, kWide>, v, kLanes);
          for (; v < vectors; ++v) run(&narrow_any<T, 1>, v, kLanes);
          if (rest) run(&narrow_any<T, 1>, v, rest);
        }
      }
    }
  });
}
