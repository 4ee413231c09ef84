// Backward pass of one direction of a recurrent layer (see recurrent-inl.h). Cell is LstmCell or GruCell.
//
// dz (row, 4 blocks of h) holds the gradients at the gates for a chunk of steps. Each step fills its rows and sends
// them through w_hh to the step before; then the chunk as a whole gives dx, and is summed into the transposed weight
// gradients (column, gate * h + unit), which land on the slice of the full-size gradients at the end. With a projection
// the gradient at y goes through w_hr first.

constexpr int64_t kBackwardRows = 256;
constexpr int64_t kFetchedUnits = 256;  // of the rows that are fetched before they are needed

template <typename T, typename C>
struct StepGradients {
  const T* dy;  // null for zeros
  int64_t ldy;
  const T *gates, *cells;
  float *dh, *dc;
  int64_t ldh, ldc;
  const C* h_previous;
  int64_t ld_previous;
  const T* c_previous;  // null for zeros
  C* dz;
  int64_t ldz, block;  // block: from one gate to the next
  C* h;                // where a projection needs the state before it
  int64_t ld, hidden;  // ld: of h

  StepGradients from(int64_t m) const {
    StepGradients s = *this;
    if (dy) s.dy += m * ldy;
    s.gates += m * 4 * hidden, s.dh += m * ldh, s.dc += m * ldc, s.h_previous += m * ld_previous, s.dz += m * ldz;
    if (cells) s.cells += m * hidden;
    if (c_previous) s.c_previous += m * hidden;
    if (h) s.h += m * ld;
    return s;
  }

  // What is read of row m at unit j is in no cache near, and its streams are too many and too short for the CPU to see
  // them: row after row fetches what is `ahead` rows on.
  int64_t ahead() const { return (kFetchedUnits + hidden - 1) / hidden; }
  inline __attribute__((always_inline)) void fetch(int64_t m, int64_t j) const {
    if (j % (64 / sizeof(T))) return;
    for (int64_t g = 0; g < 4; ++g) __builtin_prefetch(gates + (4 * m + g) * hidden + j);
    if (dy) __builtin_prefetch(dy + m * ldy + j);
    if (cells) __builtin_prefetch(cells + m * hidden + j);
    if (c_previous) __builtin_prefetch(c_previous + m * hidden + j);
  }
};

// The state before a visit is in the rows of the visit before, but for sequences that begin here: theirs is the initial
// one.
struct Previous {
  int64_t row, count;

  Previous(const RecurrentLayer& layer, int64_t d, int64_t k) : row(0), count(0) {
    if (k == 0) return;
    const int64_t t = layer.visit(d, k - 1);
    row = layer.start[t], count = std::min(layer.size[layer.visit(d, k)], layer.size[t]);
  }
};

// c (m, n) (+)= a (m, k) @ b (k, n) in panels of columns that stay in cache.
template <typename C>
inline void gemm_columns(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb, float* c,
                         int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += 128)
    tile_gemm(m, std::min<int64_t>(128, n - j), k, a, lda, b + j * kPair<C>, ldb, c + j, ldc, add);
}

// Rows of a chunk as the second operand of a product: where they lie, or in `pairs` with rows in pairs.
template <typename C>
const C* rows_operand(const C* rows, int64_t ld, int64_t count, int64_t cols, C* pairs) {
  if constexpr (kPair<C> == 1) return rows;
  pack_b<C>(Matrix<C>{rows, ld, 1}, count, cols, pairs, ld);
  return pairs;
}

// dst (cols, rows) = src (rows, cols) transposed, rows padded to whole pairs.
template <typename C, typename S>
void transposed_operand(const S* src, int64_t lds, int64_t rows, int64_t cols, C* dst, int64_t ldd) {
  transpose_rows(src, lds, rows, cols, dst, ldd);
  if (rows % kPair<C> == 0) return;
  for (int64_t c = 0; c < cols; ++c) dst[c * ldd + rows] = C(0.0f);
}

template <class Cell, typename T, typename C>
void recurrent_backward_kernel(const RecurrentLayer& layer, const RecurrentGradients& grads, int64_t d) {
  constexpr int64_t gates = Cell::kGates, split = Cell::kStateSplit;
  const RecurrentWeights& w = layer.weights[d];
  const int64_t batch = layer.batch, hidden = layer.hidden, state = layer.state, in = layer.in,
                full = layer.full_hidden, hp = round_up(hidden, 16), sp = round_up(state, 16);
  const int64_t part = in / layer.in_blocks, full_part = layer.full_in / layer.in_blocks;
  const int64_t block = round_up(hidden, kPair<C>), width = gates * block, ldz = round_up(4 * block, 16) + 16,
                ldw = round_up(width, 16) + 16;
  const bool projects = layer.projects(), need_dw = !grads.dw.empty();
  const std::vector<Panel> panels = panels_of(state), in_panels = panels_of(in, layer.in_blocks),
                           unit_panels = panels_of(projects ? hidden : 0);
  const std::vector<Chunk> chunks = chunks_of(layer, d, std::max(kBackwardRows, batch));
  int64_t chunk_rows = 0;
  for (const Chunk& chunk : chunks) chunk_rows = std::max(chunk_rows, chunk.rows);
  const int64_t pair_rows = round_up(chunk_rows, kPair<C>), ldr = round_up(chunk_rows, 16) + 16;
  float* dx = grads.dx[d];
  const bool pairs = kPair<C> == 2 && need_dw;

  Arena arena;
  C *w_hh, *w_ih, *w_hr, *dz, *dz_pairs, *h_previous, *operand, *dy_rows, *h_rows, *h_pairs;
  float *dh, *dh_units, *dc, *dw, *dw_hr, *db;
  int64_t in_padded = 0;
  for (const Panel& p : in_panels) in_padded += p.padded;
  arena.ask(w_hh, width * sp);
  arena.ask(w_ih, dx ? width * in_padded : 0);
  arena.ask(w_hr, projects ? round_up(state, kPair<C>) * hp : 0);
  arena.ask(dz, chunk_rows * ldz);
  arena.ask(dz_pairs, pairs ? pair_rows * ldz : 0);
  arena.ask(h_previous, chunk_rows * sp);
  arena.ask(dy_rows, projects ? chunk_rows * sp : 0);
  arena.ask(h_rows, projects ? chunk_rows * hp : 0);
  arena.ask(h_pairs, projects && pairs ? pair_rows * hp : 0);
  arena.ask(operand, need_dw ? (in + (projects ? 2 : 1) * state) * ldr : 0);
  arena.ask(dh, batch * sp);
  arena.ask(dh_units, projects ? batch * hp : 0);
  arena.ask(dc, batch * hp);
  arena.ask(dw, need_dw ? (in + state) * ldw : 0);
  arena.ask(dw_hr, need_dw && projects ? state * hp : 0);
  arena.ask(db, need_dw ? 4 * block + 16 : 0);
  arena.take();
  if (need_dw) std::fill_n(db, 4 * block + 16, 0.0f);
  // What lies beside the units of a row takes part in pairs.
  std::fill_n(dz, chunk_rows * ldz, C(0.0f));
  if (projects) std::fill_n(dy_rows, chunk_rows * sp, C(0.0f));

  for (const Panel& p : panels)
    pack_columns((const T*)w.w_hh, w.ld_hh, gates, full, hidden, p.begin, p, w_hh + width * p.begin);
  if (dx) {
    C* packed = w_ih;
    for (const Panel& p : in_panels) {
      const int64_t column = p.begin / part * full_part + p.begin % part;
      pack_columns((const T*)w.w_ih, w.ld_ih, gates, full, hidden, column, p, packed);
      packed += width * p.padded;
    }
  }
  for (const Panel& p : unit_panels)
    pack_columns((const T*)w.w_hr, w.ld_hr, 1, 0, state, p.begin, p, w_hr + round_up(state, kPair<C>) * p.begin);
  const int64_t ldy = layer.directions * state, first = d * batch, first_row = d * layer.rows();
  const T* y = (const T*)grads.y + d * state;
  const T* dy = grads.dy ? (const T*)grads.dy + d * state : nullptr;
  const T* kept_gates = (const T*)grads.gates + first_row * 4 * hidden;
  const T* kept_cells = grads.cells ? (const T*)grads.cells + first_row * hidden : nullptr;
  const T* h0 = layer.h0 ? (const T*)layer.h0 + first * state : nullptr;
  const T* c0 = layer.c0 ? (const T*)layer.c0 + first * hidden : nullptr;
  copy_rows(grads.dh_n ? (const T*)grads.dh_n + first * state : nullptr, state, dh, sp, batch, state);
  copy_rows(grads.dc_n ? (const T*)grads.dc_n + first * hidden : nullptr, hidden, dc, hp, batch, hidden);

  bool add = false;
  for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
    for (int64_t k = chunk->last; k >= chunk->first; --k) {
      const int64_t t = layer.visit(d, k), n = layer.size[t], row = layer.start[t], at = row - chunk->row;
      if (n == 0) continue;
      const Previous previous(layer, d, k);
      C* h_before = h_previous + at * sp;
      copy_rows(y + previous.row * ldy, ldy, h_before, sp, previous.count, state);
      copy_rows(h0 ? h0 + previous.count * state : nullptr, state, h_before + previous.count * sp, sp,
                n - previous.count, state);
      StepGradients<T, C> step{dy ? dy + row * ldy : nullptr,
                               ldy,
                               kept_gates + row * 4 * hidden,
                               kept_cells ? kept_cells + row * hidden : nullptr,
                               dh,
                               dc,
                               sp,
                               hp,
                               h_before,
                               sp,
                               kept_cells ? kept_cells + previous.row * hidden : nullptr,
                               dz + at * ldz,
                               ldz,
                               block,
                               nullptr,
                               hp,
                               hidden};
      if (projects) {
        C* at_y = dy_rows + at * sp;
        for (int64_t m = 0; m < n; ++m) {
          for (int64_t j = 0; j < state; j += kLanes) {
            const int64_t left = state - j;
            const vf more = dy ? load_upto(step.dy + m * ldy + j, left) : vf{};
            store_some(at_y + m * sp + j, load_upto(dh + m * sp + j, left) + more, left);
          }
        }
        const int64_t depth = round_up(state, kPair<C>);
        for (const Panel& p : unit_panels)
          tile_gemm(n, p.padded, depth, at_y, sp, w_hr + depth * p.begin, p.padded, dh_units + p.begin, hp, false);
        step.dy = nullptr, step.dh = dh_units, step.ldh = hp, step.h = h_rows + at * hp;
      }
      Cell::backward(previous.count, step);
      if (previous.count < n) {
        StepGradients<T, C> begins = step.from(previous.count);
        begins.c_previous = c0 ? c0 + previous.count * hidden : nullptr;
        Cell::backward(n - previous.count, begins);
      }
      if (k > 0) {  // what the next visit reads before it can fetch
        const Previous next(layer, d, k - 1);
        const int64_t to = layer.start[layer.visit(d, k - 1)] - row;  // rows from here
        for (int64_t m = 0; m < std::min(step.ahead(), n); ++m) {
          for (int64_t j = 0; j < hidden; j += kLanes) step.fetch(to + m, j);
        }
        for (int64_t m = 0; m < next.count; ++m) {
          for (int64_t j = 0; j < state; j += 64 / sizeof(T)) __builtin_prefetch(y + (next.row + m) * ldy + j, 0, 2);
        }
      }
      for (const Panel& p : panels) {
        const C* panel = w_hh + width * p.begin;
        tile_gemm(n, p.padded, split * block, step.dz, ldz, panel, p.padded, dh + p.begin, sp, !Cell::kAdds);
        if (split < gates) {
          tile_gemm(n, p.padded, block, step.dz + 3 * block, ldz, panel + split * block * p.padded, p.padded,
                    dh + p.begin, sp, true);
        }
      }
    }
    const int64_t rows = chunk->rows;
    if (rows == 0) continue;
    if (dx) {
      const C* packed = w_ih;
      for (const Panel& p : in_panels) {
        tile_gemm(rows, p.count, width, dz, ldz, packed, p.padded, dx + chunk->row * in + p.begin, in, false);
        packed += width * p.padded;
      }
    }
    if (need_dw) {
      const int64_t depth = round_up(rows, kPair<C>);
      C *of_state = operand + in * ldr, *of_y = of_state + state * ldr;
      transposed_operand((const T*)layer.x + chunk->row * layer.ldx, layer.ldx, rows, in, operand, ldr);
      transposed_operand(h_previous, sp, rows, state, of_state, ldr);
      const C* at_gates = rows_operand(dz, ldz, rows, 4 * block, dz_pairs);
      gemm_columns(in, width, depth, operand, ldr, at_gates, ldz, dw, ldw, add);
      float* dw_hh = dw + in * ldw;
      gemm_columns(state, split * block, depth, of_state, ldr, at_gates, ldz, dw_hh, ldw, add);
      if (split < gates) {
        gemm_columns(state, block, depth, of_state, ldr, at_gates + 3 * block * kPair<C>, ldz, dw_hh + split * block,
                     ldw, add);
      }
      if (projects) {
        transposed_operand(dy_rows, sp, rows, state, of_y, ldr);
        gemm_columns(state, hidden, depth, of_y, ldr, rows_operand(h_rows, hp, rows, hidden, h_pairs), hp, dw_hr, hp, add);
      }
      add = true;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < 4 * block; j += kLanes) store(db + j, load(db + j) + load(dz + r * ldz + j));
      }
    }
  }

  if (grads.dh0) {
    copy_rows(dh, sp, (T*)grads.dh0 + first * state, state, batch, state);
    if (grads.dc0) copy_rows(dc, hp, (T*)grads.dc0 + first * hidden, hidden, batch, hidden);
  }
  if (!need_dw || !add) return;
  const std::vector<void*>& out = grads.dw[d];
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t b = 0; b < layer.in_blocks; ++b) {
      transpose_rows(dw + b * part * ldw + g * block, ldw, part, hidden,
                     (T*)out[0] + g * full * layer.full_in + b * full_part, layer.full_in);
    }
    transpose_rows(dw + in * ldw + g * block, ldw, state, hidden, (T*)out[1] + g * full * layer.full_state,
                   layer.full_state);
    if (out.size() >= 4) {
      copy_rows(db + g * block, 0, (T*)out[2] + g * full, 0, 1, hidden);
      copy_rows(db + (g < split ? g : 3) * block, 0, (T*)out[3] + g * full, 0, 1, hidden);
    }
  }
  if (projects) copy_rows(dw_hr, hp, (T*)out.back(), full, state, hidden);
}
