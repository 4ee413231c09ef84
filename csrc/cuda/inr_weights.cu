// inr_weights: the tables of the first layer, and which of the kernels of inr_weights_<operand>.cu runs.
#include <string.h>

#include "inr_weights.cuh"
#include "inr_weights_operands.h"

namespace slimkernels {
namespace {

constexpr int kTableThreads = 128;
constexpr int kUploadWords = 480;

template <int kOperand>
struct Kind {
  static constexpr int value = kOperand;
};

struct Words {
  int64_t word[kUploadWords];
};

__global__ void __launch_bounds__(kUploadWords)
    upload_kernel(int64_t* to, int count, const __grid_constant__ Words from) {
  if (int(threadIdx.x) < count) to[threadIdx.x] = from.word[threadIdx.x];
}

// The first layer is a sum of terms of the row and of the column; the row's table has the scalar axes and the bias,
// too.
__global__ void __launch_bounds__(kTableThreads, 4) inr_tables_kernel(const __grid_constant__ SkInr call) {
  SK_DYN_SMEM(float, encodings);  // (6, encoded)
  const int encoded = 1 + 2 * int(call.bands), hidden = int(call.hidden);
  int64_t low = 0, high = call.job_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (call.jobs[middle].table_begin <= int64_t(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const SkInrJob job = call.jobs[low];
  const int64_t rows = inr_rows(job), columns = inr_columns(job), at = blockIdx.x - job.table_begin;
  const int64_t sample = at / (rows + columns), index = at - sample * (rows + columns);
  const bool of_row = index < rows;
  for (int i = threadIdx.x; i < kInrAxes * encoded; i += kTableThreads) {
    const int axis = i / encoded;
    const int64_t position = axis == 1 ? index : axis == 2 ? index - rows : 0;
    if (of_row != (axis == 2))
      encodings[i] = inr_encode(inr_value(call, job, sample, axis, position, position), i % encoded);
  }
  __syncthreads();
  for (int h = threadIdx.x; h < hidden; h += kTableThreads) {
    float sum = of_row ? call.b_in[job.mlp * hidden + h] : 0.0f;
    for (int axis = 0; axis < kInrAxes; ++axis) {
      if (of_row == (axis == 2)) continue;
      const float* weights = call.w_in + (job.mlp * kInrAxes + axis) * encoded * hidden + h;
      for (int t = 0; t < encoded; ++t) sum += encodings[axis * encoded + t] * weights[int64_t(t) * hidden];
    }
    call.tables[blockIdx.x * int64_t(hidden) + h] = sum;
  }
}

}  // namespace

int inr_tables(const SkInr& call, void* stream) {
  if (call.noise == kNoiseElement) return int(cudaSuccess);
  const SkInr copy = call;
  const int64_t bytes = kInrAxes * (1 + 2 * call.bands) * 4;
  SK_LAUNCH(inr_tables_kernel, dim3(unsigned(call.table_rows)), dim3(kTableThreads), bytes, stream, copy);
  return int(cudaGetLastError());
}

}  // namespace slimkernels

extern "C" int sk_upload(void* to, const void* from, int64_t bytes, void* stream) {
  using namespace slimkernels;
  for (int64_t at = 0; at < bytes / 8; at += kUploadWords) {
    Words words;
    const int count = int(bytes / 8 - at < kUploadWords ? bytes / 8 - at : kUploadWords);
    memcpy(words.word, static_cast<const int64_t*>(from) + at, count * 8);
    int64_t* target = static_cast<int64_t*>(to) + at;
    SK_LAUNCH(upload_kernel, dim3(1), dim3(kUploadWords), 0, stream, target, count, words);
  }
  return int(cudaGetLastError());
}

extern "C" int64_t sk_inr_tile(int64_t hidden) {
  return hidden == 64 || hidden == 128 || hidden == 256 ? 64 : hidden == 512 ? 32 : 0;
}

extern "C" int64_t sk_inr_shared(int64_t hidden, int64_t outputs, int64_t bands, int operand) {
  using namespace slimkernels;
  const auto of = [&](auto known) {
    using Kind = decltype(known);
    const int64_t encoded = 1 + 2 * bands;
    if (hidden == 64) return InrShape<Kind::value, 64>::shared_bytes(outputs, encoded);
    if (hidden == 128) return InrShape<Kind::value, 128>::shared_bytes(outputs, encoded);
    if (hidden == 256) return InrShape<Kind::value, 256>::shared_bytes(outputs, encoded);
    return InrShape<Kind::value, 512>::shared_bytes(outputs, encoded);
  };
  if (operand == kSkOperandBfloat16 || operand == kSkOperandHalf) return of(Kind<kSkOperandBfloat16>{});
  return of(Kind<kSkOperandFloat>{});
}

extern "C" int sk_inr_forward(const SkInr* call, void* weights, int operand, int dtype, void* stream) {
  using namespace slimkernels;
  if (!call->tiles) return int(cudaSuccess);
  if (const int code = inr_tables(*call, stream)) return code;
  if (operand == kSkOperandFloat) return inr_forward_float(*call, weights, dtype, stream);
  if (operand == kSkOperandTf32) return inr_forward_tf32(*call, weights, dtype, stream);
  if (operand == kSkOperandBfloat16) return inr_forward_bfloat16(*call, weights, dtype, stream);
  return inr_forward_half(*call, weights, dtype, stream);
}
