#include "ensemble_kernel.cuh"

namespace assay::cuda {
template const void* kernel_for<float>(Path, Sweeps);
template const void* finish_kernel_of<float>();
}
