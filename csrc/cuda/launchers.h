// What the CUDA sources offer: plain pointers, sizes and a stream; no torch. Every launcher returns a cudaError_t.
#pragma once

#include <stdint.h>

enum SkDtype { kSkFloat = 0, kSkBfloat16 = 1, kSkHalf = 2 };

// A depthwise convolution: output channel c reads input channel c / (outputs / channels). Strides are in numbers; the
// four dimensions are batch, channel, height, width. A 1d convolution has height 1.
struct SkDepthwise {
  int64_t batch, channels, outputs;
  int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4], weight_stride[3];  // weight: channel, kernel row, kernel column
};

// target[leading slice of source's shape] += source. The source is contiguous.
constexpr int kSkSliceDims = 5;
struct SkSlice {
  void* target;
  const void* source;
  int64_t size[kSkSliceDims], stride[kSkSliceDims];  // of the slice; the target's strides. Unused dimensions: size 1
};

// How the hidden layers are multiplied: the storage of the operands. Sums are float32.
enum SkOperand { kSkOperandFloat = 0, kSkOperandTf32 = 1, kSkOperandBfloat16 = 2, kSkOperandHalf = 3 };

// One tensor at one width. Sorted by network; tiles of all jobs and samples are numbered one after another.
struct SkInrJob {
  int64_t tensor, mlp, layer, layers, kernel, tile_out, tile_in, layout, c_out, c_in;
  int64_t places_out, places_in;           // channels that positions are divided by
  int64_t start;                           // of its weights in the result
  int64_t tile_begin, tiles;               // its first tile; tiles in one sample
  int64_t table_begin;                     // its first row in the tables: samples * (rows + columns) of them
  const void* base;                        // or null
  int64_t base_out, base_in, base_kernel;  // strides
};

// One call: the networks, padded to `hidden` (64, 128, 256 or 512) and `outputs` (a multiple of 64, `hidden` at most)
// with zeros.
struct SkInr {
  const float* w_in;      // (P, 6, 1 + 2 bands, hidden)
  const float* b_in;      // (P, hidden)
  const void* w_hidden;   // (P, D, hidden, hidden), operands
  const float* b_hidden;  // (P, D, hidden)
  const float* skip;      // (P, D)
  const void* w_out;      // (P, outputs, hidden), operands
  const float* b_out;     // (P, outputs)
  const float* scale;     // (T,) or null
  const SkInrJob* jobs;   // on the device
  const int64_t* seed;    // on the device, or null: seed_value
  float* tables;          // (rows, hidden) of the first layer; not for noise "element"
  int64_t seed_value, job_count, tiles, table_rows;
  int64_t mlps, hidden, depth, outputs, real_outputs, bands;
  int64_t samples, first_sample, noise, neumeta, activation;
  float norm, limit;
};

// Backward cuts the tiles of a network, which lie one after another, and the rows of its tables into segments; a
// gradient is the sum of its segments' in their order. `first` and `count` are tiles or rows.
struct SkInrRun {
  int64_t mlp, segment, first, count;  // `segment` numbers its first one
};

// Sizes of what backward works in, and how many it has of each. Numbers are float where nothing else is said.
struct SkInrPlan {
  int64_t tile_rows, runs;        // coordinates a tile; networks that have tiles
  int64_t segments, wave_tiles;   // of tiles; the most tiles that are held at a time, in a wave
  int64_t table_segments;         // of rows; 0 with noise "element"
  int64_t numbers, first_numbers; // of a network's gradients, see SkInrBackward
  int64_t partial;                // numbers
};

// Where backward works, and its results, which are added to. Buffers of E, the operand's storage, and float.
struct SkInrBackward {
  const float* dy;        // like the weights
  const void* w_hidden;   // (P, D, hidden, hidden): the transposes
  const void* w_out;      // (P, hidden, outputs): likewise
  SkInrRun* runs;         // (2, runs): of tiles and of rows
  void* inputs;           // (D + 1, wave's tiles * rows, hidden): what each layer multiplied
  void* gradients;        // (D, ..., hidden): at the hidden layers' pre-activations
  void* results;          // (..., outputs): at the networks' outputs
  float* first;           // (..., hidden): at the first layer's pre-activation
  float *dskip, *dscale;  // (wave's tiles, D) and (wave's tiles)
  float* dtables;         // like the tables
  float* partial;         // the segments' gradients
  float* total;           // (P, numbers): w_hidden, w_out, b_hidden, b_out and skip, one after another
  float* first_total;     // (P, 6 (1 + 2 bands) + 1, hidden): w_in, b_in
  float* scale_total;     // (T,) or null
  int64_t tensors;        // T
  int64_t tile_rows, run_count, numbers, first_numbers;  // of the plan
  int64_t first_segment, segments, first_tile, tiles;    // of the wave
};

extern "C" {
// Writes `bytes` bytes to the device without a copy that a CUDA graph could not hold. A multiple of 8.
int sk_upload(void* to, const void* from, int64_t bytes, void* stream);
// Coordinates of a tile. 0 when this hidden size is not taken.
int64_t sk_inr_tile(int64_t hidden);
// Bytes of shared memory that a block of forward takes. Backward's take less, or 80 KiB at most, which all GPUs have that
// these sources are compiled for.
int64_t sk_inr_shared(int64_t hidden, int64_t outputs, int64_t bands, int operand);
// The weights of all jobs, in their layouts, into `weights` of dtype `dtype`; the bases have that dtype.
int sk_inr_forward(const SkInr* call, void* weights, int operand, int dtype, void* stream);
// How backward works in about `bytes` bytes. `jobs` are those of the call, on the host.
void sk_inr_plan(const SkInr* call, const SkInrJob* jobs, int operand, int64_t bytes, SkInrPlan* plan);
// Adds the gradients to total, first_total and scale_total. The last two lines of `work` need not be filled.
int sk_inr_backward(const SkInr* call, const SkInrJob* jobs, const SkInrBackward* work, int operand, int64_t bytes,
                    void* stream);

// y = act(conv(x, weight) + bias + residual). bias and residual may be null; residual has y's strides.
int sk_depthwise_forward(const SkDepthwise* shape, const void* x, const void* weight, const void* bias,
                         const void* residual, void* y, int activation, int dtype, void* stream);
// dx has the strides x_stride, dy y_stride.
int sk_depthwise_input_gradient(const SkDepthwise* shape, const void* dy, const void* weight, void* dx, int dtype,
                                void* stream);
// Writes the first `outputs` rows of dw. `scratch` holds sk_depthwise_scratch floats.
int64_t sk_depthwise_scratch(const SkDepthwise* shape);
int sk_depthwise_weight_gradient(const SkDepthwise* shape, const void* dy, const void* x, void* dw, float* scratch,
                                 int dtype, void* stream);

int sk_slice_accumulate(const SkSlice* slices, int64_t count, int target_dtype, int source_dtype, void* stream);
}
