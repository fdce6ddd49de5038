// Philox4x32-10 (Salmon et al., SC 2011), Wide::L counters at a time: ops/philox.py's ten rounds, with the same bits.
#pragma once
#include "simd.h"

namespace assay::ASSAY_ISA {

// Four words of each counter, in the low halves of the lanes. The high halves hold rubbish: only products of low halves
// are taken, and callers store the low halves.
struct Words {
  Wide w[4];
};

ASSAY_INLINE Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  const Wide m0 = wide(0xD2511F53u), m1 = wide(0xCD9E8D57u);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const Wide p0 = multiply_low_halves(c.w[0], m0), p1 = multiply_low_halves(c.w[2], m1);
    c = {{shift_right<32>(p1) ^ c.w[1] ^ wide(k0), p1, shift_right<32>(p0) ^ c.w[3] ^ wide(k1), p0}};
  }
  return c;
}

// The words at counters (first mod 2^32, first / 2^32, c2, c3), (first + 1 ...), one per lane.
ASSAY_INLINE Words philox_at(int64_t first, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const Wide c = wide(static_cast<uint64_t>(first)) + wide_index();
  return philox4x32({{c, shift_right<32>(c), wide(c2), wide(c3)}}, k0, k1);
}

// Lane by lane: the four words of the first counter, of the second, ...; 4 L words whose high halves are clean.
ASSAY_INLINE void store_words(uint32_t* p, const Words& c) {
  store_by_lane(p, c.w[0] ^ shift_left_32(c.w[1]), c.w[2] ^ shift_left_32(c.w[3]));
}

}  // namespace assay::ASSAY_ISA
