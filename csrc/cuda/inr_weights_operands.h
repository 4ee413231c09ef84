// The kernels of inr_weights, one source file an operand: nvcc takes the files side by side.
#pragma once

#include "launchers.h"

namespace slimkernels {

int inr_forward_float(const SkInr& call, void* weights, int dtype, void* stream);
int inr_forward_tf32(const SkInr& call, void* weights, int dtype, void* stream);
int inr_forward_bfloat16(const SkInr& call, void* weights, int dtype, void* stream);
int inr_forward_half(const SkInr& call, void* weights, int dtype, void* stream);

// The tables of the first layer; nothing with noise "element".
int inr_tables(const SkInr& call, void* stream);

// The matrix kernels of a wave.
int inr_backward_float(const SkInr& call, const SkInrBackward& wave, void* stream);
int inr_backward_tf32(const SkInr& call, const SkInrBackward& wave, void* stream);
int inr_backward_bfloat16(const SkInr& call, const SkInrBackward& wave, void* stream);
int inr_backward_half(const SkInr& call, const SkInrBackward& wave, void* stream);

}  // namespace slimkernels
