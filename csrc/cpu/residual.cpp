// Logits -> softmax - onehot(label), in place, and its squared norm: the gradient of each row's loss in its logits.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace assay::ASSAY_ISA {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// No float32 accumulator takes more than 64 terms; blocks are added up in double.
constexpr int64_t BLOCK = 64 * Vec::W;

float highest(const float* z, int64_t n) {
  constexpr int W = Vec::W;
  const Vec low = splat(-INF);
  Vec m[4] = {low, low, low, low};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) m[j] = max(load(z + i + j * W), m[j]);  // NaN is dropped and comes back in the sum
  for (; i < n; i += W) m[0] = max(load_first(z + i, n - i, -INF), m[0]);
  return maximum(max(max(m[0], m[1]), max(m[2], m[3])));
}

// z -> e^(z - m) over at most BLOCK columns; returns their sum.
float exponentiate(float* z, int64_t n, Vec m) {
  constexpr int W = Vec::W;
  const Vec zero = splat(0.f);
  Vec s[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const Vec e = exp(load(z + i + j * W) - m);
      store(z + i + j * W, e);
      s[j] = s[j] + e;
    }
  for (; i < n; i += W) {
    const Vec e = exp(load_first(z + i, n - i, -INF) - m);
    for (int64_t c = i; c < n && c < i + W; ++c) z[c] = lane(e, static_cast<int>(c - i));
    s[0] = s[0] + e;
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// z -> z * scale over at most BLOCK columns; returns the sum of squares.
float scale_block(float* z, int64_t n, Vec scale) {
  constexpr int W = Vec::W;
  const Vec zero = splat(0.f);
  Vec s[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const Vec p = load(z + i + j * W) * scale;
      store(z + i + j * W, p);
      s[j] = fma(p, p, s[j]);
    }
  for (; i < n; i += W) {
    const Vec p = load_first(z + i, n - i, 0.f) * scale;
    for (int64_t c = i; c < n && c < i + W; ++c) z[c] = lane(p, static_cast<int>(c - i));
    s[0] = fma(p, p, s[0]);
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

void residual_row(const ResidualArgs& a, int64_t r) {
  float* z = a.logits + r * a.stride;
  const int64_t y = a.labels[r];
  if (y == a.ignore_index) {
    for (int64_t c = 0; c < a.C; ++c) z[c] = 0.f;
    a.sqnorm[r] = 0;
    return;
  }
  const float m = highest(z, a.C);
  const double label = std::exp(static_cast<double>(z[y]) - m);
  z[y] = -INF;  // the others are summed alone: 1 - p_y as 1 minus a sum would be noise when p_y is nearly 1
  const Vec vm = splat(m);
  double others = 0, squares = 0;
  for (int64_t c = 0; c < a.C; c += BLOCK) others += exponentiate(z + c, a.C - c < BLOCK ? a.C - c : BLOCK, vm);
  const Vec scale = splat(static_cast<float>(1 / (others + label)));
  for (int64_t c = 0; c < a.C; c += BLOCK) squares += scale_block(z + c, a.C - c < BLOCK ? a.C - c : BLOCK, scale);
  const double rest = others / (others + label);
  z[y] = static_cast<float>(-rest);
  a.sqnorm[r] = squares + rest * rest;
}

}  // namespace

void residual(const ResidualArgs& a) {
  parallel(a.rows, 1, a.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) residual_row(a, r);
  });
}

}  // namespace assay::ASSAY_ISA
