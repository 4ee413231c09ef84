// Forward pass of one direction of a recurrent layer (see recurrent-inl.h). Cell is LstmCell or GruCell.
//
// The input part of a chunk of steps is one product per panel of hidden units, into tiles [row][gate][unit]; a step
// adds the recurrent part to its rows, panel by panel, and the gate arithmetic follows while the tile is in cache.

// Fewer rows in all: read the weights where they lie instead of packing them.
constexpr int64_t kDotRows = 24;
// Fewer sequences: the recurrent part is bound by reading the weights, which packing does not make less.
constexpr int64_t kDotBatch = 3;
constexpr int64_t kForwardRows = 128;

template <typename T>
struct StepOutputs {
  T* y;
  int64_t ldy;
  T *gates, *cells;  // null when not kept; rows of 4 * hidden and hidden
  int64_t hidden;
};

template <class Cell, typename T>
void recurrent_forward_kernel(const RecurrentLayer& layer, const RecurrentOutputs& out, int64_t d) {
  constexpr int64_t gates = Cell::kGates;
  const RecurrentWeights& w = layer.weights[d];
  const int64_t batch = layer.batch, hidden = layer.hidden, in = layer.in, full = layer.full_hidden,
                hp = round_up(hidden, 16);
  const int64_t part = in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const std::vector<Panel> panels = panels_of(hidden);
  const std::vector<Chunk> chunks = chunks_of(layer, d, std::max(kForwardRows, batch));
  int64_t chunk_rows = 0;
  for (const Chunk& chunk : chunks) chunk_rows = std::max(chunk_rows, chunk.rows);
  const bool dot_input = layer.rows() < kDotRows, dot_state = dot_input || batch < kDotBatch;
  const bool convert = !std::is_same_v<T, float>;

  Arena arena((dot_input ? 0 : gates * hp * in) + (dot_state ? 0 : gates * hp * hidden) +
              chunk_rows * (gates * hp + (convert ? in : 0)) + (Cell::kAdds ? 0 : batch * gates * 64) + 3 * batch * hp +
              4 * hp + 256);
  float* w_ih = arena.take(dot_input ? 0 : gates * hp * in);
  float* w_hh = arena.take(dot_state ? 0 : gates * hp * hidden);
  float* input_tiles = arena.take(chunk_rows * gates * hp);
  float* x_float = arena.take(convert ? chunk_rows * in : 0);
  float* state_tile = arena.take(Cell::kAdds ? 0 : batch * gates * 64);
  float* h = arena.take(batch * hp);
  float* h_next = arena.take(batch * hp);
  float* c = arena.take(batch * hp);
  float* bias = arena.take(4 * hp);

  for (const Panel& p : panels) {
    if (!dot_input) {
      pack_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part,
                 w_ih + gates * p.begin * in);
    }
    if (!dot_state)
      pack_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, full, hidden, w_hh + gates * p.begin * hidden);
    Cell::pack_bias((const T*)w.b_ih, (const T*)w.b_hh, full, p, bias + 4 * p.begin);
  }
  const int64_t of_direction = d * batch * hidden;
  copy_rows(layer.h0 ? (const T*)layer.h0 + of_direction : nullptr, hidden, h, hp, batch, hidden);
  copy_rows(layer.c0 ? (const T*)layer.c0 + of_direction : nullptr, hidden, c, hp, batch, hidden);

  T* y = (T*)out.y + d * hidden;
  const int64_t ldy = layer.directions * hidden;
  T* kept_gates = out.gates ? (T*)out.gates + d * layer.rows() * 4 * hidden : nullptr;
  T* kept_cells = out.cells ? (T*)out.cells + d * layer.rows() * hidden : nullptr;
  for (const Chunk& chunk : chunks) {
    const float* x;
    int64_t ldx = layer.ldx;
    if constexpr (std::is_same_v<T, float>) {
      x = (const float*)layer.x + chunk.row * ldx;
    } else {
      copy_rows((const T*)layer.x + chunk.row * ldx, ldx, x_float, in, chunk.rows, in);
      x = x_float, ldx = in;
    }
    for (const Panel& p : panels) {
      const int64_t width = gates * p.padded;
      float* tiles = input_tiles + chunk_rows * gates * p.begin;
      if (dot_input) {
        dot_gates((const T*)w.w_ih, w.ld_ih, gates, full, p, layer.in_blocks, full_part, part, x, ldx, chunk.rows,
                  tiles, false);
      } else {
        tile_gemm(chunk.rows, width, in, x, ldx, w_ih + gates * p.begin * in, width, tiles, width, false);
      }
    }
    for (int64_t k = chunk.first; k <= chunk.last; ++k) {
      const int64_t t = layer.visit(d, k), n = layer.size[t], row = layer.start[t];
      if (n == 0) continue;
      for (const Panel& p : panels) {
        const int64_t width = gates * p.padded;
        float* input_tile = input_tiles + chunk_rows * gates * p.begin + (row - chunk.row) * width;
        float* tile = Cell::kAdds ? input_tile : state_tile;
        if (dot_state) {
          dot_gates((const T*)w.w_hh, w.ld_hh, gates, full, p, 1, full, hidden, h, hp, n, tile, Cell::kAdds);
        } else {
          tile_gemm(n, width, hidden, h, hp, w_hh + gates * p.begin * hidden, width, tile, width, Cell::kAdds);
        }
        const StepOutputs<T> step{y + row * ldy + p.begin, ldy,
                                  kept_gates ? kept_gates + row * 4 * hidden + p.begin : nullptr,
                                  kept_cells ? kept_cells + row * hidden + p.begin : nullptr, hidden};
        Cell::forward(n, p, input_tile, tile, bias + 4 * p.begin, h + p.begin, h_next + p.begin, c + p.begin, hp, step);
      }
      if (n < batch) std::memcpy(h_next + n * hp, h + n * hp, (batch - n) * hp * sizeof(float));
      std::swap(h, h_next);
    }
  }
  copy_rows(h, hp, (T*)out.h_n + of_direction, hidden, batch, hidden);
  if (out.c_n) copy_rows(c, hp, (T*)out.c_n + of_direction, hidden, batch, hidden);
}
