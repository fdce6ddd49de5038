// The native interface: plain structs of pointers and sizes. Nothing here knows Python or torch.
#pragma once
#include <cstdint>

#include "ngrams.h"

namespace assay {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
constexpr int itemsize_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Thrown where memory whose size follows from the arguments cannot be had.
struct OutOfMemory {
  int64_t bytes;
};

// One bit per field of EnsembleStats, in the order of its rows in `EnsembleArgs::out`.
enum Field : int32_t {
  NLL,
  MEAN_NLL,
  MARGIN,
  AGREEMENT,
  EL2N,
  ENTROPY,
  EXPECTED_ENTROPY,
  MUTUAL_INFORMATION,
  CONFIDENCE,
  VOTE_ENTROPY,
  PREDICTION,  // written to `prediction`, not to `out`
  NUM_FIELDS,
};
constexpr int32_t NUM_FLOAT_FIELDS = PREDICTION;

struct EnsembleArgs {
  const void* const* logits;   // K pointers to (N, C)
  const int64_t* row_strides;  // K, in elements
  const int64_t* col_strides;  // K, in elements
  DType dtype;
  int64_t K, N, C;
  const int64_t* labels;  // (N,) or null; each is in [0, C) or equals ignore_index
  int64_t ignore_index;
  const double* weights;  // (K,), >= 0, summing to 1
  uint32_t fields;        // 1 << Field for each field wanted
  float* out;             // (NUM_FLOAT_FIELDS, N); rows of fields not wanted are left alone
  int64_t* prediction;    // (N,)
  int32_t threads;

  bool wants(Field f) const { return fields >> f & 1; }
};

// out = hidden weightᵀ + bias, for rows few beside C
struct LinearArgs {
  const float* hidden_t;      // (D, padded_rows): the rows transposed, zeros past the last
  int64_t rows, padded_rows;  // padded to a multiple of 16
  const void* weight;         // (C, D)
  DType weight_dtype;
  int64_t C, D, weight_stride;  // between rows, in elements; columns are adjacent
  const float* bias;            // (C,) or null
  float* out;                   // (rows, C)
  int64_t out_stride;
  int32_t threads;
  // hidden_t is (D / 2 rounded up, padded_rows, 2) bfloat16 instead: for a bfloat16 weight, with kernels that multiply pairs
  bool pairs = false;
};

// logits -> softmax - onehot(label) in place, zeros in ignored rows
struct ResidualArgs {
  float* logits;  // (rows, C)
  int64_t rows, C, stride;
  const int64_t* labels;  // (rows,): each is in [0, C) or equals ignore_index
  int64_t ignore_index;
  double* sqnorm;  // (rows,)
  int32_t threads;
};

// out[r] = sum_c x[r, c] * y[r, c], abs_out[r] = sum_c |x[r, c] * y[r, c]|
struct MultiplyReduceArgs {
  const void* x;
  const void* y;
  DType x_dtype, y_dtype;
  int64_t rows, cols;
  int64_t x_stride, y_stride;  // between rows, in elements; columns are adjacent
  double* out;                 // (rows,)
  double* abs_out;             // (rows,) or null
  int32_t threads;
};

// The 128 random bits of counters (first mod 2^32, first / 2^32, c2, c3), (first + 1 ...)
struct PhiloxArgs {
  uint32_t key0, key1;
  int64_t first, n;
  uint32_t c2, c3;
  uint32_t* out;  // (n, 4)
  int32_t threads;
};

// out += a random projection of the coordinates first, first + 1, ..., without its scale. Throws OutOfMemory.
struct ProjectArgs {
  const void* vectors;  // (rows, cols)
  DType dtype;
  int64_t rows, cols, stride;  // between rows, in elements; columns are adjacent
  int64_t first;
  uint32_t key0, key1;
  int64_t dim, nonzeros;  // of each coordinate in a sparse projection; 0: a dense one
  double* out;            // (rows, dim)
  int32_t threads;
  int64_t scratch_bytes = int64_t{1} << 30;  // for sums on their way to `out`; more where two rows' take more
};

// scores[m, i] = <features[i], queries[m]> (times scales[i]), or per m the k largest of them and their rows i
struct ScanArgs {
  const void* features;  // (N, D)
  DType dtype;
  const float* scales;  // (N,): the features are int8, whatever `dtype` says; or null
  int64_t N, D, stride;  // between rows, in elements; columns are adjacent
  const float* queries;  // (M, D)
  int64_t M;
  bool maximum;      // of a row's M scores only the largest (NaN if one is NaN): 1 column below instead of M
  float* scores;     // (columns, N); or null for the k best
  int64_t k;         // at most N
  float* values;     // (threads, columns, k), all NaN; the first thread's part becomes the result, best first
  int64_t* indices;  // likewise, all INT64_MAX
  int32_t threads;
};

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  bool multiply_pairs;  // whether `linear` takes pairs
  bool (*count_ngrams)(const Texts&, const CountArgs&);  // false if a thread cannot have memory for a row
  void (*count_tokens)(const Texts&, int64_t* counts);   // (rows,)
  void (*ensemble)(const EnsembleArgs&);
  void (*hash_ngrams)(const Texts&, const HashArgs&);
  void (*least_hashes)(const LeastArgs&);
  void (*linear)(const LinearArgs&);
  void (*multiply_reduce)(const MultiplyReduceArgs&);
  void (*philox)(const PhiloxArgs&);
  void (*project)(const ProjectArgs&);
  void (*residual)(const ResidualArgs&);
  void (*scan)(const ScanArgs&);
  void (*weighted_sums)(const SumsArgs&);
};

// Instruction sets compiled into this build, best last; `supported` says whether this processor runs it.
struct Isa {
  const Kernels* kernels;
  bool supported;
};
int isa_list(Isa out[4]);

// The best supported set, or the one named; null if the name is unknown, not built or not supported.
const Kernels* select_kernels(const char* name);

}  // namespace assay
