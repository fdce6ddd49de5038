// From sums to fields: the arithmetic of ensemble_stats that neither loads nor synchronises.
//
// fma where it is meant: nvcc runs with -fmad=false, so that every instantiation of a kernel rounds alike and a field
// has the same bits whichever others are asked for.
#pragma once
#include "../assay.h"
#include "portable.h"

namespace assay::cuda {

// Logits this far below the maximum count as this far: e^-200 is 0, and (z - m) e^(z - m) stays 0 for z = -inf.
constexpr float FAR = -200.f;

constexpr float TINY = std::numeric_limits<float>::min();

// A model's softmax over some columns, relative to their maximum m: d = sum e^(z-m), s = sum (z-m) e^(z-m), and, of a
// single model, q = sum e^2(z-m).
// No columns, or nothing but -inf: m = -inf, d = s = q = 0. A NaN or +inf logit shows in m.
struct alignas(16) State {
  float m, d, s, q;
};
constexpr State EMPTY_STATE{-INF, 0, 0, 0};

// The same while it grows: in double, for a row has many parts.
struct Growing {
  float m;
  double d, s, q;
};
constexpr Growing NOTHING{-INF, 0, 0, 0};

// Relative to m >= a.m.
ASSAY_HD Growing rescaled(const Growing& a, float m) {
  if (a.m == m) return a;
  const float shift = a.m - m;
  if (shift < FAR) return {m, 0, 0, 0};  // nothing is left, nor is there of -inf: 0 * inf must not be NaN
  const double r = static_cast<double>(exp2_approx(shift * LOG2E));
  return {m, r * a.d, r * fma(static_cast<double>(shift), a.d, a.s), r * r * a.q};
}
// b, relative to a.m >= b.m, is added.
ASSAY_HD void add(Growing& a, const State& b) {
  const float shift = b.m - a.m;
  if (!(shift >= FAR)) return;
  const float r = exp2_approx(shift * LOG2E);
  a.d += static_cast<double>(r * b.d);
  a.s += static_cast<double>(r * fmaf(shift, b.d, b.s));
  a.q += static_cast<double>(r * r * b.q);
}
ASSAY_HD State rounded(const Growing& a) {
  return {a.m, static_cast<float>(a.d), static_cast<float>(a.s), static_cast<float>(a.q)};
}

ASSAY_HD State merge(const State& a, const State& b) {
  Growing sum{max_nan(a.m, b.m), 0, 0, 0};
  add(sum, a);
  add(sum, b);
  return rounded(sum);
}

ASSAY_HD bool is_defined(float m) { return m > -INF && m < INF; }

// log x of a normal x, and a / b, to about 1e-7, absolute and relative, by float operations: a GPU has few units for double.
ASSAY_HD double log_of(float x) {
  const uint32_t bits = float_to_bits(x);
  int exponent = static_cast<int>(bits >> 23) - 127;
  float mantissa = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
  if (mantissa > 1.41421356f) mantissa *= 0.5f, ++exponent;  // log 1 is 0, and nothing cancels near it
  return fma(static_cast<double>(exponent), LN2, static_cast<double>(std::log(mantissa)));
}
ASSAY_HD double quotient(float a, float b) {
  const float inverse = 1.f / b, q = a * inverse;
  return static_cast<double>(q) + static_cast<double>(fmaf(-q, b, a) * inverse);
}

// ---- the mixture ----------------------------------------------------------------------------------------------------
//
// Probabilities are summed as P = p 2^origin, where -origin is about the mean of log2 p. Mutual information is then
// sum_c (sum_k P_k log2 P_k - P log2 P), with P_k = w_k p_k 2^origin, and what the weights add to it: terms whose
// logarithms are small, so that their roundings are, too, of which equal logits make the same in every column.

// How a model's logits become P_k: 2^((z - m) log2(e) + whole + rest + origin).
struct alignas(16) Mixer {
  float m;
  float whole, rest;  // of log2(w / d)
  float bits;         // w times its entropy in bits, about
};

static_assert(sizeof(Mixer) == sizeof(State));  // one takes the other's place

ASSAY_HD Mixer mixer_of(const State& a, float weight) {
  const Log2 d = log2_of(fmaxf(a.d, TINY)), w = log2_of(fmaxf(weight, TINY));
  const float mean = a.s / a.d * LOG2E;
  return {a.m, w.exponent - d.exponent, w.rest - d.rest, weight * ((d.exponent + d.rest) - mean)};
}

// A whole number: 2^origin and its inverse are exact. 0 for undefined rows, whose sums nobody reads.
ASSAY_HD float origin_of(float bits) { return bits > 0.f && bits < 64.f ? std::rint(bits) : 0.f; }
ASSAY_HD float power_of_two(float whole) { return bits_to_float(static_cast<uint32_t>(static_cast<int>(whole) + 127) << 23); }

// Over some columns; the label's is left out of rest, squares and top.
struct Mixture {
  float information;  // bits, without the weights' share
  float rest, squares;
  float p_label;
  float top;
  int top_column;
};
constexpr int NO_COLUMN = std::numeric_limits<int>::max();
constexpr Mixture EMPTY_MIXTURE{0, 0, 0, 0, 0, NO_COLUMN};

ASSAY_HD void take_higher(float& top, int& column, float other, int others_column) {
  if (other > top || (other == top && others_column < column)) top = other, column = others_column;
}

// 1 - p_y is the sum of the other columns, never a difference: confident rows keep their digits.
ASSAY_HD float el2n(double rest, double squares) { return std::sqrt(static_cast<float>(fma(rest, rest, squares))); }

ASSAY_HD constexpr uint32_t bit(Field f) { return 1u << f; }
constexpr uint32_t LABEL_FIELDS = 1u << NLL | 1u << MEAN_NLL | 1u << MARGIN | 1u << AGREEMENT | 1u << EL2N;

// Which work a mask of fields asks for. `squares`: a single model's, whose mixture takes no second sweep.
struct Wants {
  bool mixture, squares, logs, tops, votes, prediction;
};
ASSAY_HD constexpr Wants wants(uint32_t fields, bool labelled, int64_t K) {
  const uint32_t f = labelled ? fields : fields & ~LABEL_FIELDS;
  const bool several = K > 1, rivals = (f & (bit(MARGIN) | bit(EL2N))) != 0;
  return {
      several && (rivals || (f & (bit(ENTROPY) | bit(MUTUAL_INFORMATION) | bit(CONFIDENCE) | bit(PREDICTION))) != 0),
      !several && rivals,
      several && (f & (bit(ENTROPY) | bit(MUTUAL_INFORMATION))) != 0,
      (f & (bit(AGREEMENT) | bit(VOTE_ENTROPY))) != 0 || (!several && (f & bit(PREDICTION)) != 0),
      several && (f & bit(VOTE_ENTROPY)) != 0,
      several && (f & bit(PREDICTION)) != 0,
  };
}

}  // namespace assay::cuda
