// Forward pass of one direction for cells that add the input part to the recurrent part (LSTM), with many sequences.
//
// x of the step is put beside the state, so that one product per panel gives the gates and no input part of other steps
// travels through memory. With few sequences the product would be bound by reading w_ih at every step; there
// recurrent_forward-inl.h serves a chunk of steps at once.

constexpr int64_t kJoinedBatch = 16;
constexpr int64_t kJoinedRows = 64;  // of a tile: with 4 gates of 64 units it stays in the second-level cache

template <class Cell, typename T>
void recurrent_joined_kernel(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  static_assert(Cell::kAdds);
  constexpr int64_t gates = Cell::kGates;
  const RecurrentWeights& w = layer.weights[d];
  const int64_t batch = layer.batch, hidden = layer.hidden, in = layer.in, full = layer.full_hidden;
  const int64_t part = in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t depth = in + hidden, hp = round_up(hidden, 16), ld = round_up(in + hp, 16);  // a row: x, then h
  const std::vector<Panel> panels = panels_of(hidden);

  Arena arena(gates * hp * depth + kJoinedRows * gates * 64 + 3 * batch * ld + 4 * hp + 256);
  float* weights = arena.take(gates * hp * depth);
  float* tile = arena.take(kJoinedRows * gates * 64);
  float* rows = arena.take(batch * ld);
  float* rows_next = arena.take(batch * ld);
  float* c = arena.take(batch * ld);
  float* bias = arena.take(4 * hp);
  for (const Panel& p : panels) {
    float* panel = weights + gates * p.begin * depth;
    pack_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part, panel);
    pack_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, full, hidden, panel + gates * p.padded * in);
    Cell::pack_bias((const T*)w.b_ih, (const T*)w.b_hh, full, p, bias + 4 * p.begin);
  }
  const int64_t of_direction = d * batch * hidden;
  copy_rows(layer.h0 ? (const T*)layer.h0 + of_direction : nullptr, hidden, rows + in, ld, batch, hidden);
  copy_rows(layer.c0 ? (const T*)layer.c0 + of_direction : nullptr, hidden, c, ld, batch, hidden);

  T* y = (T*)out.y + d * hidden;
  const int64_t ldy = layer.directions * hidden;
  T* kept_gates = out.gates ? (T*)out.gates + d * layer.rows() * 4 * hidden : nullptr;
  T* kept_cells = out.cells ? (T*)out.cells + d * layer.rows() * hidden : nullptr;
  for (int64_t k = 0; k < layer.steps(); ++k) {
    const int64_t t = layer.visit(d, k), n = layer.size[t], row = layer.start[t];
    copy_rows((const T*)layer.x + row * layer.ldx, layer.ldx, rows, ld, n, in);
    const int64_t blocks = (n + kJoinedRows - 1) / kJoinedRows;
    for (const Panel& p : panels) {
      const int64_t width = gates * p.padded;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t m = n * b / blocks, count = n * (b + 1) / blocks - m, at = row + m;
        tile_gemm(count, width, depth, rows + m * ld, ld, weights + gates * p.begin * depth, width, tile, width, false);
        const StepOutputs<T> step{y + at * ldy + p.begin, ldy,
                                  kept_gates ? kept_gates + at * 4 * hidden + p.begin : nullptr,
                                  kept_cells ? kept_cells + at * hidden + p.begin : nullptr, hidden};
        const int64_t state = m * ld + in + p.begin;
        Cell::forward(count, p, tile, tile, bias + 4 * p.begin, rows + state, rows_next + state, c + m * ld + p.begin,
                      ld, step);
      }
    }
    if (n < batch) copy_rows(rows + n * ld + in, ld, rows_next + n * ld + in, ld, batch - n, hidden);
    std::swap(rows, rows_next);
  }
  copy_rows(rows + in, ld, (T*)out.h_n + of_direction, hidden, batch, hidden);
  if (out.c_n) copy_rows(c, ld, (T*)out.c_n + of_direction, hidden, batch, hidden);
}
