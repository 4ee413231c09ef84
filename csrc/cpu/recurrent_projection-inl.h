// The product with w_hr that follows each step of a layer with projection (see recurrent-inl.h).

template <typename T, typename C>
class Projection {
 public:
  C* h;         // (rows, ldh): what the gates give
  int64_t ldh;  // 0 without projection

  // For at most `rows` rows a step; `dot`: w_hr is read where it lies.
  Projection(Arena& arena, Arena& fixed, const RecurrentLayer& layer, int64_t d, int64_t rows, bool dot)
      : ldh(layer.projects() ? round_up(layer.hidden, 16) : 0),
        w_((const T*)layer.weights[d].w_hr),
        ld_(layer.weights[d].ld_hr),
        depth_(layer.hidden),
        count_(layer.state),
        dot_(dot) {
    if (!ldh) return;
    panels_ = panels_of(count_);
    const int64_t width = round_up(count_, 16);
    arena.ask(h, rows * ldh);
    fixed.ask(packed_, dot ? 0 : width * round_up(depth_, kPair<C>));
    arena.ask(tile_, rows * (dot ? width : 64));
  }

  void pack() {
    if (!ldh || dot_) return;
    for (const Panel& p : panels_) pack_gates(w_, ld_, 1, 0, p, 1, depth_, depth_, panel(p));
  }

  // y and the next state (n, p) = h w_hr^T.
  void run(int64_t n, T* y, int64_t ldy, C* state, int64_t ld_state) const {
    if constexpr (std::is_same_v<C, float>) {
      if (dot_) {
        const int64_t width = round_up(count_, 16);
        dot_rows(w_, ld_, count_, h, ldh, n, depth_, tile_, width, false);
        return give(tile_, width, n, count_, y, ldy, state, ld_state);
      }
    }
    for (const Panel& p : panels_) {
      tile_gemm(n, p.padded, round_up(depth_, kPair<C>), h, ldh, panel(p), p.padded, tile_, p.padded, false);
      give(tile_, p.padded, n, p.count, y + p.begin, ldy, state + p.begin, ld_state);
    }
  }

 private:
  C* panel(const Panel& p) const { return packed_ + p.begin * round_up(depth_, kPair<C>); }

  static void give(const float* sums, int64_t ld, int64_t n, int64_t cols, T* y, int64_t ldy, C* state,
                   int64_t ld_state) {
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        const vf v = load_upto(sums + m * ld + j, cols - j);
        store_some(y + m * ldy + j, v, cols - j);
        store_some(state + m * ld_state + j, rounded<T>(v), cols - j);
      }
    }
  }

  const T* w_;
  int64_t ld_, depth_, count_;
  bool dot_;
  std::vector<Panel> panels_;
  C* packed_;
  float* tile_;
};
