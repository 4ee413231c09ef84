// What one call of inr_weights does: the networks, the jobs (a tensor at a width) and the tiles they are cut into.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "common.h"

namespace slimkernels {

constexpr int64_t kInrAxes = 6;
constexpr int64_t kInrTile = 84;  // coordinates evaluated together; their activations stay in second-level cache

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A 64-byte aligned array that is not initialised, from PyTorch's allocator: profiles of memory show it.
template <typename T>
class Buffer {
 public:
  void resize(int64_t size) {
    if (size <= size_) return;
    memory_.clear();
    memory_ = c10::GetAllocator(c10::DeviceType::CPU)->allocate(size * sizeof(T));
    size_ = size;
  }
  T* data() const { return static_cast<T*>(memory_.get()); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  c10::DataPtr memory_;
  int64_t size_ = 0;
};

enum class InrNoise { kNone, kAxis, kElement };

struct InrJob {
  int64_t tensor, mlp, layer, layers, kernel, tile_out, tile_in, layout, c_out, c_in;
  int64_t places_out, places_in;  // positions are divided by
  int64_t rows, cols, points, emitted,
      first_out;               // points = rows * cols; outputs [first_out, first_out + emitted) are used
  int64_t start, saved_start;  // first weight; first saved activation
  int64_t out_stride, in_stride, kernel_stride;  // of the result
  const float* base = nullptr;
  int64_t base_out = 0, base_in = 0;
  std::vector<int64_t> base_kernel;  // offset of each kernel element
  float scale = 1.0f;
};

struct InrPlan {
  int64_t mlps, hidden, padded, inputs, bands, depth, outputs, padded_out;
  int64_t samples, first_sample, seed;
  InrNoise noise;
  float limit, norm;
  bool neumeta, by_output;
  Activation activation;
  std::vector<InrJob> jobs;                  // sorted by network
  std::vector<int64_t> tile_begin;           // first tile of each job, and the number of tiles
  std::vector<int64_t> mlp_first, mlp_last;  // first and last tile of each network; -1 when unused
  const float *b_in, *b_hidden, *skip, *w_out, *b_out;
  const void *w_in, *w_hidden;  // float or BFloat16: what the kernel multiplies

  int64_t encoded() const { return 1 + 2 * bands; }  // numbers an axis
  int64_t column(int64_t axis, int64_t t) const {    // of w_in, for number t of an axis
    if (t == 0) return axis;
    const int64_t band = (t - 1) / 2, cosine = (t - 1) % 2;
    return kInrAxes + 2 * kInrAxes * band + (neumeta ? 2 * axis + cosine : axis + kInrAxes * cosine);
  }
};

// Gradients of one network in float32, padded like the packed weights.
struct InrGradients {
  int64_t mlp = -1;
  Buffer<float> w_in;      // (6, encoded, padded): transposed
  Buffer<float> b_in;      // (padded)
  Buffer<float> w_hidden;  // (depth, padded, padded); unused where `hidden` is the result itself
  float* hidden = nullptr;
  Buffer<float> b_hidden;  // (depth, padded)
  Buffer<float> w_out;     // (outputs, padded)
  Buffer<float> b_out;     // (padded_out)
  std::vector<double> skip;
};

// Where finished gradients go: contiguous, float or BFloat16 like the kernel's weights. Every network that has a tile
// is written.
struct InrGradientOutputs {
  void *w_in, *b_in, *w_hidden, *b_hidden, *skip, *w_out, *b_out;
};

// The passes over tiles [first, last) with products of bfloat16 pairs, null where the CPU has none (AVX512-BF16).
struct InrKernels {
  void (*forward)(const InrPlan&, float* weights, c10::BFloat16* saved, int64_t first, int64_t last);
  void (*backward)(const InrPlan&, const float* dy, const c10::BFloat16* saved, bool need_scale, int64_t first,
                   int64_t last, double* dscale, const InrGradientOutputs& out,
                   std::vector<std::unique_ptr<InrGradients>>& shared);
  void (*flush)(const InrPlan&, const InrGradients&, const InrGradientOutputs&);
};
const InrKernels* inr_bfloat16_kernels();

inline uint32_t inr_mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The offset of coordinate `index` on an axis, in [-0.5, 0.5): the same numbers as the reference's noise_offsets.
struct InrOffsets {
  uint32_t key;
  float limit;
  InrOffsets(int64_t seed, int64_t sample, int64_t tensor, int64_t axis, float clamp) : limit(clamp) {
    const auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    key = inr_mix(inr_mix(inr_mix(low) ^ high) + static_cast<uint32_t>(sample));
    key = inr_mix(inr_mix(key + static_cast<uint32_t>(tensor)) + static_cast<uint32_t>(axis));
  }
  float operator()(int64_t index) const {
    const uint32_t bits = inr_mix(inr_mix(static_cast<uint32_t>(index)) ^ key) >> 8;
    const float u = static_cast<float>(bits) * 0x1p-24f - 0.5f;
    return u < -limit ? -limit : u > limit ? limit : u;
  }
};

// The value of coordinate `position` (row, column or 0) on an axis.
inline float inr_value(const InrPlan& plan, const InrJob& job, int64_t axis, int64_t position, float offset) {
  const int64_t raw[] = {job.layer, 0, 0, job.layers, job.c_out, job.c_in};
  const int64_t step[] = {1, job.tile_out, job.tile_in, 1, 1, 1};
  const float divisor[] = {float(job.layers), float(job.places_out), float(job.places_in),
                           plan.norm,         plan.norm,             plan.norm};
  return (float(position) + float(raw[axis]) + offset) * float(step[axis]) / divisor[axis];
}

}  // namespace slimkernels
