// Uninitialised scratch. Not std::vector: its functions would be shared with units compiled for other processors.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "../assay.h"

namespace assay::ASSAY_ISA {

// SMALL: a few hundred KB, whose lack ends the process. LARGE: what follows from the arguments, whose lack is thrown as
// OutOfMemory; only outside of teams, whose threads no exception may leave.
enum class Size { SMALL, LARGE };

template <class T>
struct Scratch {
  T* p;
  explicit Scratch(int64_t n, Size size = Size::SMALL) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    p = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (p) return;
    if (size == Size::LARGE) throw OutOfMemory{static_cast<int64_t>(bytes)};
    std::abort();
  }
  ~Scratch() { std::free(p); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return p[i]; }
};

}  // namespace assay::ASSAY_ISA
