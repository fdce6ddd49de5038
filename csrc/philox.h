// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011), as in Random123:
// a block of 128 random bits is a function of a counter and a key, so that any coordinate's bits can be had by any
// thread, in any order, on any device.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ASSAY_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define ASSAY_PHILOX_INLINE inline
#endif

namespace assay {

struct PhiloxCounter {
  uint32_t v[4];
};
struct PhiloxKey {
  uint32_t v[2];
};

ASSAY_PHILOX_INLINE PhiloxCounter philox4x32_10(PhiloxCounter c, PhiloxKey k) {
  constexpr uint64_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;       // multipliers
  constexpr uint32_t WEYL0 = 0x9E3779B9u, WEYL1 = 0xBB67AE85u;  // golden ratio, sqrt(3) - 1
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = M0 * c.v[0], p1 = M1 * c.v[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ k.v[0], static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ k.v[1], static_cast<uint32_t>(p0)}};
    k.v[0] += WEYL0;
    k.v[1] += WEYL1;
  }
  return c;
}

}  // namespace assay
