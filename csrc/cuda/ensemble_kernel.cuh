// ensemble_stats' kernels: EnsembleRows for each path. A file per dtype instantiates them, so that they compile side by side.
#pragma once
#include <cuda_runtime_api.h>

#include "crew.cuh"
#include "ensemble_rows.h"

namespace assay::cuda {

struct Launch {
  Problem problem;
  char* g_scratch;         // TWICE_GLOBAL: a part per block
  int64_t scratch_stride;  // bytes
  unsigned* g_counters;    // TWICE_GLOBAL: one per crew, 0
};

constexpr int max_threads(Path path) {
  return path == Path::NARROW ? NARROW_THREADS : path == Path::WARP ? 32 * WARP_ROWS : 32 * WIDE_MAX_WARPS;
}
// Blocks that the registers of an SM must have room for: with fewer, too few loads are in flight.
constexpr int min_blocks(Path path) {
  return path == Path::NARROW ? 6 : path == Path::WARP ? 5 : path == Path::ONCE || path == Path::KEPT ? 3 : 2;
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
      if (sweeps == Sweeps::TWO) return kernel_of<T, Path::TWICE>(sweeps);
      [[fallthrough]];  // without a second sweep there is nothing to keep or to read twice
    case Path::KEPT:
      return kernel_of<T, Path::KEPT>(sweeps);
  }
  return nullptr;
}

extern template const void* kernel_for<float>(Path, Sweeps);
extern template const void* kernel_for<bf16>(Path, Sweeps);
extern template const void* kernel_for<f16>(Path, Sweeps);

}  // namespace assay::cuda
