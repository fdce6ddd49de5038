// The CUDA kernels' own code without a GPU: dispatch, index maps, loads, merges, and whole rows computed by emulated
// crews against a plain double computation. Philox against Random123's published vectors.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_crew.h"
#include "logits_of_floats.h"
#include "philox.h"
#include "sparse_tests.h"

using namespace assay;
using namespace assay::cuda;

void test_rows_f32(std::mt19937& rng);
void test_rows_bf16(std::mt19937& rng);
void test_rows_f16(std::mt19937& rng);

namespace {

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

constexpr uint32_t ALL = (1u << NUM_FIELDS) - 1;

void expect_plan(int64_t K, int64_t C, int itemsize, const Device& device, Path path, int slices) {
  const Plan p = make_plan(K, C, itemsize, device);
  const std::string where = "plan of K=" + std::to_string(K) + " C=" + std::to_string(C) + ": ";
  check(p.path == path, where + "path " + std::to_string(static_cast<int>(p.path)));
  check(p.slices == slices, where + "slices " + std::to_string(p.slices));
  check(make_layout(p, K, p.keeps()).bytes <= device.shared_bytes || p.path == Path::TWICE_GLOBAL, where + "shared memory");
  const int V = p.path == Path::NARROW ? 1 : 16 / itemsize, slots = p.path == Path::NARROW ? NARROW_COLUMNS : 4 * V;
  const int64_t columns = int64_t{p.slices} * p.chunks * p.row_groups * p.lanes * slots;
  check(columns >= C, where + "columns left out");
  check(columns <= std::numeric_limits<int>::max(), where + "columns beyond 32 bits");
  check(p.threads() % 32 == 0 && p.threads() <= max_threads(p.path) && 32 % p.lanes == 0, where + "threads");
  for (const Wants& todo : {wants(ALL, true, K), wants(ALL, false, K), wants(bit(NLL), true, K)})
    check(has_kernel(p.path, sweeps(todo)), where + "no kernel");
}

constexpr int64_t WIDTHS[] = {1,    2,     7,     8,      9,      255,     256,       257,  1000,
                              1025, 50257, 65537, 151936, 262144, 1000003, 100000007, MAX_C};

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
  for (int64_t K : {1, 2, 3, 5, 8, 13, 14, 17, 18, 31, 32, 33, 100})
    for (int64_t C : WIDTHS)
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
  for (float x : {1e-3f, 0.3f, 0.999f, 1 + 1e-6f, 1.5f, 7.f, 3e5f}) {
    const double exact = std::log(static_cast<double>(x));
    check(std::fabs(log_of(x) - exact) <= 1e-7 * std::max(1.0, std::fabs(exact)), "log of " + std::to_string(x));
  }
  check(log_of(1) == 0 && quotient(0, 1) == 0, "a sure row's entropy is 0");
  float top = 0.5f;
  int column = 7;
  take_higher(top, column, 0.5f, 9);
  check(column == 7, "of equal probabilities the lower column's");
  take_higher(top, column, 0.5f, 3);
  take_higher(top, column, 0.25f, 1);
  check(column == 3, "the lower column's, whichever came first");
  take_higher(top, column, 0.75f, 11);
  check(top == 0.75f && column == 11, "the higher probability's");
  for (float x : {-INF, -3.f, -0.f, 0.f, 1e-30f, 2.f, INF}) check(from_ordered(to_ordered(x)) == x, "ordered and back");
  check(to_ordered(-3) < to_ordered(-2) && to_ordered(-2) < to_ordered(1) && to_ordered(INF) < to_ordered(max_nan(NaN, 1)),
        "as integers, floats have their order");
  for (int a = 0; a < 32; ++a)
    for (int b = 1; b <= 32; ++b) check(quotient_of_small(a, b) == a / b, "the quotient of small numbers");
  // The work that masks ask for
  check(wants(ALL, true, 1).squares && !wants(ALL, false, 1).squares && !wants(ALL, true, 1).mixture, "one model");
  check(!wants(bit(NLL) | bit(MEAN_NLL) | bit(AGREEMENT) | bit(EXPECTED_ENTROPY) | bit(VOTE_ENTROPY), true, 4).mixture,
        "fields of one sweep");
  for (Field f : {MARGIN, EL2N, ENTROPY, MUTUAL_INFORMATION, CONFIDENCE, PREDICTION})
    check(wants(bit(f), true, 2).mixture, "fields of the mixture");
  check(!wants(bit(MARGIN) | bit(EL2N), false, 2).mixture && !wants(bit(AGREEMENT), false, 2).tops, "label fields without labels");
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
  test_rows_f32(rng);
  test_rows_bf16(rng);
  test_rows_f16(rng);
  test_sparse_limits();
  test_sparse_sums<float>(DType::f32, rng);
  test_sparse_sums<bf16>(DType::bf16, rng);
  test_sparse_sums<f16>(DType::f16, rng);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
