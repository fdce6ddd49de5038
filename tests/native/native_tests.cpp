// The native kernels without Python, for the sanitizers: every instruction set against a plain double computation, at
// the sizes where loads have tails, with every kind of stride, and with arrays that end where their data ends.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "assay.h"

using namespace assay;

namespace {

int failures = 0;

void check(bool ok, const char* what, const char* isa, int64_t a, int64_t b, int64_t c) {
  if (ok) return;
  std::printf("FAILED %s on %s (%lld, %lld, %lld)\n", what, isa, static_cast<long long>(a), static_cast<long long>(b),
              static_cast<long long>(c));
  ++failures;
}

uint16_t to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return static_cast<uint16_t>(u >> 16);
}

float from_bf16(uint16_t b) {
  const uint32_t u = static_cast<uint32_t>(b) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

struct Case {
  int64_t K, N, C, row_gap, col_stride;
  bool bf16;
  int threads;
};

// nll, entropy and margin of one row in double
void expected(const std::vector<std::vector<double>>& z, int64_t y, double& nll, double& entropy, double& margin) {
  const size_t C = z[0].size();
  std::vector<double> p(C, 0.0);
  for (const auto& row : z) {
    const double m = *std::max_element(row.begin(), row.end());
    double d = 0;
    for (double v : row) d += std::exp(v - m);
    for (size_t c = 0; c < C; ++c) p[c] += std::exp(row[c] - m) / d / static_cast<double>(z.size());
  }
  entropy = 0;
  double other = 0;
  for (size_t c = 0; c < C; ++c) {
    if (p[c] > 0) entropy -= p[c] * std::log(p[c]);
    if (static_cast<int64_t>(c) != y) other = std::max(other, p[c]);
  }
  nll = -std::log(p[static_cast<size_t>(y)]);
  margin = p[static_cast<size_t>(y)] - other;
}

void ensemble_case(const Kernels& kernels, const Case& c, std::mt19937& rng) {
  std::normal_distribution<float> normal(0, 3);
  const int64_t row_stride = c.C * c.col_stride + c.row_gap;
  const int64_t size = c.N ? (c.N - 1) * row_stride + (c.C - 1) * c.col_stride + 1 : 0;  // not an element beyond
  std::vector<std::vector<float>> wide(static_cast<size_t>(c.K));
  std::vector<std::vector<uint16_t>> narrow(static_cast<size_t>(c.K));
  std::vector<const void*> pointers;
  for (int64_t k = 0; k < c.K; ++k) {
    auto& w = wide[static_cast<size_t>(k)];
    w.resize(static_cast<size_t>(size));
    for (float& v : w) v = from_bf16(to_bf16(normal(rng)));
    auto& n = narrow[static_cast<size_t>(k)];
    for (float v : w) n.push_back(to_bf16(v));
    pointers.push_back(c.bf16 ? static_cast<const void*>(n.data()) : static_cast<const void*>(w.data()));
  }
  std::vector<int64_t> labels(static_cast<size_t>(c.N)), prediction(static_cast<size_t>(c.N));
  for (auto& y : labels) y = static_cast<int64_t>(rng() % static_cast<uint64_t>(c.C));
  if (c.N > 2) labels[1] = -100;
  const std::vector<int64_t> rows(static_cast<size_t>(c.K), row_stride), cols(static_cast<size_t>(c.K), c.col_stride);
  const std::vector<double> weights(static_cast<size_t>(c.K), 1.0 / static_cast<double>(c.K));
  std::vector<float> out(static_cast<size_t>(NUM_FLOAT_FIELDS * c.N));
  EnsembleArgs args{};
  args.logits = pointers.data();
  args.row_strides = rows.data();
  args.col_strides = cols.data();
  args.dtype = c.bf16 ? DType::bf16 : DType::f32;
  args.K = c.K;
  args.N = c.N;
  args.C = c.C;
  args.labels = labels.data();
  args.ignore_index = -100;
  args.weights = weights.data();
  args.fields = (1u << NUM_FIELDS) - 1;
  args.out = out.data();
  args.prediction = prediction.data();
  args.threads = c.threads;
  kernels.ensemble(args);

  for (int64_t n = 0; n < c.N; ++n) {
    const auto at = [&](Field f) { return out[static_cast<size_t>(f * c.N + n)]; };
    if (labels[static_cast<size_t>(n)] == -100) {
      check(std::isnan(at(NLL)) && prediction[static_cast<size_t>(n)] == -1, "ignored row", kernels.isa, c.K, c.N, c.C);
      continue;
    }
    std::vector<std::vector<double>> z(static_cast<size_t>(c.K));
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t j = 0; j < c.C; ++j)
        z[static_cast<size_t>(k)].push_back(
            static_cast<double>(wide[static_cast<size_t>(k)][static_cast<size_t>(n * row_stride + j * c.col_stride)]));
    double nll, entropy, margin;
    expected(z, labels[static_cast<size_t>(n)], nll, entropy, margin);
    check(std::fabs(at(NLL) - nll) < 4e-6 * std::max(1.0, nll), "nll", kernels.isa, c.K, n, c.C);
    check(std::fabs(at(ENTROPY) - entropy) < 4e-6 * std::max(1.0, entropy), "entropy", kernels.isa, c.K, n, c.C);
    check(std::fabs(at(MARGIN) - margin) < 4e-6, "margin", kernels.isa, c.K, n, c.C);
  }
}

void multiply_reduce_case(const Kernels& kernels, int64_t rows, int64_t cols, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * cols)), y(x.size());
  std::vector<uint16_t> xb, yb;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = from_bf16(to_bf16(normal(rng)));
    y[i] = from_bf16(to_bf16(normal(rng)));
    xb.push_back(to_bf16(x[i]));
    yb.push_back(to_bf16(y[i]));
  }
  for (int form = 0; form < 4; ++form) {
    const bool bx = form & 1, by = form & 2;
    std::vector<double> out(static_cast<size_t>(rows)), absolute(out.size()), again(out.size());
    MultiplyReduceArgs args{bx ? static_cast<const void*>(xb.data()) : x.data(),
                            by ? static_cast<const void*>(yb.data()) : y.data(),
                            bx ? DType::bf16 : DType::f32,
                            by ? DType::bf16 : DType::f32,
                            rows, cols, cols, cols, out.data(), absolute.data(), 2};
    kernels.multiply_reduce(args);
    args.out = again.data();
    args.abs_out = nullptr;
    kernels.multiply_reduce(args);
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const double product = static_cast<double>(x[static_cast<size_t>(r * cols + c)]) * static_cast<double>(y[static_cast<size_t>(r * cols + c)]);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double slack = 1e-6 * magnitude + 1e-30;
      check(std::fabs(out[static_cast<size_t>(r)] - sum) < slack, "multiply_reduce", kernels.isa, form, rows, cols);
      check(std::fabs(again[static_cast<size_t>(r)] - sum) < slack, "multiply_reduce alone", kernels.isa, form, rows, cols);
      check(std::fabs(absolute[static_cast<size_t>(r)] - magnitude) < slack, "absolute sum", kernels.isa, form, rows, cols);
    }
  }
}

// `form`: 0 float32, 1 a bfloat16 weight, 2 with pairs of bfloat16 rows
void linear_case(const Kernels& kernels, int64_t rows, int64_t C, int64_t D, int form, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const int64_t padded = (rows + 15) / 16 * 16, stride = D + 3;
  std::vector<float> hidden(static_cast<size_t>(D * padded)), weight(static_cast<size_t>((C - 1) * stride + D));
  std::vector<float> bias(static_cast<size_t>(C)), out(static_cast<size_t>(rows * C));
  std::vector<uint16_t> narrow, pairs(static_cast<size_t>((D + 1) / 2 * padded * 2));
  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t bits = to_bf16(normal(rng));
      hidden[static_cast<size_t>(d * padded + r)] = from_bf16(bits);
      pairs[static_cast<size_t>((d / 2 * padded + r) * 2 + d % 2)] = bits;
    }
  for (float& v : weight) narrow.push_back(to_bf16(v = from_bf16(to_bf16(normal(rng)))));
  for (float& v : bias) v = normal(rng);
  LinearArgs args{};
  args.hidden_t = form == 2 ? reinterpret_cast<const float*>(pairs.data()) : hidden.data();
  args.rows = rows;
  args.padded_rows = padded;
  args.weight = form == 0 ? static_cast<const void*>(weight.data()) : narrow.data();
  args.weight_dtype = form == 0 ? DType::f32 : DType::bf16;
  args.C = C;
  args.D = D;
  args.weight_stride = stride;
  args.bias = bias.data();
  args.out = out.data();
  args.out_stride = C;
  args.threads = 2;
  args.pairs = form == 2;
  kernels.linear(args);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) {
      double sum = static_cast<double>(bias[static_cast<size_t>(c)]), magnitude = std::fabs(sum);
      for (int64_t d = 0; d < D; ++d) {
        const double product = static_cast<double>(hidden[static_cast<size_t>(d * padded + r)]) *
                               static_cast<double>(weight[static_cast<size_t>(c * stride + d)]);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(static_cast<double>(out[static_cast<size_t>(r * C + c)]) - sum);
      check(error <= 1e-6 * magnitude, form == 2 ? "linear, pairs" : "linear", kernels.isa, rows, C, D);
    }
}

void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
  }
}

// nonzeros = 0: a dense projection
void project_case(const Kernels& kernels, int64_t rows, int64_t cols, int64_t dim, int64_t nonzeros, bool bf16,
                  std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const int64_t stride = cols + 3, first = (int64_t{1} << 33) + 5;
  const size_t size = static_cast<size_t>((rows - 1) * stride + cols);
  std::vector<float> x(size);
  std::vector<uint16_t> narrow;
  for (float& v : x) narrow.push_back(to_bf16(v = from_bf16(to_bf16(normal(rng)))));
  std::vector<double> out(static_cast<size_t>(rows * dim), 1.0), expected(out);
  const uint32_t key[2] = {static_cast<uint32_t>(rng()), static_cast<uint32_t>(rng())};
  for (int64_t c = 0; c < cols; ++c) {
    const auto add = [&](int64_t d, bool minus) {
      for (int64_t r = 0; r < rows; ++r) {
        const double v = static_cast<double>(x[static_cast<size_t>(r * stride + c)]);
        expected[static_cast<size_t>(r * dim + d)] += minus ? -v : v;
      }
    };
    for (int64_t i = 0; i < (nonzeros ? nonzeros : dim); ++i) {
      const int64_t u = (first + c) * nonzeros + i, at = nonzeros ? u / 4 : first + c;
      uint32_t words[4] = {static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32),
                           nonzeros ? 0 : static_cast<uint32_t>(i / 128), nonzeros ? 2u : 3u};
      philox(words, key[0], key[1]);
      if (nonzeros) {
        const uint32_t w = words[u % 4];
        add(static_cast<int64_t>(uint64_t{w >> 1} * static_cast<uint64_t>(dim) >> 31), w & 1);
      } else {
        add(i, words[i % 128 / 32] >> (i % 32) & 1);
      }
    }
  }
  ProjectArgs args{bf16 ? static_cast<const void*>(narrow.data()) : x.data(),
                         bf16 ? DType::bf16 : DType::f32,
                         rows, cols, stride, first, key[0], key[1], dim, nonzeros, out.data(), 2};
  std::vector<double> one_by_one(out);
  kernels.project(args);
  for (size_t i = 0; i < out.size(); ++i)
    check(std::fabs(out[i] - expected[i]) < 1e-4, nonzeros ? "sparse projection" : "dense projection", kernels.isa,
          rows, cols, dim);
  args.out = one_by_one.data();
  args.scratch_bytes = 1;
  kernels.project(args);
  check(out == one_by_one, "projection in little memory", kernels.isa, rows, cols, dim);
}

// Scores of every row, and all N of them ranked; `form`: 0 float32, 1 bf16, 2 int8 with scales.
void scan_case(const Kernels& kernels, int64_t N, int64_t D, int64_t M, int form, bool maximum, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const int64_t stride = D + 3, size = N ? (N - 1) * stride + D : 0;  // not an element beyond
  std::vector<float> wide(static_cast<size_t>(size)), queries(static_cast<size_t>(M * D)), scales;
  std::vector<uint16_t> narrow;
  std::vector<int8_t> bytes;
  for (float& v : wide) {
    bytes.push_back(static_cast<int8_t>(rng() % 256));
    v = form == 2 ? static_cast<float>(bytes.back()) : from_bf16(to_bf16(normal(rng)));
    narrow.push_back(to_bf16(v));
  }
  for (float& v : queries) v = normal(rng);
  for (int64_t i = 0; i < N; ++i) scales.push_back(form == 2 ? static_cast<float>(i % 3) : 1.f);  // 0: ties
  const int64_t columns = maximum ? 1 : M;
  constexpr int32_t threads = 3;
  std::vector<float> scores(static_cast<size_t>(columns * N));
  std::vector<float> values(static_cast<size_t>(threads * columns * N), std::numeric_limits<float>::quiet_NaN());
  std::vector<int64_t> indices(values.size(), std::numeric_limits<int64_t>::max());
  ScanArgs args{};
  args.features = form == 0 ? static_cast<const void*>(wide.data())
                            : form == 1 ? static_cast<const void*>(narrow.data()) : bytes.data();
  args.dtype = form == 1 ? DType::bf16 : DType::f32;
  args.scales = form == 2 ? scales.data() : nullptr;
  args.N = N;
  args.D = D;
  args.stride = stride;
  args.queries = queries.data();
  args.M = M;
  args.maximum = maximum;
  args.threads = threads;
  args.scores = scores.data();
  kernels.scan(args);
  args.scores = nullptr;
  args.k = N;
  args.values = values.data();
  args.indices = indices.data();
  kernels.scan(args);

  for (int64_t m = 0; m < columns; ++m) {
    const float* row = scores.data() + m * N;
    for (int64_t i = 0; i < N; ++i) {
      double best = -std::numeric_limits<double>::infinity(), magnitude = 0;
      for (int64_t q = m; q < (maximum ? M : m + 1); ++q) {
        double sum = 0;
        for (int64_t d = 0; d < D; ++d) {
          const double product = static_cast<double>(wide[static_cast<size_t>(i * stride + d)]) *
                                 static_cast<double>(queries[static_cast<size_t>(q * D + d)]);
          sum += product;
          magnitude += std::fabs(product);
        }
        best = std::max(best, sum * static_cast<double>(scales[static_cast<size_t>(i)]));
      }
      check(std::fabs(row[i] - best) <= 2e-6 * magnitude, "scan", kernels.isa, N, D, M);
    }
    std::vector<int64_t> order(static_cast<size_t>(N));
    for (int64_t i = 0; i < N; ++i) order[static_cast<size_t>(i)] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    for (int64_t i = 0; i < N; ++i) {
      const int64_t want = order[static_cast<size_t>(i)], at = m * N + i;
      const bool same = indices[static_cast<size_t>(at)] == want && values[static_cast<size_t>(at)] == row[want];
      check(same, "ranking", kernels.isa, N, D, M);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  Isa list[4];
  const int n = isa_list(list);
  int ran = 0;
  for (int i = 0; i < n; ++i) {
    const Kernels& kernels = *list[i].kernels;
    if (!list[i].supported) {
      std::printf("skipped %s: this processor does not run it\n", kernels.isa);
      continue;
    }
    for (int64_t K : {1, 3})
      for (int64_t N : {0, 1, 17, 40})
        for (int64_t C : {1, 2, 10, 100, 255, 256, 257, 1023, 2100})
          for (int form = 0; form < 3; ++form)
            for (bool bf16 : {false, true}) {
              ensemble_case(kernels, {K, N, C, form == 1 ? 3 : 0, form == 2 ? 2 : 1, bf16, form + 1}, rng);
              ++ran;
            }
    for (int64_t rows : {1, 16, 17, 64})
      for (int64_t C : {1, 16, 33})
        for (int64_t D : {1, 2, 27, 128, 129, 300})
          for (int form = 0; form < (kernels.multiply_pairs ? 3 : 2); ++form) linear_case(kernels, rows, C, D, form, rng);
    for (int64_t cols : {1, 7, 16, 33, 127, 1024, 1100}) multiply_reduce_case(kernels, 5, cols, rng);
    for (int64_t rows : {1, 5, 16, 17, 40})
      for (int64_t cols : {1, 15, 33, 1100})
        for (bool bf16 : {false, true}) {
          project_case(kernels, rows, cols, 37, 1, bf16, rng);
          project_case(kernels, rows, cols, 5, 3, bf16, rng);
          project_case(kernels, rows, cols, 131, 0, bf16, rng);
        }
    for (int64_t nonzeros : {0, 1, 3})  // many pieces, and of rows a block and one
      for (int64_t rows : {1, 17, 65}) project_case(kernels, rows, 13000, 5, nonzeros, false, rng);
    for (int64_t N : {0, 1, 66})
      for (int64_t D : {0, 1, 7, 16, 33, 64, 1100})
        for (int64_t M : {1, 2, 3, 4, 5, 11})
          for (int form = 0; form < 3; ++form)
            for (bool maximum : {false, true}) {
              scan_case(kernels, N, D, M, form, maximum, rng);
              ++ran;
            }
  }
  check(select_kernels("no such set") == nullptr, "unknown instruction set", "-", 0, 0, 0);
  check(select_kernels(nullptr) != nullptr, "default instruction set", "-", 0, 0, 0);
  std::printf("%d cases, %d failures\n", ran, failures);
  return failures ? 1 : 0;
}
