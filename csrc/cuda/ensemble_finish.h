// From a row's sums to its fields: what one thread does, once the logits have been gone through.
#pragma once
#include "ensemble_plan.h"
#include "logits.h"

namespace assay::cuda {

struct ModelLogits {
  const void* g_logits;  // (N, C)
  int64_t row_stride, col_stride;
  float weight;
};

struct Problem {
  ModelLogits inline_models[INLINE_MODELS];
  const ModelLogits* g_models;  // null: inline
  int64_t N;                    // rows of all launches: the stride of g_out
  int64_t first, rows;          // of this one
  int32_t K, C;
  const int64_t* g_labels;
  int64_t ignore_index;
  uint32_t fields;
  Wants todo;             // of fields
  float* g_out;           // (NUM_FLOAT_FIELDS, N)
  int64_t* g_prediction;  // (N,)
  Plan plan;
  Layout layout;
  SumsLayout sums_layout;  // of narrow rows' blocks
  Sums sums;               // of other rows

  // By value: a reference to one or the other would be read as any memory is.
  ASSAY_HD ModelLogits model(int k) const {
    if (g_models) return g_models[k];
    return inline_models[k];
  }
  template <class T>
  ASSAY_HD const T* row(const ModelLogits& model, int64_t n) const {
    return static_cast<const T*>(model.g_logits) + (first + n) * model.row_stride;
  }
  // False: the row counts for nothing (ignored, or its label is no class, which a captured graph cannot report otherwise).
  ASSAY_HD bool read_label(int64_t n, int& to) const {
    if (!g_labels) return true;
    const int64_t y = g_labels[first + n];
    if (y == ignore_index || y < 0 || y >= C) return false;
    to = static_cast<int>(y);
    return true;
  }
  ASSAY_HD bool asks_for(Field f) const { return fields >> f & 1; }
  ASSAY_HD void write(Field f, int64_t n, float value) const {
    if (asks_for(f)) g_out[f * N + first + n] = value;
  }
  ASSAY_HD void write_prediction(int64_t n, int64_t value) const {
    if (asks_for(PREDICTION)) g_prediction[first + n] = value;
  }
};
constexpr int NO_LABEL = -1;

// Row n of the launch, whose sums are the `at`-th.
template <class T>
class FinishRow {
 public:
  ASSAY_HD FinishRow(const Problem& problem, const Sums& its_sums, int64_t its_at, int64_t its_n)
      : p(problem), sums(its_sums), at(its_at), n(its_n) {}

  ASSAY_HD void run() {
    defined = p.read_label(n, label);
    if (defined) add_models();
    if (!defined) return write_undefined();
    if (p.K == 1) {
      mix_one();
    } else if (p.todo.mixture) {
      add_mixtures();
    }
    write_fields();
  }

 private:
  ASSAY_HD State state(int k) const { return sums.models[k * sums.rows + at]; }
  ASSAY_HD int top(int k) const { return static_cast<int>(sums.tops[k * sums.rows + at]); }
  ASSAY_HD float label_logit(const ModelLogits& model) const {
    return label >= 0 ? to_float(p.row<T>(model, n)[label * model.col_stride]) : NaN;
  }
  // A single model's sums leave the label out.
  ASSAY_HD State with_label(const State& others, float zy) const {
    return p.K == 1 && label >= 0 ? merge(others, State{zy, 1, 0, 1}) : others;
  }

  ASSAY_HD void add_models() {
    float highest = -INF, sum = 0;  // the mixture's probability of the label is sum e^highest
    double shares = 0;
    ASSAY_UNROLL_2  // so many models' loads at once
    for (int k = 0; k < p.K; ++k) {
      const ModelLogits model = p.model(k);
      const float w = model.weight, zy = label_logit(model);
      const State all = with_label(state(k), zy);
      if (!is_defined(all.m)) defined = false;
      if (!defined) return;
      const double log_d = log_of(all.d);
      expected_entropy = fma(static_cast<double>(w), log_d - quotient(all.s, all.d), expected_entropy);
      shares += static_cast<double>(w);
      if (!(w > 0.f)) continue;  // 0 * inf must not be NaN
      weights_entropy -= static_cast<double>(w) * log_of(fmaxf(w, TINY));
      if (p.todo.tops) add_vote(k, w);
      if (label < 0) continue;
      const float log_py = (zy - all.m) - static_cast<float>(log_d);
      mean_nll -= static_cast<double>(w) * static_cast<double>(log_py);
      if (log_py > highest) {
        sum = fmaf(sum, exp2_approx((highest - log_py) * LOG2E), w);
        highest = log_py;
      } else if (log_py > -INF) {
        sum = fmaf(w, exp2_approx((log_py - highest) * LOG2E), sum);
      }
    }
    nll = highest == -INF ? INF : -(highest + std::log(sum));
    expected_entropy *= 2 - shares;  // the rounded weights' sum is almost 1
  }

  ASSAY_HD void add_vote(int k, float w) {
    if (top_of(k) == label) agreement += static_cast<double>(w);
    if (!p.todo.votes) return;
    // A class's share of the vote, seen from each of its voters: H = -sum_k w_k log(share of k's choice)
    double share = 0;
    ASSAY_NO_UNROLL
    for (int j = 0; j < p.K; ++j) share += top(j) == top(k) ? static_cast<double>(p.model(j).weight) : 0;
    vote_entropy -= static_cast<double>(w * std::log(share < 1 ? static_cast<float>(share) : 1.f));
  }
  ASSAY_HD int top_of(int k) const {
    if (p.K > 1 || label < 0) return top(k);
    const State others = state(0);
    const float zy = label_logit(p.model(0));
    return zy > others.m || (zy == others.m && label < top(0)) ? label : top(0);
  }

  // A single model is its own mixture.
  ASSAY_HD void mix_one() {
    const float zy = label_logit(p.model(0));
    const State others = state(0), all = with_label(others, zy);
    confidence = 1.f / all.d;
    if (p.todo.tops) prediction = top_of(0);
    if (!p.todo.squares) return;
    Growing x{all.m, 0, 0, 0};
    add(x, others);
    const double inverse = static_cast<double>(confidence);
    rest = x.d * inverse;
    squares = x.q * inverse * inverse;
    margin = exp2_approx((zy - all.m) * LOG2E) * confidence - exp2_approx((others.m - all.m) * LOG2E) * confidence;
  }

  ASSAY_HD void add_mixtures() {
    double bits = 0;
    float p_label = 0, rival = 0;
    int column = NO_COLUMN;
    ASSAY_UNROLL_4
    for (int i = 0; i < p.plan.slices; ++i) {
      const Mixture x = sums.mixtures[i * sums.rows + at];
      bits += static_cast<double>(x.information);
      rest += static_cast<double>(x.rest);
      squares += static_cast<double>(x.squares);
      p_label = fmaxf(p_label, x.p_label);
      take_higher(rival, column, x.top, x.top_column);
    }
    information = fmax(fma(bits, LN2, weights_entropy), 0.0);
    margin = p_label - rival;
    if (label >= 0) take_higher(rival, column, p_label, label);
    confidence = rival;
    prediction = column;
  }

  ASSAY_HD void write_fields() const {
    const bool labelled = label >= 0;
    const auto put = [&](Field f, float value) { p.write(f, n, value); };
    put(NLL, labelled ? nll : NaN);
    put(MEAN_NLL, labelled ? static_cast<float>(mean_nll) : NaN);
    put(MARGIN, labelled ? margin : NaN);
    put(AGREEMENT, labelled ? static_cast<float>(agreement) : NaN);
    put(EL2N, labelled ? el2n(rest, squares) : NaN);
    put(ENTROPY, static_cast<float>(expected_entropy + information));
    put(EXPECTED_ENTROPY, static_cast<float>(expected_entropy));
    put(MUTUAL_INFORMATION, static_cast<float>(information));
    put(CONFIDENCE, confidence);
    put(VOTE_ENTROPY, static_cast<float>(vote_entropy));
    p.write_prediction(n, prediction);
  }
  ASSAY_HD void write_undefined() const {
    ASSAY_NO_UNROLL
    for (int f = 0; f < NUM_FLOAT_FIELDS; ++f) p.write(static_cast<Field>(f), n, NaN);
    p.write_prediction(n, -1);
  }

  const Problem& p;
  const Sums& sums;
  const int64_t at, n;
  int label = NO_LABEL;
  bool defined = true;
  double expected_entropy = 0, weights_entropy = 0, mean_nll = 0, agreement = 0, vote_entropy = 0;
  double information = 0, rest = 0, squares = 0;
  float nll = INF, margin = 0, confidence = 0;
  int prediction = -1;
};

}  // namespace assay::cuda
