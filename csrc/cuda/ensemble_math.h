// From sums to fields: the arithmetic of ensemble_stats that neither loads nor synchronises.
//
// fma where it is meant: nvcc runs with -fmad=false, so that every instantiation of a kernel rounds alike and a field
// has the same bits whichever others are asked for.
#pragma once
#include "../assay.h"
#include "portable.h"

namespace assay::cuda {

// The difference of entropies carries an error of a few 1e-7 (1 + entropy): below this share of it, mutual information
// is summed as a KL divergence instead.
constexpr float SMALL_INFORMATION = 1e-4f;

// Logits this far below the maximum count as this far: e^-200 is 0, and (z - m) e^(z - m) stays 0 for z = -inf.
constexpr float FAR = -200.f;

constexpr float TINY = std::numeric_limits<float>::min();

// A model's softmax over some columns, relative to their maximum m: d = sum e^(z-m), s = sum (z-m) e^(z-m), and, of a
// single model, q = sum e^2(z-m).
// No columns, or nothing but -inf: m = -inf, d = s = q = 0. A NaN or +inf logit shows in m.
struct State {
  float m;
  double d, s, q;
};
constexpr State EMPTY_STATE{-INF, 0, 0, 0};

// The same sums relative to m >= a.m.
ASSAY_HD State rescaled(const State& a, float m) {
  if (a.m == m) return a;
  const float shift = a.m - m;
  if (shift < FAR) return {m, 0, 0, 0};  // nothing is left, nor is there of -inf: 0 * inf must not be NaN
  const double r = static_cast<double>(exp2_approx(shift * LOG2E));
  return {m, r * a.d, r * fma(static_cast<double>(shift), a.d, a.s), r * r * a.q};
}

ASSAY_HD State merge(const State& a, const State& b) {
  const float m = max_nan(a.m, b.m);
  const State x = rescaled(a, m), y = rescaled(b, m);
  return {m, x.d + y.d, x.s + y.s, x.q + y.q};
}

// One model's whole row. (m, log d) stay two words: their sum would lose digits under a large common offset. Entropies are
// double until mutual information is taken from them: at 11 nats a float rounds by half a millionth.
struct Model {
  float m, inverse;  // e^(z - m) inverse is the probability
  double entropy;
  float log_py;
};

ASSAY_HD bool is_defined(float m) { return m > -INF && m < INF; }

// log x and a / b to about 1e-7, absolute and relative, by float operations: a GPU has few units for double.
ASSAY_HD double log_of(double x) {
  int exponent;
  float mantissa = static_cast<float>(std::frexp(x, &exponent));
  if (mantissa < 0.70710678f) mantissa *= 2, --exponent;  // log 1 is 0, and nothing cancels near it
  return fma(static_cast<double>(exponent), LN2, static_cast<double>(std::log(mantissa)));
}
ASSAY_HD double quotient(double a, double b) {
  const float inverse = 1.f / static_cast<float>(b);
  const double q = static_cast<double>(static_cast<float>(a) * inverse);
  return q + static_cast<double>(static_cast<float>(fma(-q, b, a)) * inverse);
}

ASSAY_HD Model finish_model(const State& a, float zy) {
  const float d = static_cast<float>(a.d);
  return {a.m, 1.f / d, log_of(a.d) - quotient(a.s, a.d), (zy - a.m) - std::log(d)};
}

// The mixture over some columns, the label's left out of rest, squares and top_other.
struct Mixture {
  double entropy;          // bits
  double rest, squares;    // sums of p and p^2
  float top_other, p_label;
};
constexpr Mixture EMPTY_MIXTURE{0, 0, 0, 0, 0};

// In nats, of probabilities that add up to 1 + eps: rounded weights and approximate exponentials let them miss it.
ASSAY_HD double entropy_of(const Mixture& x) {
  const double eps = x.rest + static_cast<double>(x.p_label) - 1;
  return fma(x.entropy * LN2, 1 - eps, eps);
}

ASSAY_HD Mixture merge(const Mixture& a, const Mixture& b) {
  return {a.entropy + b.entropy, a.rest + b.rest, a.squares + b.squares,
          a.top_other > b.top_other ? a.top_other : b.top_other, a.p_label > b.p_label ? a.p_label : b.p_label};
}

// A single model is its own mixture: `others` is its state without the label's column, `model` that of all columns.
ASSAY_HD Mixture mixture_of_one(const State& others, const Model& model, float zy) {
  const State x = rescaled(others, model.m);
  const double inverse = static_cast<double>(model.inverse);
  return {0, x.d * inverse, x.q * inverse * inverse, exp2_approx((others.m - model.m) * LOG2E) * model.inverse,
          exp2_approx((zy - model.m) * LOG2E) * model.inverse};
}

// What a second look gives: the KL sum, and the highest column as (probability, lowest index), which compares as a number.
struct Refined {
  double information;
  uint64_t best;
};
constexpr Refined EMPTY_REFINED{0, 0};

ASSAY_HD uint64_t make_best(float p, int column) {  // p >= 0: its bits ascend with it
  return static_cast<uint64_t>(float_to_bits(p)) << 32 | (0xffffffffu - static_cast<uint32_t>(column));
}
ASSAY_HD int best_column(uint64_t best) { return static_cast<int>(0xffffffffu - static_cast<uint32_t>(best)); }
ASSAY_HD Refined merge(const Refined& a, const Refined& b) {
  return {a.information + b.information, a.best > b.best ? a.best : b.best};
}

// One column's w p log(p_k / p) terms, q = p_k / p: never negative, and 0 where the models agree.
ASSAY_HD float divergence_term(float weight, float q) {
  return q > 0.f ? weight * fmaf(q, std::log(q), 1.f - q) : weight;
}

// The fields that each model's own softmax gives.
struct ModelFields {
  bool defined;
  float nll, mean_nll, agreement, vote_entropy;
  double expected_entropy;
};

// s_models, s_tops: (K,) states and argmaxes; weight(k). Sums are double: any K.
template <class Weight>
ASSAY_HD ModelFields combine_models(const Model* s_models, const int* s_tops, int K, const Weight& weight, int label,
                                    bool votes) {
  ModelFields r{true, 0, 0, 0, 0, 0};
  double mean_nll = 0, agreement = 0, expected_entropy = 0, vote_entropy = 0, sum = 0, shares = 0;
  float highest = -INF;
  for (int k = 0; k < K; ++k) {
    const Model& model = s_models[k];
    const float w = weight(k);
    r.defined = r.defined && is_defined(model.m);
    expected_entropy = fma(static_cast<double>(w), model.entropy, expected_entropy);
    shares += static_cast<double>(w);
    if (!(w > 0.f)) continue;  // 0 * inf must not be NaN
    mean_nll -= static_cast<double>(w) * static_cast<double>(model.log_py);
    highest = model.log_py > highest ? model.log_py : highest;
    if (!votes) continue;
    if (s_tops[k] == label) agreement += static_cast<double>(w);
    // A class's share of the vote, seen from each of its voters: H = -sum_k w_k log(share of k's choice)
    double share = 0;
    for (int j = 0; j < K; ++j) share += s_tops[j] == s_tops[k] ? static_cast<double>(weight(j)) : 0;
    const float clipped = share < 1 ? static_cast<float>(share) : 1.f;
    vote_entropy -= static_cast<double>(w * std::log(clipped));
  }
  for (int k = 0; highest > -INF && k < K; ++k)
    if (weight(k) > 0.f) sum += static_cast<double>(weight(k) * std::exp(s_models[k].log_py - highest));
  r.nll = highest == -INF ? INF : -(highest + std::log(static_cast<float>(sum)));
  r.mean_nll = static_cast<float>(mean_nll);
  r.agreement = static_cast<float>(agreement);
  r.expected_entropy = expected_entropy * (2 - shares);  // the rounded weights' sum is almost 1
  r.vote_entropy = static_cast<float>(vote_entropy);
  return r;
}

// 1 - p_y is the sum of the other columns, never a difference: confident rows keep their digits.
ASSAY_HD float el2n(const Mixture& x) {
  return static_cast<float>(std::sqrt(fma(x.rest, x.rest, x.squares)));
}

ASSAY_HD constexpr uint32_t bit(Field f) { return 1u << f; }
constexpr uint32_t LABEL_FIELDS = 1u << NLL | 1u << MEAN_NLL | 1u << MARGIN | 1u << AGREEMENT | 1u << EL2N;

// Which work a mask of fields asks for. `squares`: a single model's, whose mixture takes no second sweep.
struct Wants {
  bool mixture, squares, logs, tops, information, prediction;
};
ASSAY_HD constexpr Wants wants(uint32_t fields, bool labelled, int64_t K) {
  const uint32_t f = labelled ? fields : fields & ~LABEL_FIELDS;
  const bool several = K > 1, rivals = (f & (bit(MARGIN) | bit(EL2N))) != 0;
  return {
      several && (rivals || (f & (bit(ENTROPY) | bit(MUTUAL_INFORMATION) | bit(CONFIDENCE) | bit(PREDICTION))) != 0),
      !several && rivals,
      several && (f & (bit(ENTROPY) | bit(MUTUAL_INFORMATION))) != 0,
      (f & (bit(AGREEMENT) | bit(VOTE_ENTROPY))) != 0 || (!several && (f & bit(PREDICTION)) != 0),
      several && (f & bit(MUTUAL_INFORMATION)) != 0,
      several && (f & bit(PREDICTION)) != 0,
  };
}

}  // namespace assay::cuda
