// The CUDA kernels' own code without a GPU: dispatch, index maps, loads, merges, and whole rows computed by emulated
// crews against a plain double computation. Philox against Random123's published vectors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "emulated_crew.h"
#include "philox.h"
#include "sparse_tests.h"

using namespace assay;
using namespace assay::cuda;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

// ---- Philox: kat_vectors of Random123 -------------------------------------------------------------------------------

void test_philox() {
  struct Known {
    PhiloxCounter counter;
    PhiloxKey key;
    uint32_t want[4];
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, {{0, 0}}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{{~0u, ~0u, ~0u, ~0u}}, {{~0u, ~0u}}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) {
    const PhiloxCounter got = philox4x32_10(k.counter, k.key);
    for (int i = 0; i < 4; ++i) check(got.v[i] == k.want[i], "philox word " + std::to_string(i));
  }
}

// ---- dispatch ---------------------------------------------------------------------------------------------------------

constexpr Device HOPPER{227 << 10, 16}, PORTABLE{227 << 10, 8}, AMPERE{163 << 10, 1};

void expect_plan(int64_t K, int64_t C, int itemsize, const Device& device, Path path, int slices) {
  const Plan p = make_plan(K, C, itemsize, device);
  const std::string where = "plan of K=" + std::to_string(K) + " C=" + std::to_string(C) + ": ";
  check(p.path == path, where + "path " + std::to_string(static_cast<int>(p.path)));
  check(p.slices == slices, where + "slices " + std::to_string(p.slices));
  check(make_layout(p, K, p.keeps()).bytes <= device.shared_bytes || p.path == Path::TWICE_GLOBAL, where + "shared memory");
  const int V = p.path == Path::NARROW ? 1 : 16 / itemsize, slots = p.path == Path::NARROW ? NARROW_COLUMNS : 4 * V;
  check(int64_t{p.slices} * p.chunks * p.row_groups * p.lanes * slots >= C, where + "columns left out");
  check(p.threads() % 32 == 0 && p.threads() <= 256 && 32 % p.lanes == 0, where + "threads");
}

void test_plans() {
  expect_plan(1, 1, 4, HOPPER, Path::NARROW, 1);
  expect_plan(8, 100, 4, HOPPER, Path::NARROW, 1);
  for (const Device& d : {HOPPER, PORTABLE, AMPERE}) {
    expect_plan(2, 256, 2, d, Path::NARROW, 1);
    for (int K : {1, 8}) expect_plan(K, 257, 2, d, Path::WARP, 1);
    expect_plan(2, 1024, 2, d, Path::WARP, 1);
    expect_plan(2, 1025, 2, d, Path::KEPT, 1);
    expect_plan(2, 513, 4, d, Path::KEPT, 1);
    expect_plan(1, 1025, 2, d, Path::ONCE, 1);
    expect_plan(33, 10, 4, d, Path::TWICE_GLOBAL, 1);
  }
  expect_plan(1, 262144, 4, HOPPER, Path::ONCE, 1);
  expect_plan(1, 262145, 4, HOPPER, Path::ONCE, 2);
  expect_plan(1, 1 << 20, 4, AMPERE, Path::ONCE, 1);
  check(make_plan(1, 64 << 10, 2, HOPPER).threads() == 128, "a short row has few warps");
  check(make_plan(1, 65 << 10, 2, HOPPER).threads() == 256, "a long row has more");
  // 72 KB are 36 chunks and what else a row needs.
  expect_plan(2, 16 << 10, 2, HOPPER, Path::KEPT, 1);
  expect_plan(2, 18 << 10, 2, HOPPER, Path::KEPT, 2);
  expect_plan(5, 32000, 2, HOPPER, Path::KEPT, 8);
  expect_plan(2, 65536, 4, HOPPER, Path::KEPT, 8);
  expect_plan(2, 65536, 4, PORTABLE, Path::KEPT, 8);
  expect_plan(5, 151936, 2, HOPPER, Path::KEPT, 16);
  expect_plan(8, 131072, 2, HOPPER, Path::TWICE, 16);
  expect_plan(8, 262144, 2, HOPPER, Path::TWICE, 16);
  expect_plan(8, 65536, 2, PORTABLE, Path::TWICE, 8);
  expect_plan(4, 9 << 10, 2, AMPERE, Path::KEPT, 1);
  expect_plan(4, 9 << 10, 4, AMPERE, Path::TWICE_GLOBAL, 16);
  expect_plan(4, 1000, 4, AMPERE, Path::KEPT, 1);
  expect_plan(40, 3000, 4, HOPPER, Path::TWICE_GLOBAL, 8);
  for (int64_t K : {1, 2, 5, 8, 31, 32, 33, 100})
    for (int64_t C : {1, 2, 7, 8, 9, 255, 256, 257, 1000, 1025, 50257, 151936, 262144, 1000003})
      for (int itemsize : {2, 4})
        for (const Device& d : {HOPPER, PORTABLE, AMPERE, Device{99 << 10, 1}}) {
          const Plan p = make_plan(K, C, itemsize, d);
          expect_plan(K, C, itemsize, d, p.path, p.slices);
        }
}

// Every column has one owner and one slot, and a lane's columns ascend.
template <int V, int U>
void test_slots(int lanes) {
  using S = Slots<V, U>;
  std::vector<int> owners(static_cast<size_t>(S::columns(lanes)));
  for (int lane = 0; lane < lanes; ++lane) {
    int before = -1;
    for (int i = 0; i < S::COUNT; ++i) {
      const int c = S::column(lane, lanes, i);
      check(c > before, "a lane's columns must ascend");
      before = c;
      ++owners[static_cast<size_t>(c)];
      for (int other = 0; other < lanes; ++other)
        check(S::slot(other, lanes, c) == (other == lane ? i : -1), "slot is not column's inverse");
    }
  }
  check(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }), "a column without its one owner");
}

// ---- logits of each dtype -----------------------------------------------------------------------------------------------

void from_float(float f, float& to) { to = f; }
void from_float(float f, bf16& to) { to.bits = static_cast<uint16_t>(float_to_bits(f) >> 16); }
void from_float(float f, f16& to) {  // truncates; overflows to inf
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000;
  const int exponent = static_cast<int>(u >> 23 & 0xff) - 127;
  uint32_t bits;
  if (exponent == 128) {
    bits = 0x7c00 | (u & 0x7fffff ? 0x200 : 0);
  } else if (exponent > 15) {
    bits = 0x7bff;
  } else if (exponent >= -14) {
    bits = static_cast<uint32_t>(exponent + 15) << 10 | (u >> 13 & 0x3ff);
  } else {
    bits = exponent < -24 ? 0 : (0x400 | (u >> 13 & 0x3ff)) >> (-14 - exponent);
  }
  to.bits = static_cast<uint16_t>(sign | bits);
}

// Every alignment and stride, in arrays that end where their row ends.
template <class T>
void test_loads() {
  constexpr int V = 16 / sizeof(T), U = 4, lanes = 4;
  using S = Slots<V, U>;
  for (int C : {1, 7, S::columns(lanes) - 1, S::columns(lanes), S::columns(lanes) + 1, 3 * S::columns(lanes) + 5})
    for (int offset = 0; offset < V; ++offset)
      for (int stride : {1, 3}) {
        const size_t size = static_cast<size_t>(offset + (C - 1) * stride + 1);
        T* buffer = static_cast<T*>(std::malloc(size * sizeof(T)));
        for (size_t i = 0; i < size; ++i) from_float(static_cast<float>(static_cast<int>(i) - 50), buffer[i]);
        for (int first = 0; first < C; first += S::columns(lanes))
          for (int lane = 0; lane < lanes; ++lane) {
            Granule g[U];
            load_vectors<T, U>(buffer + offset, stride, C, first, lane, lanes, g);
            float z[S::COUNT];
            for (int u = 0; u < U; ++u) {
              float v[V];
              unpack(g[u], v, T{});
              std::copy(v, v + V, z + u * V);
            }
            for (int i = 0; i < S::COUNT; ++i) {
              const int c = first + S::column(lane, lanes, i);
              const float want = c < C ? to_float(buffer[offset + c * stride]) : -INF;
              check(z[i] == want, "load of column " + std::to_string(c) + " at offset " + std::to_string(offset));
            }
          }
        std::free(buffer);
      }
}

// ---- states -----------------------------------------------------------------------------------------------------------

void test_states() {
  const State a{2, 3, -1, 2}, none = EMPTY_STATE, b{-5, 1.5, -0.25, 1.25};
  const auto same = [](const State& x, const State& y) { return x.m == y.m && x.d == y.d && x.s == y.s && x.q == y.q; };
  check(same(merge(a, none), a) && same(merge(none, a), a) && same(merge(none, none), none), "merge with nothing");
  const State ab = merge(a, b);
  const double r = std::exp(-7.0);
  check(ab.m == 2 && std::fabs(ab.d - (3 + 1.5 * r)) < 1e-6, "merged d");
  check(std::fabs(ab.s - (-1 + r * (-0.25 - 7 * 1.5))) < 1e-6, "merged s: the shift times d belongs to it");
  check(std::fabs(ab.q - (2 + r * r * 1.25)) < 1e-6, "merged q");
  check(merge(a, State{NaN, 1, 0, 1}).m != merge(a, State{NaN, 1, 0, 1}).m, "NaN must survive a merge");
  check(!is_defined(merge(State{INF, 0, 0, 0}, a).m) && !is_defined(NaN) && !is_defined(none.m), "undefined maxima");
  const State tiny{-3e38f, 2, 0, 2}, huge{3e38f, 1, 0, 1};  // their difference overflows
  check(same(merge(tiny, huge), huge), "a state out of reach adds nothing");
  for (double x : {1e-3, 0.3, 0.999, 1 + 1e-6, 1.5, 7.0, 3e5})
    check(std::fabs(log_of(x) - std::log(x)) <= 1e-7 * std::max(1.0, std::fabs(std::log(x))), "log of " + std::to_string(x));
  check(log_of(1) == 0 && finish_model(State{3, 1, 0, 1}, 3).entropy == 0, "a sure row's entropy is 0");
  check(make_best(0.5f, 3) > make_best(0.5f, 4) && make_best(0.6f, 9) > make_best(0.5f, 0), "best: highest, then lowest");
  check(best_column(make_best(0.25f, 123456)) == 123456, "best's column");
  check(std::fabs(divergence_term(1, 1)) < 1e-9 && divergence_term(0.5f, 0) == 0.5f, "divergence terms");
  // The work that masks ask for
  const uint32_t all = (1u << NUM_FIELDS) - 1;
  check(wants(all, true, 1).squares && !wants(all, false, 1).squares && !wants(all, true, 1).mixture, "one model");
  check(!wants(bit(NLL) | bit(MEAN_NLL) | bit(AGREEMENT) | bit(EXPECTED_ENTROPY) | bit(VOTE_ENTROPY), true, 4).mixture,
        "fields of one sweep");
  for (Field f : {MARGIN, EL2N, ENTROPY, MUTUAL_INFORMATION, CONFIDENCE, PREDICTION})
    check(wants(bit(f), true, 2).mixture, "fields of the mixture");
  check(!wants(bit(MARGIN) | bit(EL2N), false, 2).mixture && !wants(bit(AGREEMENT), false, 2).tops, "label fields without labels");
}

// ---- whole rows against double ------------------------------------------------------------------------------------------

using Rows = std::vector<std::vector<std::vector<double>>>;  // [k][n][c]

struct Expected {
  double value[NUM_FLOAT_FIELDS];
  bool defined;
  std::vector<double> p;  // the mixture
};

Expected expected(const Rows& z, size_t n, const std::vector<double>& w, int64_t label, bool labelled, int64_t ignore) {
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
float hard_logit(int kind, int k, int64_t c, int64_t C, std::mt19937& rng) {
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
std::vector<Path> paths(int64_t K) {
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
      if (C <= 32) test_rows<T, 1>({"one lane per row", K, C, narrow_plan(C, 1), 0, 1, 0, 2, ALL, true}, rng);
    }
  // Real shapes in small: warps of 4 or 8 lanes, several warps, several blocks.
  for (int64_t K : {1, 3}) {
    for (int64_t C : {1, 5, 10, 33, 64, 200}) {
      test_rows<T, 8>({"narrow", K, C, narrow_plan(C, 16), K, 1, 1, 2, ALL, true}, rng);
      test_rows<T, 8>({"narrow, one sweep", K, C, narrow_plan(C, 16), 0, 2, 0, 1, ONE_SWEEP, true}, rng);
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
    test_rows<T, 8>({"narrow, no labels", K, 20, narrow_plan(20, 16), 0, 1, 0, 1, ALL, false}, rng);
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

template <class T>
void test_sparse_sums(DType dtype, std::mt19937& rng) {
  const SparseShape shapes[] = {
      {17, 0, 20000, 300, 1, 2, 0},   // two planes, a tile of one row, slices and pieces, a chunk that ends early
      {3, 1, 4099, 512, 2, 1, 0},     // rows that can't be read in pairs
      {16, 2, 8192, 512, 1, 1, 1},    // nor where the first isn't at a multiple of 4 bytes
      {9, 0, 9000, 1000, 1, 1, 0},    // one plane
      {2, 0, 17001, 4096, 1, 3, 0},   // four buckets of a thread
      {1, 0, 20001, 300, 2, 2, 0},    // one row
      {1, 0, 8200, 700, 1, 1, 3},
      {1, 0, 16384, 4096, 1, 1, 0},
  };
  for (const SparseShape& shape : shapes) {
    const std::string wrong = test_sparse<T>(shape, dtype, rng);
    check(wrong.empty(), wrong);
  }
}

void test_sparse_limits() {
  check(sparse_fits(512, 1, 2, 227 << 10) && sparse_fits(4096, 1, 4, 227 << 10), "sparse: Hopper takes 4096");
  check(sparse_fits(512, 1, 2, 163 << 10) && !sparse_fits(4096, 1, 2, 163 << 10), "sparse: Ampere takes 512");
  check(!sparse_fits(4097, 1, 2, 1 << 30) && !sparse_fits(8, 8, 2, 1 << 30), "sparse: what 16 bits don't hold");
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  test_philox();
  test_plans();
  test_slots<4, 4>(4);
  test_slots<8, 4>(32);
  test_slots<1, 8>(2);
  test_slots<8, 2>(1);
  test_loads<float>();
  test_loads<bf16>();
  test_loads<f16>();
  test_states();
  test_dtype<float>(rng);
  test_dtype<bf16>(rng);
  test_dtype<f16>(rng);
  test_sparse_limits();
  test_sparse_sums<float>(DType::f32, rng);
  test_sparse_sums<bf16>(DType::bf16, rng);
  test_sparse_sums<f16>(DType::f16, rng);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
