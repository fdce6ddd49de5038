// The table of one instruction set's kernels; compiled once per set, like the kernels themselves.
#include "kernels.h"
#include "simd.h"

#define ASSAY_STRING_(x) #x
#define ASSAY_STRING(x) ASSAY_STRING_(x)

namespace assay::ASSAY_ISA {
extern const Kernels kernels;
const Kernels kernels = {ASSAY_STRING(ASSAY_ISA), MULTIPLIES_PAIRS, count_ngrams, count_tokens,
                         ensemble,                hash_ngrams,      least_hashes, linear,
                         multiply_reduce,         philox,           project,      residual,
                         scan,                    weighted_sums};
}  // namespace assay::ASSAY_ISA
