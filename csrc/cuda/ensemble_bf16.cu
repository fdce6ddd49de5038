#include "ensemble_kernel.cuh"

namespace assay::cuda {
template const void* kernel_for<bf16>(Path, Sweeps);
template const void* finish_kernel_of<bf16>();
}
