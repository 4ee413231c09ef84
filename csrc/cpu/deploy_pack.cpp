#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

#include <tuple>
#include <utility>

#include "deploy.h"

namespace slimkernels::deploy {
namespace {

int64_t lanes_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? bfloat16_kernels()->lanes : float_kernels().lanes;
}

constexpr int64_t kNarrow = 4;  // outputs, or twice as many

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

at::Tensor padded_bias(const std::optional<at::Tensor>& bias, int64_t out, int64_t lanes) {
  at::Tensor padded = at::zeros({up(out, lanes)}, at::kFloat);
  if (bias.has_value()) padded.narrow(0, 0, out).copy_(*bias);
  return padded;
}

// (taps, in, out) to (taps, vectors of out, in in units, lanes, pair); `in` even where units are pairs.
at::Tensor by_vectors(const at::Tensor& weight, int64_t lanes, at::ScalarType dtype) {
  const int64_t out = weight.size(2), pair = dtype == at::kBFloat16 ? 2 : 1;
  at::Tensor wide = at::constant_pad_nd(weight, {0, up(out, lanes) - out, 0, up(weight.size(1), pair) - weight.size(1)});
  wide = wide.reshape({wide.size(0), wide.size(1) / pair, pair, wide.size(2) / lanes, lanes});
  return wide.permute({0, 3, 1, 4, 2}).to(dtype).contiguous();
}

// (kh, kw, in, lanes) and (lanes): the outputs again and again until the vector is full.
std::pair<at::Tensor, at::Tensor> pack_narrow(const at::Tensor& weight, const at::Tensor& bias, int64_t lanes) {
  const int64_t out = weight.size(0), times = lanes / out;
  if (times < 2) return {};
  return {weight.permute({2, 3, 1, 0}).repeat({1, 1, 1, times}).contiguous(), bias.narrow(0, 0, out).repeat({times})};
}

// Depthwise weights and bias in the order of a vector of bfloat16 whose rows were interleaved: within two vectors of channels the
// first has channels 0 to 3 of every 8, the second 4 to 7.
std::pair<at::Tensor, at::Tensor> pack_pairs(const at::Tensor& weight, const at::Tensor& bias, int64_t lanes) {
  const int64_t out = weight.size(0), kh = weight.size(2), kw = weight.size(3), more = up(out, 2 * lanes) - out;
  const int64_t blocks = (out + more) / (2 * lanes), rows = up(kh, 2) / 2, groups = lanes / 4;
  // (blocks, groups, half, 4, row pairs, pair, kw)
  at::Tensor w = at::constant_pad_nd(weight.reshape({out, kh, kw}), {0, 0, 0, up(kh, 2) - kh, 0, more});
  w = w.reshape({blocks, groups, 2, 4, rows, 2, kw}).permute({0, 4, 6, 2, 1, 3, 5}).to(at::kBFloat16).contiguous();
  const at::Tensor b = at::constant_pad_nd(bias, {0, more}).reshape({blocks, groups, 2, 4}).transpose(1, 2).contiguous();
  return {w, b};
}

}  // namespace

Weights pack_conv(const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> output_padding,
                  int64_t groups, bool transposed, at::ScalarType dtype, bool winograd, bool normed) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0, "deploy: expected a weight of 4 dimensions, got ",
                    weight.sizes());
  Weights w;
  w.stride = std::move(stride), w.padding = std::move(padding), w.dilation = std::move(dilation);
  w.output_padding = std::move(output_padding);
  w.groups = groups, w.transposed = transposed;
  w.kernel_h = weight.size(2), w.kernel_w = weight.size(3);
  w.out = transposed ? weight.size(1) * groups : weight.size(0);
  w.in = transposed ? weight.size(0) : weight.size(1) * groups;
  const int64_t lanes = lanes_of(dtype);
  w.bias = padded_bias(bias, w.out, lanes);
  const int64_t taps = w.kernel_h * w.kernel_w;
  bool separate = transposed && groups == 1;  // every tap is a 1x1 convolution of its own
  for (int i = 0; i < 2; ++i) {
    separate &= w.stride[i] == weight.size(2 + i) && !w.padding[i] && !w.output_padding[i] && w.dilation[i] == 1;
  }
  const at::Tensor values = weight.to(at::kFloat);
  if (dtype == at::kBFloat16 && groups == 1 && !transposed && w.in % 2) {
    w.stem = by_vectors(values.permute({2, 3, 1, 0}).reshape({w.kernel_h, w.kernel_w * w.in, w.out}), lanes, dtype);
    w.stem = w.stem.transpose(0, 1).contiguous();
  }
  if (!transposed && groups == 1) {
    // The depth of a vector of outputs is the taps one after the other.
    const at::Tensor packed = by_vectors(values.permute({2, 3, 1, 0}).reshape({taps, w.in, w.out}), lanes, dtype);
    w.packed = packed.transpose(0, 1).contiguous();
    if (w.out == kNarrow || w.out == 2 * kNarrow) std::tie(w.narrow, w.narrow_bias) = pack_narrow(values, w.bias, lanes);
    const bool one_step = w.stride[0] == 1 && w.stride[1] == 1 && w.dilation[0] == 1 && w.dilation[1] == 1;
    if (winograd && w.kernel_h == 3 && w.kernel_w == 3 && one_step)
      w.winograd_side = winograd_side(weight, dtype, normed);
    if (w.winograd_side) w.winograd = pack_winograd(weight, w.winograd_side, lanes, dtype);
  } else if (separate) {
    w.packed = by_vectors(values.permute({2, 3, 0, 1}).reshape({taps, w.in, w.out}), lanes, dtype);
  } else if (!transposed && groups == w.in && groups == w.out) {
    const at::Tensor wide = at::constant_pad_nd(values.reshape({w.out, taps}), {0, 0, 0, up(w.out, lanes) - w.out});
    w.packed = wide.reshape({wide.size(0) / lanes, lanes, taps}).transpose(1, 2).contiguous();
    if (dtype == at::kBFloat16) std::tie(w.pairs, w.pair_bias) = pack_pairs(values, w.bias.narrow(0, 0, w.out), lanes);
  }
  const bool odd = dtype == at::kBFloat16 && w.in % 2 && groups == 1;
  if (!w.packed.defined() || odd) {
    w.weight = weight.to(dtype).contiguous(at::MemoryFormat::ChannelsLast);
    if (bias.has_value()) w.full_bias = bias->to(dtype);
  }
  return w;
}

Weights pack_affine(const at::Tensor& scale, const at::Tensor& shift) {
  Weights w;
  w.out = w.in = scale.size(0);
  w.packed = padded_bias(scale, w.out, 16);
  w.bias = padded_bias(shift, w.out, 16);
  return w;
}

int64_t Bound::bytes() const {
  int64_t total = 0;
  for (const Weights& w : weights) {
    for (const at::Tensor& t : {w.packed, w.bias, w.winograd, w.narrow, w.narrow_bias, w.pairs, w.pair_bias, w.stem, w.weight, w.full_bias}) total += t.defined() ? t.nbytes() : 0;
  }
  return total;
}

}  // namespace slimkernels::deploy
