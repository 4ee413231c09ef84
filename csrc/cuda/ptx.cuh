// The only place with inline PTX. Beside each piece stands a body for the CPU that computes exactly the same; sums of
// products are rounded once there, and in an order of its own on the GPU.
#pragma once

#include "launch.cuh"

namespace slimkernels {

// 16 bytes from global to shared memory, or zeros; they are there after cp_wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef SK_EMULATED
  ::emulator::copy_async(shared, global, 16, valid ? 16 : 0);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_commit() {
#ifdef SK_EMULATED
  ::emulator::copy_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most `kInFlight` of this thread's groups are under way.
template <int kInFlight>
__device__ __forceinline__ void cp_wait() {
#ifdef SK_EMULATED
  ::emulator::copy_wait(kInFlight);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kInFlight) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Lane l receives row l /
// 4, columns 2 * (l % 4) and the next, of each; with kTranspose column l / 4 and those rows.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef SK_EMULATED
  if (reinterpret_cast<uintptr_t>(row) % 16) ::emulator::fail("ldmatrix: misaligned row");
  const auto rows = ::emulator::exchange(~0u, &row, sizeof row, EMULATOR_HERE);
  const unsigned lane = EMULATOR_LANE, other = lane / 4, pair = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    uint16_t numbers[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = kTranspose ? pair + i : other, c = kTranspose ? other : pair + i;
      const uint16_t* at;
      memcpy(&at, rows[m * 8 + r], sizeof at);
      numbers[i] = at[c];
    }
    out[m] = numbers[0] | uint32_t(numbers[1]) << 16;
  }
  __syncwarp();
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// The nearest number with 10 bits of mantissa, halves away from zero.
__device__ __forceinline__ float round_to_tf32(float x) {
#ifdef SK_EMULATED
  return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xFFFFE000u);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#endif
}

#ifdef SK_EMULATED
// d (16 x 8) += a (16 x k) b (k x 8): lane l has rows l / 4 and l / 4 + 8 of a and d and column l / 4 of b;
// `number(register, i)` is number i of a register that holds `kPacked` of them.
template <int kPacked, typename Number>
inline void emulated_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Number number) {
  struct Post {
    uint32_t a[4], b[2];
  } post{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto seen = ::emulator::exchange(~0u, &post, sizeof post, EMULATOR_HERE);
  const unsigned lane = EMULATOR_LANE;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + e % 2;
    double sum = d[e];
    for (unsigned k = 0; k < 8 * kPacked; ++k) {
      const unsigned half = k / (4 * kPacked), owner = k / kPacked % 4, i = k % kPacked;
      Post from_a, from_b;
      memcpy(&from_a, seen[row * 4 + owner], sizeof from_a);
      memcpy(&from_b, seen[column * 4 + owner], sizeof from_b);
      sum += double(number(from_a.a[e / 2 + 2 * half], i)) * double(number(from_b.b[half], i));
    }
    d[e] = float(sum);
  }
}
#endif

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef SK_EMULATED
  emulated_mma<2>(d, a, b0, b1, [](uint32_t r, unsigned i) { return __uint_as_float(r >> (16 * i) << 16); });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef SK_EMULATED
  emulated_mma<2>(d, a, b0, b1, [](uint32_t r, unsigned i) { return __half2float(__half{uint16_t(r >> (16 * i))}); });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef SK_EMULATED
  emulated_mma<1>(d, a, b0, b1, [](uint32_t r, unsigned) { return __uint_as_float(r & 0xFFFFE000u); });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace slimkernels
