// Backward pass of one direction of a recurrent layer (see recurrent-inl.h). Cell is LstmCell or GruCell.
//
// dz (row, 4 blocks of h) holds the gradients at the gates for a chunk of steps. Each step fills its rows and sends
// them through w_hh to the step before; then the chunk as a whole gives dx, and is summed into the transposed weight
// gradients (column, gate * h + unit), which land on the slice of the full-size gradients at the end.

constexpr int64_t kBackwardRows = 256;

template <typename T>
struct StepGradients {
  const T* dy;  // null for zeros
  int64_t ldy;
  const T *gates, *cells;
  float *dh, *dc;
  const float *h_previous, *c_previous;
  int64_t ld;  // of the four above
  float* dz;
  int64_t ldz, hidden;
};

// The state before visit k of direction d: rows of the visit before, and of `initial` for sequences that begin here.
template <typename T>
void copy_previous(const RecurrentLayer& layer, int64_t d, int64_t k, const T* kept, int64_t ld, const T* initial,
                   float* dst, int64_t ldd) {
  const int64_t n = layer.size[layer.visit(d, k)];
  int64_t before = 0;
  if (k > 0) {
    const int64_t t = layer.visit(d, k - 1);
    before = std::min(n, layer.size[t]);
    copy_rows(kept + layer.start[t] * ld, ld, dst, ldd, before, layer.hidden);
  }
  copy_rows(initial ? initial + before * layer.hidden : nullptr, layer.hidden, dst + before * ldd, ldd, n - before,
            layer.hidden);
}

// c (m, n) (+)= a (m, k) @ b (k, n) in panels of columns that stay in cache.
inline void gemm_columns(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                         float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += 128)
    tile_gemm(m, std::min<int64_t>(128, n - j), k, a, lda, b + j, ldb, c + j, ldc, add);
}

template <class Cell, typename T>
void recurrent_backward_kernel(const RecurrentLayer& layer, const RecurrentGradients& grads, int64_t d) {
  constexpr int64_t gates = Cell::kGates, split = Cell::kStateSplit;
  const RecurrentWeights& w = layer.weights[d];
  const int64_t batch = layer.batch, hidden = layer.hidden, in = layer.in, full = layer.full_hidden,
                hp = round_up(hidden, 16);
  const int64_t part = in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t width = gates * hidden, ldz = round_up(4 * hidden, 16) + 16, ldw = round_up(width, 16) + 16;
  const std::vector<Panel> panels = panels_of(hidden), in_panels = panels_of(in);
  const std::vector<Chunk> chunks = chunks_of(layer, d, std::max(kBackwardRows, batch));
  int64_t chunk_rows = 0;
  for (const Chunk& chunk : chunks) chunk_rows = std::max(chunk_rows, chunk.rows);
  const int64_t ldr = round_up(chunk_rows, 16) + 16;
  float* dx = grads.dx[d];
  const bool need_dw = !grads.dw.empty();

  Arena arena(width * (hp + (dx ? round_up(in, 16) : 0)) + chunk_rows * (ldz + hp) + 3 * batch * hp +
              (need_dw ? (in + hidden) * (ldr + ldw) + 4 * hp : 0) + 256);
  float* w_hh = arena.take(width * hp);
  float* w_ih = arena.take(dx ? width * round_up(in, 16) : 0);
  float* dz = arena.take(chunk_rows * ldz);
  float* h_previous = arena.take(chunk_rows * hp);
  float* c_previous = arena.take(batch * hp);
  float* dh = arena.take(batch * hp);
  float* dc = arena.take(batch * hp);
  float* operand = arena.take(need_dw ? (in + hidden) * ldr : 0);
  float* dw = arena.take(need_dw ? (in + hidden) * ldw : 0);
  float* db = arena.take(need_dw ? 4 * hp : 0);
  if (need_dw) std::fill_n(db, 4 * hp, 0.0f);

  for (const Panel& p : panels)
    pack_columns((const T*)w.w_hh, w.ld_hh, gates, full, hidden, p, full, hidden, w_hh + width * p.begin);
  if (dx) {
    for (const Panel& p : in_panels)
      pack_columns((const T*)w.w_ih, w.ld_ih, gates, full, hidden, p, full_part, part, w_ih + width * p.begin);
  }
  const int64_t of_direction = d * batch * hidden, ldy = layer.directions * hidden;
  const T* y = (const T*)grads.y + d * hidden;
  const T* dy = grads.dy ? (const T*)grads.dy + d * hidden : nullptr;
  const T* kept_gates = (const T*)grads.gates + d * layer.rows() * 4 * hidden;
  const T* kept_cells = grads.cells ? (const T*)grads.cells + d * layer.rows() * hidden : nullptr;
  const T* h0 = layer.h0 ? (const T*)layer.h0 + of_direction : nullptr;
  const T* c0 = layer.c0 ? (const T*)layer.c0 + of_direction : nullptr;
  copy_rows(grads.dh_n ? (const T*)grads.dh_n + of_direction : nullptr, hidden, dh, hp, batch, hidden);
  copy_rows(grads.dc_n ? (const T*)grads.dc_n + of_direction : nullptr, hidden, dc, hp, batch, hidden);

  bool add = false;
  for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
    for (int64_t k = chunk->last; k >= chunk->first; --k) {
      const int64_t t = layer.visit(d, k), n = layer.size[t], row = layer.start[t];
      if (n == 0) continue;
      float* h_before = h_previous + (row - chunk->row) * hp;
      float* dz_step = dz + (row - chunk->row) * ldz;
      copy_previous(layer, d, k, y, ldy, h0, h_before, hp);
      if (kept_cells) copy_previous(layer, d, k, kept_cells, hidden, c0, c_previous, hp);
      Cell::backward(n, StepGradients<T>{dy ? dy + row * ldy : nullptr, ldy, kept_gates + row * 4 * hidden,
                                         kept_cells ? kept_cells + row * hidden : nullptr, dh, dc, h_before, c_previous,
                                         hp, dz_step, ldz, hidden});
      for (const Panel& p : panels) {
        const float* panel = w_hh + width * p.begin;
        tile_gemm(n, p.padded, split * hidden, dz_step, ldz, panel, p.padded, dh + p.begin, hp, !Cell::kAdds);
        if (split < gates) {
          tile_gemm(n, p.padded, hidden, dz_step + 3 * hidden, ldz, panel + split * hidden * p.padded, p.padded,
                    dh + p.begin, hp, true);
        }
      }
    }
    const int64_t rows = chunk->rows;
    if (rows == 0) continue;
    if (dx) {
      for (const Panel& p : in_panels) {
        tile_gemm(rows, p.count, width, dz, ldz, w_ih + width * p.begin, p.padded, dx + chunk->row * in + p.begin, in,
                  false);
      }
    }
    if (need_dw) {
      transpose_rows((const T*)layer.x + chunk->row * layer.ldx, layer.ldx, rows, in, operand, ldr);
      transpose_rows(h_previous, hp, rows, hidden, operand + in * ldr, ldr);
      const float* state = operand + in * ldr;
      gemm_columns(in, width, rows, operand, ldr, dz, ldz, dw, ldw, add);
      gemm_columns(hidden, split * hidden, rows, state, ldr, dz, ldz, dw + in * ldw, ldw, add);
      if (split < gates)
        gemm_columns(hidden, hidden, rows, state, ldr, dz + 3 * hidden, ldz, dw + in * ldw + split * hidden, ldw, add);
      add = true;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < 4 * hidden; j += kLanes)
          store_some(db + j, load(db + j) + load(dz + r * ldz + j), 4 * hidden - j);
      }
    }
  }

  if (grads.dh0) {
    copy_rows(dh, hp, (T*)grads.dh0 + of_direction, hidden, batch, hidden);
    if (grads.dc0) copy_rows(dc, hp, (T*)grads.dc0 + of_direction, hidden, batch, hidden);
  }
  if (!need_dw || !add) return;
  const std::vector<void*>& out = grads.dw[d];
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t b = 0; b < layer.in_blocks; ++b) {
      transpose_rows(dw + b * part * ldw + g * hidden, ldw, part, hidden,
                     (T*)out[0] + g * full * layer.full_in + b * full_part, layer.full_in);
    }
    transpose_rows(dw + in * ldw + g * hidden, ldw, hidden, hidden, (T*)out[1] + g * full * full, full);
    if (out.size() == 4) {
      copy_rows(db + g * hidden, 0, (T*)out[2] + g * full, 0, 1, hidden);
      copy_rows(db + (g < split ? g : 3) * hidden, 0, (T*)out[3] + g * full, 0, 1, hidden);
    }
  }
}
