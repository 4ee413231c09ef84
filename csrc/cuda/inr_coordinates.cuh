// Coordinates of inr_weights: which a tile has, their values and encodings, and where their outputs go.
#pragma once

#include "launchers.h"
#include "numeric.cuh"

namespace slimkernels {

constexpr int kInrAxes = 6;
constexpr int kInrTileBytes = 256;  // of shared memory for InrTile: in registers it would leave too few
enum InrNoise { kNoiseNone, kNoiseAxis, kNoiseElement };

__device__ __forceinline__ uint32_t inr_mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The offset of coordinate `index` on an axis: the numbers of the reference's noise_offsets.
__device__ __forceinline__ float inr_offset(const SkInr& call, int64_t sample, int64_t tensor, int axis,
                                            int64_t index) {
  if (call.noise == kNoiseNone) return 0.0f;
  const uint64_t seed = uint64_t(call.seed ? *call.seed : call.seed_value);
  uint32_t key = inr_mix(inr_mix(uint32_t(seed)) ^ uint32_t(seed >> 32));
  key = inr_mix(key + uint32_t(sample + call.first_sample));
  key = inr_mix(inr_mix(key + uint32_t(tensor)) + uint32_t(axis));
  const float u = float(inr_mix(inr_mix(uint32_t(index)) ^ key) >> 8) * 5.9604644775390625e-8f - 0.5f;
  return fminf(fmaxf(u, -call.limit), call.limit);
}

// The coordinate's value on an axis; `position` is the row, the column or 0, `index` numbers the offset.
__device__ __forceinline__ float inr_value(const SkInr& call, const SkInrJob& job, int64_t sample, int axis,
                                           int64_t position, int64_t index) {
  const int64_t raw = axis == 0 ? job.layer : axis == 3 ? job.layers : axis == 4 ? job.c_out : axis == 5 ? job.c_in : 0;
  const int64_t step = axis == 1 ? job.tile_out : axis == 2 ? job.tile_in : 1;
  const float divisor = axis == 0   ? float(job.layers)
                        : axis == 1 ? float(job.places_out)
                        : axis == 2 ? float(job.places_in)
                                    : call.norm;
  const float at = float(position) + float(raw) + inr_offset(call, sample, job.tensor, axis, index);
  return at * float(step) / divisor;
}

// Number t of an axis' encoding: v, then sin and cos of pi * 2^band * v.
__device__ __forceinline__ float inr_encode(float v, int t) {
  if (t == 0) return v;
  const float angle = v * float(1u << ((t - 1) / 2));  // exact
  return t % 2 ? sinpif(angle) : cospif(angle);
}

__host__ __device__ __forceinline__ int64_t inr_columns(const SkInrJob& job) {
  return (job.c_in + job.tile_in - 1) / job.tile_in;
}
__host__ __device__ __forceinline__ int64_t inr_rows(const SkInrJob& job) {
  return (job.c_out + job.tile_out - 1) / job.tile_out;
}

// What a tile of the call is: coordinates [first, points) of a job in one sample.
struct InrTile {
  SkInrJob job;
  int64_t sample, first, points, columns;

  // `per_sample`: the samples are tiles of their own (backward).
  __device__ __forceinline__ InrTile(const SkInr& call, int64_t tile, int rows, bool per_sample) {
    int64_t low = 0, high = call.job_count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (call.jobs[middle].tile_begin <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    job = call.jobs[low];
    const int64_t at = tile - job.tile_begin;
    sample = per_sample ? at / job.tiles : 0;
    first = (at - sample * job.tiles) * rows;
    columns = inr_columns(job);
    points = inr_rows(job) * columns;
  }

  static __device__ __forceinline__ const InrTile& in_shared(void* shared, const SkInr& call, int64_t tile, int rows,
                                                             bool per_sample) {
    static_assert(sizeof(InrTile) <= kInrTileBytes);
    InrTile* made = static_cast<InrTile*>(shared);
    if (threadIdx.x == 0) *made = InrTile(call, tile, rows, per_sample);
    __syncthreads();
    return *made;
  }
};

// Where number `k` of the coordinate's kernel patch goes: output and input channel and kernel element.
struct InrTarget {
  int64_t out, in, element;
  __device__ __forceinline__ InrTarget(const SkInrJob& job, int64_t columns, int64_t point, int k) {
    const int64_t row = point / columns, column = point - row * columns;
    const int patch = k / int(job.kernel);
    element = k - patch * job.kernel;
    out = row * job.tile_out + patch / job.tile_in, in = column * job.tile_in + patch % job.tile_in;
  }
  __device__ __forceinline__ bool inside(const SkInrJob& job) const { return out < job.c_out && in < job.c_in; }
  __device__ __forceinline__ int64_t offset(const SkInrJob& job) const {
    if (job.layout == 1) return (in * job.c_out + out) * job.kernel + element;
    if (job.layout == 2) return (out * job.kernel + element) * job.c_in + in;
    return (out * job.c_in + in) * job.kernel + element;
  }
};

__device__ __forceinline__ int inr_emitted(const SkInrJob& job) { return int(job.kernel * job.tile_out * job.tile_in); }
__device__ __forceinline__ int inr_first_output(const SkInr& call, const SkInrJob& job) {
  return (int(call.real_outputs) - inr_emitted(job)) / 2;  // a smaller kernel takes the middle
}

}  // namespace slimkernels
