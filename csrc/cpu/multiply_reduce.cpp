// Row-wise dot products of two matrices, with the sum of absolute products beside them on request: the second half of
// grad_dot and grad_sqnorm, run on a GEMM's output while it is still in cache.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace assay::ASSAY_ISA {
namespace {

// float32 partial sums this wide, 64 vectors over 4 accumulators, then double.
constexpr int64_t BLOCK = 64 * Vec::W;

// A piece of work is about 256 KB.
constexpr int64_t ELEMENTS_PER_PIECE = 65536;

template <bool ABS, class X, class Y>
void row_dot(const X* x, const Y* y, int64_t n, double& out, double& abs_out) {
  constexpr int W = Vec::W;
  const Vec zero = splat(0.f);
  Vec s[4] = {zero, zero, zero, zero}, t[4] = {zero, zero, zero, zero};
  auto add = [&](Vec a, Vec b, int j) __attribute__((always_inline)) {
    s[j] = fma(a, b, s[j]);
    if (ABS) t[j] = fma(abs(a), abs(b), t[j]);
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) add(load(x + i + j * W), load(y + i + j * W), j);
  for (; i < n; i += W) add(load_first(x + i, n - i, 0.f), load_first(y + i, n - i, 0.f), 0);
  out += sum((s[0] + s[1]) + (s[2] + s[3]));
  if (ABS) abs_out += sum((t[0] + t[1]) + (t[2] + t[3]));
}

#if defined(__AVX512BF16__)
// bf16 x bf16 in one instruction a pair. Only for sums without the absolute ones.
template <>
void row_dot<false, bf16, bf16>(const bf16* x, const bf16* y, int64_t n, double& out, double&) {
  __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  auto add = [&](__m512i a, __m512i b, int j) __attribute__((always_inline)) {
    __m512bh ah, bh;
    std::memcpy(&ah, &a, 64);
    std::memcpy(&bh, &b, 64);
    s[j] = _mm512_dpbf16_ps(s[j], ah, bh);
  };
  int64_t i = 0;
  for (; i + 128 <= n; i += 128)
    for (int j = 0; j < 4; ++j) add(_mm512_loadu_si512(x + i + 32 * j), _mm512_loadu_si512(y + i + 32 * j), j);
  for (; i < n; i += 32) {
    const __mmask32 k = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1u;
    add(_mm512_maskz_loadu_epi16(k, x + i), _mm512_maskz_loadu_epi16(k, y + i), 0);
  }
  out += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}
#endif

template <class X, class Y>
void reduce_row(const MultiplyReduceArgs& a, int64_t r) {
  const X* x = static_cast<const X*>(a.x) + r * a.x_stride;
  const Y* y = static_cast<const Y*>(a.y) + r * a.y_stride;
  double total = 0, abs_total = 0;
  for (int64_t c = 0; c < a.cols; c += BLOCK) {
    const int64_t n = a.cols - c < BLOCK ? a.cols - c : BLOCK;
    if (a.abs_out) {
      row_dot<true>(x + c, y + c, n, total, abs_total);
    } else {
      row_dot<false>(x + c, y + c, n, total, abs_total);
    }
  }
  a.out[r] = total;
  if (a.abs_out) a.abs_out[r] = abs_total;
}

template <class X, class Y>
void run(const MultiplyReduceArgs& a) {
  const int64_t grain = 1 + ELEMENTS_PER_PIECE / (a.cols > 0 ? a.cols : 1);
  parallel(a.rows, grain, a.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) reduce_row<X, Y>(a, r);
  });
}

template <class X>
void run_y(const MultiplyReduceArgs& a) {
  switch (a.y_dtype) {
    case DType::f32:
      return run<X, float>(a);
    case DType::bf16:
      return run<X, bf16>(a);
    case DType::f16:
      return run<X, f16>(a);
  }
}

}  // namespace

void multiply_reduce(const MultiplyReduceArgs& a) {
  switch (a.x_dtype) {
    case DType::f32:
      return run_y<float>(a);
    case DType::bf16:
      return run_y<bf16>(a);
    case DType::f16:
      return run_y<f16>(a);
  }
}

}  // namespace assay::ASSAY_ISA
