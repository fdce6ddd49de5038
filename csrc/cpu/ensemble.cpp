// Statistics of K models' logits, row by row: see EnsembleStats in python/assay/ops/ensemble.py for the fields.
//
// Two shapes of the same computation. Narrow rows (C <= NARROW_MAX_C): one row per SIMD lane, so that ten classes fill
// the vectors as well as a hundred thousand do. Wide rows: one row at a time in blocks of columns.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace assay::ASSAY_ISA {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NaN = std::numeric_limits<float>::quiet_NaN();

// Up to here a tile's 4 x lanes x C floats (with AVX-512 64 KB) are nearly all in L1.
constexpr int64_t NARROW_MAX_C = 256;

void write_nan(const EnsembleArgs& a, int64_t n) {
  for (int f = 0; f < NUM_FLOAT_FIELDS; ++f)
    if (a.fields >> f & 1) a.out[f * a.N + n] = NaN;
  if (a.wants(PREDICTION)) a.prediction[n] = -1;
}

template <class T>
ASSAY_INLINE const T* row_pointer(const EnsembleArgs& a, int64_t k, int64_t n) {
  return static_cast<const T*>(a.logits[k]) + n * a.row_strides[k];
}

#include "ensemble_narrow.h"
#include "ensemble_wide.h"

template <class T>
void run(const EnsembleArgs& a) {
  if (a.C <= NARROW_MAX_C) {
    narrow<T>(a);
  } else {
    wide<T>(a);
  }
}

}  // namespace

void ensemble(const EnsembleArgs& a) {
  switch (a.dtype) {
    case DType::f32:
      return run<float>(a);
    case DType::bf16:
      return run<bf16>(a);
    case DType::f16:
      return run<f16>(a);
  }
}

}  // namespace assay::ASSAY_ISA
