// Floats as logits of each dtype.
#pragma once
#include "cuda/logits.h"

namespace assay::cuda {

inline void from_float(float f, float& to) { to = f; }
inline void from_float(float f, bf16& to) { to.bits = static_cast<uint16_t>(float_to_bits(f) >> 16); }
inline void from_float(float f, f16& to) {  // truncates; overflows to inf
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000;
  const int exponent = static_cast<int>(u >> 23 & 0xff) - 127;
  uint32_t bits;
  if (exponent == 128) {
    bits = 0x7c00 | (u & 0x7fffff ? 0x200 : 0);
  } else if (exponent > 15) {
    bits = 0x7bff;
  } else if (exponent >= -14) {
    bits = static_cast<uint32_t>(exponent + 15) << 10 | (u >> 13 & 0x3ff);
  } else {
    bits = exponent < -24 ? 0 : (0x400 | (u >> 13 & 0x3ff)) >> (-14 - exponent);
  }
  to.bits = static_cast<uint16_t>(sign | bits);
}

}  // namespace assay::cuda
