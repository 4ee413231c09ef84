// Adds many compact gradients to the leading slices of full-size gradient buffers in few launches.
//
// The table of slices travels in the kernel's arguments: no copy to the device, nothing that a CUDA graph cannot hold.
// A block works on one chunk of one slice; which one it finds by bisection in the table.
#include "launchers.h"
#include "numeric.cuh"

namespace slimkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;  // numbers a block adds, or 16-byte vectors when the slice allows them
constexpr int kEntries = 36;  // kernel arguments hold 4 KiB

struct Entry {
  SkSlice slice;
  int dims, vector;  // after merging; 1 when rows can be walked in 16-byte steps
};

struct Table {
  int count;
  int first_chunk[kEntries + 1];
  Entry entry[kEntries];
};
static_assert(sizeof(Table) <= 4096, "kernel arguments hold 4 KiB");

template <typename T, typename S, int V>
__device__ __forceinline__ void add_chunk(const Entry& e, int64_t begin, int64_t total) {
  const int64_t end = begin + kChunk < total ? begin + kChunk : total;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    int64_t rest = i * V, offset = 0;
    for (int d = e.dims - 1; d > 0; --d) {
      const int64_t row = rest / e.slice.size[d];
      offset += (rest - row * e.slice.size[d]) * e.slice.stride[d];
      rest = row;
    }
    T* target = static_cast<T*>(e.slice.target) + offset + rest * e.slice.stride[0];
    float sum[V], source[V];
    load<T, V>(target, sum);
    load<S, V>(static_cast<const S*>(e.slice.source) + i * V, source);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += source[k];
    store<T, V>(target, sum);
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 4) slice_accumulate_kernel(const __grid_constant__ Table table) {
  const int block = blockIdx.x;
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Entry& e = table.entry[low];
  int64_t total = 1;
  for (int d = 0; d < e.dims; ++d) total *= e.slice.size[d];
  const int64_t begin = int64_t(block - table.first_chunk[low]) * kChunk;
  constexpr int V = sizeof(T) == sizeof(S) ? Lanes<T>::value : 1;
  if (V > 1 && e.vector) {
    add_chunk<T, S, V>(e, begin, total / V);
  } else {
    add_chunk<T, S, 1>(e, begin, total);
  }
}

// Drops dimensions of size 1 and joins neighbours that lie one after another in the target.
Entry merged(const SkSlice& slice, int lanes, int bytes) {
  Entry e{};
  e.slice.target = slice.target, e.slice.source = slice.source;
  for (int d = 0; d < kSkSliceDims; ++d) {
    if (slice.size[d] == 1) continue;
    const int last = e.dims - 1;
    if (e.dims && e.slice.stride[last] == slice.size[d] * slice.stride[d]) {
      e.slice.size[last] *= slice.size[d], e.slice.stride[last] = slice.stride[d];
    } else {
      e.slice.size[e.dims] = slice.size[d], e.slice.stride[e.dims] = slice.stride[d], ++e.dims;
    }
  }
  if (!e.dims) e.slice.size[0] = e.slice.stride[0] = e.dims = 1;
  const int last = e.dims - 1;
  bool vector = lanes > 1 && e.slice.stride[last] == 1 && e.slice.size[last] % lanes == 0;
  for (int d = 0; d < last; ++d) vector = vector && e.slice.stride[d] % lanes == 0;
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % (lanes * bytes) == 0; };
  e.vector = vector && aligned(slice.target) && aligned(slice.source);
  return e;
}

template <typename T, typename S>
int accumulate(const SkSlice* slices, int64_t count, void* stream) {
  const int lanes = sizeof(T) == sizeof(S) ? Lanes<T>::value : 1;
  Table table{};
  int64_t chunks = 0;
  const auto flush = [&] {
    if (!table.count) return;
    table.first_chunk[table.count] = int(chunks);
    const auto kernel = slice_accumulate_kernel<T, S>;
    SK_LAUNCH(kernel, dim3(unsigned(chunks)), dim3(kThreads), 0, stream, table);
    table = Table{}, chunks = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    int64_t numbers = 1;
    for (int64_t size : slices[i].size) numbers *= size;
    if (!numbers) continue;
    const Entry e = merged(slices[i], lanes, sizeof(T));
    const int64_t needed = ceil_div(e.vector ? numbers / lanes : numbers, kChunk);
    if (table.count == kEntries || chunks + needed > INT32_MAX) flush();
    table.first_chunk[table.count] = int(chunks), table.entry[table.count++] = e, chunks += needed;
  }
  flush();
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace slimkernels

extern "C" int sk_slice_accumulate(const SkSlice* slices, int64_t count, int target_dtype, int source_dtype,
                                   void* stream) {
  using namespace slimkernels;
  if (target_dtype == kSkFloat) {
    if (source_dtype == kSkFloat) return accumulate<float, float>(slices, count, stream);
    if (source_dtype == kSkBfloat16) return accumulate<float, __nv_bfloat16>(slices, count, stream);
    return accumulate<float, __half>(slices, count, stream);
  }
  if (target_dtype != source_dtype) return int(cudaErrorInvalidValue);
  return target_dtype == kSkBfloat16 ? accumulate<__nv_bfloat16, __nv_bfloat16>(slices, count, stream)
                                     : accumulate<__half, __half>(slices, count, stream);
}
