// z = h Wᵀ + b for a block of rows that is small beside W: an output layer's logits, W read once from memory in its own
// layout. A general GEMM repacks W for every block of rows, which costs more than the product when there are 32 of them.
//
// Rows are lanes: h comes transposed, an element of W is broadcast, and a tile of NV vectors of rows x NC columns stays
// in registers. Finished panels of W columns are transposed on their way out.
//
// An element is a float32, converted where W is narrower; or, where there is an instruction for it and both sides are
// bfloat16, a pair of features as they lie in W.
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace assay::ASSAY_ISA {
namespace {

constexpr int W = Vec::W;

// A panel is as many columns as there are lanes, in two halves: 3 x 8 accumulators, 3 rows of h and a broadcast fit the
// 32 registers of AVX-512, 3 x 4 the 16 of AVX2.
constexpr int NC = W > 1 ? W / 2 : 1, MAX_NV = 3;

// float32 sums over the features are this long; the sums of such sums are added up one by one. Even, for pairs.
constexpr int64_t CHUNK = 128;

// Bytes of an element: a float32, or two bfloat16.
constexpr int64_t ELEMENT = 4;

// A piece of work is about 1 MB of W.
constexpr int64_t ELEMENTS_PER_PIECE = 1 << 18;

ASSAY_INLINE Vec broadcast_element(const char* p) {
  float f;
  std::memcpy(&f, p, sizeof f);
  return splat(f);
}

// panel[c][v] += sum_d h[d][v] w[c][d] over n elements. h: (n, stride) transposed rows; w: NC rows of W, `w_stride` bytes
// apart.
template <int NV, bool PAIRS>
ASSAY_INLINE void tile(const float* h, int64_t h_stride, const char* w, int64_t w_stride, int64_t n, float* panel,
                       int64_t panel_stride) {
  Vec s[NC][NV];
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) s[c][v] = splat(0.f);
  for (int64_t d = 0; d < n; ++d, h += h_stride, w += ELEMENT) {
    Vec a[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) a[v] = load(h + v * W);
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const Vec b = broadcast_element(w + c * w_stride);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) s[c][v] = PAIRS ? add_products_of_pairs(a[v], b, s[c][v]) : fma(a[v], b, s[c][v]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) {
      float* p = panel + c * panel_stride + v * W;
      store(p, load(p) + s[c][v]);
    }
}

// Rows of W, `stride` bytes apart.
struct WeightRows {
  const char* p;
  int64_t stride;
};

// n features from d on of W's rows c0.. as elements: in place where they are, else in `buffer` (W, CHUNK), zeros past the
// last row and feature. A chunk at a time, so that the buffer stays in L1.
template <class T, bool PAIRS>
WeightRows rows_of_weight(const LinearArgs& a, int64_t c0, int64_t d, int64_t n, float* buffer) {
  const T* w = static_cast<const T*>(a.weight) + c0 * a.weight_stride + d;
  const bool in_place = PAIRS ? n % 2 == 0 : sizeof(T) == ELEMENT;
  if (in_place && a.C - c0 >= W)
    return {reinterpret_cast<const char*>(w), a.weight_stride * static_cast<int64_t>(sizeof(T))};
  for (int64_t c = 0; c < W; ++c) {
    float* to = buffer + c * CHUNK;
    const T* from = w + c * a.weight_stride;
    const int64_t there = c0 + c < a.C ? n : 0;
    if (PAIRS) {
      std::memset(to, 0, static_cast<size_t>((n + 1) / 2 * ELEMENT));
      if (there) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
      continue;
    }
    int64_t i = 0;
    for (; i + W <= there; i += W) store(to + i, load(from + i));
    for (; i < there; ++i) to[i] = to_float(from[i]);
    for (; i < n; ++i) to[i] = 0.f;
  }
  return {reinterpret_cast<const char*>(buffer), CHUNK * ELEMENT};
}

// One panel: z[r][c] for all rows and W columns from c0 on, into `panel` (W, padded rows).
template <class T, bool PAIRS>
void multiply(const LinearArgs& a, int64_t c0, float* buffer, float* panel) {
  constexpr int64_t FEATURES = PAIRS ? 2 : 1;  // of an element
  const int64_t vectors = a.padded_rows / W;
  for (int64_t d = 0; d < a.D; d += CHUNK) {
    const int64_t features = a.D - d < CHUNK ? a.D - d : CHUNK, n = (features + FEATURES - 1) / FEATURES;
    const WeightRows w = rows_of_weight<T, PAIRS>(a, c0, d, features, buffer);
    for (int64_t v = 0; v < vectors; v += MAX_NV) {
      const float* h = a.hidden_t + d / FEATURES * a.padded_rows + v * W;
      for (int64_t c = 0; c < W; c += NC) {
        const char* wc = w.p + c * w.stride;
        float* out = panel + c * a.padded_rows + v * W;
        switch (vectors - v) {
          case 1:
            tile<1, PAIRS>(h, a.padded_rows, wc, w.stride, n, out, a.padded_rows);
            break;
          case 2:
            tile<2, PAIRS>(h, a.padded_rows, wc, w.stride, n, out, a.padded_rows);
            break;
          default:
            tile<3, PAIRS>(h, a.padded_rows, wc, w.stride, n, out, a.padded_rows);
        }
      }
    }
  }
}

// (W columns, padded rows) -> the columns c0.. of the rows of z.
void write_out(const LinearArgs& a, const float* panel, int64_t c0) {
  const int64_t columns = a.C - c0 < W ? a.C - c0 : W;
  for (int64_t r0 = 0; r0 < a.rows; r0 += W) {
    Vec t[W];
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) t[c] = load(panel + c * a.padded_rows + r0);
    transpose(t);
    const int64_t rows = a.rows - r0 < W ? a.rows - r0 : W;
    float* z = a.out + r0 * a.out_stride + c0;
    if (columns == W) {
      for (int64_t r = 0; r < rows; ++r) store(z + r * a.out_stride, t[r]);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) z[r * a.out_stride + c] = lane(t[r], static_cast<int>(c));
    }
  }
}

template <class T, bool PAIRS = false>
void run(const LinearArgs& a) {
  const int64_t panels = (a.C + W - 1) / W, grain = 1 + ELEMENTS_PER_PIECE / (W * (a.D > 0 ? a.D : 1));
  parallel(panels, grain, a.threads, [&](Pieces& pieces) {
    Scratch<float> panel(W * a.padded_rows), buffer(W * CHUNK);
    for (int64_t begin, end; pieces.next(begin, end);) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t c0 = p * W;
        for (int64_t c = 0; c < W; ++c) {
          const Vec bias = splat(a.bias && c0 + c < a.C ? a.bias[c0 + c] : 0.f);
          for (int64_t r = 0; r < a.padded_rows; r += W) store(panel.p + c * a.padded_rows + r, bias);
        }
        multiply<T, PAIRS>(a, c0, buffer.p, panel.p);
        write_out(a, panel.p, c0);
      }
    }
  });
}

}  // namespace

void linear(const LinearArgs& a) {
  switch (a.weight_dtype) {
    case DType::f32:
      return run<float>(a);
    case DType::bf16:
      if (MULTIPLIES_PAIRS && a.pairs) return run<bf16, MULTIPLIES_PAIRS>(a);
      return run<bf16>(a);
    case DType::f16:
      return run<f16>(a);
  }
}

}  // namespace assay::ASSAY_ISA
