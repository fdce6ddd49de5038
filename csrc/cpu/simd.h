// The only file with intrinsics. `Vec` is a vector of W floats with the operations the kernels need; the scalar version
// (W = 1) is the one to read first. `Wide` is a vector of L 64-bit integers, for counters and hashes; `plus_minus` turns
// the low W bits of a number into signs, a 1 being -1. Selected by ASSAY_SIMD: 0 scalar, 1 AVX2 + FMA + F16C, 2 AVX-512
// F/BW/DQ/VL.
//
// Everything lives in the instruction set's own namespace (see kernels.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if ASSAY_SIMD > 0
#include <immintrin.h>
#endif

#define ASSAY_INLINE inline __attribute__((always_inline))

namespace assay::ASSAY_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

ASSAY_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
ASSAY_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
ASSAY_INLINE float to_float(float x) { return x; }
ASSAY_INLINE float to_float(int8_t x) { return static_cast<float>(x); }
ASSAY_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
ASSAY_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// Eight bytes, the first in the lowest bits.
ASSAY_INLINE uint64_t load_word(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  x = __builtin_bswap64(x);
#endif
  return x;
}

#if ASSAY_SIMD == 0

struct Vec {
  static constexpr int W = 1;
  float v;
};
struct Mask {
  bool m;
};
ASSAY_INLINE Vec splat(float x) { return {x}; }
ASSAY_INLINE Vec lane_index() { return {0.f}; }
template <class T>
ASSAY_INLINE Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
ASSAY_INLINE Vec load_first(const T* p, int64_t n, float fill) {
  return {n > 0 ? to_float(*p) : fill};
}
ASSAY_INLINE void store(float* p, Vec a) { *p = a.v; }
ASSAY_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
ASSAY_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
ASSAY_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
ASSAY_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
ASSAY_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
ASSAY_INLINE Vec fms(Vec a, Vec b, Vec c) {  // one rounding, as the others: the product is exact in double
  return {static_cast<float>(static_cast<double>(a.v) * b.v - c.v)};
}
ASSAY_INLINE Vec abs(Vec a) { return {std::fabs(a.v)}; }
ASSAY_INLINE Vec sqrt(Vec a) { return {std::sqrt(a.v)}; }
ASSAY_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }  // b if either is NaN
ASSAY_INLINE Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
ASSAY_INLINE Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
ASSAY_INLINE Vec select(Mask m, Vec yes, Vec no) { return m.m ? yes : no; }
ASSAY_INLINE uint32_t bits(Mask m) { return m.m; }
ASSAY_INLINE Vec fraction(Vec t) { return {t.v - std::floor(t.v)}; }
constexpr bool ALL_REACHABLE = false;  // whether scale_by_power_of_two takes every t
ASSAY_INLINE Vec reachable(Vec t) { return {t.v < -127.f ? -127.f : t.v}; }
ASSAY_INLINE Vec scale_by_power_of_two(Vec a, Vec t) {  // a 2^floor(t) for reachable t, 0 if that is below 2^-126
  const int32_t n = t.v == t.v ? static_cast<int32_t>(std::floor(t.v)) : 0;
  return {a.v * bits_to_float(static_cast<uint32_t>(n + 127) << 23)};
}
// a = 2^exponent * mantissa with mantissa in [sqrt(1/2), sqrt(2)), for normal a > 0
ASSAY_INLINE void split(Vec a, Vec& exponent, Vec& mantissa) {
  const int32_t u = static_cast<int32_t>(float_to_bits(a.v));
  const int32_t e = (u - 0x3f3504f3) >> 23;
  exponent.v = static_cast<float>(e);
  mantissa.v = bits_to_float(static_cast<uint32_t>(u - e * (1 << 23)));
}
ASSAY_INLINE float sum(Vec a) { return a.v; }
ASSAY_INLINE float maximum(Vec a) { return a.v; }
ASSAY_INLINE void transpose(Vec (&)[1]) {}
ASSAY_INLINE void prefetch(const void*) {}
ASSAY_INLINE void prefetch_l2(const void*) {}
ASSAY_INLINE Vec plus_minus(uint32_t bits) { return {bits & 1 ? -1.f : 1.f}; }
ASSAY_INLINE void add_to(double* p, Vec a) { *p += static_cast<double>(a.v); }
ASSAY_INLINE Vec load_pairs(const bf16* p) {  // 2 W numbers as they are, two to a lane
  uint32_t u;
  std::memcpy(&u, p, 4);
  return {bits_to_float(u)};
}
ASSAY_INLINE Vec first_of_pairs(Vec a) { return {bits_to_float(float_to_bits(a.v) << 16)}; }
ASSAY_INLINE Vec second_of_pairs(Vec a) { return {bits_to_float(float_to_bits(a.v) & 0xffff0000u)}; }

struct Wide {
  static constexpr int L = 1;
  uint64_t v;
};
ASSAY_INLINE Wide wide(uint64_t x) { return {x}; }
ASSAY_INLINE Wide wide_index() { return {0}; }
ASSAY_INLINE Wide operator+(Wide a, Wide b) { return {a.v + b.v}; }
ASSAY_INLINE Wide operator^(Wide a, Wide b) { return {a.v ^ b.v}; }
ASSAY_INLINE Wide operator&(Wide a, Wide b) { return {a.v & b.v}; }
template <int N>
ASSAY_INLINE Wide shift_right(Wide a) {
  return {a.v >> N};
}
ASSAY_INLINE Wide multiply_low_halves(Wide a, Wide b) { return {(a.v & 0xffffffffu) * (b.v & 0xffffffffu)}; }
ASSAY_INLINE void store_low_halves(uint32_t* p, Wide a) { *p = static_cast<uint32_t>(a.v); }
ASSAY_INLINE void store_by_lane(uint32_t* p, Wide a, Wide b) {  // a0 b0 a1 b1 ...
  store_low_halves(p, a);
  store_low_halves(p + 1, {a.v >> 32});
  store_low_halves(p + 2, b);
  store_low_halves(p + 3, {b.v >> 32});
}
ASSAY_INLINE Wide shift_left_32(Wide a) { return {a.v << 32}; }
ASSAY_INLINE Wide load(const uint64_t* p) { return {*p}; }
ASSAY_INLINE uint32_t equal(Wide a, Wide b) { return a.v == b.v; }

struct Bytes {
  static constexpr int N = 8;
  uint64_t v;  // as load_word has them
};
constexpr uint64_t ONES = 0x0101010101010101u, HIGH = 0x80 * ONES;
ASSAY_INLINE Bytes load_bytes(const uint8_t* p) { return {load_word(p)}; }
ASSAY_INLINE void store(uint8_t* p, Bytes a) {
  const uint64_t x = load_word(reinterpret_cast<const uint8_t*>(&a.v));
  std::memcpy(p, &x, 8);
}
// 0x80 where a byte is from `first` to `last`, which are below 0x80.
ASSAY_INLINE uint64_t in_range(Bytes a, uint64_t first, uint64_t last) {
  const uint64_t x = a.v & ~HIGH;
  return (x + (0x80 - first) * ONES) & ~(x + (0x7F - last) * ONES) & ~a.v & HIGH;
}
ASSAY_INLINE uint64_t gather_bits(uint64_t high) { return (high >> 7) * 0x0102040810204080u >> 56; }
template <char First, char Last>
ASSAY_INLINE uint64_t between(Bytes a) {
  return gather_bits(in_range(a, First, Last));
}
ASSAY_INLINE uint64_t high_bits(Bytes a) { return gather_bits(a.v & HIGH); }
ASSAY_INLINE Bytes lower_case(Bytes a) { return {a.v | in_range(a, 'A', 'Z') >> 2}; }

#elif ASSAY_SIMD == 1

struct Vec {
  static constexpr int W = 8;
  __m256 v;
};
struct Mask {
  __m256 m;
};
ASSAY_INLINE Vec splat(float x) { return {_mm256_set1_ps(x)}; }
ASSAY_INLINE Vec lane_index() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
ASSAY_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
ASSAY_INLINE Vec load(const bf16* p) {
  const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16))};
}
ASSAY_INLINE Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
ASSAY_INLINE Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
ASSAY_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
ASSAY_INLINE Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
ASSAY_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
template <class T>
ASSAY_INLINE Vec load_first(const T* p, int64_t n, float fill) {
  T buffer[8] = {};  // AVX2 has no masked 8- and 16-bit loads, and a tail is rare: go through memory
  std::memcpy(buffer, p, static_cast<size_t>(n < 0 ? 0 : n > 8 ? 8 : n) * sizeof(T));
  return select(lane_index() < splat(static_cast<float>(n)), load(buffer), splat(fill));
}
ASSAY_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
ASSAY_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
ASSAY_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
ASSAY_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
ASSAY_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
ASSAY_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ASSAY_INLINE Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
ASSAY_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
ASSAY_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
ASSAY_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b if either is NaN
ASSAY_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.m)); }
ASSAY_INLINE Vec fraction(Vec t) { return {_mm256_sub_ps(t.v, _mm256_floor_ps(t.v))}; }
constexpr bool ALL_REACHABLE = false;
ASSAY_INLINE Vec reachable(Vec t) { return max(splat(-127.f), t); }
ASSAY_INLINE Vec scale_by_power_of_two(Vec a, Vec t) {  // a 2^floor(t) for reachable t, 0 if that is below 2^-126
  const __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(t.v));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
  // NaN converts to INT_MIN, whose power is finite here: NaN in `a` survives the product
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(power))};
}
ASSAY_INLINE void split(Vec a, Vec& exponent, Vec& mantissa) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(u, _mm256_set1_epi32(0x3f3504f3)), 23);
  exponent.v = _mm256_cvtepi32_ps(e);
  mantissa.v = _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(e, 23)));
}
ASSAY_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
ASSAY_INLINE float maximum(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
ASSAY_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
ASSAY_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
ASSAY_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
ASSAY_INLINE Vec plus_minus(uint32_t bits) {
  const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  const __m256i moved = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(bits)), shifts);
  return {_mm256_or_ps(_mm256_and_ps(_mm256_castsi256_ps(moved), _mm256_set1_ps(-0.f)), _mm256_set1_ps(1.f))};
}
ASSAY_INLINE void add_to(double* p, Vec a) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
  _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), low));
  _mm256_storeu_pd(p + 4, _mm256_add_pd(_mm256_loadu_pd(p + 4), high));
}
ASSAY_INLINE Vec load_pairs(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
ASSAY_INLINE Vec first_of_pairs(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))}; }
ASSAY_INLINE Vec second_of_pairs(Vec a) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
}

struct Wide {
  static constexpr int L = 4;
  __m256i v;
};
ASSAY_INLINE Wide wide(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
ASSAY_INLINE Wide wide_index() { return {_mm256_setr_epi64x(0, 1, 2, 3)}; }
ASSAY_INLINE Wide operator+(Wide a, Wide b) { return {_mm256_add_epi64(a.v, b.v)}; }
ASSAY_INLINE Wide operator^(Wide a, Wide b) { return {_mm256_xor_si256(a.v, b.v)}; }
ASSAY_INLINE Wide operator&(Wide a, Wide b) { return {_mm256_and_si256(a.v, b.v)}; }
template <int N>
ASSAY_INLINE Wide shift_right(Wide a) {
  return {_mm256_srli_epi64(a.v, N)};
}
ASSAY_INLINE Wide multiply_low_halves(Wide a, Wide b) { return {_mm256_mul_epu32(a.v, b.v)}; }
ASSAY_INLINE void store_low_halves(uint32_t* p, Wide a) {
  const __m256i packed = _mm256_permutevar8x32_epi32(a.v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
ASSAY_INLINE void store_by_lane(uint32_t* p, Wide a, Wide b) {
  const __m256i even = _mm256_unpacklo_epi64(a.v, b.v), odd = _mm256_unpackhi_epi64(a.v, b.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
ASSAY_INLINE Wide shift_left_32(Wide a) { return {_mm256_slli_epi64(a.v, 32)}; }
ASSAY_INLINE Wide load(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
ASSAY_INLINE uint32_t equal(Wide a, Wide b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(a.v, b.v))));
}

struct Bytes {
  static constexpr int N = 32;
  __m256i v;
};
ASSAY_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
ASSAY_INLINE void store(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
ASSAY_INLINE uint64_t high_bits(Bytes a) { return static_cast<uint32_t>(_mm256_movemask_epi8(a.v)); }
// Signed: bytes from 0x80 on are below all of ASCII.
template <char First, char Last>
ASSAY_INLINE __m256i in_range(Bytes a) {
  return _mm256_and_si256(_mm256_cmpgt_epi8(a.v, _mm256_set1_epi8(First - 1)),
                          _mm256_cmpgt_epi8(_mm256_set1_epi8(Last + 1), a.v));
}
template <char First, char Last>
ASSAY_INLINE uint64_t between(Bytes a) {
  return high_bits({in_range<First, Last>(a)});
}
ASSAY_INLINE Bytes lower_case(Bytes a) {
  return {_mm256_or_si256(a.v, _mm256_and_si256(in_range<'A', 'Z'>(a), _mm256_set1_epi8(0x20)))};
}

#elif ASSAY_SIMD == 2

struct Vec {
  static constexpr int W = 16;
  __m512 v;
};
struct Mask {
  __mmask16 m;
};
ASSAY_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
ASSAY_INLINE Vec lane_index() {
  return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
ASSAY_INLINE __m512 widen_bf16(__m256i u) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16));
}
ASSAY_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
ASSAY_INLINE Vec load(const bf16* p) { return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
ASSAY_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
ASSAY_INLINE __m512 widen_int8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
ASSAY_INLINE Vec load(const int8_t* p) { return {widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
ASSAY_INLINE __mmask16 first(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
}
ASSAY_INLINE Vec load_first(const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
}
ASSAY_INLINE Vec load_first(const bf16* p, int64_t n, float fill) {
  const __mmask16 k = first(n);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), k, widen_bf16(_mm256_maskz_loadu_epi16(k, p)))};
}
ASSAY_INLINE Vec load_first(const f16* p, int64_t n, float fill) {
  const __mmask16 k = first(n);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), k, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, p)))};
}
ASSAY_INLINE Vec load_first(const int8_t* p, int64_t n, float fill) {
  const __mmask16 k = first(n);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), k, widen_int8(_mm_maskz_loadu_epi8(k, p)))};
}
ASSAY_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
ASSAY_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
ASSAY_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
ASSAY_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
ASSAY_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
ASSAY_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ASSAY_INLINE Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
ASSAY_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
ASSAY_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
ASSAY_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b if either is NaN
ASSAY_INLINE Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
ASSAY_INLINE Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
ASSAY_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, m.m, yes.v)}; }
ASSAY_INLINE uint32_t bits(Mask m) { return m.m; }
ASSAY_INLINE Vec fraction(Vec t) { return {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
constexpr bool ALL_REACHABLE = true;
ASSAY_INLINE Vec reachable(Vec t) { return max(splat(-160.f), t); }
ASSAY_INLINE Vec scale_by_power_of_two(Vec a, Vec t) { return {_mm512_scalef_ps(a.v, t.v)}; }  // a 2^floor(t)
ASSAY_INLINE void split(Vec a, Vec& exponent, Vec& mantissa) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(u, _mm512_set1_epi32(0x3f3504f3)), 23);
  exponent.v = _mm512_cvtepi32_ps(e);
  mantissa.v = _mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(e, 23)));
}
ASSAY_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
ASSAY_INLINE float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }
ASSAY_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // u[4j + i] holds columns i, i+4, i+8, i+12 of rows 4j..4j+3
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
ASSAY_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
ASSAY_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
ASSAY_INLINE Vec plus_minus(uint32_t bits) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(1.f), static_cast<__mmask16>(bits), _mm512_set1_ps(-1.f))};
}
ASSAY_INLINE void add_to(double* p, Vec a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), low));
  _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), high));
}
ASSAY_INLINE Vec load_pairs(const bf16* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
ASSAY_INLINE Vec first_of_pairs(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
ASSAY_INLINE Vec second_of_pairs(Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
}

struct Wide {
  static constexpr int L = 8;
  __m512i v;
};
ASSAY_INLINE Wide wide(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
ASSAY_INLINE Wide wide_index() { return {_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)}; }
ASSAY_INLINE Wide operator+(Wide a, Wide b) { return {_mm512_add_epi64(a.v, b.v)}; }
ASSAY_INLINE Wide operator^(Wide a, Wide b) { return {_mm512_xor_si512(a.v, b.v)}; }
ASSAY_INLINE Wide operator&(Wide a, Wide b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int N>
ASSAY_INLINE Wide shift_right(Wide a) {
  return {_mm512_srli_epi64(a.v, N)};
}
ASSAY_INLINE Wide multiply_low_halves(Wide a, Wide b) { return {_mm512_mul_epu32(a.v, b.v)}; }
ASSAY_INLINE void store_low_halves(uint32_t* p, Wide a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a.v));
}
ASSAY_INLINE void store_by_lane(uint32_t* p, Wide a, Wide b) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(a.v, first, b.v));
  _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi64(a.v, second, b.v));
}
ASSAY_INLINE Wide shift_left_32(Wide a) { return {_mm512_slli_epi64(a.v, 32)}; }
ASSAY_INLINE Wide load(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
ASSAY_INLINE uint32_t equal(Wide a, Wide b) { return _mm512_cmpeq_epi64_mask(a.v, b.v); }

struct Bytes {
  static constexpr int N = 64;
  __m512i v;
};
ASSAY_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
ASSAY_INLINE void store(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
template <char First, char Last>
ASSAY_INLINE uint64_t between(Bytes a) {
  return _mm512_mask_cmple_epi8_mask(_mm512_cmpge_epi8_mask(a.v, _mm512_set1_epi8(First)), a.v, _mm512_set1_epi8(Last));
}
ASSAY_INLINE uint64_t high_bits(Bytes a) { return _mm512_movepi8_mask(a.v); }
ASSAY_INLINE Bytes lower_case(Bytes a) {
  return {_mm512_mask_add_epi8(a.v, between<'A', 'Z'>(a), a.v, _mm512_set1_epi8(0x20))};
}

#endif

// sum + a1 b1 + a0 b0 of every lane's pairs: one instruction where there is one, which takes subnormal numbers as 0.
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_PAIRS = true;
ASSAY_INLINE Vec add_products_of_pairs(Vec a, Vec b, Vec sum) {
  __m512bh x, y;
  std::memcpy(&x, &a.v, sizeof x);
  std::memcpy(&y, &b.v, sizeof y);
  return {_mm512_dpbf16_ps(sum.v, x, y)};
}
#else
constexpr bool MULTIPLIES_PAIRS = false;
ASSAY_INLINE Vec add_products_of_pairs(Vec a, Vec b, Vec sum) {
  return fma(first_of_pairs(a), first_of_pairs(b), fma(second_of_pairs(a), second_of_pairs(b), sum));
}
#endif

ASSAY_INLINE float lane(const Vec& a, int i) {
  float f;
  std::memcpy(&f, reinterpret_cast<const char*>(&a) + i * sizeof(float), sizeof(float));
  return f;
}

// 2^t for t < 128 that is `reachable`: no lower than a number whose power is 0, NaN for NaN. With f in [0, 1) what t
// exceeds the whole number below it by, 2^f by a degree-5 minimax polynomial with constant term 1, so that 2^0 is exactly
// 1 (relative error 8.3e-8, Lawson iteration), and an exact scaling.
ASSAY_INLINE Vec exp2_reachable(Vec t) {
  const Vec f = fraction(t);
  Vec p = fma(f, splat(1.867128326e-3f), splat(9.017034009e-3f));
  p = fma(f, p, splat(5.579991048e-2f));
  p = fma(f, p, splat(2.401644509e-1f));
  p = fma(f, p, splat(6.931513117e-1f));
  p = fma(f, p, splat(1.f));
  return scale_by_power_of_two(p, t);
}

// 2^t for t < 128, 0 where that is too small, NaN for NaN.
ASSAY_INLINE Vec exp2(Vec t) { return exp2_reachable(ALL_REACHABLE ? t : reachable(t)); }

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// e^x for x < 88, exactly 0 for -inf.
ASSAY_INLINE Vec exp(Vec x) { return exp2_reachable(reachable(x * splat(LOG2E))); }

// log x for normal x > 0; a finite negative number for 0 and subnormals, so that x * log(x) is 0 there; undefined for
// NaN. x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) / f by a degree-8 minimax polynomial (relative
// error 2.6e-8, Lawson iteration).
ASSAY_INLINE Vec log(Vec x) {
  Vec e, m;
  split(x, e, m);
  const Vec f = m - splat(1.f);
  Vec p = fma(f, splat(8.722361005e-02f), splat(-1.436684334e-01f));
  p = fma(f, p, splat(1.495226531e-01f));
  p = fma(f, p, splat(-1.656239317e-01f));
  p = fma(f, p, splat(1.995683369e-01f));
  p = fma(f, p, splat(-2.500207406e-01f));
  p = fma(f, p, splat(3.333418562e-01f));
  p = fma(f, p, splat(-4.999998796e-01f));
  p = fma(f, p, splat(1.000000000e+00f));
  return fma(f, p, e * splat(LN2));
}

}  // namespace assay::ASSAY_ISA
