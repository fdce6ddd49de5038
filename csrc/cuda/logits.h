// Loads of logits: a group of lanes takes a chunk of a row's columns, 16 bytes at a time wherever the columns are
// adjacent, whatever the row's alignment.
//
// g_, s_ and r_ say that a pointer or array is in global memory, shared memory or registers.
#pragma once
#include <type_traits>

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

ASSAY_HD constexpr uint32_t minus_infinity(float) { return 0xff800000u; }
ASSAY_HD constexpr uint32_t minus_infinity(bf16) { return 0xff80u; }
ASSAY_HD constexpr uint32_t minus_infinity(f16) { return 0xfc00u; }
// Column v of a vector becomes -inf.
template <class T>
ASSAY_HD void take_column_out(Granule& g, int v, T) {
  constexpr int PER_WORD = 4 / static_cast<int>(sizeof(T)), BITS = 32 / PER_WORD;
  constexpr uint32_t MASK = PER_WORD == 1 ? 0xffffffffu : 0xffffu;
  const int shift = v % PER_WORD * BITS;
  g.word[v / PER_WORD] = (g.word[v / PER_WORD] & ~(MASK << shift)) | minus_infinity(T{}) << shift;
}

// The larger of each column, and the largest of all; NaN if there is one.
ASSAY_HD uint32_t max_word(uint32_t a, uint32_t b, float) {
  return float_to_bits(max_nan(bits_to_float(a), bits_to_float(b)));
}
ASSAY_HD uint32_t max_halves(uint32_t a, uint32_t b, float x, float y) {  // a where x is the larger or NaN
  return !(x < y) && !(y != y) ? a : b;
}
template <class T>  // bf16, f16
ASSAY_HD uint32_t max_word(uint32_t a, uint32_t b, T) {
#ifdef __CUDA_ARCH__
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
#else
  const auto half = [](uint32_t w, int i) { return T{static_cast<uint16_t>(w >> 16 * i)}; };
  uint32_t r = 0;
  for (int i = 0; i < 2; ++i)
    r |= max_halves(half(a, i).bits, half(b, i).bits, to_float(half(a, i)), to_float(half(b, i))) << 16 * i;
  return r;
#endif
}
template <class T>
ASSAY_HD Granule max_nan(const Granule& a, const Granule& b, T type) {
  Granule r;
  ASSAY_UNROLL
  for (int i = 0; i < 4; ++i) r.word[i] = max_word(a.word[i], b.word[i], type);
  return r;
}
template <class T>
ASSAY_HD float max_of(const Granule& g, T type) {
  const uint32_t w = max_word(max_word(g.word[0], g.word[1], type), max_word(g.word[2], g.word[3], type), type);
  if constexpr (sizeof(T) == 4) {
    return bits_to_float(w);
  } else {
    return max_nan(to_float(T{static_cast<uint16_t>(w)}), to_float(T{static_cast<uint16_t>(w >> 16)}));
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

ASSAY_HD uint32_t bits_of(float x) { return float_to_bits(x); }
ASSAY_HD uint32_t bits_of(bf16 x) { return x.bits; }
ASSAY_HD uint32_t bits_of(f16 x) { return x.bits; }
template <class T>
ASSAY_HD Granule nothing(T type) {
  const uint32_t word = sizeof(T) == 4 ? minus_infinity(type) : minus_infinity(type) << 16 | minus_infinity(type);
  return {{word, word, word, word}};
}
// A vector of which only `count` columns are there, one by one; -inf in the others.
template <class T>
ASSAY_HD Granule gather(const T* g, int64_t stride, int count) {
  constexpr int PER_WORD = 4 / static_cast<int>(sizeof(T));
  Granule r;
  ASSAY_UNROLL
  for (int i = 0; i < 4; ++i) {
    uint32_t word = 0;
    ASSAY_UNROLL
    for (int k = 0; k < PER_WORD; ++k) {
      const int c = i * PER_WORD + k;
      const uint32_t bits = c < count ? bits_of(g[c * stride]) : minus_infinity(T{});
      word |= bits << (32 / PER_WORD * k % 32);
    }
    r.word[i] = word;
  }
  return r;
}

// A lane's U vectors of a chunk, as they are in memory; -inf from column C on. Reads no byte outside the row.
template <class T, int U>
ASSAY_HD void load_vectors(const T* g_row, int64_t stride, int C, int first, int lane, int lanes, Granule (&r_g)[U]) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  using S = Slots<V, U>;
  const T* g_first = g_row + first;
  const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(g_first) & 15);  // the same for all lanes
  const char* g_bytes = reinterpret_cast<const char*>(g_first) - misaligned + lane * 16;
  if (stride == 1 && misaligned == 0) {
    if (first + S::columns(lanes) <= C) {
      ASSAY_UNROLL
      for (int u = 0; u < U; ++u) r_g[u] = load_granule(g_bytes + u * lanes * 16);
      return;
    }
    ASSAY_UNROLL
    for (int u = 0; u < U; ++u) {  // the row's last chunk: whole vectors but for one
      const int c = first + S::column(lane, lanes, u * V);
      if (c >= C) {
        r_g[u] = nothing(T{});
      } else {
        r_g[u] = c + V <= C ? load_granule(g_bytes + u * lanes * 16) : gather(g_row + c, 1, C - c);
      }
    }
    return;
  }
  // Misaligned columns come out of two aligned granules each: not at the row's ends, where those hold foreign bytes.
  if (stride == 1 && first > 0 && first + S::columns(lanes) + V <= C) {
    const uint32_t bits = misaligned % 4 * 8;
    switch (misaligned / 4) {
      case 0:
        return load_realigned<0>(g_bytes, lanes, bits, r_g);
      case 1:
        return load_realigned<1>(g_bytes, lanes, bits, r_g);
      case 2:
        return load_realigned<2>(g_bytes, lanes, bits, r_g);
      default:
        return load_realigned<3>(g_bytes, lanes, bits, r_g);
    }
  }
  ASSAY_UNROLL
  for (int u = 0; u < U; ++u) {
    const int c = first + S::column(lane, lanes, u * V);
    r_g[u] = gather(g_row + c * stride, stride, C - c);
  }
}

// r_z[i] = logit of column first + i * step of a row in shared memory, -inf from column C on.
template <class T, int U>
ASSAY_HD void load_columns(const T* s_row, int C, int first, int step, float (&r_z)[U]) {
  ASSAY_UNROLL
  for (int i = 0; i < U; ++i) {
    const int c = first + i * step;
    r_z[i] = c < C ? to_float(s_row[c]) : -INF;
  }
}
template <class T, int U>  // all of them are there
ASSAY_HD void load_columns(const T* s_first, int step, float (&r_z)[U]) {
  ASSAY_UNROLL
  for (int i = 0; i < U; ++i) r_z[i] = to_float(s_first[i * step]);
}

// `count` adjacent numbers to shared memory, by `threads` threads of which this is one: 16 bytes at a time but for the ends.
// Both begin equally far from a multiple of 16 bytes. They are there after wait_for_copies and a barrier.
template <class T>
ASSAY_HD void copy_numbers(T* s_to, const T* g_from, int count, int thread, int threads) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  const int misaligned = static_cast<int>((reinterpret_cast<uintptr_t>(g_from) & 15) / sizeof(T));
  const int before = (V - misaligned) % V, head = before < count ? before : count;
  const int vectors = (count - head) / V, tail = head + vectors * V;
  ASSAY_NO_UNROLL
  for (int i = thread; i < vectors; i += threads) copy_16_bytes(s_to + head + i * V, g_from + head + i * V);
  for (int i = thread; i < head; i += threads) s_to[i] = g_from[i];
  for (int i = tail + thread; i < count; i += threads) s_to[i] = g_from[i];
}

}  // namespace assay::cuda
