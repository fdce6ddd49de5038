// The CUDA kernels' Python module, an extension of its own: a build without nvcc lacks it, and nothing loads it before a
// CUDA tensor comes. Addresses of device memory and a stream in; an error of the CUDA runtime becomes a RuntimeError.
#include <pybind11/functional.h>

#include "bindings.h"
#include "cuda/assay_cuda.h"

namespace py = pybind11;
using namespace pybind11::literals;
using assay::Address;

namespace {

void check(int32_t error, const std::string& what = "") {
  if (error) throw std::runtime_error(what + assay::cuda::error_string(error));
}

int compute_capability() {
  int32_t capability = 0;
  check(assay::cuda::compute_capability(&capability));
  return capability;
}

// `allocate` gives the address of a workspace of so many bytes, which may be used again once the stream has passed the work.
void ensemble(const std::vector<Address>& logits, const std::vector<int64_t>& row_strides,
              const std::vector<int64_t>& col_strides, int dtype, int64_t N, int64_t C, Address labels,
              int64_t ignore_index, const std::vector<double>& weights, uint32_t fields, Address out,
              Address prediction, const std::function<Address(size_t)>& allocate, Address stream) {
  const std::vector<const void*> pointers = assay::pointers(logits);
  const assay::EnsembleArgs args =
      assay::ensemble_args(pointers, row_strides, col_strides, dtype, N, C, labels, ignore_index, weights, fields, out,
                           prediction, 0);
  const char* const failed = "ensemble_stats: the CUDA kernel could not be launched: ";
  size_t bytes = 0;
  check(assay::cuda::ensemble_workspace(args, &bytes), failed);
  void* workspace = bytes ? reinterpret_cast<void*>(allocate(bytes)) : nullptr;
  int32_t error = 0;
  {
    py::gil_scoped_release release;
    error = assay::cuda::ensemble(args, workspace, bytes, reinterpret_cast<void*>(stream));
  }
  check(error, failed);
}

int64_t sparse_chunk(int64_t dim, int64_t nonzeros, int dtype, bool one_row) {
  int64_t chunk = 0;
  check(assay::cuda::sparse_chunk(dim, nonzeros, static_cast<assay::DType>(dtype), one_row, &chunk));
  return chunk;
}

void sparse(Address vectors, int dtype, int64_t rows, int64_t stride, int64_t count, Address order, int32_t dim,
            int32_t nonzeros, int64_t slice, int64_t slices_of_piece, Address partial, Address sums, Address stream) {
  const assay::cuda::SparseArgs args{reinterpret_cast<const void*>(vectors),
                                     static_cast<assay::DType>(dtype),
                                     rows,
                                     stride,
                                     count,
                                     reinterpret_cast<const uint16_t*>(order),
                                     dim,
                                     nonzeros,
                                     slice,
                                     slices_of_piece,
                                     reinterpret_cast<double*>(partial),
                                     reinterpret_cast<double*>(sums)};
  int32_t error = 0;
  {
    py::gil_scoped_release release;
    error = assay::cuda::sparse(args, reinterpret_cast<void*>(stream));
  }
  check(error, "project: the CUDA kernel could not be launched: ");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "assay's CUDA kernels. Use assay.ops, which checks what these take on trust.";
  m.def("build_info", &assay::cuda::build_info, "The compiler's version and the architectures: CUDA 13.0, sm_80 sm_90");
  m.def("compute_capability", &compute_capability, "10 * major + minor of the current device");
  m.def("ensemble", &ensemble, "logits"_a, "row_strides"_a, "col_strides"_a, "dtype"_a, "N"_a, "C"_a, "labels"_a,
        "ignore_index"_a, "weights"_a, "fields"_a, "out"_a, "prediction"_a, "allocate"_a, "stream"_a);
  m.def("sparse_chunk", &sparse_chunk, "dim"_a, "nonzeros"_a, "dtype"_a, "one_row"_a,
        "Coordinates whose entries the Sparse kernel takes at a time; 0 where it does not take the sketch");
  m.def("sparse", &sparse, "vectors"_a, "dtype"_a, "rows"_a, "stride"_a, "count"_a, "order"_a, "dim"_a, "nonzeros"_a,
        "slice"_a, "slices_of_piece"_a, "partial"_a, "sums"_a, "stream"_a);
}
