// Which convolutions run by Winograd's algorithm, and their weights.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>

#include "deploy_plan.h"

namespace slimkernels::deploy {
namespace {

constexpr int64_t kLeastChannels = 16;
constexpr int64_t kMostNumbers = 256 * 256;  // channels in by out up to which F(3x3, 3x3) runs in bfloat16
constexpr int64_t kBlockBytes = 512 * 1024;  // of a block of tiles: their inputs and outputs stay in second-level cache
constexpr int64_t kFetchWeightBytes = 48 * 1024;       // weights from which on the next panel's are asked for ahead
constexpr int64_t kFewRegisters = 24;                  // of a vector of outputs, 6 positions and 4 tiles
constexpr double kFewCycles = 160;                     // for one input and vector of outputs
constexpr int64_t kLeastBlock = 56, kMostBlock = 112;  // tiles; fewer would read the weights too often

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

// In bfloat16 what is multiplied is rounded after the transform. Measured over PyTorch's error of convolution, norm and
// activation (it rounds after each), 16 to 256 channels: direct 0.7, F(2x2) 1.1 to 1.2, F(3x3) 1.55 to 1.6, F(4x4) 2.8
// to 3. Without a norm it is 1.0, 1.5 to 1.6, 2.2 to 2.3 and 4 (and for a norm as it is made, which changes nothing and
// rounds nothing). So F(3x3) runs where a norm was folded, and where its 25 numbers of weights for 16 take no longer to
// read than it saves. Whole networks, ResNet-20 and ResNet-50 with norms as they are made and with others: 0.7 to 1.1
// of PyTorch's error, as with direct convolutions.
int64_t winograd_side(const at::Tensor& weight, at::ScalarType dtype, bool normed) {
  const int64_t out = weight.size(0), in = weight.size(1);
  if (out < kLeastChannels || in < kLeastChannels) return 0;
  if (dtype != at::kBFloat16) return 4;
  if (in % 2) return 0;
  return normed && in * out <= kMostNumbers ? 3 : 2;
}

at::Tensor pack_winograd(const at::Tensor& weight, int64_t side, int64_t lanes, at::ScalarType dtype) {
  const int64_t out = weight.size(0), in = weight.size(1), pair = dtype == at::kBFloat16 ? 2 : 1;
  const double a = std::sqrt(0.5), b = std::sqrt(2.0), p = kSmallPointP, q = kSmallPointQ;
  const double at_p = 1 / (2 * p * (p * p - q * q)), at_q = 1 / (2 * q * (q * q - p * p));
  std::vector<double> rows{1,       0,      0,         -1 / 1.5, -a / 1.5, -0.5 / 1.5, -1 / 1.5, a / 1.5, -0.5 / 1.5,
                           1 / 6.0, b / 6., 2.0 / 6.0, 1 / 6.0,  -b / 6.0, 2.0 / 6.0,  0,        0,       1};
  if (side == 3) {
    rows = {at_p,  p * at_p, p * p * at_p,
            -at_p, p * at_p, -p * p * at_p,
            at_q,  q * at_q, q * q * at_q,
            -at_q, q * at_q, -q * q * at_q,
            0,     0,        1};
  }
  if (side == 2) rows = {1, 0, 0, 0.5, 0.5, 0.5, 0.5, -0.5, 0.5, 0, 0, 1};
  const at::Tensor g = at::tensor(rows, at::kDouble).reshape({-1, 3});
  const int64_t matrices = g.size(0) * g.size(0);
  // (matrices, in, out) to (matrices, vectors of out, in units, lanes, pair)
  at::Tensor u = at::einsum("pk,oikl,ql->pqio", {g, weight.to(at::kDouble), g}).reshape({matrices, in, out});
  u = at::constant_pad_nd(u, {0, up(out, lanes) - out})
          .reshape({matrices, in / pair, pair, up(out, lanes) / lanes, lanes});
  return u.permute({0, 3, 1, 4, 2}).to(dtype).contiguous();
}

// Cycles by what was measured on Zen 5: 32 products (of pairs) a cycle, about 110 and 90 cycles for a vector of
// channels to be brought into the 36 matrices and back (60 and 50 for 25, 45 and 35 for 16), and 6 bytes of weights a
// cycle in float, which are too many for any near cache, 10 in bfloat16. Few tiles take as long for 1 to 4 of them, and
// read no more weights than the direct form.
WinogradForm Planner::pick_winograd(int64_t side, int64_t tiles, int64_t pixels, int64_t in, int64_t out) const {
  const int64_t lanes = bound.kernels->lanes, in_vectors = up(in, lanes) / lanes, out_vectors = up(out, lanes) / lanes;
  const bool small = side < 4;
  const double products = static_cast<double>(in * out_vectors) / 2 / (small ? 2 : 1),
               matrices = static_cast<double>((side + 2) * (side + 2));
  const double direct = static_cast<double>(pixels) * 9 * products;
  const double blocks = std::max<double>(1, static_cast<double>(tiles) / kLeastBlock);
  const double weights = matrices * static_cast<double>(bound.element * in * out_vectors * lanes) * blocks;
  const double scatter = side == 4 ? 110 : side == 3 ? 60 : 45, gather = side == 4 ? 90 : side == 3 ? 50 : 35;
  const double moved = static_cast<double>(tiles) *
                       (scatter * static_cast<double>(in_vectors) + gather * static_cast<double>(out_vectors));
  const double work = static_cast<double>(tiles) * matrices * products + moved;
  const double whole = std::max(work, small ? weights / 10 + work / 8 : weights / 6 + work / 4);
  const bool registers = !small && bound.kernels->tile_registers >= kFewRegisters;
  const double few = registers ? static_cast<double>((tiles + 3) / 4) * kFewCycles * 2 * products + moved : 2 * direct;
  if (std::min(whole, few) >= 0.85 * direct) return WinogradForm::kNone;
  return few < whole ? WinogradForm::kFew : WinogradForm::kWhole;
}

bool Planner::winograd(int index) {
  const Step& step = program.steps[index];
  const Weights& w = bound.weights[index];
  const int from = step.inputs[0];
  const Value &x = plan.values[from], &y = plan.values[step.output];
  if (!w.winograd.defined()) return false;
  const int64_t side = w.winograd_side, matrices = (side + 2) * (side + 2), lanes = bound.kernels->lanes;
  const int64_t tiles = x.n * (up(y.h, side) / side) * (up(y.w, side) / side);
  const WinogradForm form = pick_winograd(side, tiles, y.n * y.h * y.w, x.c, y.c);
  if (form == WinogradForm::kNone) return false;
  WinogradJob job{};
  job.images = x.n, job.out_h = y.h, job.out_w = y.w, job.in_c = x.c, job.out_c = y.c, job.side = side;
  job.x = plane(from), job.y = plane(step.output);
  if (step.residual >= 0) job.residual = plane(step.residual);
  job.weight = static_cast<const char*>(w.winograd.const_data_ptr());
  job.epilogue = {step.activation, w.bias.const_data_ptr<float>()};
  const int64_t in = up(x.c, lanes), out = up(y.c, lanes);
  const int64_t shift = first_pixel(from) - (w.padding[0] * job.x.row + w.padding[1] * job.x.pixel) * bound.element;
  const auto add = [&](const std::string& says) {
    plan.scratch_bytes = std::max(plan.scratch_bytes, job.slots * job.slot_bytes);
    plan.actions.push_back({Runs::kWinograd, static_cast<int>(plan.winograds.size()), from, step.residual, step.output,
                            shift, first_pixel(step.output), index});
    plan.winograds.push_back(job);
    plan.descriptions[index] = says + ", depth " + std::to_string(x.c);
  };
  if (form == WinogradForm::kFew) {
    job.few = true, job.slots = 1, job.slot_bytes = up(tiles, 4) * matrices * in * 4;
    job.weight = static_cast<const char*>(w.packed.const_data_ptr());
    job.fetch_weights = 9 * x.c * out * bound.element > kBlockBytes;
    add("Winograd F(4x4, 3x3), " + std::to_string(tiles) + " tiles, weights transformed as they are read");
    return true;
  }
  const int64_t tile_bytes = matrices * (in * bound.element + out * 4);
  const int64_t block = std::clamp<int64_t>(kBlockBytes / tile_bytes, kLeastBlock, kMostBlock);
  const int64_t weight_bytes = matrices * x.c * out * bound.element;
  job.fetch_weights = weight_bytes > kFetchWeightBytes;
  const int64_t blocks = (tiles + block - 1) / block;
  job.block = (tiles + blocks - 1) / blocks;
  std::tie(job.vectors, job.tile) = pick_tile(*bound.kernels, job.block, out / lanes, x.c * bound.element / 4);
  // A line more than a multiple of the page size, so that the matrices do not share their places in the cache.
  job.v_position = job.block * in + 16, job.m_position = job.block * out + 16;
  job.slot_bytes = matrices * (job.v_position * bound.element + job.m_position * 4);
  job.slots = std::min<int64_t>(blocks, at::get_num_threads());
  const std::string tile = std::to_string(side) + "x" + std::to_string(side);
  add("Winograd F(" + tile + ", 3x3), " + std::to_string(job.block) + " tiles at a time");
  return true;
}

}  // namespace slimkernels::deploy
