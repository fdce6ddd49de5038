// ensemble_stats' whole rows of one dtype, computed by emulated crews, against a plain double computation. A file of its
// own for each dtype: each is a minute of compiling under sanitizers.
#pragma once
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_crew.h"
#include "logits_of_floats.h"

namespace assay::cuda {

using Rows = std::vector<std::vector<std::vector<double>>>;  // [k][n][c]

struct Expected {
  double value[NUM_FLOAT_FIELDS];
  bool defined;
  std::vector<double> p;  // the mixture
};

inline Expected expected(const Rows& z, size_t n, const std::vector<double>& w, int64_t label, bool labelled, int64_t ignore) {
  const size_t K = z.size(), C = z[0][n].size();
  Expected e{};
  e.defined = !labelled || (label != ignore && label >= 0 && label < static_cast<int64_t>(C));
  e.p.assign(C, 0);
  std::vector<std::vector<double>> log_p(K);
  std::vector<size_t> top(K);
  double expected_entropy = 0, mean_nll = 0, agreement = 0, votes = 0, information = 0, py = 0;
  for (size_t k = 0; k < K; ++k) {
    const auto& row = z[k][n];
    double m = -static_cast<double>(INF), d = 0;
    for (double v : row) {
      if (std::isnan(v) || v == static_cast<double>(INF)) e.defined = false;
      m = std::max(m, v);
    }
    if (!(m > -static_cast<double>(INF))) e.defined = false;
    if (!e.defined) return e;
    for (double v : row) d += std::exp(v - m);
    top[k] = static_cast<size_t>(std::max_element(row.begin(), row.end()) - row.begin());
    for (size_t c = 0; c < C; ++c) {
      const double lp = row[c] - m - std::log(d), p = std::exp(lp);
      log_p[k].push_back(lp);
      e.p[c] += w[k] * p;
      if (p > 0) expected_entropy -= w[k] * p * lp;
    }
  }
  double entropy = 0, other = 0, rest = 0, squares = 0;
  const size_t y = labelled ? static_cast<size_t>(label) : C;
  for (size_t c = 0; c < C; ++c) {
    if (e.p[c] > 0) entropy -= e.p[c] * std::log(e.p[c]);
    if (c == y) continue;
    other = std::max(other, e.p[c]);
    rest += e.p[c];
    squares += e.p[c] * e.p[c];
  }
  for (size_t k = 0; k < K; ++k) {
    for (size_t c = 0; w[k] > 0 && c < C; ++c)  // 0 log 0 = 0 weighs nothing
      if (std::exp(log_p[k][c]) > 0) information += w[k] * std::exp(log_p[k][c]) * (log_p[k][c] - std::log(e.p[c]));
    if (!(w[k] > 0)) continue;
    double share = 0;
    for (size_t j = 0; j < K; ++j) share += top[j] == top[k] ? w[j] : 0;
    votes -= w[k] * std::log(std::min(share, 1.0));
    if (!labelled) continue;
    mean_nll -= w[k] * log_p[k][y];
    py += w[k] * std::exp(log_p[k][y]);
    agreement += top[k] == y ? w[k] : 0;
  }
  double highest = -static_cast<double>(INF), sum = 0;
  for (size_t k = 0; labelled && k < K; ++k)
    if (w[k] > 0) highest = std::max(highest, log_p[k][y]);
  for (size_t k = 0; labelled && k < K && highest > -static_cast<double>(INF); ++k)
    if (w[k] > 0) sum += w[k] * std::exp(log_p[k][y] - highest);
  const double nan = static_cast<double>(NaN);
  e.value[NLL] = labelled ? (sum > 0 ? -(highest + std::log(sum)) : static_cast<double>(INF)) : nan;
  e.value[MEAN_NLL] = labelled ? mean_nll : nan;
  e.value[MARGIN] = labelled ? py - other : nan;
  e.value[AGREEMENT] = labelled ? agreement : nan;
  e.value[EL2N] = labelled ? std::sqrt(rest * rest + squares) : nan;
  e.value[ENTROPY] = entropy;
  e.value[EXPECTED_ENTROPY] = expected_entropy;
  e.value[MUTUAL_INFORMATION] = std::max(information, 0.0);
  e.value[CONFIDENCE] = *std::max_element(e.p.begin(), e.p.end());
  e.value[VOTE_ENTROPY] = votes;
  return e;
}

// One row of each kind that random logits do not show; rows of the models differ.
inline float hard_logit(int kind, int k, int64_t c, int64_t C, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const float x = normal(rng);
  switch (kind) {
    case 0:
      return x;
    case 1:
      return 5 * x;
    case 2:
      return 0;  // flat: every column ties
    case 3:
      return c == (C * 7 / 9 + k) % C ? 20.f : -20.f;  // peaked
    case 4:
      return x + 1e4f;
    case 5:
      return x - 1e4f;
    case 6:
      return std::round(x);  // ties within and between the models
    case 7:
      return c % 2 && C > 1 ? -INF : x;
    case 8:
      return c + 1 < C ? -INF : x;  // only the last column is possible
    case 9:
      return k == 0 ? -INF : x;  // undefined
    case 10:
      return c == C / 2 && k == 0 ? NaN : x;
    case 11:
      return c == C - 1 ? INF : x;
    case 12:
      return c == C - 1 ? 90.f : 0;  // far above a chunk's first columns
    case 13:
      return static_cast<float>(c % 97) / 7 + (k ? 1e-3f * x : 0);  // models that nearly agree: a divergence
    case 14:
      return 3 + static_cast<float>(c % 89) / 11;  // models that agree
    case 15:
      return -103.f * static_cast<float>(c) / static_cast<float>(C);  // subnormal probabilities
    case 16:
      return x * 1e20f;
    case 17:
      return x * 3e37f;
    case 18:
      return c == 3 % C || c == C - 1 ? 4.f : x - 5.f;  // two equal winners, far apart
    default:
      return -std::numeric_limits<float>::max();  // a mask of finite numbers
  }
}
constexpr int KINDS = 20;

struct Case {
  const char* name;
  int64_t K, C;
  Plan plan;
  int64_t row_gap, col_stride, offset;  // elements
  int crews;
  uint32_t fields;
  bool labelled;
};

template <class T, Path PATH, int WARP>
void run_path(const Problem& p, int crews) {
  const Sweeps asked = sweeps(p.todo);
  check(has_kernel(PATH, asked), "no such kernel");
  if constexpr (has_kernel(PATH, Sweeps::ONE))
    if (asked == Sweeps::ONE) emulated::run<T, PATH, Sweeps::ONE, WARP>(p, crews);
  if constexpr (has_kernel(PATH, Sweeps::SQUARES))
    if (asked == Sweeps::SQUARES) emulated::run<T, PATH, Sweeps::SQUARES, WARP>(p, crews);
  if constexpr (has_kernel(PATH, Sweeps::TWO))
    if (asked == Sweeps::TWO) emulated::run<T, PATH, Sweeps::TWO, WARP>(p, crews);
}

// Warps of 8 have packed rows, of 4 wide ones, single threads both: each pair is minutes of compiling under sanitizers.
template <class T, int WARP>
void run(const Problem& p, int crews) {
  if constexpr (WARP != 4)
    if (p.plan.path == Path::NARROW) return run_path<T, Path::NARROW, WARP>(p, crews);
  if constexpr (WARP == 8)
    if (p.plan.path == Path::WARP) return run_path<T, Path::WARP, WARP>(p, crews);
  if constexpr (WARP != 8) {
    if (p.plan.path == Path::ONCE) return run_path<T, Path::ONCE, WARP>(p, crews);
    if (p.plan.path == Path::KEPT) return run_path<T, Path::KEPT, WARP>(p, crews);
    if (p.plan.path == Path::TWICE) return run_path<T, Path::TWICE, WARP>(p, crews);
  }
  if constexpr (WARP == 4)
    if (p.plan.path == Path::TWICE_GLOBAL) return run_path<T, Path::TWICE_GLOBAL, WARP>(p, crews);
  check(false, "a path without its warp");
}

template <class T, int WARP>
void test_rows(const Case& c, std::mt19937& rng) {
  const int64_t N = KINDS + 3, K = c.K, C = c.C;
  const int64_t row_stride = C * c.col_stride + c.row_gap, size = (N - 1) * row_stride + (C - 1) * c.col_stride + 1 + c.offset;
  Rows z(static_cast<size_t>(K));
  std::vector<T*> buffers;
  Problem p{};
  std::vector<ModelLogits> table(static_cast<size_t>(K));
  std::vector<double> w;
  for (int64_t k = 0; k < K; ++k) w.push_back(k == 1 && K > 2 ? 0 : 1.0 + static_cast<double>(k));  // one without weight
  double total = 0;
  for (double x : w) total += x;
  for (double& x : w) x /= total;
  for (int64_t k = 0; k < K; ++k) {
    T* buffer = static_cast<T*>(std::calloc(static_cast<size_t>(size), sizeof(T)));  // not an element beyond the last
    buffers.push_back(buffer);
    for (int64_t n = 0; n < N; ++n) {
      std::vector<double> row;
      for (int64_t i = 0; i < C; ++i) {
        T& to = buffer[c.offset + n * row_stride + i * c.col_stride];
        from_float(hard_logit(static_cast<int>(n % KINDS), static_cast<int>(k), i, C, rng), to);
        row.push_back(static_cast<double>(to_float(to)));
      }
      z[static_cast<size_t>(k)].push_back(row);
    }
    table[static_cast<size_t>(k)] = {buffer + c.offset, row_stride, c.col_stride, static_cast<float>(w[static_cast<size_t>(k)])};
    if (K <= INLINE_MODELS) p.inline_models[k] = table[static_cast<size_t>(k)];
  }
  std::vector<int64_t> labels(static_cast<size_t>(N)), prediction(static_cast<size_t>(N), -7);
  for (auto& y : labels) y = static_cast<int64_t>(rng() % static_cast<uint64_t>(C));
  labels[0] = -100;                           // ignored
  labels[KINDS] = C, labels[KINDS + 1] = -1;  // what a captured graph cannot refuse
  constexpr float UNTOUCHED = -12345.f;
  std::vector<float> out(static_cast<size_t>(NUM_FLOAT_FIELDS * N), UNTOUCHED);
  if (K > INLINE_MODELS) p.g_models = table.data();
  p.N = N;
  p.K = static_cast<int32_t>(K);
  p.C = static_cast<int32_t>(C);
  p.g_labels = c.labelled ? labels.data() : nullptr;
  p.ignore_index = -100;
  p.fields = c.fields;
  p.g_out = out.data();
  p.g_prediction = prediction.data();
  p.plan = c.plan;
  p.todo = wants(c.fields, c.labelled, K);
  run<T, WARP>(p, c.crews);

  static const char* names[] = {"nll", "mean_nll", "margin", "agreement", "el2n", "entropy", "expected_entropy",
                                "mutual_information", "confidence", "vote_entropy"};
  for (int64_t n = 0; n < N; ++n) {
    const size_t row = static_cast<size_t>(n);
    const Expected e = expected(z, row, w, labels[row], c.labelled, -100);
    const std::string where = std::string(c.name) + " K=" + std::to_string(K) + " C=" + std::to_string(C) +
                              " itemsize=" + std::to_string(sizeof(T)) + " row " + std::to_string(n) + ": ";
    for (int f = 0; f < NUM_FLOAT_FIELDS; ++f) {
      const float got = out[static_cast<size_t>(f * N + n)];
      const std::string text = where + names[f] + " is " + std::to_string(got) + ", expected " + std::to_string(e.value[f]);
      if (!(c.fields >> f & 1)) {
        check(got == UNTOUCHED, where + names[f] + " was not asked for but written");
      } else if (!e.defined || std::isnan(e.value[f])) {
        check(std::isnan(got), text + " (NaN)");
      } else if (std::isinf(e.value[f])) {
        check(static_cast<double>(got) == e.value[f], text);
      } else {
        check(std::fabs(static_cast<double>(got) - e.value[f]) <= 2e-6 * std::max(1.0, std::fabs(e.value[f])), text);
      }
    }
    if (!(c.fields >> PREDICTION & 1)) {
      check(prediction[row] == -7, where + "prediction was not asked for but written");
    } else if (!e.defined) {
      check(prediction[row] == -1, where + "prediction of an undefined row");
    } else {
      const int64_t got = prediction[row];
      check(got >= 0 && got < C, where + "prediction " + std::to_string(got));
      if (got < 0 || got >= C) continue;
      check(e.p[static_cast<size_t>(got)] >= (1 - 2e-6) * *std::max_element(e.p.begin(), e.p.end()), where + "prediction");
      for (int64_t i = 0; i < got; ++i) {
        bool equal = true;
        for (const auto& model : z) equal = equal && model[row][static_cast<size_t>(i)] == model[row][static_cast<size_t>(got)];
        check(!equal, where + "prediction " + std::to_string(got) + " ties with " + std::to_string(i));
      }
    }
  }
  for (T* b : buffers) std::free(b);
}

// A wide row's, by the number of models.
inline std::vector<Path> paths(int64_t K) {
  return K == 1 ? std::vector<Path>{Path::ONCE} : std::vector<Path>{Path::KEPT, Path::TWICE};
}

template <class T>
void test_dtype(std::mt19937& rng) {
  constexpr uint32_t ALL = (1u << NUM_FIELDS) - 1, ONE_SWEEP = bit(NLL) | bit(MEAN_NLL) | bit(AGREEMENT) | bit(VOTE_ENTROPY);
  constexpr int SLOTS = 64 / sizeof(T);
  // One thread does everything: quick, so every size.
  for (int64_t K : {1, 2, 3, 8})
    for (int64_t C : {1, 2, 3, 10, 63, 64, 65, 200, 1000}) {
      for (Path path : paths(K))
        test_rows<T, 1>({"one thread", K, C, wide_plan(path, C, SLOTS, 1, 1, 1), K % 2, C == 10 ? 2 : 1, K % 3, 1, ALL, true}, rng);
      if (C <= 32) test_rows<T, 1>({"one lane per row", K, C, narrow_plan(C, sizeof(T), 1), 0, 1, 0, 2, ALL, true}, rng);
    }
  // Real shapes in small: warps of 4 or 8 lanes, several warps, several blocks.
  for (int64_t K : {1, 3}) {
    for (int64_t C : {1, 5, 10, 33, 64, 200}) {
      test_rows<T, 8>({"narrow", K, C, narrow_plan(C, sizeof(T), 16), K, 1, 1, 2, ALL, true}, rng);
      test_rows<T, 8>({"narrow, one sweep", K, C, narrow_plan(C, sizeof(T), 16), 0, 2, 0, 1, ONE_SWEEP, true}, rng);
    }
    for (int64_t C : {4 * SLOTS - 1, 4 * SLOTS + 1, 11 * SLOTS + 3, 40 * SLOTS + 1})
      for (Path path : paths(K)) {
        test_rows<T, 4>({"block", K, C, wide_plan(path, C, SLOTS, 1, 4, 2), 1, 1, 0, 1, ALL, true}, rng);
        test_rows<T, 4>({"cluster", K, C, wide_plan(path, C, SLOTS, 2, 4, 2), 0, 1, 1, 2, ALL, true}, rng);
      }
    const Path path = paths(K)[0];
    test_rows<T, 4>({"cluster, one sweep", K, 2000, wide_plan(path, 2000, SLOTS, 2, 4, 2), 0, 1, 0, 1, ONE_SWEEP, true}, rng);
    test_rows<T, 4>({"no labels", K, 500, wide_plan(path, 500, SLOTS, 2, 4, 2), 0, 1, 0, 1, ALL, false}, rng);
    for (int64_t C : {SLOTS - 1, 4 * SLOTS - 1, 8 * SLOTS - 3, 8 * SLOTS}) {
      test_rows<T, 8>({"warps", K, C, warp_plan(8, 3), K, 1, 1, 2, ALL, true}, rng);
      test_rows<T, 8>({"warps, no labels", K, C, warp_plan(8, 4), 0, 1, 0, 1, ALL, false}, rng);
      test_rows<T, 8>({"warps, one sweep", K, C, warp_plan(8, 2), 0, 2, 0, 1, ONE_SWEEP, true}, rng);
    }
    test_rows<T, 8>({"narrow, no labels", K, 20, narrow_plan(20, sizeof(T), 16), 0, 1, 0, 1, ALL, false}, rng);
  }
  test_rows<T, 4>({"many models", 40, 300, wide_plan(Path::TWICE_GLOBAL, 300, SLOTS, 2, 4, 2), 0, 1, 0, 1, ALL, true}, rng);
  // Entropies of 8 to 11 nats, of which mutual information is what is left.
  constexpr uint32_t ENTROPIES = bit(ENTROPY) | bit(EXPECTED_ENTROPY) | bit(MUTUAL_INFORMATION);
  constexpr int64_t WIDE = 71 * 1024 + 5;
  test_rows<T, 1>({"large entropies", 3, WIDE, wide_plan(Path::TWICE, WIDE, SLOTS, 1, 1, 1), 0, 1, 0, 1, ENTROPIES, false}, rng);
  for (int f = 0; f < NUM_FIELDS; ++f) {
    test_rows<T, 4>({"one field", 2, 300, wide_plan(Path::KEPT, 300, SLOTS, 1, 4, 1), 0, 1, 0, 1, 1u << f, true}, rng);
    test_rows<T, 1>({"one field, one model", 1, 300, wide_plan(Path::ONCE, 300, SLOTS, 1, 1, 1), 0, 1, 0, 1, 1u << f, true}, rng);
  }
}

}  // namespace assay::cuda
