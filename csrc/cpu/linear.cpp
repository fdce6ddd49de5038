// z = h Wᵀ + b for a block of rows that is small beside W: an output layer's logits, W read once from memory in its own
// layout. A general GEMM repacks W for every block of rows, which costs more than the product when there are 32 of them.
//
// Rows are lanes: h comes transposed, an element of W is broadcast, and a tile of NV vectors of rows x NC columns stays
// in registers. Finished panels of W columns are transposed on their way out.
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

// float32 sums over the features are this long; the sums of such sums are added up one by one.
constexpr int64_t CHUNK = 128;

// A piece of work is about 1 MB of W.
constexpr int64_t ELEMENTS_PER_PIECE = 1 << 18;

// panel[c][v] += sum_d h[d][v] w[c][d] over n features. h: (n, stride) transposed rows; w: NC rows of W.
template <int NV>
ASSAY_INLINE void tile(const float* h, int64_t h_stride, const float* w, int64_t w_stride, int64_t n, float* panel,
                       int64_t panel_stride) {
  Vec s[NC][NV];
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) s[c][v] = splat(0.f);
  for (int64_t d = 0; d < n; ++d, h += h_stride) {
    Vec a[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) a[v] = load(h + v * W);
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const Vec b = splat(w[c * w_stride + d]);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) s[c][v] = fma(a[v], b, s[c][v]);
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

// One panel: z[r][c] for all rows and W columns, from `w` (W, D), into `panel` (W, padded rows).
void multiply(const LinearArgs& a, const float* w, int64_t w_stride, float* panel) {
  const int64_t vectors = a.padded_rows / W;
  for (int64_t d = 0; d < a.D; d += CHUNK) {
    const int64_t n = a.D - d < CHUNK ? a.D - d : CHUNK;
    for (int64_t v = 0; v < vectors; v += MAX_NV) {
      const float* h = a.hidden_t + d * a.padded_rows + v * W;
      for (int64_t c = 0; c < W; c += NC) {
        const float* wc = w + c * w_stride + d;
        float* out = panel + c * a.padded_rows + v * W;
        switch (vectors - v) {
          case 1:
            tile<1>(h, a.padded_rows, wc, w_stride, n, out, a.padded_rows);
            break;
          case 2:
            tile<2>(h, a.padded_rows, wc, w_stride, n, out, a.padded_rows);
            break;
          default:
            tile<3>(h, a.padded_rows, wc, w_stride, n, out, a.padded_rows);
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

// Rows c0.. of W as float32: in place where they are, else converted into `buffer`, zeros past the last.
template <class T>
const float* rows_of_weight(const LinearArgs& a, int64_t c0, float* buffer, int64_t& stride) {
  const T* w = static_cast<const T*>(a.weight) + c0 * a.weight_stride;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (a.C - c0 >= W) {
      stride = a.weight_stride;
      return w;
    }
  }
  stride = a.D;
  for (int64_t c = 0; c < W; ++c) {
    float* to = buffer + c * a.D;
    if (c0 + c >= a.C) {
      for (int64_t d = 0; d < a.D; ++d) to[d] = 0.f;
      continue;
    }
    const T* from = w + c * a.weight_stride;
    int64_t d = 0;
    for (; d + W <= a.D; d += W) store(to + d, load(from + d));
    for (; d < a.D; ++d) to[d] = to_float(from[d]);
  }
  return buffer;
}

template <class T>
void run(const LinearArgs& a) {
  const int64_t panels = (a.C + W - 1) / W, grain = 1 + ELEMENTS_PER_PIECE / (W * (a.D > 0 ? a.D : 1));
  parallel(panels, grain, a.threads, [&](Pieces& pieces) {
    Scratch<float> panel(W * a.padded_rows), buffer(W * a.D);
    for (int64_t begin, end; pieces.next(begin, end);) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t c0 = p * W;
        for (int64_t c = 0; c < W; ++c) {
          const Vec bias = splat(a.bias && c0 + c < a.C ? a.bias[c0 + c] : 0.f);
          for (int64_t r = 0; r < a.padded_rows; r += W) store(panel.p + c * a.padded_rows + r, bias);
        }
        int64_t stride;
        const float* w = rows_of_weight<T>(a, c0, buffer.p, stride);
        multiply(a, w, stride, panel.p);
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
      return run<bf16>(a);
    case DType::f16:
      return run<f16>(a);
  }
}

}  // namespace assay::ASSAY_ISA
