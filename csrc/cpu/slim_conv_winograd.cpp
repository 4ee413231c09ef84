#include "slim_conv_winograd.h"

#include <algorithm>

#include "gemm.h"

#define SK_INL "slim_conv_winograd-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

constexpr int64_t kLeastChannels = 12;
constexpr int64_t kBlock = 56;  // tiles; fewer would read the weights too often, more would leave second-level cache
constexpr int64_t kVector = 16;

int64_t vectors_of(int64_t channels) { return (channels + kVector - 1) / kVector; }

}  // namespace

// Cycles by what was measured on Zen 5: 32 products a cycle, about 110 and 90 cycles for a vector of channels to be brought into
// the 36 matrices and back, 120 for a vector of weights, which are read from memory for every block.
bool winograd_pays(int64_t images, int64_t out_h, int64_t out_w, int64_t in, int64_t out) {
  if (std::min(in, out) < kLeastChannels) return false;
  const double tiles = static_cast<double>(images * ((out_h + 3) / 4) * ((out_w + 3) / 4));
  const double products = static_cast<double>(in * vectors_of(out)) / 2;
  const double direct = static_cast<double>(images * out_h * out_w) * 9 * products;
  const double transforms = 110.0 * static_cast<double>(vectors_of(in)) + 90.0 * static_cast<double>(vectors_of(out));
  const double weights = 36.0 * 4 * static_cast<double>(in * vectors_of(out) * kVector) * std::max(1.0, tiles / kBlock);
  const double work = tiles * (36 * products + transforms);
  const double total = std::max(work, weights / 6 + work / 4) + 120.0 * static_cast<double>(in * vectors_of(out));
  return total < 0.85 * direct;
}

void winograd_conv(const at::Tensor& in, const at::Tensor& weight, const WeightView& view, const float* bias, at::Tensor& y,
                   int64_t pad_top, int64_t pad_left) {
  WinogradConv conv{in.size(0), in.size(2), in.size(3), in.size(1), y.size(2), y.size(3), y.size(1), in.stride(0), in.stride(2),
                    in.stride(3), y.stride(0), y.stride(2), y.stride(3), pad_top, pad_left, 0};
  const int64_t tiles = conv.images * ((conv.out_h + 3) / 4) * ((conv.out_w + 3) / 4);
  const int64_t blocks = (tiles + kBlock - 1) / kBlock;
  conv.block = (tiles + blocks - 1) / blocks;
  SK_CALL_ISA(winograd_conv_kernel, conv, in.const_data_ptr<float>(), view, weight.const_data_ptr<float>(), bias,
              y.data_ptr<float>());
}

}  // namespace slimkernels
