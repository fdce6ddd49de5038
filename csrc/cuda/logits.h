// Loads of logits: a group of lanes takes a chunk of a row's columns, 16 bytes at a time wherever the columns are
// adjacent, whatever the row's alignment.
//
// g_, s_ and r_ say that a pointer or array is in global memory, shared memory or registers.
#pragma once
#include "portable.h"

namespace assay::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

ASSAY_HD float to_float(float x) { return x; }
ASSAY_HD float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
ASSAY_HD float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
#endif
}

struct alignas(16) Granule {
  uint32_t word[4];
};

ASSAY_HD Granule load_granule(const void* g_aligned) {
#ifdef __CUDA_ARCH__
  const uint4 x = __ldg(static_cast<const uint4*>(g_aligned));
  return {{x.x, x.y, x.z, x.w}};
#else
  Granule g;
  std::memcpy(&g, g_aligned, 16);
  return g;
#endif
}

// The 16 bytes that begin WORDS words and `bits` bits into a and b.
template <int WORDS>
ASSAY_HD Granule realigned(const Granule& a, const Granule& b, uint32_t bits) {
  const uint32_t w[8] = {a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1], b.word[2], b.word[3]};
  Granule r;
  ASSAY_UNROLL
  for (int i = 0; i < 4; ++i) r.word[i] = funnel_shift_right(w[WORDS + i], w[WORDS + i + 1], bits);
  return r;
}

template <int WORDS, int U>
ASSAY_HD void load_realigned(const char* g_bytes, int lanes, uint32_t bits, Granule (&r_g)[U]) {
  ASSAY_UNROLL
  for (int u = 0; u < U; ++u) {
    const char* g = g_bytes + u * lanes * 16;
    r_g[u] = realigned<WORDS>(load_granule(g), load_granule(g + 16), bits);
  }
}

ASSAY_HD void unpack(const Granule& g, float (&r_z)[4], float) {
  ASSAY_UNROLL
  for (int i = 0; i < 4; ++i) r_z[i] = bits_to_float(g.word[i]);
}
template <class T>  // bf16, f16
ASSAY_HD void unpack(const Granule& g, float (&r_z)[8], T) {
  ASSAY_UNROLL
  for (int i = 0; i < 4; ++i) {
    r_z[2 * i] = to_float(T{static_cast<uint16_t>(g.word[i])});
    r_z[2 * i + 1] = to_float(T{static_cast<uint16_t>(g.word[i] >> 16)});
  }
}

// A lane's slots of a chunk: U vectors of V adjacent columns, the lanes' vectors interleaved so that a group's loads are
// coalesced. A lane's columns ascend with the slot.
template <int V, int U>
struct Slots {
  static constexpr int COUNT = V * U;
  ASSAY_HD static constexpr int columns(int lanes) { return lanes * COUNT; }  // of a whole chunk
  ASSAY_HD static constexpr int column(int lane, int lanes, int slot) {       // from the chunk's first
    return (slot / V * lanes + lane) * V + slot % V;
  }
  // The slot that holds a column of the chunk, for the lane that owns it; -1 for the others.
  ASSAY_HD static constexpr int slot(int lane, int lanes, int column) {
    return column / V % lanes == lane ? column / (V * lanes) * V + column % V : -1;
  }
};

// r_z[i] = logit of column first + Slots::column(lane, lanes, i), -inf from column C on. Reads no byte outside the row.
template <class T, int V, int U>
ASSAY_HD void load_chunk(const T* g_row, int64_t stride, int C, int first, int lane, int lanes, float (&r_z)[V * U]) {
  using S = Slots<V, U>;
  if constexpr (V * sizeof(T) == 16) {
    const T* g_first = g_row + first;
    const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(g_first) & 15);  // the same for all lanes
    // Misaligned columns come out of two aligned granules each: not at the row's ends, where those hold foreign bytes.
    const bool inside = misaligned ? first > 0 && first + S::columns(lanes) + V <= C : first + S::columns(lanes) <= C;
    if (stride == 1 && inside) {
      const char* g_bytes = reinterpret_cast<const char*>(g_first) - misaligned + lane * 16;
      Granule r_g[U];
      if (misaligned == 0) {
        ASSAY_UNROLL
        for (int u = 0; u < U; ++u) r_g[u] = load_granule(g_bytes + u * lanes * 16);
      } else {
        const uint32_t bits = misaligned % 4 * 8;
        switch (misaligned / 4) {
          case 0:
            load_realigned<0>(g_bytes, lanes, bits, r_g);
            break;
          case 1:
            load_realigned<1>(g_bytes, lanes, bits, r_g);
            break;
          case 2:
            load_realigned<2>(g_bytes, lanes, bits, r_g);
            break;
          default:
            load_realigned<3>(g_bytes, lanes, bits, r_g);
        }
      }
      ASSAY_UNROLL
      for (int u = 0; u < U; ++u) {
        float r_v[V];
        unpack(r_g[u], r_v, T{});
        ASSAY_UNROLL
        for (int v = 0; v < V; ++v) r_z[u * V + v] = r_v[v];
      }
      return;
    }
  }
  const int64_t step = (lanes - 1) * V * stride;  // from the end of a vector to the lane's next
  int c = first + lane * V;
  const T* g = g_row + c * stride;
  ASSAY_UNROLL
  for (int i = 0; i < S::COUNT; ++i) {
    r_z[i] = c < C ? to_float(*g) : -INF;
    const bool last = i % V == V - 1;
    c += last ? (lanes - 1) * V + 1 : 1;
    g += last ? step + stride : stride;
  }
}

}  // namespace assay::cuda
