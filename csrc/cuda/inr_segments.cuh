// The segments of inr_weights' backward, on the device and on the host: see SkInrRun.
#pragma once

#include "launch.cuh"
#include "launchers.h"

namespace slimkernels {

constexpr int kInrSegmentRows = 1024;      // coordinates whose gradients one block sums
constexpr int kInrSegmentTableRows = 256;  // rows of tables, likewise

struct InrSegment {
  int64_t mlp, first, count;

  __host__ __device__ __forceinline__ InrSegment(const SkInrRun* runs, int64_t run_count, int64_t segment, int64_t size) {
    int64_t low = 0, high = run_count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (runs[middle].segment <= segment) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t at = (segment - runs[low].segment) * size, left = runs[low].count - at;
    mlp = runs[low].mlp, first = runs[low].first + at, count = left < size ? left : size;
  }
};

}  // namespace slimkernels
