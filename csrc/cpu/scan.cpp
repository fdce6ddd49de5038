// Inner products of every row of a matrix with a few queries, and the k best rows of each query from the same read.
//
// Lanes run along a row. A tile is as many (row, query) pairs as a vector has lanes, so that one transposition adds up
// all of its sums. Where there are more queries than one tile takes, 16-bit and int8 rows are converted once, into a
// buffer that fits the cache.
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace assay::ASSAY_ISA {

ASSAY_INLINE Vec load(const int8_t* p) {
  float wide[Vec::W];  // the compiler makes two instructions of this
  for (int i = 0; i < Vec::W; ++i) wide[i] = static_cast<float>(p[i]);
  return load(wide);
}
ASSAY_INLINE Vec load_first(const int8_t* p, int64_t n, float fill) {
  float wide[Vec::W];
  for (int i = 0; i < Vec::W; ++i) wide[i] = i < n ? static_cast<float>(p[i]) : fill;
  return load(wide);
}

namespace {

constexpr int W = Vec::W;
constexpr int ROWS = W > 1 ? 4 : 1, QUERIES = W > 1 ? W / ROWS : 1;

// No float32 accumulator takes more than 64 terms; blocks are added up one by one.
constexpr int64_t BLOCK = 64 * W;

// A block of rows, converted, is at most this large, and so stays in L2.
constexpr int64_t ELEMENTS_PER_BLOCK = 1 << 15;
constexpr int64_t MAX_BLOCK_ROWS = 64;

// A piece of work is about 1 MB.
constexpr int64_t BYTES_PER_PIECE = 1 << 20;

// out[c * ROWS + r] = <x[r], q[c]>. Every sum is made in the same order whatever C is: lane by lane, then `sum`'s halves.
template <int C, class T>
ASSAY_INLINE void tile(const T* const (&x)[ROWS], const float* q, int64_t n, float (&out)[ROWS * QUERIES]) {
  for (float& o : out) o = 0.f;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
    Vec s[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) s[i] = splat(0.f);
    auto add = [&](const Vec (&a)[ROWS], Vec b, int c) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) s[c * ROWS + r] = fma(a[r], b, s[c * ROWS + r]);
    };
    int64_t d = begin;
    for (; d + W <= end; d += W) {
      Vec a[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) a[r] = load(x[r] + d);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) add(a, load(q + c * n + d), c);
    }
    if (d < end) {
      Vec a[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) a[r] = load_first(x[r] + d, end - d, 0.f);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) add(a, load_first(q + c * n + d, end - d, 0.f), c);
    }
    if constexpr (C == QUERIES) {
      transpose(s);
#pragma GCC unroll 4
      for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
      float sums[W];
      store(sums, s[0]);
      for (int i = 0; i < W; ++i) out[i] += sums[i];
    } else {
#pragma GCC unroll 12
      for (int i = 0; i < C * ROWS; ++i) out[i] += sum(s[i]);
    }
  }
}

template <class T>
void multiply(const T* const (&x)[ROWS], const float* q, int64_t queries, int64_t n, float (&out)[ROWS * QUERIES]) {
  switch (queries) {
    case 1:
      return tile<1>(x, q, n, out);
    case 2:
      return tile<QUERIES < 2 ? QUERIES : 2>(x, q, n, out);
    case 3:
      return tile<QUERIES < 3 ? QUERIES : 3>(x, q, n, out);
    default:
      return tile<QUERIES>(x, q, n, out);
  }
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

// ---- blocks of rows -------------------------------------------------------------------------------------------------

void take(const ScanArgs& a, int64_t slot, int64_t column, int64_t row, float score) {
  if (a.scores) {
    a.scores[column * a.N + row] = score;
  } else {
    heap_of(a, slot, column).offer(score, row);
  }
}

// Rows row0.. (at most MAX_BLOCK_ROWS) against all queries. `x` is the first of them.
template <class T>
void scan_block(const ScanArgs& a, int64_t slot, const T* x, int64_t stride, int64_t row0, int64_t rows) {
  float best[MAX_BLOCK_ROWS];
  for (int64_t m = 0; m < a.M; m += QUERIES) {
    const int64_t queries = a.M - m < QUERIES ? a.M - m : QUERIES;
    for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
      const T* tile_rows[ROWS];  // past the last row, the last row again
      for (int64_t r = 0; r < ROWS; ++r) tile_rows[r] = x + (r0 + r < rows ? r0 + r : rows - 1) * stride;
      float out[ROWS * QUERIES];
      multiply(tile_rows, a.queries + m * a.D, queries, a.D, out);
      for (int64_t c = 0; c < queries; ++c)
        for (int64_t r = 0; r < ROWS && r0 + r < rows; ++r) {
          const int64_t row = row0 + r0 + r;
          const float score = a.scales ? out[c * ROWS + r] * a.scales[row] : out[c * ROWS + r];
          float& high = best[r0 + r];
          if (!a.maximum) {
            take(a, slot, m + c, row, score);
          } else if (m + c == 0 || score > high || score != score) {  // NaN, once there, is not displaced
            high = score;
          }
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

template <class T>
void run(const ScanArgs& a) {
  const bool in_place = sizeof(T) == sizeof(float) || a.M <= QUERIES;
  const int64_t width = a.D > 0 ? a.D : 1, fitting = ELEMENTS_PER_BLOCK / width;
  const int64_t block = fitting < ROWS ? ROWS : fitting < MAX_BLOCK_ROWS ? fitting : MAX_BLOCK_ROWS;
  const int64_t grain = 1 + BYTES_PER_PIECE / (width * static_cast<int64_t>(sizeof(T)));
  int64_t slots = 0;
  parallel(a.N, grain, a.threads, [&](Pieces& pieces) {
    const int64_t slot = __atomic_fetch_add(&slots, 1, __ATOMIC_RELAXED);
    Scratch<float> buffer(in_place ? 0 : block * a.D);
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t row0 = begin; row0 < end; row0 += block) {
        const int64_t rows = end - row0 < block ? end - row0 : block;
        const T* x = static_cast<const T*>(a.features) + row0 * a.stride;
        if (in_place) {
          scan_block(a, slot, x, a.stride, row0, rows);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) convert(x + r * a.stride, a.D, buffer.p + r * a.D);
        scan_block(a, slot, static_cast<const float*>(buffer.p), a.D, row0, rows);
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
