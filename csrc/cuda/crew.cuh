// The crews of EnsembleRows on a GPU: who shares a row, and how they meet. The native tests emulate these on threads.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "portable.h"

namespace assay::cuda {

struct BlockCrew {
  static constexpr int WARP = 32;
  const int thread, threads;
  const int slice, slices;

  __device__ explicit BlockCrew(int slices_ = 1)
      : thread(static_cast<int>(threadIdx.x)),
        threads(static_cast<int>(blockDim.x)),
        slice(static_cast<int>(blockIdx.x) % slices_),
        slices(slices_) {}

  // This crew's place among the grid's, and their number.
  __device__ int first_tile() const { return static_cast<int>(blockIdx.x) / slices; }
  __device__ int tile_step() const { return static_cast<int>(gridDim.x) / slices; }

  // Called by whole warps only.
  template <class T>
  __device__ T shuffle_xor(T x, int offset) const {
    return __shfl_xor_sync(0xffffffffu, x, offset);
  }
  // Of a warp; NaN if any is.
  __device__ float warp_max(float x) const {
    return from_ordered(__reduce_max_sync(0xffffffffu, to_ordered(x)));
  }
  __device__ uint32_t ballot(bool yes) const { return __ballot_sync(0xffffffffu, yes); }
  __device__ int warp_min(int x) const { return __reduce_min_sync(0xffffffffu, x); }
  __device__ void atomic_min(uint32_t* p, uint32_t value) const { atomicMin(p, value); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ void sync_block() const { __syncthreads(); }
  __device__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ const T* peer(const T* s_mine, int) const {
    return s_mine;
  }
};

// Blocks of a cluster, which read each other's shared memory. A single block needs no Hopper.
struct ClusterCrew : BlockCrew {
  using BlockCrew::BlockCrew;

  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (slices > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  template <class T>
  __device__ const T* peer(const T* s_mine, int of) const {
#if __CUDA_ARCH__ >= 900
    if (slices > 1) return cooperative_groups::this_cluster().map_shared_rank(s_mine, of);
#endif
    return s_mine;
  }
};

// Blocks that meet in global memory: all of them must be resident (a cooperative launch).
struct GlobalCrew : BlockCrew {
  unsigned* const g_arrivals;    // this crew's; 0 at launch
  const int64_t scratch_stride;  // bytes between the blocks' parts of the workspace
  mutable unsigned expected = 0;

  __device__ GlobalCrew(int slices_, unsigned* g_counters, int64_t stride)
      : BlockCrew(slices_), g_arrivals(g_counters + first_tile()), scratch_stride(stride) {}

  // As cooperative groups' grid.sync(): the block's writes, a fence, one arrival; then the others' arrivals, a fence.
  __device__ void sync() const {
    __syncthreads();
    if (slices == 1) return;
    expected += static_cast<unsigned>(slices);
    if (thread == 0) {
      __threadfence();
      atomicAdd(g_arrivals, 1u);
      while (static_cast<int>(*static_cast<volatile unsigned*>(g_arrivals) - expected) < 0) {  // the count may wrap
      }
      __threadfence();
    }
    __syncthreads();
  }
  template <class T>
  __device__ const T* peer(const T* g_mine, int of) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(g_mine) + (of - slice) * scratch_stride);
  }
};

}  // namespace assay::cuda
