// What both Python modules share: addresses come as integers, and pybind11 is included nowhere else.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "assay.h"

namespace assay {

using Address = uintptr_t;

inline std::vector<const void*> pointers(const std::vector<Address>& addresses) {
  std::vector<const void*> out;
  out.reserve(addresses.size());
  for (Address a : addresses) out.push_back(reinterpret_cast<const void*>(a));
  return out;
}

// Points into its arguments, which must live as long.
inline EnsembleArgs ensemble_args(const std::vector<const void*>& logits, const std::vector<int64_t>& row_strides,
                                  const std::vector<int64_t>& col_strides, int dtype, int64_t N, int64_t C,
                                  Address labels, int64_t ignore_index, const std::vector<double>& weights,
                                  uint32_t fields, Address out, Address prediction, int threads) {
  return {logits.data(),
          row_strides.data(),
          col_strides.data(),
          static_cast<DType>(dtype),
          static_cast<int64_t>(logits.size()),
          N,
          C,
          reinterpret_cast<const int64_t*>(labels),
          ignore_index,
          weights.data(),
          fields,
          reinterpret_cast<float*>(out),
          reinterpret_cast<int64_t*>(prediction),
          threads};
}

}  // namespace assay
