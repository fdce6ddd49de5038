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
    for (int64_t cols : {1, 7, 16, 33, 127, 1024, 1100}) multiply_reduce_case(kernels, 5, cols, rng);
  }
  check(select_kernels("no such set") == nullptr, "unknown instruction set", "-", 0, 0, 0);
  check(select_kernels(nullptr) != nullptr, "default instruction set", "-", 0, 0, 0);
  std::printf("%d cases, %d failures\n", ran, failures);
  return failures ? 1 : 0;
}
