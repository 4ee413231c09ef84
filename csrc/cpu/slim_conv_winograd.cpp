#include "slim_conv_winograd.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "gemm.h"

#define SK_INL "slim_conv_winograd-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

constexpr int64_t kLeastChannels = 12, kLeastGradientChannels = 8;
constexpr int64_t kNearBytes = 3 * 1024 * 1024;
constexpr double kMostSums =
    10e6;                       // bytes, 256 channels of both: 512 would take 38 MB, whose pages cost what is gained
constexpr int64_t kBlock = 56;  // tiles; fewer would read the weights too often, more would leave second-level cache
constexpr int64_t kVector = 16;

int64_t vectors_of(int64_t channels) { return (channels + kVector - 1) / kVector; }

}  // namespace

// Cycles by what was measured on Zen 5: 32 products a cycle, about 110 and 90 cycles for a vector of channels to be
// brought into the 36 matrices and back, 120 for a vector of weights, which are read from memory for every block.
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

// Likewise, against oneDNN, which pads the channels of both to whole vectors. Some of it is added once, some with each
// block; and what does not fit the caches comes slower by tiles than by rows: 32x32 images of 8 to 16 channels, 64 of
// them, took 1.0 to 1.4 times oneDNN's time, those of 16x16 and 8x8 .5 to .8.
bool winograd_gradient_pays(int64_t images, int64_t out_h, int64_t out_w, int64_t in, int64_t out) {
  if (std::min(in, out) < kLeastGradientChannels) return false;
  const double tiles = static_cast<double>(images * ((out_h + 3) / 4) * ((out_w + 3) / 4));
  const double in_vectors = static_cast<double>(vectors_of(in)), vectors = static_cast<double>(vectors_of(out));
  const double products = static_cast<double>(in) * vectors;
  if (products * 36 * kVector * sizeof(float) > kMostSums) return false;
  const double direct = static_cast<double>(images * out_h * out_w) * 4.5 * kVector * in_vectors * vectors;
  const bool far = images * out_h * out_w * (in + out) * static_cast<int64_t>(sizeof(float)) > kNearBytes;
  const double transforms = 110 * in_vectors + 70 * vectors + (far ? 400 * (in_vectors + vectors) : 0);
  return tiles * (18 * products + transforms) + products * (250 + 72 * tiles / kBlock) < 0.85 * direct;
}

namespace {

WinogradConv plan(const at::Tensor& in, const at::Tensor& out, int64_t pad_top, int64_t pad_left) {
  WinogradConv conv{
      in.size(0),   in.size(2),   in.size(3),    in.size(1),    out.size(2),   out.size(3), out.size(1), in.stride(0),
      in.stride(2), in.stride(3), out.stride(0), out.stride(2), out.stride(3), pad_top,     pad_left,    0};
  const int64_t tiles = conv.images * ((conv.out_h + 3) / 4) * ((conv.out_w + 3) / 4);
  const int64_t blocks = (tiles + kBlock - 1) / kBlock;
  conv.block = (tiles + blocks - 1) / blocks;
  return conv;
}

}  // namespace

void winograd_conv(const at::Tensor& in, const at::Tensor& weight, const WeightView& view, const float* bias,
                   at::Tensor& y, int64_t pad_top, int64_t pad_left) {
  SK_CALL_ISA(winograd_conv_kernel, plan(in, y, pad_top, pad_left), in.const_data_ptr<float>(), view,
              weight.const_data_ptr<float>(), bias, y.data_ptr<float>());
}

void winograd_gradient(const at::Tensor& dy, const at::Tensor& x, at::Tensor& dw, int64_t pad_top, int64_t pad_left) {
  SK_CALL_ISA(winograd_gradient_kernel, plan(x, dy, pad_top, pad_left), x.const_data_ptr<float>(),
              dy.const_data_ptr<float>(), dw.data_ptr<float>());
}

}  // namespace slimkernels
