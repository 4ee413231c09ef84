// Forward pass of one direction of a recurrent layer (see recurrent-inl.h). Cell is LstmCell or GruCell.
//
// The input part of a chunk of steps is one product per panel of hidden units, into tiles [row][gate][unit]; a step
// adds the recurrent part to its rows, panel by panel, and the gate arithmetic follows while the tile is in cache.

constexpr int64_t kForwardRows = 128;

template <typename T>
struct StepOutputs {
  T* y;  // null when the projection gives it
  int64_t ldy;
  T *gates, *cells;  // null when not kept; rows of 4 * hidden and hidden
  int64_t hidden;

  // Of the rows from `row` on and the units from `unit` on.
  StepOutputs at(int64_t row, int64_t unit) const {
    return {y ? y + row * ldy + unit : nullptr, ldy, gates ? gates + row * 4 * hidden + unit : nullptr,
            cells ? cells + row * hidden + unit : nullptr, hidden};
  }
};

template <typename T>
StepOutputs<T> outputs_of(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  const int64_t first = d * layer.rows() * layer.hidden;
  return {(T*)out.y + d * layer.state, layer.directions * layer.state, out.gates ? (T*)out.gates + 4 * first : nullptr,
          out.cells ? (T*)out.cells + first : nullptr, layer.hidden};
}

template <class Cell, typename T, typename C>
void recurrent_forward_kernel(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  constexpr int64_t gates = Cell::kGates;
  const RecurrentWeights& w = layer.weights[d];
  const int64_t batch = layer.batch, hidden = layer.hidden, state = layer.state, full = layer.full_hidden,
                hp = round_up(hidden, 16), sp = round_up(state, 16);
  const int64_t part = layer.in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t in = layer.in_blocks * round_up(part, kPair<C>), depth = round_up(state, kPair<C>);
  const std::vector<Panel> panels = panels_of(hidden);
  const std::vector<Chunk> chunks = chunks_of(layer, d, std::max(kForwardRows, batch));
  int64_t chunk_rows = 0;
  for (const Chunk& chunk : chunks) chunk_rows = std::max(chunk_rows, chunk.rows);
  const bool dot_input = layer.dot_input(), dot_state = layer.dot_state();
  const bool convert = !std::is_same_v<T, C> || in != layer.in;

  Arena arena, fixed;
  C *w_ih, *w_hh, *x_copy, *h, *h_next;
  float *input_tiles, *state_tile, *c, *bias;
  fixed.ask(w_ih, dot_input ? 0 : gates * hp * in);
  fixed.ask(w_hh, dot_state ? 0 : gates * hp * depth);
  arena.ask(input_tiles, chunk_rows * gates * hp);
  arena.ask(x_copy, convert ? chunk_rows * in : 0);
  arena.ask(state_tile, Cell::kAdds ? 0 : batch * gates * 64);
  arena.ask(h, batch * sp);
  arena.ask(h_next, batch * sp);
  arena.ask(c, batch * hp);
  fixed.ask(bias, 4 * hp);
  Projection<T, C> projection(arena, fixed, layer, d, batch, dot_state);
  arena.take();
  if (!fixed.take_kept(layer.kept ? layer.kept + d : nullptr)) {
    for (const Panel& p : panels) {
      if (!dot_input) {
        pack_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part,
                   w_ih + gates * p.begin * in);
      }
      if (!dot_state)
        pack_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, state, state, w_hh + gates * p.begin * depth);
      Cell::pack_bias((const T*)w.b_ih, (const T*)w.b_hh, full, p, bias + 4 * p.begin);
    }
    projection.pack();
  }
  // What is beside the units of a row takes part in whole vectors and pairs: it stays 0.
  std::fill_n(h, batch * sp, C(0.0f));
  std::fill_n(h_next, batch * sp, C(0.0f));
  std::fill_n(c, batch * hp, 0.0f);
  const int64_t first = d * batch;
  if (layer.h0) copy_rows((const T*)layer.h0 + first * state, state, h, sp, batch, state);
  if (layer.c0) copy_rows((const T*)layer.c0 + first * hidden, hidden, c, hp, batch, hidden);

  const StepOutputs<T> outputs = outputs_of<T>(layer, out, d);
  for (const Chunk& chunk : chunks) {
    const C* x;
    int64_t ldx = in;
    if (convert) {
      copy_blocks((const T*)layer.x + chunk.row * layer.ldx, layer.ldx, x_copy, in, chunk.rows, layer.in_blocks, part);
      x = x_copy;
    } else {
      x = (const C*)layer.x + chunk.row * layer.ldx, ldx = layer.ldx;
    }
    for (const Panel& p : panels) {
      const int64_t width = gates * p.padded;
      float* tiles = input_tiles + chunk_rows * gates * p.begin;
      if constexpr (std::is_same_v<C, float>) {
        if (dot_input) {
          dot_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part, x, ldx, chunk.rows,
                    tiles, false);
          continue;
        }
      }
      tile_gemm(chunk.rows, width, in, x, ldx, w_ih + gates * p.begin * in, width, tiles, width, false);
    }
    for (int64_t k = chunk.first; k <= chunk.last; ++k) {
      const int64_t t = layer.visit(d, k), n = layer.size[t], row = layer.start[t];
      if (n == 0) continue;
      for (const Panel& p : panels) {
        const int64_t width = gates * p.padded;
        float* input_tile = input_tiles + chunk_rows * gates * p.begin + (row - chunk.row) * width;
        float* tile = Cell::kAdds ? input_tile : state_tile;
        if (dot_state) {
          if constexpr (std::is_same_v<C, float>)
            dot_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, state, state, h, sp, n, tile, Cell::kAdds);
        } else {
          tile_gemm(n, width, depth, h, sp, w_hh + gates * p.begin * depth, width, tile, width, Cell::kAdds);
        }
        StepOutputs<T> step = outputs.at(row, p.begin);
        C* given = h_next + p.begin;
        if (projection.ldh) step.y = nullptr, given = projection.h + p.begin;
        Cell::forward(n, p, input_tile, tile, bias + 4 * p.begin, h + p.begin, given, projection.ldh ? projection.ldh : sp,
                      c + p.begin, hp, step);
      }
      if (projection.ldh) projection.run(n, outputs.y + row * outputs.ldy, outputs.ldy, h_next, sp);
      if (n < batch) std::memcpy((void*)(h_next + n * sp), h + n * sp, (batch - n) * sp * sizeof(C));
      std::swap(h, h_next);
    }
  }
  copy_rows(h, sp, (T*)out.h_n + first * state, state, batch, state);
  if (out.c_n) copy_rows(c, hp, (T*)out.c_n + first * hidden, hidden, batch, hidden);
}
