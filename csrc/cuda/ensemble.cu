// ensemble_stats on NVIDIA GPUs: how its kernels are launched.
#include <cuda_runtime_api.h>

#include <mutex>

#include "assay_cuda.h"
#include "ensemble_kernel.cuh"

namespace assay::cuda {
namespace {

const void* kernel(DType dtype, Path path, Sweeps sweeps) {
  switch (dtype) {
    case DType::f32:
      return kernel_for<float>(path, sweeps);
    case DType::bf16:
      return kernel_for<bf16>(path, sweeps);
    case DType::f16:
      return kernel_for<f16>(path, sweeps);
  }
  return nullptr;
}

const void* finish_kernel(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return finish_kernel_of<float>();
    case DType::bf16:
      return finish_kernel_of<bf16>();
    case DType::f16:
      return finish_kernel_of<f16>();
  }
  return nullptr;
}

#define ASSAY_RETURN_ON_ERROR(call)                              \
  do {                                                           \
    if (const cudaError_t e = (call); e != cudaSuccess) return e; \
  } while (0)

struct DeviceFacts {
  bool known = false;
  Device device{};
  int multiprocessors = 0, l2_bytes = 0;
};

cudaError_t attribute(int* value, cudaDeviceAttr which, int device) {
  return cudaDeviceGetAttribute(value, which, device);
}

// The largest cluster that the device runs with the most shared memory that a part of a row may take.
cudaError_t max_cluster(const DeviceFacts& facts, int device, int* size) {
  int clusters = 0;
  *size = 1;
  ASSAY_RETURN_ON_ERROR(attribute(&clusters, cudaDevAttrClusterLaunch, device));
  if (!clusters) return cudaSuccess;
  const void* f = kernel_for<float>(Path::KEPT, Sweeps::TWO);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(max_threads(Path::KEPT));
  config.dynamicSmemBytes = static_cast<size_t>(
      KEPT_BYTES_LAST < facts.device.shared_bytes ? KEPT_BYTES_LAST : facts.device.shared_bytes);
  ASSAY_RETURN_ON_ERROR(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(facts.device.shared_bytes)));
  ASSAY_RETURN_ON_ERROR(cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  ASSAY_RETURN_ON_ERROR(cudaOccupancyMaxPotentialClusterSize(size, f, &config));
  *size = *size >= 16 ? 16 : *size >= 8 ? 8 : *size >= 4 ? 4 : *size >= 2 ? 2 : 1;
  return cudaSuccess;
}

// Facts of the current device, asked for once.
cudaError_t current_device(DeviceFacts* facts) {
  static std::mutex mutex;
  static DeviceFacts cache[64];
  int device = 0, shared = 0;
  ASSAY_RETURN_ON_ERROR(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < 64 && cache[device].known) {
    *facts = cache[device];
    return cudaSuccess;
  }
  ASSAY_RETURN_ON_ERROR(attribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  ASSAY_RETURN_ON_ERROR(attribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, device));
  ASSAY_RETURN_ON_ERROR(attribute(&facts->l2_bytes, cudaDevAttrL2CacheSize, device));
  facts->device.shared_bytes = shared;
  ASSAY_RETURN_ON_ERROR(max_cluster(*facts, device, &facts->device.max_cluster));
  facts->known = true;
  if (device < 64) cache[device] = *facts;
  return cudaSuccess;
}

// A launch but for its addresses.
struct Setup {
  Plan plan;
  Layout layout;
  Wants todo;
  const void* kernel;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[1];
  int64_t crews;  // of blocks; each takes a tile of rows at a time
  int64_t rows;   // of a launch: as many as there is room for in the workspace
  SumsLayout sums;
  int64_t models_bytes, counters_bytes, scratch_bytes, workspace_bytes;
};

cudaError_t set_up(const EnsembleArgs& a, Setup* s) {
  if (a.K < 1 || a.N < 0 || a.C < 1 || a.C > MAX_C || a.K > MAX_C) return cudaErrorInvalidValue;
  DeviceFacts facts;
  ASSAY_RETURN_ON_ERROR(current_device(&facts));
  const int itemsize = itemsize_of(a.dtype);
  const Plan plan = make_plan(a.K, a.C, itemsize, facts.device);
  const bool global = plan.path == Path::TWICE_GLOBAL;

  *s = Setup{};
  s->plan = plan;
  s->rows = a.N;
  s->sums = make_sums(a.K, plan.slices, plan.rows());
  if (plan.path != Path::NARROW) {
    const int64_t most = SUMS_BYTES / make_sums(a.K, plan.slices, 1).bytes;
    s->rows = a.N < most ? a.N : most < 1 ? 1 : most;
    s->sums = make_sums(a.K, plan.slices, s->rows);
  }
  const int64_t tiles = ceil_div(s->rows, plan.rows());
  s->todo = wants(a.fields, a.labels != nullptr, a.K);
  s->kernel = kernel(a.dtype, plan.path, sweeps(s->todo));
  if (!s->kernel) return cudaErrorInvalidValue;
  s->layout = make_layout(plan, a.K, s->todo.mixture && plan.keeps());
  s->config.blockDim = dim3(static_cast<unsigned>(plan.threads()));
  s->config.dynamicSmemBytes = global ? 0 : static_cast<size_t>(s->layout.bytes);
  s->config.attrs = s->attributes;
  if (s->config.dynamicSmemBytes > 48 << 10)  // the same value from every thread that launches this kernel
    ASSAY_RETURN_ON_ERROR(cudaFuncSetAttribute(s->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(facts.device.shared_bytes)));
  if (global) {
    s->attributes[0].id = cudaLaunchAttributeCooperative;
    s->attributes[0].val.cooperative = 1;
    s->config.numAttrs = 1;
  } else if (plan.slices > 1) {
    if (plan.slices > 8)
      ASSAY_RETURN_ON_ERROR(cudaFuncSetAttribute(s->kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    s->attributes[0].id = cudaLaunchAttributeClusterDimension;
    s->attributes[0].val.clusterDim = {static_cast<unsigned>(plan.slices), 1, 1};
    s->config.numAttrs = 1;
  }

  // Rows that are read twice: as many as are resident and fit L2. Others: a crew per tile, up to a grid's sensible size.
  s->crews = tiles < 1 << 20 ? tiles : 1 << 20;
  if (plan.twice()) {
    int resident = 0;
    if (global || plan.slices == 1) {
      ASSAY_RETURN_ON_ERROR(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, s->kernel, plan.threads(), s->config.dynamicSmemBytes));
      resident = resident * facts.multiprocessors / plan.slices;
    } else {
      s->config.gridDim = dim3(static_cast<unsigned>(plan.slices));
      ASSAY_RETURN_ON_ERROR(cudaOccupancyMaxActiveClusters(&resident, s->kernel, &s->config));
    }
    if (resident < 1) return cudaErrorCooperativeLaunchTooLarge;
    int64_t crews = resident;
    if (s->todo.mixture) {
      const auto in_l2 = static_cast<int64_t>(TWICE_L2_SHARE * facts.l2_bytes / (static_cast<double>(a.K) * a.C * itemsize));
      crews = in_l2 < 1 ? 1 : in_l2 < crews ? in_l2 : crews;
    }
    s->crews = tiles < crews ? tiles : crews;
  }
  s->config.gridDim = dim3(static_cast<unsigned>(s->crews * plan.slices));

  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  s->models_bytes = a.K > INLINE_MODELS ? aligned(a.K * static_cast<int64_t>(sizeof(ModelLogits))) : 0;
  s->counters_bytes = global ? aligned(s->crews * static_cast<int64_t>(sizeof(unsigned))) : 0;
  s->scratch_bytes = global ? aligned(s->crews * plan.slices * s->layout.bytes) : 0;
  s->workspace_bytes = s->models_bytes + s->counters_bytes + s->scratch_bytes + (plan.path == Path::NARROW ? 0 : s->sums.bytes);
  return cudaSuccess;
}

struct ModelBatch {
  ModelLogits models[INLINE_MODELS];
};

// Kernel arguments are part of a captured graph; a copy from host memory would be read again at each replay.
__global__ void upload_models(const __grid_constant__ ModelBatch batch, int count, ModelLogits* g_models) {
  if (static_cast<int>(threadIdx.x) < count) g_models[threadIdx.x] = batch.models[threadIdx.x];
}

ModelLogits model_of(const EnsembleArgs& a, int64_t k) {
  return {a.logits[k], a.row_strides[k], a.col_strides[k], static_cast<float>(a.weights[k])};
}

cudaError_t place_models(const EnsembleArgs& a, void* g_workspace, cudaStream_t stream, Problem* p) {
  if (a.K <= INLINE_MODELS) {
    for (int64_t k = 0; k < a.K; ++k) p->inline_models[k] = model_of(a, k);
    return cudaSuccess;
  }
  auto* g_models = static_cast<ModelLogits*>(g_workspace);
  for (int64_t k0 = 0; k0 < a.K; k0 += INLINE_MODELS) {
    ModelBatch batch{};
    const int count = static_cast<int>(a.K - k0 < INLINE_MODELS ? a.K - k0 : INLINE_MODELS);
    for (int i = 0; i < count; ++i) batch.models[i] = model_of(a, k0 + i);
    ModelLogits* g_to = g_models + k0;
    void* arguments[] = {&batch, const_cast<int*>(&count), &g_to};
    ASSAY_RETURN_ON_ERROR(cudaLaunchKernel(reinterpret_cast<const void*>(&upload_models), dim3(1), dim3(INLINE_MODELS),
                                           arguments, 0, stream));
  }
  p->g_models = g_models;
  return cudaSuccess;
}

Problem problem_of(const EnsembleArgs& a, const Setup& s) {
  Problem p{};
  p.N = a.N;
  p.K = static_cast<int32_t>(a.K);
  p.C = static_cast<int32_t>(a.C);
  p.g_labels = a.labels;
  p.ignore_index = a.ignore_index;
  p.fields = a.fields;
  p.todo = s.todo;
  p.g_out = a.out;
  p.g_prediction = a.prediction;
  p.plan = s.plan;
  p.layout = s.layout;
  p.sums_layout = s.sums;
  return p;
}

// The rows from launch.problem.first on: their sums, then their fields.
cudaError_t run_rows(const EnsembleArgs& a, const Setup& s, Launch& launch) {
  Problem& p = launch.problem;
  p.rows = a.N - p.first < s.rows ? a.N - p.first : s.rows;
  const bool narrow = s.plan.path == Path::NARROW;
  if (s.counters_bytes)
    ASSAY_RETURN_ON_ERROR(cudaMemsetAsync(launch.g_counters, 0, static_cast<size_t>(s.counters_bytes), s.config.stream));
  if (!narrow && s.todo.tops)  // above every column
    ASSAY_RETURN_ON_ERROR(cudaMemsetAsync(p.sums.tops, 0xff, static_cast<size_t>(s.sums.mixtures - s.sums.tops), s.config.stream));
  void* arguments[] = {&launch};
  ASSAY_RETURN_ON_ERROR(cudaLaunchKernelExC(&s.config, s.kernel, arguments));
  if (narrow) return cudaSuccess;
  void* problem[] = {&p};
  return cudaLaunchKernel(finish_kernel(a.dtype), dim3(static_cast<unsigned>(ceil_div(p.rows, FINISH_THREADS))),
                          dim3(FINISH_THREADS), problem, 0, s.config.stream);
}

cudaError_t run(const EnsembleArgs& a, void* g_workspace, size_t bytes, cudaStream_t stream) {
  if (a.N == 0) return cudaSuccess;
  Setup s;
  ASSAY_RETURN_ON_ERROR(set_up(a, &s));
  if (bytes < static_cast<size_t>(s.workspace_bytes)) return cudaErrorInvalidValue;
  s.config.stream = stream;
  Launch launch{};
  launch.problem = problem_of(a, s);
  ASSAY_RETURN_ON_ERROR(place_models(a, g_workspace, stream, &launch.problem));
  char* const g_counters = static_cast<char*>(g_workspace) + s.models_bytes;
  launch.g_counters = reinterpret_cast<unsigned*>(g_counters);
  launch.g_scratch = g_counters + s.counters_bytes;
  launch.scratch_stride = s.layout.bytes;
  if (s.plan.path != Path::NARROW)
    launch.problem.sums = sums_at(launch.g_scratch + s.scratch_bytes, s.sums, s.rows);
  for (Problem& p = launch.problem; p.first < a.N; p.first += s.rows) ASSAY_RETURN_ON_ERROR(run_rows(a, s, launch));
  return cudaSuccess;
}

}  // namespace

int32_t ensemble_workspace(const EnsembleArgs& args, size_t* bytes) {
  *bytes = 0;
  if (args.N == 0) return cudaSuccess;
  Setup s;
  const cudaError_t e = set_up(args, &s);
  if (e == cudaSuccess) *bytes = static_cast<size_t>(s.workspace_bytes);
  return e;
}

int32_t ensemble(const EnsembleArgs& args, void* workspace, size_t bytes, void* stream) {
  return run(args, workspace, bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace assay::cuda
