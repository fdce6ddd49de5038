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

}  // namespace assay
