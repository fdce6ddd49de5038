// What the library says about itself.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>

#include "assay_cuda.h"

#ifndef ASSAY_CUDA_ARCHITECTURES
#define ASSAY_CUDA_ARCHITECTURES "unknown architectures"
#endif
#define ASSAY_TEXT_(x) #x
#define ASSAY_TEXT(x) ASSAY_TEXT_(x)

int32_t assay_cuda_abi_version() { return ASSAY_CUDA_ABI; }

const char* assay_cuda_error_string(int32_t error) {
  static thread_local char text[256];
  const auto e = static_cast<cudaError_t>(error);
  std::snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(e), cudaGetErrorString(e));
  return text;
}

const char* assay_cuda_build_info() {
  return "CUDA " ASSAY_TEXT(__CUDACC_VER_MAJOR__) "." ASSAY_TEXT(__CUDACC_VER_MINOR__) ", " ASSAY_CUDA_ARCHITECTURES;
}

int32_t assay_cuda_compute_capability(int32_t* capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *capability = 10 * major + minor;
  return e;
}

// python/assay/ops/_cuda.py writes this struct field by field.
static_assert(sizeof(assay::EnsembleArgs) == 112 && offsetof(assay::EnsembleArgs, threads) == 104);
