#include "slim_conv_transpose_patches.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "gemm.h"

namespace slimkernels {
namespace {

// Images with their channels side by side. A patch has kernel_height rows, each of `run` neighbours in y.
struct PatchSizes {
  int64_t images, height, width, in;
  int64_t out_height, out_width, out;
  int64_t kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
  bool apart;  // each number of y belongs to one patch

  int64_t pixels() const { return images * height * width; }
  int64_t run() const { return kernel_width * out; }
  int64_t columns() const { return kernel_height * run(); }  // of the weight as a matrix with `in` rows
  int64_t row() const { return out_width * out; }
};

}  // namespace
}  // namespace slimkernels

#define SK_INL "slim_conv_transpose_patches-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

int64_t out_size(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g, int64_t d) {
  return (x.size(d + 2) - 1) * g.stride[d] - 2 * g.padding[d] + weight.size(d + 2) + g.output_padding[d];
}

PatchSizes sizes_of(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels, const ConvGeometry& g) {
  PatchSizes s{x.size(0),
               x.size(2),
               x.size(3),
               x.size(1),
               out_size(x, weight, g, 0),
               out_size(x, weight, g, 1),
               out_channels,
               weight.size(2),
               weight.size(3),
               g.stride[0],
               g.stride[1],
               g.padding[0],
               g.padding[1],
               false};
  s.apart = s.kernel_height == s.stride_height && s.kernel_width == s.stride_width && s.pad_height == 0 &&
            s.pad_width == 0 && g.output_padding[0] == 0 && g.output_padding[1] == 0;
  return s;
}

// The active slice as a matrix (in, kernel, out), a copy unless it lies so.
at::Tensor weight_matrix(const at::Tensor& weight, const PatchSizes& s) {
  return weight.narrow(0, 0, s.in).narrow(1, 0, s.out).permute({0, 2, 3, 1}).contiguous();
}

at::Tensor with_pixels(const at::Tensor& t) { return t.permute({0, 2, 3, 1}).contiguous(); }

at::Tensor images_like(const at::Tensor& x, at::IntArrayRef sizes) {
  return at::empty(sizes, x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// bfloat16 is multiplied as it is where the CPU can.
template <typename T, typename Call>
void with_multiplied_type(Call call) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (gemm_takes_bf16()) return call(c10::BFloat16());
  }
  call(float());
}

}  // namespace

bool patches_take(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels, const ConvGeometry& g,
                  bool backward) {
  if (current_isa() != Isa::kAvx512 || x.dim() != 4 || x.numel() == 0 || out_channels < 1 || g.groups != 1)
    return false;
  for (int64_t d = 0; d < 2; ++d) {
    if (g.dilation[d] != 1 || g.output_padding[d] >= g.stride[d] || out_size(x, weight, g, d) < 1) return false;
  }
  if (conv_format(x, weight) != at::MemoryFormat::ChannelsLast) return false;
  const PatchSizes s = sizes_of(x, weight, out_channels, g);
  const int64_t image = s.height * s.width;
  if (backward) {
    // Short runs cost as much to gather as long ones; in float32 oneDNN is the faster then.
    return s.apart || image == 1 || x.scalar_type() != at::kFloat || s.run() >= 16;
  }
  // oneDNN fills its vectors and blocks from 16 channels and long rows on. It adds in registers what overlaps, which
  // here goes through memory: worth it for small images and for kernels so large that oneDNN's are slow.
  if (s.out < 16 && s.stride_height * s.stride_width > 1) return true;
  if (s.apart) return s.width < 64;
  const bool small = image <= 64 && s.stride_height * s.stride_width > 1;
  return image == 1 ||
         ((small || s.kernel_height * s.kernel_width >= 64) && (s.images > 1 || at::get_num_threads() == 1));
}

at::Tensor patches_conv_transpose(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                                  int64_t out_channels, const ConvGeometry& geometry, Activation activation,
                                  const MaybeTensor& residual) {
  const PatchSizes s = sizes_of(x, weight, out_channels, geometry);
  const at::Tensor in = with_pixels(x), w = weight_matrix(weight, s);
  at::Tensor y = images_like(x, {s.images, s.out, s.out_height, s.out_width});
  std::vector<float> bias_row(s.row());
  if (bias) {
    const at::Tensor values = bias->narrow(0, 0, s.out).to(at::kFloat).contiguous();
    for (int64_t i = 0; i < s.out_width; ++i) {
      std::copy_n(values.const_data_ptr<float>(), s.out, bias_row.data() + i * s.out);
    }
  }
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_transpose", SK_CASES_F32_BF16_F16([&] {
                       with_multiplied_type<scalar_t>([&]<typename C>(C) {
                         SK_CALL_ISA(patches_kernel<C>, s, in.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                                     bias_row.data(), y.data_ptr<scalar_t>());
                       });
                     }));
  add_activate(y, residual, activation);
  return y;
}

ThreeTensors patches_conv_transpose_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                             int64_t full_bias, const ConvGeometry& geometry, bool need_dx,
                                             bool need_dw, bool need_db) {
  const PatchSizes s = sizes_of(x, weight, dy.size(1), geometry);
  const at::Tensor grad = with_pixels(dy), in = with_pixels(x), nothing = at::empty({0}, dy.options());
  const at::Tensor w = need_dx ? weight_matrix(weight, s) : nothing;
  at::Tensor dx = need_dx ? images_like(x, x.sizes()) : nothing, dw = nothing, db = nothing;
  at::Tensor sums = need_dw ? at::empty({s.in, s.columns()}, x.options().dtype(at::kFloat)) : nothing;
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_transpose_backward", SK_CASES_F32_BF16_F16([&] {
                       with_multiplied_type<scalar_t>([&]<typename C>(C) {
                         SK_CALL_ISA(patches_backward_kernel<C>, s, grad.const_data_ptr<scalar_t>(),
                                     in.const_data_ptr<scalar_t>(), need_dx ? w.const_data_ptr<scalar_t>() : nullptr,
                                     need_dx ? dx.data_ptr<scalar_t>() : nullptr,
                                     need_dw ? sums.data_ptr<float>() : nullptr);
                       });
                     }));
  if (need_dw) {
    const at::Tensor part = sums.to(x.scalar_type()).view({s.in, s.kernel_height, s.kernel_width, s.out});
    dw = sized_gradient(part.permute({0, 3, 1, 2}), weight, GradientSize::kFull);
  }
  if (need_db) {
    at::Tensor totals = at::empty({s.out}, dy.options().dtype(at::kFloat));
    AT_DISPATCH_SWITCH(dy.scalar_type(), "slim_conv_transpose_backward", SK_CASES_F32_BF16_F16([&] {
                         SK_CALL_ISA(patches_bias_kernel, grad.const_data_ptr<scalar_t>(), s.images * s.out_height,
                                     s.row(), s.out, totals.data_ptr<float>());
                       }));
    db = sized_bias_gradient(totals.to(dy.scalar_type()), s.out, full_bias, dy.scalar_type(), GradientSize::kFull);
  }
  return {dx, dw, db};
}

}  // namespace slimkernels
