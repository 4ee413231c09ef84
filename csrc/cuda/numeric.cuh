// Storage types, 16-byte vectors and the activations. Everything is computed in float.
#pragma once

#include <math.h>

#include "launch.cuh"

namespace slimkernels {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

template <typename T>
struct Lanes {
  static constexpr int value = 16 / sizeof(T);  // numbers in 16 bytes
};

// V numbers at `p`; V is 1 or fills 16 bytes, and then `p` is 16-byte aligned.
template <typename T, int V>
__device__ __forceinline__ void load(const T* p, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = to_float(*p);
  } else {
    static_assert(V * sizeof(T) == 16, "a vector is 16 bytes");
    union {
      uint4 bits;
      T numbers[V];
    } u = {*reinterpret_cast<const uint4*>(p)};
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = to_float(u.numbers[i]);
  }
}

template <typename T, int V>
__device__ __forceinline__ void store(T* p, const float (&x)[V]) {
  if constexpr (V == 1) {
    *p = from_float<T>(x[0]);
  } else {
    static_assert(V * sizeof(T) == 16, "a vector is 16 bytes");
    union U {
      uint4 bits;
      T numbers[V];
      __device__ U() : bits() {}
    } u;
#pragma unroll
    for (int i = 0; i < V; ++i) u.numbers[i] = from_float<T>(x[i]);
    *reinterpret_cast<uint4*>(p) = u.bits;
  }
}

// In the order of ACTIVATIONS in slimkernels/ops/_common.py.
enum Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kElu, kRelu6, kHardswish, kTanh, kSigmoid };

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float gelu_tanh_inner(float x) { return 0.7978845608028654f * (x + 0.044715f * x * x * x); }

__device__ __forceinline__ float activate(float x, int activation) {
  switch (activation) {
    case kRelu:
      return x > 0.0f || x != x ? x : 0.0f;
    case kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(gelu_tanh_inner(x)));
    case kSilu:
      return x * sigmoid(x);
    case kElu:
      return x > 0.0f ? x : expm1f(x);
    case kRelu6:
      return x != x ? x : fminf(fmaxf(x, 0.0f), 6.0f);
    case kHardswish:
      return x * fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) / 6.0f;
    case kTanh:
      return tanhf(x);
    case kSigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

// The switch once for all numbers, not a switch a number.
template <int N>
__device__ __forceinline__ void activate_all(float (&x)[N], int activation) {
#define SK_CASE(kind)                                                          \
  case kind:                                                                   \
    _Pragma("unroll") for (int i = 0; i < N; ++i) x[i] = activate(x[i], kind); \
    break;
  switch (activation) {
    SK_CASE(kRelu)
    SK_CASE(kGelu)
    SK_CASE(kGeluTanh)
    SK_CASE(kSilu)
    SK_CASE(kElu)
    SK_CASE(kRelu6)
    SK_CASE(kHardswish)
    SK_CASE(kTanh)
    SK_CASE(kSigmoid)
    default:
      break;
  }
#undef SK_CASE
}

// The derivative at the input, from what `keeps_output` says is kept: the activation's output or its input.
__device__ __forceinline__ bool keeps_output(int activation) {
  return !(activation == kGelu || activation == kGeluTanh || activation == kSilu || activation == kHardswish);
}

__device__ __forceinline__ float activation_derivative(float kept, int activation) {
  switch (activation) {
    case kRelu:
      return kept > 0.0f ? 1.0f : 0.0f;
    case kGelu:
      return 0.5f * (1.0f + erff(kept * 0.7071067811865476f)) + kept * 0.3989422804014327f * expf(-0.5f * kept * kept);
    case kGeluTanh: {
      const float t = tanhf(gelu_tanh_inner(kept));
      return 0.5f * (1.0f + t) +
             0.5f * kept * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * kept * kept);
    }
    case kSilu: {
      const float s = sigmoid(kept);
      return s * (1.0f + kept * (1.0f - s));
    }
    case kElu:
      return kept > 0.0f ? 1.0f : kept + 1.0f;
    case kRelu6:
      return kept > 0.0f && kept < 6.0f ? 1.0f : 0.0f;
    case kHardswish:
      return kept <= -3.0f ? 0.0f : kept >= 3.0f ? 1.0f : (2.0f * kept + 3.0f) / 6.0f;
    case kTanh:
      return 1.0f - kept * kept;
    case kSigmoid:
      return kept * (1.0f - kept);
    default:
      return 1.0f;
  }
}

}  // namespace slimkernels
