// Uninitialised scratch. Not std::vector: its functions would be shared with units compiled for other processors.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace assay::ASSAY_ISA {

template <class T>
struct Scratch {
  T* p;
  explicit Scratch(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    p = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!p) std::abort();  // a few hundred KB
  }
  ~Scratch() { std::free(p); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return p[i]; }
};

}  // namespace assay::ASSAY_ISA
