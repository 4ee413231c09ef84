// What the kernels of a deployed network take: one job is one step of the plan for an input shape. Strides are in elements of
// the activations' type unless their name says otherwise; channels lie side by side.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"

namespace slimkernels::deploy {

// `units` 32-bit units (a float, a pair of bfloat16) side by side, `offset` units from the first tap of an output pixel;
// `packed` is their place in the packed weight.
struct TapRun {
  int64_t offset, units, packed;
};

// Strides of an activation in memory.
struct Plane {
  int64_t image = 0, row = 0, pixel = 0;
};

// Where a job's activations lie: x and y at their first value (x of the padding, where a convolution reads it).
struct Places {
  const char *x = nullptr, *residual = nullptr;  // residual may be null
  char *y = nullptr, *scratch = nullptr;
};

struct Epilogue {
  Activation activation = Activation::kNone;
  const float* bias = nullptr;  // padded to whole vectors
};

// Convolution as sums over runs; also a linear layer (one row of pixels) and a tap of a transposed convolution.
struct ConvJob {
  int64_t images, out_h, out_w, out_c;
  Plane x, y, residual;  // x.image, x.row and x.pixel are the steps from one output to the next, in units
  std::vector<TapRun> runs;
  std::vector<int64_t> chunks;  // first run of each part of the depth; one more at the end
  int64_t depth;                // units in all
  const char* weight;           // (vectors of outputs, depth, lanes) units
  int64_t vectors, tile;        // of outputs, of pixels: the register tile
  int64_t band;                 // output rows (over all images) that are worked on together
  bool fetch, fetch_x;          // outputs (and residual), input: larger than the second-level cache
  bool fetch_weights;           // too many for it
  Epilogue epilogue;
};

// Winograd's F(4x4, 3x3) in float, F(3x3, 3x3) or F(2x2, 3x3) in bfloat16: `block` tiles of side x side outputs at a
// time through 36, 25 or 16 matrices of inputs (v) and of outputs (m, always float), which lie `v_position` and
// `m_position` numbers apart in a slot of the scratch memory; each slot is worked on by one thread.
struct WinogradJob {
  int64_t images, out_h, out_w, in_c, out_c;
  int64_t side;  // outputs in a row of a tile
  Plane x, y, residual;
  const char* weight;     // (matrices, vectors of outputs, in_c, lanes) floats or pairs
  int64_t vectors, tile;  // register tile of the products
  int64_t block, slots, slot_bytes, v_position, m_position;
  bool fetch_weights;  // they are too many for a near cache
  // Few tiles: `weight` is that of a direct convolution, and the scratch memory holds the inputs of all tiles.
  bool few;
  Epilogue epilogue;
};

// Convolution with so few outputs that a vector holds those of several pixels side by side.
struct NarrowJob {
  int64_t images, out_h, out_w, in_c, out_c, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  Plane x, y, residual;  // x strides are those of the input
  const float* weight;   // (kernel_h, kernel_w, in_c, lanes), the outputs again for every pixel of a vector
  Epilogue epilogue;     // the bias too
};

struct DepthwiseJob {
  int64_t images, out_h, out_w, channels, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  Plane x, y, residual;  // x strides are those of the input
  const float* weight;   // (vectors of channels, kernel_h, kernel_w, lanes)
  // For bfloat16, two rows of taps at a time, or null: (blocks of two vectors, pairs of rows, kernel_w, 2, lanes, 2), and the bias
  // in the same order (see deploy_depthwise-inl.h).
  const char* pairs;
  const float* pair_bias;
  Epilogue epilogue;
};

struct PoolJob {
  int64_t images, in_h, in_w, out_h, out_w, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h,
      dilation_w;
  bool max, count_padding;
  Plane x, y;
};

// y = act(x * scale + bias + residual), each part optional; also a copy.
struct PointwiseJob {
  int64_t images, h, w, channels;
  Plane x, y, residual;
  const float* scale = nullptr;
  Epilogue epilogue;
};

struct Kernels {
  int64_t lanes, tile_registers;  // floats in a vector; accumulators a register tile may have
  void (*conv)(const ConvJob&, const Places&);
  void (*winograd)(const WinogradJob&, const Places&);
  void (*narrow)(const NarrowJob&, const Places&);
  void (*depthwise)(const DepthwiseJob&, const Places&);
  void (*pool)(const PoolJob&, const Places&);
  void (*pointwise)(const PointwiseJob&, const Places&);
};

constexpr int64_t kMaxVectors = 4, kMaxTile = 14;
constexpr float kSmallPointP = 0.4f, kSmallPointQ = 1.25f;  // of F(3x3, 3x3)

const Kernels& float_kernels();
const Kernels* bfloat16_kernels();  // null where the machine has no bfloat16 products (or the compiler did not know them)

}  // namespace slimkernels::deploy
