// The part of the CUDA language that our kernels use, for g++: see fibers.h for how blocks run.
#pragma once

#include <cmath>

#include "fibers.h"

#define SK_EMULATED 1
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (::emulator::self->index)
#define blockIdx (::emulator::current->index)
#define blockDim (::emulator::current->block)
#define gridDim (::emulator::current->grid)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline cudaError_t cudaGetLastError() { return emulator::last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

#define EMULATOR_HERE (::emulator::Place{__FILE__, __LINE__})
#define EMULATOR_LANE (::emulator::self->linear & 31)
#define __syncthreads() ::emulator::barrier(EMULATOR_HERE)
#define __syncwarp() ((void)::emulator::exchange(~0u, nullptr, 0, EMULATOR_HERE))

namespace emulator {

template <typename T>
T shuffled(unsigned mask, T value, unsigned lane, Place place) {
  const auto seen = exchange(mask, &value, sizeof value, place);
  std::memcpy(&value, seen[lane & 31], sizeof value);
  return value;
}

}  // namespace emulator

#define __shfl_sync(mask, value, lane) ::emulator::shuffled(mask, value, lane, EMULATOR_HERE)
#define __shfl_xor_sync(mask, value, bits) ::emulator::shuffled(mask, value, EMULATOR_LANE ^ (bits), EMULATOR_HERE)
#define __shfl_down_sync(mask, value, by) \
  ::emulator::shuffled(mask, value, EMULATOR_LANE + (by) > 31 ? EMULATOR_LANE : EMULATOR_LANE + (by), EMULATOR_HERE)

inline float sinpif(float x) { return float(std::sin(M_PI * std::remainder(double(x), 2.0))); }
inline float cospif(float x) { return float(std::cos(M_PI * std::remainder(double(x), 2.0))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Storage and conversions, rounded to the nearest even; arithmetic goes through float.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned u = __float_as_uint(x);
  return {x != x ? uint16_t(0x7FFF) : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __half __float2half(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  __half out;
  std::memcpy(&out, &h, 2);
  return out;
}
inline float __half2float(__half x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return static_cast<float>(h);
}

// For the test that loads the library: the words of the last error, or an empty string, and forgets it.
extern "C" inline __attribute__((used)) const char* emulator_take_error() {
  static std::string told;
  told.swap(emulator::last_error);
  emulator::last_error.clear();
  return told.c_str();
}
extern "C" inline __attribute__((used)) void emulator_set_schedule(int schedule) { emulator::schedule = schedule; }
