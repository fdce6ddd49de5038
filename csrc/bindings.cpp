// The CPU kernels' Python module. Addresses and sizes in, nothing checked, nothing converted: assay.ops does both.
#include "bindings.h"
#include "ngrams.h"

namespace py = pybind11;
using namespace pybind11::literals;
using assay::Address;
using assay::DType;

namespace {

const assay::Kernels& kernels(const std::string& isa) {
  const assay::Kernels* k = assay::select_kernels(isa.empty() ? nullptr : isa.c_str());
  if (!k) throw py::value_error("instruction set " + isa + " is unknown, not built or not supported by this processor");
  return *k;
}

void ensemble(const std::string& isa, const std::vector<Address>& logits, const std::vector<int64_t>& row_strides,
              const std::vector<int64_t>& col_strides, int dtype, int64_t N, int64_t C, Address labels,
              int64_t ignore_index, const std::vector<double>& weights, uint32_t fields, Address out,
              Address prediction, int threads) {
  const assay::Kernels& k = kernels(isa);
  const std::vector<const void*> pointers = assay::pointers(logits);
  const assay::EnsembleArgs args =
      assay::ensemble_args(pointers, row_strides, col_strides, dtype, N, C, labels, ignore_index, weights, fields, out,
                           prediction, threads);
  py::gil_scoped_release release;
  k.ensemble(args);
}

void multiply_reduce(const std::string& isa, Address x, int x_dtype, int64_t x_stride, Address y, int y_dtype,
                     int64_t y_stride, int64_t rows, int64_t cols, Address out, Address abs_out, int threads) {
  const assay::Kernels& k = kernels(isa);
  const assay::MultiplyReduceArgs args{reinterpret_cast<const void*>(x),
                                       reinterpret_cast<const void*>(y),
                                       static_cast<DType>(x_dtype),
                                       static_cast<DType>(y_dtype),
                                       rows,
                                       cols,
                                       x_stride,
                                       y_stride,
                                       reinterpret_cast<double*>(out),
                                       reinterpret_cast<double*>(abs_out),
                                       threads};
  py::gil_scoped_release release;
  k.multiply_reduce(args);
}

void linear(const std::string& isa, Address hidden_t, int64_t rows, int64_t padded_rows, Address weight,
            int weight_dtype, int64_t C, int64_t D, int64_t weight_stride, Address bias, Address out,
            int64_t out_stride, int threads, bool pairs) {
  const assay::Kernels& k = kernels(isa);
  const assay::LinearArgs args{reinterpret_cast<const float*>(hidden_t),
                               rows,
                               padded_rows,
                               reinterpret_cast<const void*>(weight),
                               static_cast<DType>(weight_dtype),
                               C,
                               D,
                               weight_stride,
                               reinterpret_cast<const float*>(bias),
                               reinterpret_cast<float*>(out),
                               out_stride,
                               threads,
                               pairs};
  py::gil_scoped_release release;
  k.linear(args);
}

void residual(const std::string& isa, Address logits, int64_t rows, int64_t C, int64_t stride, Address labels,
              int64_t ignore_index, Address sqnorm, int threads) {
  const assay::Kernels& k = kernels(isa);
  const assay::ResidualArgs args{reinterpret_cast<float*>(logits),
                                 rows,
                                 C,
                                 stride,
                                 reinterpret_cast<const int64_t*>(labels),
                                 ignore_index,
                                 reinterpret_cast<double*>(sqnorm),
                                 threads};
  py::gil_scoped_release release;
  k.residual(args);
}

void philox(const std::string& isa, uint32_t key0, uint32_t key1, int64_t first, int64_t n, uint32_t c2, uint32_t c3,
            Address out, int threads) {
  const assay::Kernels& k = kernels(isa);
  const assay::PhiloxArgs args{key0, key1, first, n, c2, c3, reinterpret_cast<uint32_t*>(out), threads};
  py::gil_scoped_release release;
  k.philox(args);
}

void project(const std::string& isa, Address vectors, int dtype, int64_t rows, int64_t cols, int64_t stride,
             int64_t first, uint32_t key0, uint32_t key1, int64_t dim, int64_t nonzeros, Address out, int threads) {
  const assay::Kernels& k = kernels(isa);
  const assay::ProjectArgs args{reinterpret_cast<const void*>(vectors),
                                static_cast<DType>(dtype),
                                rows,
                                cols,
                                stride,
                                first,
                                key0,
                                key1,
                                dim,
                                nonzeros,
                                reinterpret_cast<double*>(out),
                                threads};
  try {
    py::gil_scoped_release release;
    k.project(args);
  } catch (const assay::OutOfMemory& e) {
    PyErr_Format(PyExc_MemoryError,
                 "project: could not allocate %lld bytes for the sums of %lld rows with dim=%lld; take a smaller dim or "
                 "fewer rows at a time",
                 static_cast<long long>(e.bytes), static_cast<long long>(rows), static_cast<long long>(dim));
    throw py::error_already_set();
  }
}

void scan(const std::string& isa, Address features, int dtype, Address scales, int64_t N, int64_t D, int64_t stride,
          Address queries, int64_t M, bool maximum, Address scores, int64_t k, Address values, Address indices,
          int threads) {
  const assay::Kernels& kernel = kernels(isa);
  const assay::ScanArgs args{reinterpret_cast<const void*>(features),
                             static_cast<DType>(dtype),
                             reinterpret_cast<const float*>(scales),
                             N,
                             D,
                             stride,
                             reinterpret_cast<const float*>(queries),
                             M,
                             maximum,
                             reinterpret_cast<float*>(scores),
                             k,
                             reinterpret_cast<float*>(values),
                             reinterpret_cast<int64_t*>(indices),
                             threads};
  py::gil_scoped_release release;
  kernel.scan(args);
}

assay::Texts texts(Address bytes, Address offsets, bool wide, int64_t rows, Address characters, bool punctuation,
                   int threads) {
  return {reinterpret_cast<const uint8_t*>(bytes), reinterpret_cast<const void*>(offsets), wide, rows,
          reinterpret_cast<const uint32_t*>(characters), punctuation, threads};
}

void count_tokens(const std::string& isa, Address bytes, Address offsets, bool wide, int64_t rows, Address characters,
                  bool punctuation, int threads, Address counts) {
  const assay::Kernels& k = kernels(isa);
  const assay::Texts read = texts(bytes, offsets, wide, rows, characters, punctuation, threads);
  py::gil_scoped_release release;
  k.count_tokens(read, reinterpret_cast<int64_t*>(counts));
}

void hash_ngrams(const std::string& isa, Address bytes, Address offsets, bool wide, int64_t rows, Address characters,
                 bool punctuation, int threads, int64_t least, int64_t order, uint64_t seed, Address places, Address out) {
  const assay::Kernels& k = kernels(isa);
  const assay::Texts read = texts(bytes, offsets, wide, rows, characters, punctuation, threads);
  const assay::HashArgs args{least, order, seed, reinterpret_cast<const int64_t*>(places),
                             reinterpret_cast<uint64_t*>(out)};
  py::gil_scoped_release release;
  k.hash_ngrams(read, args);
}

bool count_ngrams(const std::string& isa, Address bytes, Address offsets, bool wide, int64_t rows, Address characters,
                  bool punctuation, int threads, int64_t order, uint64_t seed, int64_t buckets, Address terms,
                  int64_t count, Address starts, int64_t bits, Address places, Address features, Address counts,
                  Address found) {
  const assay::Kernels& k = kernels(isa);
  const assay::Texts read = texts(bytes, offsets, wide, rows, characters, punctuation, threads);
  const assay::CountArgs args{order,
                              seed,
                              buckets,
                              reinterpret_cast<const uint64_t*>(terms),
                              count,
                              reinterpret_cast<const int64_t*>(starts),
                              bits,
                              reinterpret_cast<const int64_t*>(places),
                              reinterpret_cast<int64_t*>(features),
                              reinterpret_cast<int64_t*>(counts),
                              reinterpret_cast<int64_t*>(found)};
  py::gil_scoped_release release;
  return k.count_ngrams(read, args);
}

void least_hashes(const std::string& isa, Address hashes, Address places, int64_t rows, Address multipliers,
                  Address addends, int64_t count, Address out, int threads) {
  const assay::Kernels& k = kernels(isa);
  const assay::LeastArgs args{reinterpret_cast<const uint64_t*>(hashes),
                              reinterpret_cast<const int64_t*>(places),
                              rows,
                              reinterpret_cast<const uint32_t*>(multipliers),
                              reinterpret_cast<const uint32_t*>(addends),
                              count,
                              reinterpret_cast<uint32_t*>(out),
                              threads};
  py::gil_scoped_release release;
  k.least_hashes(args);
}

void weighted_sums(const std::string& isa, Address offsets, int64_t rows, Address features, Address values,
                   Address weights, int64_t targets, Address out, int threads) {
  const assay::Kernels& k = kernels(isa);
  const assay::SumsArgs args{reinterpret_cast<const int64_t*>(offsets),
                             rows,
                             reinterpret_cast<const int64_t*>(features),
                             reinterpret_cast<const double*>(values),
                             reinterpret_cast<const double*>(weights),
                             targets,
                             reinterpret_cast<double*>(out),
                             threads};
  py::gil_scoped_release release;
  k.weighted_sums(args);
}

std::vector<std::pair<std::string, bool>> instruction_sets() {
  assay::Isa list[4];
  const int n = assay::isa_list(list);
  std::vector<std::pair<std::string, bool>> out;
  for (int i = 0; i < n; ++i) out.emplace_back(list[i].kernels->isa, list[i].supported);
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "assay's CPU kernels. Use assay.ops, which checks what these take on trust.";
  m.def("count_ngrams", &count_ngrams, "isa"_a, "bytes"_a, "offsets"_a, "wide"_a, "rows"_a, "characters"_a, "punctuation"_a,
        "threads"_a, "order"_a, "seed"_a, "buckets"_a, "terms"_a, "count"_a, "starts"_a, "bits"_a, "places"_a,
        "features"_a, "counts"_a, "found"_a, "False where memory runs out");
  m.def("count_tokens", &count_tokens, "isa"_a, "bytes"_a, "offsets"_a, "wide"_a, "rows"_a, "characters"_a, "punctuation"_a,
        "threads"_a, "counts"_a);
  m.def("ensemble", &ensemble, "isa"_a, "logits"_a, "row_strides"_a, "col_strides"_a, "dtype"_a, "N"_a, "C"_a,
        "labels"_a, "ignore_index"_a, "weights"_a, "fields"_a, "out"_a, "prediction"_a, "threads"_a);
  m.def("hash_ngrams", &hash_ngrams, "isa"_a, "bytes"_a, "offsets"_a, "wide"_a, "rows"_a, "characters"_a, "punctuation"_a,
        "threads"_a, "least"_a, "order"_a, "seed"_a, "places"_a, "out"_a);
  m.def("least_hashes", &least_hashes, "isa"_a, "hashes"_a, "places"_a, "rows"_a, "multipliers"_a, "addends"_a, "count"_a,
        "out"_a, "threads"_a);
  m.def("linear", &linear, "isa"_a, "hidden_t"_a, "rows"_a, "padded_rows"_a, "weight"_a, "weight_dtype"_a, "C"_a,
        "D"_a, "weight_stride"_a, "bias"_a, "out"_a, "out_stride"_a, "threads"_a, "pairs"_a);
  m.def("multiplies_pairs", [](const std::string& isa) { return kernels(isa).multiply_pairs; }, "isa"_a);
  m.def("multiply_reduce", &multiply_reduce, "isa"_a, "x"_a, "x_dtype"_a, "x_stride"_a, "y"_a, "y_dtype"_a,
        "y_stride"_a, "rows"_a, "cols"_a, "out"_a, "abs_out"_a, "threads"_a);
  m.def("philox", &philox, "isa"_a, "key0"_a, "key1"_a, "first"_a, "n"_a, "c2"_a, "c3"_a, "out"_a, "threads"_a);
  m.def("project", &project, "isa"_a, "vectors"_a, "dtype"_a, "rows"_a, "cols"_a, "stride"_a, "first"_a, "key0"_a,
        "key1"_a, "dim"_a, "nonzeros"_a, "out"_a, "threads"_a);
  m.def("residual", &residual, "isa"_a, "logits"_a, "rows"_a, "C"_a, "stride"_a, "labels"_a, "ignore_index"_a,
        "sqnorm"_a, "threads"_a);
  m.def("scan", &scan, "isa"_a, "features"_a, "dtype"_a, "scales"_a, "N"_a, "D"_a, "stride"_a, "queries"_a, "M"_a,
        "maximum"_a, "scores"_a, "k"_a, "values"_a, "indices"_a, "threads"_a);
  m.def("weighted_sums", &weighted_sums, "isa"_a, "offsets"_a, "rows"_a, "features"_a, "values"_a, "weights"_a,
        "targets"_a, "out"_a, "threads"_a);
  m.def("instruction_sets", &instruction_sets, "(name, supported by this processor), best last");
}
