// Batch norm, residual add and activation, forward and backward, over planes (NCHW) or rows of channels (channels-last).

#include "norm_segments-inl.h"

namespace {  // the copies in other files must not be taken for these

#include "slim_batch_norm_planes-inl.h"
#include "slim_batch_norm_rows-inl.h"

template <typename T>
void slim_batch_norm_kernel(const ForwardCall<T>& call) {
  call.layout.rows ? forward_rows(call) : forward_planes(call);
}

template <typename T>
void slim_batch_norm_backward_kernel(const BackwardCall<T>& call) {
  call.layout.rows ? backward_rows(call) : backward_planes(call);
}

}  // namespace
