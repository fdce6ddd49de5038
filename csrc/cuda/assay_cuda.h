// The CUDA kernels' interface: addresses, sizes and a stream in, a cudaError_t (as int) out. It allocates nothing, waits
// for nothing and keeps no state, so that every call may be captured into a CUDA graph.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "../assay.h"

namespace assay::cuda {

std::string error_string(int32_t error);  // "cudaErrorName: what it means"
std::string build_info();                 // "CUDA 13.0, sm_80 sm_90 sm_100"
// 10 * major + minor of the current device; an error where no driver or device can be used.
int32_t compute_capability(int32_t* capability);

// ensemble_stats of (N, C) logits in device memory. `args` itself, its K pointers, strides and weights are host memory
// and are copied before this returns; labels, out and prediction are device memory; `threads` is not used. A label that is
// neither in [0, C) nor ignore_index makes its row NaN.
// The workspace is `bytes` of device memory, 16-byte aligned, at least what ensemble_workspace says for the current device
// and the same args; null if that is 0. It may be reused once the stream has passed this work.
int32_t ensemble_workspace(const EnsembleArgs& args, size_t* bytes);
int32_t ensemble(const EnsembleArgs& args, void* workspace, size_t bytes, void* stream);

// project, Sparse, of (rows, count) vectors in device memory, adjacent along a row. `order`: what ops/_sparse.py sorts,
// 16-byte aligned, for the chunks of sparse_chunk. The sums of slices of `slice` coordinates, a multiple of 8192, are
// float32, added up in double over a piece of `slices_of_piece` slices in `partial` (pieces, rows, dim), and then over the
// pieces, which are added to `sums` (rows, dim).
struct SparseArgs {
  const void* vectors;
  DType dtype;
  int64_t rows, stride, count;
  const uint16_t* order;
  int32_t dim, nonzeros;
  int64_t slice, slices_of_piece;
  double* partial;
  double* sums;
};
// Coordinates of a chunk, or 0 where the kernel does not take such a sketch on the current device.
int32_t sparse_chunk(int64_t dim, int64_t nonzeros, DType dtype, bool one_row, int64_t* chunk);
int32_t sparse(const SparseArgs& args, void* stream);

}  // namespace assay::cuda
