// Forward pass of one direction for cells that add the input part to the recurrent part (LSTM), with many sequences.
//
// x of the step is put beside the state, so that one product per panel gives the gates and no input part of other steps
// travels through memory. With few sequences the product would be bound by reading w_ih at every step; there
// recurrent_forward-inl.h serves a chunk of steps at once.

constexpr int64_t kJoinedRows = 64;  // of a tile: with 4 gates of 64 units it stays in the second-level cache

#if SK_LANES == 16
// Where vectors are wide a register tile takes the place of brgemm: rows by four gates of kLanes units. The gate arithmetic of
// the tile before goes between its products, in small parts: most of it runs in units that the products leave idle, and none of
// its chains of dependent instructions is waited for.
constexpr int64_t kFusedRows = 6;
constexpr int64_t kFusedAhead = 512;  // floats of the weights that are fetched before they are needed

template <class Cell, typename T, typename C>
struct FusedTile {
  int64_t rows, left, ld, ldc;
  const float* bias;
  float* c;
  C* h;
  StepOutputs<T> out;
  alignas(64) float z[kFusedRows][Cell::kGates][kLanes];

  template <int Part>
  inline __attribute__((always_inline)) void run(int64_t m) {
    Cell::template part<Part>(z[m][0], kLanes, bias, c + m * ldc, h + m * ld, out.at(m, 0), left);
  }
  void finish() {
    for (int64_t m = 0; m < rows; ++m) {
      [&]<int... Part>(std::integer_sequence<int, Part...>) {
        (run<Part>(m), ...);
      }(std::make_integer_sequence<int, Cell::kParts>{});
    }
    rows = 0;
  }
};

inline vf multiply_add(vf acc, vf a, vf b, float) { return acc + a * b; }
#if defined(SK_BF16)
inline vf multiply_add(vf acc, vf a, vf b, c10::BFloat16) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

// a[row][k] times b[k][gate][unit], `count` steps on.
template <int R, typename C>
inline __attribute__((always_inline)) void multiply_steps(vf (&acc)[R][4], const C*& a, int64_t lda, const C*& b,
                                                          int64_t count) {
  for (const C* end = a + count * kPair<C>; a != end; a += kPair<C>, b += 4 * kLanes * kPair<C>) {
    for (int g = 0; g < 4; ++g) __builtin_prefetch((const float*)b + kFusedAhead + g * kLanes);
    const vf b0 = load((const float*)b), b1 = load((const float*)b + kLanes), b2 = load((const float*)b + 2 * kLanes),
             b3 = load((const float*)b + 3 * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float unit;
      std::memcpy(&unit, a + r * lda, sizeof(unit));
      const vf s = splat(unit);
      acc[r][0] = multiply_add(acc[r][0], s, b0, C{}), acc[r][1] = multiply_add(acc[r][1], s, b1, C{});
      acc[r][2] = multiply_add(acc[r][2], s, b2, C{}), acc[r][3] = multiply_add(acc[r][3], s, b3, C{});
    }
  }
}

// tile.z = the products of R rows; `before` is finished meanwhile.
template <int R, class Cell, typename T, typename C>
void fused_tile(const C* a, int64_t lda, const C* b, int64_t depth, FusedTile<Cell, T, C>& before,
                FusedTile<Cell, T, C>& tile) {
  vf acc[R][4] = {};
  const int64_t steps = depth / kPair<C>, each = before.rows ? steps / (before.rows * Cell::kParts) : 0;
  for (int64_t m = 0; m < before.rows; ++m) {
    [&]<int... Part>(std::integer_sequence<int, Part...>) __attribute__((always_inline)) {
      ((multiply_steps<R>(acc, a, lda, b, each), before.template run<Part>(m)), ...);
    }(std::make_integer_sequence<int, Cell::kParts>{});
  }
  multiply_steps<R>(acc, a, lda, b, steps - each * before.rows * Cell::kParts);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < 4; ++g) store(tile.z[r][g], acc[r][g]);
  }
  tile.rows = R;
}

template <class Cell, typename T, typename C>
void fused_tile(int64_t rows, const C* a, int64_t lda, const C* b, int64_t depth, FusedTile<Cell, T, C>& before,
                FusedTile<Cell, T, C>& tile) {
  switch (rows) {
    case 1: return fused_tile<1>(a, lda, b, depth, before, tile);
    case 2: return fused_tile<2>(a, lda, b, depth, before, tile);
    case 3: return fused_tile<3>(a, lda, b, depth, before, tile);
    case 4: return fused_tile<4>(a, lda, b, depth, before, tile);
    case 5: return fused_tile<5>(a, lda, b, depth, before, tile);
    default: return fused_tile<6>(a, lda, b, depth, before, tile);
  }
}
#endif

template <class Cell, typename T, typename C>
void recurrent_joined_kernel(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  static_assert(Cell::kAdds);
  constexpr int64_t gates = Cell::kGates;
  const RecurrentWeights& w = layer.weights[d];
  const int64_t batch = layer.batch, hidden = layer.hidden, state = layer.state, full = layer.full_hidden,
                hp = round_up(hidden, 16);
  const int64_t part = layer.in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t in = layer.in_blocks * round_up(part, kPair<C>), depth = in + round_up(state, kPair<C>),
                ld = round_up(in + round_up(state, 16), 16);  // a row: x, then the state
#if SK_LANES == 16
  constexpr int64_t tile_rows = kFusedRows, tile_units = kLanes;
  FusedTile<Cell, T, C> tiles[2] = {}, *before = tiles, *next = tiles + 1;
#else
  constexpr int64_t tile_rows = kJoinedRows, tile_units = 64;
#endif
  const std::vector<Panel> panels = panels_of(hidden, 1, tile_units);

  Arena arena, fixed;
  C *weights, *rows, *rows_next;
  float *tile, *c, *bias;
  fixed.ask(weights, gates * hp * depth);
  arena.ask(tile, SK_LANES == 16 ? 0 : tile_rows * gates * tile_units);
  arena.ask(rows, batch * ld);
  arena.ask(rows_next, batch * ld);
  arena.ask(c, batch * hp);
  fixed.ask(bias, 4 * hp);
  Projection<T, C> projection(arena, fixed, layer, d, batch, false);
  arena.take();
  if (!fixed.take_kept(layer.kept ? layer.kept + d : nullptr)) {
    for (const Panel& p : panels) {
      C* panel = weights + gates * p.begin * depth;
      pack_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part, panel);
      pack_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, state, state, panel + gates * p.padded * in);
      Cell::pack_bias((const T*)w.b_ih, (const T*)w.b_hh, full, p, bias + 4 * p.begin);
    }
    projection.pack();
  }
  std::fill_n(rows, batch * ld, C(0.0f));  // what is beside the units of a row stays 0
  std::fill_n(rows_next, batch * ld, C(0.0f));
  std::fill_n(c, batch * hp, 0.0f);
  const int64_t first = d * batch;
  if (layer.h0) copy_rows((const T*)layer.h0 + first * state, state, rows + in, ld, batch, state);
  if (layer.c0) copy_rows((const T*)layer.c0 + first * hidden, hidden, c, hp, batch, hidden);

  const StepOutputs<T> outputs = outputs_of<T>(layer, out, d);
  for (int64_t k = 0; k < layer.steps(); ++k) {
    const int64_t t = layer.visit(d, k), n = layer.size[t], row = layer.start[t];
    copy_blocks((const T*)layer.x + row * layer.ldx, layer.ldx, rows, ld, n, layer.in_blocks, part);
    if (k + 1 < layer.steps()) {  // x of the next step: in no cache near, and too short for the CPU to see a pattern
      const int64_t next = layer.visit(d, k + 1);
      for (int64_t r = 0; r < layer.size[next]; ++r) {
        const T* from = (const T*)layer.x + (layer.start[next] + r) * layer.ldx;
        for (int64_t i = 0; i < layer.in; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
      }
    }
    const int64_t blocks = (n + tile_rows - 1) / tile_rows;
    for (const Panel& p : panels) {
      const C* panel = weights + gates * p.begin * depth;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t m = n * b / blocks, count = n * (b + 1) / blocks - m;
        StepOutputs<T> step = outputs.at(row + m, p.begin);
        C* given = rows_next + m * ld + in + p.begin;
        if (projection.ldh) step.y = nullptr, given = projection.h + m * projection.ldh + p.begin;
        const int64_t ld_given = projection.ldh ? projection.ldh : ld;
        float *at_c = c + m * hp + p.begin, *at_bias = bias + gates * p.begin;
#if SK_LANES == 16
        next->left = p.count, next->ld = ld_given, next->ldc = hp;
        next->bias = at_bias, next->c = at_c, next->h = given, next->out = step;
        fused_tile(count, rows + m * ld, ld, panel, depth, *before, *next);
        std::swap(before, next);
#else
        const int64_t width = gates * p.padded;
        tile_gemm(count, width, depth, rows + m * ld, ld, panel, width, tile, width, false);
        Cell::forward(count, p, tile, tile, at_bias, rows + m * ld + in + p.begin, given, ld_given, at_c, hp, step);
#endif
      }
    }
#if SK_LANES == 16
    before->finish();
#endif
    if (projection.ldh) projection.run(n, outputs.y + row * outputs.ldy, outputs.ldy, rows_next + in, ld);
    if (n < batch) copy_rows(rows + n * ld + in, ld, rows_next + n * ld + in, ld, batch - n, state);
    std::swap(rows, rows_next);
  }
  copy_rows(rows + in, ld, (T*)out.h_n + first * state, state, batch, state);
  if (out.c_n) copy_rows(c, hp, (T*)out.c_n + first * hidden, hidden, batch, hidden);
}
