// ensemble_stats' kernels: EnsembleRows for each path. A file per dtype instantiates them, so that they compile side by side.
#pragma once
#include <cuda_runtime_api.h>

#include "crew.cuh"
#include "ensemble_rows.h"

namespace assay::cuda {

// Rows whose sums are in the workspace: a thread each.
constexpr int FINISH_THREADS = 128;
template <class T>
__global__ void __launch_bounds__(FINISH_THREADS, 8) finish_kernel(const __grid_constant__ Problem p) {
  const int64_t n = int64_t{blockIdx.x} * FINISH_THREADS + threadIdx.x;
  if (n < p.rows) FinishRow<T>(p, p.sums, n, n).run();
}

struct Launch {
  Problem problem;
  char* g_scratch;         // TWICE_GLOBAL: a part per block
  int64_t scratch_stride;  // bytes
  unsigned* g_counters;    // TWICE_GLOBAL: one per crew, 0
};

// Blocks that the registers of an SM must have room for: with fewer, too few loads are in flight.
constexpr int min_blocks(Path path) {
  return path == Path::NARROW ? 6 : path == Path::WARP ? 5 : max_warps(path) > 8 ? 1 : path == Path::ONCE || path == Path::KEPT ? 3 : 2;
}

template <class T, Path PATH, Sweeps SWEEPS>
__global__ void __launch_bounds__(max_threads(PATH), min_blocks(PATH))
    ensemble_kernel(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) char s_memory[];
  const Problem& p = launch.problem;
  if constexpr (PATH == Path::TWICE_GLOBAL) {
    const GlobalCrew crew(p.plan.slices, launch.g_counters, launch.scratch_stride);
    char* g_memory = launch.g_scratch + blockIdx.x * launch.scratch_stride;
    EnsembleRows<T, PATH, SWEEPS, GlobalCrew>(p, crew, g_memory).run();
  } else if constexpr (is_packed(PATH)) {
    EnsembleRows<T, PATH, SWEEPS, BlockCrew>(p, BlockCrew(), s_memory).run();
  } else {
    const ClusterCrew crew(p.plan.slices);
    EnsembleRows<T, PATH, SWEEPS, ClusterCrew>(p, crew, s_memory).run();
  }
}

template <class T, Path PATH, Sweeps SWEEPS>
const void* kernel_or_null() {
  if constexpr (has_kernel(PATH, SWEEPS)) return reinterpret_cast<const void*>(&ensemble_kernel<T, PATH, SWEEPS>);
  return nullptr;
}

template <class T, Path PATH>
const void* kernel_of(Sweeps sweeps) {
  switch (sweeps) {
    case Sweeps::ONE:
      return kernel_or_null<T, PATH, Sweeps::ONE>();
    case Sweeps::SQUARES:
      return kernel_or_null<T, PATH, Sweeps::SQUARES>();
    case Sweeps::TWO:
      return kernel_or_null<T, PATH, Sweeps::TWO>();
  }
  return nullptr;
}

template <class T>
const void* kernel_for(Path path, Sweeps sweeps) {
  switch (path) {
    case Path::NARROW:
      return kernel_of<T, Path::NARROW>(sweeps);
    case Path::WARP:
      return kernel_of<T, Path::WARP>(sweeps);
    case Path::ONCE:
      return kernel_of<T, Path::ONCE>(sweeps);
    case Path::TWICE_GLOBAL:
      return kernel_of<T, Path::TWICE_GLOBAL>(sweeps);
    case Path::TWICE:
      return kernel_of<T, Path::TWICE>(sweeps);
    case Path::KEPT:
      return kernel_of<T, Path::KEPT>(sweeps);
  }
  return nullptr;
}

template <class T>
const void* finish_kernel_of() {
  return reinterpret_cast<const void*>(&finish_kernel<T>);
}

extern template const void* kernel_for<float>(Path, Sweeps);
extern template const void* kernel_for<bf16>(Path, Sweeps);
extern template const void* kernel_for<f16>(Path, Sweeps);
extern template const void* finish_kernel_of<float>();
extern template const void* finish_kernel_of<bf16>();
extern template const void* finish_kernel_of<f16>();

}  // namespace assay::cuda
