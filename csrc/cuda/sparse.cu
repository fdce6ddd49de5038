// project, Sparse: the kernels, and which of them a call takes. What their threads do is in sparse.h.
#include <cuda_runtime.h>

#include "sparse.h"

namespace assay::cuda {
namespace {

constexpr int PARTS_OF_A_CHUNK = 2;  // of which registers hold one at a time

__device__ __forceinline__ void start_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Where a thread has one bucket, its registers hold some of the next chunk's values while this one's are added up.
template <class T, int PLANES, int BUCKETS>
__global__ void __launch_bounds__(SPARSE_THREADS, 1)
    sparse_rows_kernel(const __grid_constant__ SparseArgs a, const __grid_constant__ SparsePlan p) {
  extern __shared__ Granule s_memory[];
  using Thread = SparseThread<T, PLANES, BUCKETS>;
  constexpr int N = BUCKETS == 1 ? Thread::ITEMS / PARTS_OF_A_CHUNK : 1;
  Thread me(a, p, s_memory, blockIdx.x, threadIdx.x);
  typename Thread::Item held[N];
  me.copy(me.begin);
  start_copies();
  if (BUCKETS == 1) me.load_all(me.begin, 0, held);
  for (int chunk = me.begin; chunk < me.end; ++chunk) {
    if (BUCKETS == 1) me.store_all(0, held);
#pragma unroll 1
    for (int q = BUCKETS == 1 ? N : 0; q < Thread::ITEMS; q += N) {
      me.load_all(chunk, q, held);
      me.store_all(q, held);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (chunk + 1 < me.end) {
      me.copy(chunk + 1);
      start_copies();
      if (BUCKETS == 1) me.load_all(chunk + 1, 0, held);
    }
    me.gather(chunk);
    me.flush(chunk);
    __syncthreads();
  }
}

template <class T, int BUCKETS>
__global__ void __launch_bounds__(SPARSE_THREADS, 1)
    sparse_row_kernel(const __grid_constant__ SparseArgs a, const __grid_constant__ SparsePlan p) {
  extern __shared__ Granule s_memory[];
  SparseThread<T, 0, BUCKETS> me(a, p, s_memory, blockIdx.x, threadIdx.x);
  me.copy(me.begin);
  start_copies();
  for (int chunk = me.begin; chunk < me.end; ++chunk) {
    if (chunk + 1 < me.end) {
      me.copy(chunk + 1);
      start_copies();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    me.gather(chunk);
    me.flush(chunk);
    __syncthreads();
  }
}

constexpr int TOTALS = 32, PARTS = 16;  // sums of a block, and threads of each

// sums (count,) += sum over pieces of partial (pieces, count), in an order of `pieces` alone.
__global__ void __launch_bounds__(TOTALS* PARTS)
    sparse_add_pieces(const double* partial, double* sums, int64_t count, int64_t pieces) {
  __shared__ double s_part[PARTS][TOTALS];
  const int lane = threadIdx.x % TOTALS, part = threadIdx.x / TOTALS;
  const int64_t i = int64_t{blockIdx.x} * TOTALS + lane;
  double total = 0;
  if (i < count) {
#pragma unroll 8
    for (int64_t piece = part; piece < pieces; piece += PARTS) total += partial[piece * count + i];
  }
  s_part[part][lane] = total;
  __syncthreads();
  if (part || i >= count) return;
  for (int other = 1; other < PARTS; ++other) total += s_part[other][lane];
  sums[i] += total;
}

template <class T>
const void* kernel_of(const SparsePlan& p) {
  if (p.planes == 2) return reinterpret_cast<const void*>(&sparse_rows_kernel<T, 2, 1>);
  if (p.planes == 1)
    return p.buckets == 1 ? reinterpret_cast<const void*>(&sparse_rows_kernel<T, 1, 1>)
                          : reinterpret_cast<const void*>(&sparse_rows_kernel<T, 1, 4>);
  return p.buckets == 1 ? reinterpret_cast<const void*>(&sparse_row_kernel<T, 1>)
                        : reinterpret_cast<const void*>(&sparse_row_kernel<T, 4>);
}

}  // namespace

int32_t sparse_chunk(int64_t dim, int64_t nonzeros, DType dtype, bool one_row, int64_t* chunk) {
  int device = 0, shared = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *chunk = 0;
  if (e == cudaSuccess && sparse_fits(dim, nonzeros, itemsize_of(dtype), shared))
    *chunk = sparse_plan(static_cast<int>(dim), static_cast<int>(nonzeros), one_row).chunk;
  return e;
}

int32_t sparse(const SparseArgs& args, void* stream) {
  SparseArgs a = args;
  SparsePlan p = sparse_plan(a.dim, a.nonzeros, a.rows == 1);
  const void* kernel = a.dtype == DType::f32    ? kernel_of<float>(p)
                       : a.dtype == DType::bf16 ? kernel_of<bf16>(p)
                                                : kernel_of<f16>(p);
  const int itemsize = itemsize_of(a.dtype);
  const auto shared = static_cast<size_t>(sparse_shared(p, itemsize));
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (e != cudaSuccess) return e;
  void* arguments[] = {&a, &p};
  const auto blocks = static_cast<unsigned>(sparse_blocks(a, p, itemsize));
  e = cudaLaunchKernel(kernel, dim3(blocks), dim3(p.threads), arguments, shared, static_cast<cudaStream_t>(stream));
  if (e != cudaSuccess) return e;
  int64_t count = a.rows * a.dim, pieces = sparse_pieces(a);
  void* sum_arguments[] = {&a.partial, &a.sums, &count, &pieces};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&sparse_add_pieces),
                          dim3(static_cast<unsigned>(ceil_div(count, TOTALS))), dim3(TOTALS * PARTS), sum_arguments, 0,
                          static_cast<cudaStream_t>(stream));
}

}  // namespace assay::cuda
