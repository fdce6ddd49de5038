// What lets the same source run on a GPU and, in the native tests, on the host: qualifiers, and the few operations that
// are one instruction there and a library call here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define ASSAY_HD __host__ __device__ __forceinline__
#else
#define ASSAY_HD inline
#endif
#ifdef __CUDA_ARCH__
#define ASSAY_UNROLL _Pragma("unroll")
#define ASSAY_UNROLL_2 _Pragma("unroll 2")
#define ASSAY_UNROLL_4 _Pragma("unroll 4")
#define ASSAY_NO_UNROLL _Pragma("unroll 1")
#else
#define ASSAY_UNROLL
#define ASSAY_UNROLL_2
#define ASSAY_UNROLL_4
#define ASSAY_NO_UNROLL
#endif

namespace assay::cuda {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NaN = std::numeric_limits<float>::quiet_NaN();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr double LN2 = 0.693147180559945309417;

ASSAY_HD float bits_to_float(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

ASSAY_HD uint32_t float_to_bits(float f) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
#endif
}

#ifndef __CUDA_ARCH__
// The largest error that is documented, always away from 0: among equal logits a GPU's errors add up like that as well.
inline float as_wrong_as_a_gpu(float x, float absolute = 0) {
  return x == 0 || x == INF || x == -INF ? x : x + std::copysign(std::fmax(std::fabs(x) * 0x1p-22f, absolute), x);
}
#endif

// 2^x, relative error up to 2^-22; below 2^-126 it is 0.
ASSAY_HD float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x == 0 ? 1.f : as_wrong_as_a_gpu(std::exp2(x));
#endif
}

// log2(x), error up to 2^-22, absolute for x in (1/2, 2) and relative elsewhere.
ASSAY_HD float log2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return as_wrong_as_a_gpu(std::log2(x), x > 0.5f && x < 2 ? 0x1p-22f : 0);
#endif
}

// log2(x) as its two parts, of a normal x: the special function unit's error is relative to all of it otherwise, and among
// equal probabilities always the same, so that millionths of 16 bits would add up.
struct Log2 {
  float exponent, rest;
};
ASSAY_HD Log2 log2_of(float x) {
  const uint32_t bits = float_to_bits(x);
  const float exponent = bits_to_float(0x4b000000u | bits >> 23) - 8388735.f;  // 2^23 + 127
  return {exponent, log2_approx(bits_to_float((bits & 0x7fffffu) | 0x3f800000u))};
}

// The larger one, or NaN if either is NaN: fmaxf drops NaN, and then a poisoned row would look healthy.
ASSAY_HD float max_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || b != b ? NaN : a > b ? a : b;
#endif
}

// Floats as integers of the same order; NaN, as max_nan makes it, is above all.
ASSAY_HD int32_t to_ordered(float x) {
  const auto bits = static_cast<int32_t>(float_to_bits(x));
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
ASSAY_HD float from_ordered(int32_t i) { return bits_to_float(static_cast<uint32_t>(i >= 0 ? i : i ^ 0x7fffffff)); }

// 32 bits of the 64-bit word high:low, from bit `shift` (0..31) on.
ASSAY_HD uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#endif
}

// 16 bytes of global memory to shared memory, both aligned, without a register: there once wait_for_copies has returned.
ASSAY_HD void copy_16_bytes(void* s_to, const void* g_from) {
#ifdef __CUDA_ARCH__
  const auto s_address = static_cast<uint32_t>(__cvta_generic_to_shared(s_to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(s_address), "l"(g_from) : "memory");
#else
  std::memcpy(s_to, g_from, 16);
#endif
}
ASSAY_HD void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// a / b for 0 <= a < 32 and b from 1 to 32.
ASSAY_HD int quotient_of_small(int a, int b) {
  return static_cast<int>((static_cast<float>(a) + 0.5f) / static_cast<float>(b));
}

ASSAY_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace assay::cuda
