// What the library says about itself.
#include <cuda_runtime_api.h>

#include "assay_cuda.h"

#ifndef ASSAY_CUDA_ARCHITECTURES
#define ASSAY_CUDA_ARCHITECTURES "unknown architectures"
#endif
#define ASSAY_TEXT_(x) #x
#define ASSAY_TEXT(x) ASSAY_TEXT_(x)

namespace assay::cuda {

std::string error_string(int32_t error) {
  const auto e = static_cast<cudaError_t>(error);
  return std::string(cudaGetErrorName(e)) + ": " + cudaGetErrorString(e);
}

std::string build_info() {
  return "CUDA " ASSAY_TEXT(__CUDACC_VER_MAJOR__) "." ASSAY_TEXT(__CUDACC_VER_MINOR__) ", " ASSAY_CUDA_ARCHITECTURES;
}

int32_t compute_capability(int32_t* capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *capability = 10 * major + minor;
  return e;
}

}  // namespace assay::cuda
