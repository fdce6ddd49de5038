// Inner products of every row of a matrix with a few queries, and the k best rows of each query from the same read.
//
// Lanes run along a row. A few queries are multiplied with the rows where these are, at the speed of the memory. For more,
// a block of rows is converted into a buffer that fits the cache and multiplied in tiles: as many (row, query) pairs as a
// vector has lanes, so that one transposition adds up all of a tile's sums.
#include <cstring>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace assay::ASSAY_ISA {

namespace {

constexpr int W = Vec::W;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int ROWS = W > 1 ? 4 : 1, QUERIES = W > 1 ? W / ROWS : 1;

// No float32 accumulator takes more than 64 terms; blocks are added up in double.
constexpr int64_t BLOCK = 64 * W;

// A block of rows, converted, is at most this large, and so stays in L2.
constexpr int64_t ELEMENTS_PER_BLOCK = 1 << 15;
constexpr int64_t MAX_BLOCK_ROWS = 64;

// A piece of work is about 1 MB.
constexpr int64_t BYTES_PER_PIECE = 1 << 20;

// out[c] = <x, q[c]> for C queries, n apart. For few queries the memory is what counts, and it is fastest read in order,
// a row after the other: the four accumulators of a product are four parts of the row.
template <int C, class T>
ASSAY_INLINE void dot(const T* x, const float* q, int64_t n, float* out) {
  double total[C] = {};
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
    Vec s[C][4];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) s[c][j] = splat(0.f);
    int64_t d = begin;
    for (; d + 4 * W <= end; d += 4 * W)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec a = load(x + d + j * W);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) s[c][j] = fma(a, load(q + c * n + d + j * W), s[c][j]);
      }
    for (; d < end; d += W) {
      const Vec a = load_first(x + d, end - d, 0.f);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) s[c][0] = fma(a, load_first(q + c * n + d, end - d, 0.f), s[c][0]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[c] += sum((s[c][0] + s[c][1]) + (s[c][2] + s[c][3]));
  }
  for (int c = 0; c < C; ++c) out[c] = static_cast<float>(total[c]);
}

// out[c * ROWS + r] = <x[r], q[c]> for full tiles, from rows that are in cache.
ASSAY_INLINE void tile(const float* const (&x)[ROWS], const float* const (&q)[QUERIES], int64_t n, float (&out)[W]) {
  double total[W] = {};
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
    Vec s[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) s[i] = splat(0.f);
    int64_t d = begin;
    for (; d + W <= end; d += W) {
      Vec a[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) a[r] = load(x[r] + d);
#pragma GCC unroll 4
      for (int c = 0; c < QUERIES; ++c) {
        const Vec b = load(q[c] + d);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) s[c * ROWS + r] = fma(a[r], b, s[c * ROWS + r]);
      }
    }
    if (d < end) {
      Vec a[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) a[r] = load_first(x[r] + d, end - d, 0.f);
#pragma GCC unroll 4
      for (int c = 0; c < QUERIES; ++c) {
        const Vec b = load_first(q[c] + d, end - d, 0.f);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) s[c * ROWS + r] = fma(a[r], b, s[c * ROWS + r]);
      }
    }
    transpose(s);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
    float sums[W];
    store(sums, s[0]);
    for (int i = 0; i < W; ++i) total[i] += sums[i];
  }
  for (int i = 0; i < W; ++i) out[i] = static_cast<float>(total[i]);
}

// ---- the k best -----------------------------------------------------------------------------------------------------

// Whether a ranks before b: the larger value, NaN after everything, and of equals the lower index. No two candidates are
// equal, so the k best are the same set in the same order however they were found.
bool before(float a, int64_t ai, float b, int64_t bi) {
  if (a > b) return true;
  if (a < b) return false;
  const bool a_nan = a != a, b_nan = b != b;
  return a_nan != b_nan ? b_nan : ai < bi;
}

// A binary heap of the best so far, the last of them on top. It starts out full of (NaN, INT64_MAX), behind everything.
struct Heap {
  float* values;
  int64_t* indices;
  int64_t size;

  ASSAY_INLINE void offer(float v, int64_t i) const {
    if (v < values[0]) return;
    if (before(v, i, values[0], indices[0])) sink(v, i, size);
  }

  // Put (v, i) in place of the top of the first n.
  void sink(float v, int64_t i, int64_t n) const {
    int64_t at = 0;
    for (int64_t child = 1; child < n; at = child, child = 2 * at + 1) {
      if (child + 1 < n && before(values[child], indices[child], values[child + 1], indices[child + 1])) ++child;
      if (before(values[child], indices[child], v, i)) break;
      values[at] = values[child];
      indices[at] = indices[child];
    }
    values[at] = v;
    indices[at] = i;
  }

  void sort() const {
    for (int64_t n = size - 1; n > 0; --n) {
      const float v = values[n];
      const int64_t i = indices[n];
      values[n] = values[0];
      indices[n] = indices[0];
      sink(v, i, n);
    }
  }
};

int64_t columns(const ScanArgs& a) { return a.maximum ? 1 : a.M; }

Heap heap_of(const ScanArgs& a, int64_t slot, int64_t column) {
  const int64_t at = (slot * columns(a) + column) * a.k;
  return {a.values + at, a.indices + at, a.k};
}

void merge(const ScanArgs& a, int64_t slots) {
  parallel(columns(a), 1, a.threads, [&](Pieces& pieces) {
    for (int64_t m, end; pieces.next(m, end);) {
      const Heap all = heap_of(a, 0, m);
      for (int64_t slot = 1; slot < slots; ++slot) {
        const Heap one = heap_of(a, slot, m);
        for (int64_t j = 0; j < a.k; ++j) all.offer(one.values[j], one.indices[j]);
      }
      all.sort();
    }
  });
}

// ---- rows against queries -------------------------------------------------------------------------------------------

ASSAY_INLINE void take(const ScanArgs& a, int64_t slot, int64_t column, int64_t row, float score) {
  if (a.scores) {
    a.scores[column * a.N + row] = score;
  } else {
    heap_of(a, slot, column).offer(score, row);
  }
}

ASSAY_INLINE float scaled(const ScanArgs& a, int64_t row, float product) {
  return a.scales ? product * a.scales[row] : product;
}

ASSAY_INLINE float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN if either is

// Rows begin..end against at most QUERIES queries, where they are.
template <class T>
void scan_few(const ScanArgs& a, int64_t slot, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.features) + row * a.stride;
    float out[QUERIES];
    switch (a.M) {
      case 1:
        dot<1>(x, a.queries, a.D, out);
        break;
      case 2:
        dot<QUERIES < 2 ? QUERIES : 2>(x, a.queries, a.D, out);
        break;
      case 3:
        dot<QUERIES < 3 ? QUERIES : 3>(x, a.queries, a.D, out);
        break;
      default:
        dot<QUERIES>(x, a.queries, a.D, out);
    }
    float best = -INF;
    for (int64_t m = 0; m < a.M; ++m) {
      const float score = scaled(a, row, out[m]);
      best = larger(best, score);
      if (!a.maximum) take(a, slot, m, row, score);
    }
    if (a.maximum) take(a, slot, 0, row, best);
  }
}

// A block of converted rows, of which x holds the first, row0, to the last, against all queries. A tile that reaches past
// the last row or query has the last one several times.
void scan_block(const ScanArgs& a, int64_t slot, const float* x, int64_t row0, int64_t rows) {
  float best[MAX_BLOCK_ROWS];
  for (float& b : best) b = -INF;
  for (int64_t m = 0; m < a.M; m += QUERIES) {
    const float* q[QUERIES];
    for (int64_t c = 0; c < QUERIES; ++c) q[c] = a.queries + (m + c < a.M ? m + c : a.M - 1) * a.D;
    for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
      const float* p[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) p[r] = x + (r0 + r < rows ? r0 + r : rows - 1) * a.D;
      float out[W];
      tile(p, q, a.D, out);
      for (int64_t c = 0; c < QUERIES && m + c < a.M; ++c)
        for (int64_t r = 0; r < ROWS && r0 + r < rows; ++r) {
          const float score = scaled(a, row0 + r0 + r, out[c * ROWS + r]);
          best[r0 + r] = larger(best[r0 + r], score);
          if (!a.maximum) take(a, slot, m + c, row0 + r0 + r, score);
        }
    }
  }
  if (a.maximum)
    for (int64_t r = 0; r < rows; ++r) take(a, slot, 0, row0 + r, best[r]);
}

template <class T>
ASSAY_INLINE void convert(const T* from, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + W <= n; d += W) store(to + d, load(from + d));
  if (d < n) {
    float last[W];
    store(last, load_first(from + d, n - d, 0.f));
    std::memcpy(to + d, last, static_cast<size_t>(n - d) * sizeof(float));
  }
}

// Rows begin..end against any number of queries, by blocks.
template <class T>
void scan_many(const ScanArgs& a, int64_t slot, int64_t begin, int64_t end, int64_t block, float* buffer) {
  for (int64_t row0 = begin; row0 < end; row0 += block) {
    const int64_t rows = end - row0 < block ? end - row0 : block;
    for (int64_t r = 0; r < rows; ++r)
      convert(static_cast<const T*>(a.features) + (row0 + r) * a.stride, a.D, buffer + r * a.D);
    scan_block(a, slot, buffer, row0, rows);
  }
}

template <class T>
void run(const ScanArgs& a) {
  const bool few = a.M <= QUERIES;
  const int64_t width = a.D > 0 ? a.D : 1, fitting = ELEMENTS_PER_BLOCK / width;
  const int64_t block = fitting < ROWS ? ROWS : fitting < MAX_BLOCK_ROWS ? fitting : MAX_BLOCK_ROWS;
  const int64_t grain = 1 + BYTES_PER_PIECE / (width * static_cast<int64_t>(sizeof(T)));
  int64_t slots = 0;
  parallel(a.N, grain, a.threads, [&](Pieces& pieces) {
    const int64_t slot = __atomic_fetch_add(&slots, 1, __ATOMIC_RELAXED);
    Scratch<float> buffer(few ? 0 : block * a.D);
    for (int64_t begin, end; pieces.next(begin, end);) {
      if (few) {
        scan_few<T>(a, slot, begin, end);
      } else {
        scan_many<T>(a, slot, begin, end, block, buffer.p);
      }
    }
  });
  if (!a.scores) merge(a, slots);
}

}  // namespace

void scan(const ScanArgs& a) {
  if (!a.scores && a.k == 0) return;
  if (a.scales) return run<int8_t>(a);
  switch (a.dtype) {
    case DType::f32:
      return run<float>(a);
    case DType::bf16:
      return run<bf16>(a);
    case DType::f16:
      return run<f16>(a);
  }
}

}  // namespace assay::ASSAY_ISA
