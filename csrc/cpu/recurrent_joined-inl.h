// Forward pass of one direction for cells that add the input part to the recurrent part (LSTM), with many sequences.
//
// x of the step is put beside the state, so that one product per panel gives the gates and no input part of other steps
// travels through memory. With few sequences the product would be bound by reading w_ih at every step; there
// recurrent_forward-inl.h serves a chunk of steps at once.

constexpr int64_t kJoinedBatch = 16;
constexpr int64_t kJoinedRows = 64;  // of a tile: with 4 gates of 64 units it stays in the second-level cache

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
  const std::vector<Panel> panels = panels_of(hidden);

  Arena arena;
  C *weights, *rows, *rows_next;
  float *tile, *c, *bias;
  arena.ask(weights, gates * hp * depth);
  arena.ask(tile, kJoinedRows * gates * 64);
  arena.ask(rows, batch * ld);
  arena.ask(rows_next, batch * ld);
  arena.ask(c, batch * hp);
  arena.ask(bias, 4 * hp);
  Projection<T, C> projection(arena, layer, d, batch, false);
  arena.take();
  for (const Panel& p : panels) {
    C* panel = weights + gates * p.begin * depth;
    pack_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part, panel);
    pack_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, state, state, panel + gates * p.padded * in);
    Cell::pack_bias((const T*)w.b_ih, (const T*)w.b_hh, full, p, bias + 4 * p.begin);
  }
  projection.pack();
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
    const int64_t blocks = (n + kJoinedRows - 1) / kJoinedRows;
    for (const Panel& p : panels) {
      const int64_t width = gates * p.padded;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t m = n * b / blocks, count = n * (b + 1) / blocks - m;
        tile_gemm(count, width, depth, rows + m * ld, ld, weights + gates * p.begin * depth, width, tile, width, false);
        StepOutputs<T> step = outputs.at(row + m, p.begin);
        C* given = rows_next + m * ld + in + p.begin;
        if (projection.ldh) step.y = nullptr, given = projection.h + m * projection.ldh + p.begin;
        Cell::forward(count, p, tile, tile, bias + 4 * p.begin, rows + m * ld + in + p.begin, given,
                      projection.ldh ? projection.ldh : ld, c + m * hp + p.begin, hp, step);
      }
    }
    if (projection.ldh) projection.run(n, outputs.y + row * outputs.ldy, outputs.ldy, rows_next + in, ld);
    if (n < batch) copy_rows(rows + n * ld + in, ld, rows_next + n * ld + in, ld, batch - n, state);
    std::swap(rows, rows_next);
  }
  copy_rows(rows + in, ld, (T*)out.h_n + first * state, state, batch, state);
  if (out.c_n) copy_rows(c, hp, (T*)out.c_n + first * hidden, hidden, batch, hidden);
}
