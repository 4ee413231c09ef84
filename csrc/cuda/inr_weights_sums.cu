// Backward of inr_weights around its matrix kernels: sums of segments, the gradients of the first layer and of the
// scales, and the order of it all. Every sum runs in an order that the sizes alone decide.
#include <algorithm>
#include <vector>

#include "inr_coordinates.cuh"
#include "inr_segments.cuh"
#include "inr_weights_operands.h"

namespace slimkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 32;     // rows multiplied at a time
constexpr int kColumns = 64;  // hidden units, and room for the encodings of an axis, of a block

// total[mlp] += the segments' sums; `first` and `segments` say which there are.
struct Sum {
  const SkInrRun* runs;
  const float* partial;
  float* total;
  int64_t run_count, first, segments, size, numbers;
};

__global__ void __launch_bounds__(kThreads, 4) inr_sum_kernel(const __grid_constant__ Sum s) {
  const int64_t blocks = (s.numbers / 4 + kThreads - 1) / kThreads;
  const int64_t segment = blockIdx.x / blocks, i = (blockIdx.x - segment * blocks) * kThreads + threadIdx.x;
  const auto network = [&](int64_t at) { return InrSegment(s.runs, s.run_count, s.first + at, s.size).mlp; };
  const int64_t mlp = network(segment);
  if (segment && network(segment - 1) == mlp) return;  // the network's first segment adds them all
  if (i * 4 >= s.numbers) return;
  float4* total = reinterpret_cast<float4*>(s.total + mlp * s.numbers) + i;
  float4 sum = *total;
  for (int64_t at = segment; at < s.segments && network(at) == mlp; ++at) {
    const float4 x = reinterpret_cast<const float4*>(s.partial + at * s.numbers)[i];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  *total = sum;
}

// scale_total[tensor] += the wave's tiles of its jobs. A block a tensor.
__global__ void __launch_bounds__(kThreads, 4)
    inr_scale_kernel(const __grid_constant__ SkInr call, const __grid_constant__ SkInrBackward wave) {
  SK_DYN_SMEM(float, room);
  float sum = 0.0f;
  for (int64_t j = 0; j < call.job_count; ++j) {
    const SkInrJob& job = call.jobs[j];
    if (job.tensor != int64_t(blockIdx.x)) continue;
    const int64_t begin = job.tile_begin - wave.first_tile, end = begin + job.tiles * call.samples;
    for (int64_t tile = (begin > 0 ? begin : 0) + threadIdx.x; tile < (end < wave.tiles ? end : wave.tiles);
         tile += kThreads) {
      sum += wave.dscale[tile];
    }
  }
  room[threadIdx.x] = sum;
  __syncthreads();
  for (int by = kThreads / 2; by; by /= 2) {
    if (int(threadIdx.x) < by) room[threadIdx.x] += room[threadIdx.x + by];
    __syncthreads();
  }
  if (threadIdx.x == 0) wave.scale_total[blockIdx.x] += room[0];
}

// The gradient of a row of the first layer's tables: of the coordinates of its row or column, those of the wave. The
// threads are groups of hidden / 4 that share the coordinates.
__global__ void __launch_bounds__(kThreads, 4)
    inr_table_gradient_kernel(const __grid_constant__ SkInr call, const __grid_constant__ SkInrBackward wave,
                              int64_t first_row) {
  SK_DYN_SMEM(float4, room);
  const int64_t table_row = first_row + blockIdx.x;
  int64_t low = 0, high = call.job_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (call.jobs[middle].table_begin <= table_row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const SkInrJob& job = call.jobs[low];
  const int64_t rows = inr_rows(job), columns = inr_columns(job), points = rows * columns;
  const int64_t sample = (table_row - job.table_begin) / (rows + columns);
  const int64_t index = table_row - job.table_begin - sample * (rows + columns);
  const int64_t tile = job.tile_begin + sample * job.tiles - wave.first_tile;  // of its first coordinate, in the wave
  const int64_t begin = tile < 0 ? -tile * wave.tile_rows : 0;                 // of its coordinates that the wave has
  const int64_t left = (wave.tiles - tile) * wave.tile_rows, end = left < points ? left : points;
  const bool of_row = index < rows;
  const int64_t own = of_row ? index * columns : index - rows, step = of_row ? 1 : columns;
  const int64_t last = of_row && own + columns < end ? own + columns : end;
  const int64_t start = own >= begin ? own : own + (begin - own + step - 1) / step * step;
  if (start >= last) return;
  const int lanes = int(call.hidden) / 4, groups = kThreads / lanes, lane = threadIdx.x % lanes;
  const float4* source = reinterpret_cast<const float4*>(wave.first + tile * wave.tile_rows * call.hidden) + lane;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int64_t point = start + threadIdx.x / lanes * step; point < last; point += groups * step) {
    const float4 x = source[point * lanes];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  room[threadIdx.x] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= lanes) return;
  float4* to = reinterpret_cast<float4*>(wave.dtables + table_row * call.hidden) + lane;
  float4 total = own >= begin ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *to;  // an earlier wave had its first ones
  for (int g = 0; g < groups; ++g) {
    const float4 x = room[g * lanes + lane];
    total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
  }
  *to = total;
}

// Row `row` of the tables, or coordinate `row` of the tiles with noise "element": its value on an axis, if the axis is
// in it.
__device__ __forceinline__ bool axis_value(const SkInr& call, const SkInrBackward& wave, int axis, int64_t row,
                                           float& value) {
  const bool element = call.noise == kNoiseElement;
  const int64_t at = element ? row / wave.tile_rows : row;
  int64_t low = 0, high = call.job_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if ((element ? call.jobs[middle].tile_begin : call.jobs[middle].table_begin) <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const SkInrJob& job = call.jobs[low];
  const int64_t rows = inr_rows(job), columns = inr_columns(job);
  if (element) {
    const int64_t sample = (at - job.tile_begin) / job.tiles;
    const int64_t point = row - (job.tile_begin + sample * job.tiles) * wave.tile_rows;
    if (point >= rows * columns) return false;
    const int64_t of_row = point / columns, position = axis == 1 ? of_row : axis == 2 ? point - of_row * columns : 0;
    value = inr_value(call, job, sample, axis, position, point);
    return true;
  }
  const int64_t sample = (at - job.table_begin) / (rows + columns);
  const int64_t index = at - job.table_begin - sample * (rows + columns);
  if ((index < rows) == (axis == 2)) return false;
  const int64_t position = axis == 1 ? index : axis == 2 ? index - rows : 0;
  value = inr_value(call, job, sample, axis, position, position);
  return true;
}

// Of a segment, an axis and kColumns hidden units: the encodings, transposed, times the gradients at the first layer.
// Axis 0 has one more "encoding", 1: the bias'.
__global__ void __launch_bounds__(kThreads, 2)
    inr_first_gradient_kernel(const __grid_constant__ SkInr call, const __grid_constant__ SkInrBackward wave,
                              int64_t first_segment) {
  SK_DYN_SMEM(float, shared);
  constexpr int kPitch = kColumns + 4;
  float *encodings = shared, *gradients = encodings + kStep * kPitch, *values = gradients + kStep * kPitch;
  const bool element = call.noise == kNoiseElement;
  const int encoded = 1 + 2 * int(call.bands), across = int(call.hidden) / kColumns;
  const int64_t segment = blockIdx.x / (kInrAxes * across);
  const int part = int(blockIdx.x - segment * kInrAxes * across), axis = part / across;
  const int column0 = part % across * kColumns, used = encoded + (axis == 0);
  const InrSegment of(wave.runs + (element ? 0 : wave.run_count), wave.run_count, first_segment + segment,
                      element ? kInrSegmentRows / wave.tile_rows : kInrSegmentTableRows);
  const int64_t unit = element ? wave.tile_rows : 1, begin = of.first * unit, count = of.count * unit;
  const float* source = element ? wave.first + (begin - wave.first_tile * unit) * call.hidden
                                : wave.dtables + begin * call.hidden;
  const int row0 = threadIdx.x / 16 * 4, own = threadIdx.x % 16 * 4;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < count; k0 += kStep) {
    __syncthreads();
    if (threadIdx.x < kStep) {
      float value = 0.0f;
      const bool there = k0 + threadIdx.x < count && axis_value(call, wave, axis, begin + k0 + threadIdx.x, value);
      values[threadIdx.x] = value, values[kStep + threadIdx.x] = there;
    }
    for (int i = threadIdx.x; i < kStep * kColumns / 4; i += kThreads) {
      const int k = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
      float x[4] = {};
      if (k0 + k < count) load<float, 4>(source + (k0 + k) * call.hidden + column0 + column, x);
      store<float, 4>(gradients + k * kPitch + column, x);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kStep * used; i += kThreads) {
      const int k = i / used, t = i - k * used;
      const float code = t == encoded ? 1.0f : inr_encode(values[k], t);
      encodings[k * kPitch + t] = values[kStep + k] != 0.0f ? code : 0.0f;
    }
    __syncthreads();
    if (row0 >= used) continue;
    for (int k = 0; k < kStep; ++k) {
      float a[4], b[4];  // what lies beyond `used` is not written anywhere
      load<float, 4>(encodings + k * kPitch + row0, a);
      load<float, 4>(gradients + k * kPitch + own, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
      }
    }
  }
  float* partial = wave.partial + segment * wave.first_numbers;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int t = row0 + i, row = t == encoded ? kInrAxes * encoded : axis * encoded + t;
    if (t < used) store<float, 4>(partial + row * call.hidden + column0 + own, sum[i]);
  }
}

int64_t operand_bytes(int operand) { return operand == kSkOperandBfloat16 || operand == kSkOperandHalf ? 2 : 4; }

// The runs of networks: of tiles, and behind them of rows of the tables.
std::vector<SkInrRun> runs_of(const SkInr& call, const SkInrJob* jobs) {
  std::vector<SkInrRun> tiles, rows;
  for (int64_t j = 0; j < call.job_count; ++j) {
    const SkInrJob& job = jobs[j];
    if (tiles.empty() || tiles.back().mlp != job.mlp) {
      tiles.push_back({job.mlp, 0, job.tile_begin, 0}), rows.push_back({job.mlp, 0, job.table_begin, 0});
    }
    tiles.back().count += job.tiles * call.samples;
    if (call.noise != kNoiseElement) rows.back().count += call.samples * (inr_rows(job) + inr_columns(job));
  }
  const auto number = [](std::vector<SkInrRun>& runs, int64_t size) {
    for (size_t i = 1; i < runs.size(); ++i) {
      runs[i].segment = runs[i - 1].segment + ceil_div(runs[i - 1].count, size);
    }
  };
  number(tiles, kInrSegmentRows / sk_inr_tile(call.hidden)), number(rows, kInrSegmentTableRows);
  tiles.insert(tiles.end(), rows.begin(), rows.end());
  return tiles;
}

// The segments from `first` on that make a wave, and their tiles.
struct Waves {
  const std::vector<SkInrRun>& runs;
  int64_t segments, size, most_tiles, most_segments;

  InrSegment segment(int64_t at) const { return InrSegment(runs.data(), int64_t(runs.size() / 2), at, size); }

  void take(int64_t first, int64_t& count, int64_t& tiles) const {
    count = tiles = 0;
    while (first + count < segments && count < most_segments) {
      const int64_t more = segment(first + count).count;
      if (count && tiles + more > most_tiles) break;
      ++count, tiles += more;
    }
  }
};

Waves waves_of(const SkInr& call, const SkInrPlan& plan, const std::vector<SkInrRun>& runs, int operand,
               int64_t bytes) {
  const int64_t row = (2 * call.depth + 1) * call.hidden * operand_bytes(operand) +
                      call.outputs * operand_bytes(operand) + call.hidden * 4;
  const int64_t numbers = std::max(plan.numbers, plan.first_numbers);
  return {runs, plan.segments, kInrSegmentRows / plan.tile_rows, std::max<int64_t>(1, bytes / (row * plan.tile_rows)),
          std::max<int64_t>(1, bytes / (numbers * 4))};
}

int64_t most_table_segments(const SkInrPlan& plan, int64_t bytes) {
  return std::max<int64_t>(1, std::min(plan.table_segments, bytes / (plan.first_numbers * 4)));
}

int add_segments(const SkInrBackward& w, bool of_tables, int64_t first, int64_t segments, int64_t size, int64_t numbers,
                 float* total, void* stream) {
  const Sum sum{w.runs + (of_tables ? w.run_count : 0), w.partial, total, w.run_count, first, segments, size, numbers};
  const int64_t blocks = ceil_div(numbers / 4, kThreads) * segments;
  SK_LAUNCH(inr_sum_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, sum);
  return int(cudaGetLastError());
}

int first_gradient(const SkInr& call, const SkInrBackward& w, int64_t first, int64_t segments, void* stream) {
  const SkInr c = call;
  const SkInrBackward copy = w;
  const int64_t blocks = segments * kInrAxes * (call.hidden / kColumns);
  const int64_t bytes = (2 * kStep * (kColumns + 4) + 2 * kStep) * 4;
  SK_LAUNCH(inr_first_gradient_kernel, dim3(unsigned(blocks)), dim3(kThreads), bytes, stream, c, copy, first);
  if (const int code = int(cudaGetLastError())) return code;
  const bool element = call.noise == kNoiseElement;
  const int64_t size = element ? kInrSegmentRows / w.tile_rows : kInrSegmentTableRows;
  return add_segments(w, !element, first, segments, size, w.first_numbers, w.first_total, stream);
}

int matrices(const SkInr& call, const SkInrBackward& w, int operand, void* stream) {
  if (operand == kSkOperandFloat) return inr_backward_float(call, w, stream);
  if (operand == kSkOperandTf32) return inr_backward_tf32(call, w, stream);
  if (operand == kSkOperandBfloat16) return inr_backward_bfloat16(call, w, stream);
  return inr_backward_half(call, w, stream);
}

int run_wave(const SkInr& call, const SkInrJob* jobs, const SkInrBackward& w, int operand, void* stream) {
  if (const int code = matrices(call, w, operand, stream)) return code;
  const int64_t size = kInrSegmentRows / w.tile_rows;
  if (const int code = add_segments(w, false, w.first_segment, w.segments, size, w.numbers, w.total, stream)) {
    return code;
  }
  const SkInr c = call;
  const SkInrBackward copy = w;
  if (w.scale_total) {
    SK_LAUNCH(inr_scale_kernel, dim3(unsigned(w.tensors)), dim3(kThreads), kThreads * 4, stream, c, copy);
    if (const int code = int(cudaGetLastError())) return code;
  }
  if (call.noise == kNoiseElement) return first_gradient(call, w, w.first_segment, w.segments, stream);
  int64_t begin = call.table_rows, end = 0;  // of the rows of the jobs that the wave has a part of
  for (int64_t j = 0; j < call.job_count; ++j) {
    const SkInrJob& job = jobs[j];
    const int64_t tiles = job.tiles * call.samples;
    if (job.tile_begin >= w.first_tile + w.tiles || job.tile_begin + tiles <= w.first_tile) continue;
    begin = std::min(begin, job.table_begin);
    end = std::max(end, job.table_begin + call.samples * (inr_rows(job) + inr_columns(job)));
  }
  SK_LAUNCH(inr_table_gradient_kernel, dim3(unsigned(end - begin)), dim3(kThreads), kThreads * 16, stream, c, copy,
            begin);
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace slimkernels

extern "C" void sk_inr_plan(const SkInr* call, const SkInrJob* jobs, int operand, int64_t bytes, SkInrPlan* plan) {
  using namespace slimkernels;
  const std::vector<SkInrRun> runs = runs_of(*call, jobs);
  const size_t half = runs.size() / 2;
  const auto count = [&](size_t last, int64_t size) {
    return half ? runs[last].segment + ceil_div(runs[last].count, size) : 0;
  };
  *plan = SkInrPlan{};
  plan->tile_rows = sk_inr_tile(call->hidden), plan->runs = int64_t(half);
  plan->segments = count(half - 1, kInrSegmentRows / plan->tile_rows);
  plan->table_segments = call->noise == kNoiseElement ? 0 : count(2 * half - 1, kInrSegmentTableRows);
  const int64_t h = call->hidden, matrices = call->depth * h + call->outputs;
  plan->numbers = round_up(matrices * h + matrices + call->depth, 4);
  plan->first_numbers = (kInrAxes * (1 + 2 * call->bands) + 1) * h;
  const Waves waves = waves_of(*call, *plan, runs, operand, bytes);
  int64_t most = 0, taken = 0, tiles = 0;
  for (int64_t first = 0; first < plan->segments; first += taken) {
    waves.take(first, taken, tiles);
    plan->wave_tiles = std::max(plan->wave_tiles, tiles), most = std::max(most, taken);
  }
  const int64_t of_first = call->noise == kNoiseElement ? most : most_table_segments(*plan, bytes);
  plan->partial = std::max(most * plan->numbers, of_first * plan->first_numbers);
}

extern "C" int sk_inr_backward(const SkInr* call, const SkInrJob* jobs, const SkInrBackward* work, int operand,
                               int64_t bytes, void* stream) {
  using namespace slimkernels;
  if (!call->tiles) return int(cudaSuccess);
  if (const int code = inr_tables(*call, stream)) return code;
  SkInrPlan plan;
  sk_inr_plan(call, jobs, operand, bytes, &plan);
  const std::vector<SkInrRun> runs = runs_of(*call, jobs);
  if (const int code = sk_upload(work->runs, runs.data(), int64_t(runs.size() * sizeof(SkInrRun)), stream)) return code;
  SkInrBackward w = *work;
  w.tile_rows = plan.tile_rows, w.run_count = plan.runs, w.numbers = plan.numbers;
  w.first_numbers = plan.first_numbers;
  const Waves waves = waves_of(*call, plan, runs, operand, bytes);
  for (w.first_segment = 0; w.first_segment < plan.segments; w.first_segment += w.segments) {
    waves.take(w.first_segment, w.segments, w.tiles);
    w.first_tile = waves.segment(w.first_segment).first;
    if (const int code = run_wave(*call, jobs, w, operand, stream)) return code;
  }
  const int64_t most = most_table_segments(plan, bytes);
  for (int64_t first = 0; first < plan.table_segments; first += most) {
    const int64_t segments = std::min(most, plan.table_segments - first);
    if (const int code = first_gradient(*call, w, first, segments, stream)) return code;
  }
  return int(cudaSuccess);
}
