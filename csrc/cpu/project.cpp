// Random projections of long vectors whose entries are hashed on the spot: Sparse, a signed sum per bucket, and
// Rademacher, a dense matrix of signs. The definitions of the entries are in ops/sketch.py.
//
// Every sum is made in one order, whatever the instruction set, the batch and the threads: coordinates one after the
// other in float32 within a slice, slices in double within a piece, pieces in double. Signs and float32 additions are
// exact or rounded once everywhere, so that all instruction sets give the same bits. Slices and pieces follow from the
// number of coordinates and the size of the sketch.
#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "simd.h"

namespace assay::ASSAY_ISA {
namespace {

constexpr int W = Vec::W, L = Wide::L;

// A slice is so long that each number of the sketch takes this many float32 terms on average.
constexpr int64_t TERMS = 32;

// Pieces are what threads share out; each keeps sums of its own, as long as they fit the scratch memory.
constexpr int64_t MAX_PIECES = 32, MERGED = 4096;  // sums that are merged at a time

// Words that are hashed at a time, for all rows at hand.
constexpr int64_t HASHES = 1024;

// Rows that share hashes, as long as their sums fit this many bytes of L2 cache.
constexpr int64_t SHARING_ROWS = 64, SUM_BYTES = 1 << 19;

// Rademacher: coordinates of one float32 sum.
constexpr int64_t COLUMNS = 256;

constexpr uint32_t SPARSE = 2, RADEMACHER = 3;  // the last word of their counters

ASSAY_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ASSAY_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
ASSAY_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// How the coordinates are cut: blocks of `block`, slices of whole blocks, pieces of whole slices.
struct Cut {
  int64_t n, block, slice, pieces;

  Cut(int64_t n_, int64_t block_, int64_t coordinates_per_slice) : n(n_), block(block_) {
    slice = round_up(most(coordinates_per_slice, 1), block);
    pieces = least((n + slice - 1) / slice, MAX_PIECES);
  }
  int64_t begin(int64_t piece) const { return (n + slice - 1) / slice * piece / pieces * slice; }
  int64_t end(int64_t piece) const { return least(n, begin(piece + 1)); }
};

// Adds the sums of each block's `pieces` pieces, `slots` apart from the next block's, to the first's, in order.
void merge(double* sums, int64_t blocks, int64_t pieces, int64_t slots, int64_t sums_per_block, int32_t threads) {
  parallel(blocks * sums_per_block, MERGED, threads, [&](Pieces& share) {
    for (int64_t begin, end; share.next(begin, end);)
      while (begin < end) {
        const int64_t block = begin / sums_per_block, i = begin % sums_per_block;
        const int64_t n = least(end - begin, sums_per_block - i);
        double* to = sums + block * slots * sums_per_block + i;
        for (int64_t piece = 1; piece < pieces; ++piece)
          for (int64_t j = 0; j < n; ++j) to[j] += to[piece * sums_per_block + j];
        begin += n;
      }
  });
}

// Calls add(piece, first row, rows, buffer, sums) for every piece of coordinates and block of rows, with zeroed `sums`
// and a buffer of the thread's own, then adds the pieces' sums to `out` in order: at(rows, row, d) is where the sum d of
// a block's row lies. What does not fit the scratch memory goes one after the other, blocks and then pieces: a block's
// first slot holds the sum of the pieces so far.
template <class Add, class At>
void for_all_pieces(const ProjectArgs& a, const Cut& cut, int64_t block_rows, int64_t sums_per_block,
                    int64_t buffer_size, const Add& add, const At& at) {
  if (cut.pieces == 0 || a.rows == 0) return;
  const int64_t blocks = (a.rows + block_rows - 1) / block_rows;
  const int64_t room = a.scratch_bytes / (sums_per_block * static_cast<int64_t>(sizeof(double)));
  const int64_t slots = least(cut.pieces, most(room, 2)), together = least(blocks, most(room / slots, 1));
  Scratch<double> sums(together * slots * sums_per_block, Size::LARGE);
  Scratch<float> buffers(most(least(a.threads, together * slots), 1) * buffer_size, Size::LARGE);
  const auto rows_of = [&](int64_t block) { return least(block_rows, a.rows - block * block_rows); };
  for (int64_t first_block = 0; first_block < blocks; first_block += together) {
    const int64_t here = least(together, blocks - first_block);
    for (int64_t piece = 0; piece < cut.pieces;) {
      const int64_t kept = piece > 0, n = least(cut.pieces - piece, slots - kept);
      int64_t members = 0;
      parallel(here * n, 1, a.threads, [&](Pieces& share) {
        float* buffer = buffers.p + __atomic_fetch_add(&members, 1, __ATOMIC_RELAXED) * buffer_size;
        for (int64_t task, end; share.next(task, end);) {
          const int64_t block = first_block + task / n;
          double* mine = sums.p + (task / n * slots + kept + task % n) * sums_per_block;
          for (int64_t i = 0; i < sums_per_block; ++i) mine[i] = 0;
          add(piece + task % n, block * block_rows, rows_of(block), buffer, mine);
        }
      });
      merge(sums.p, here, kept + n, slots, sums_per_block, a.threads);
      piece += n;
    }
    const int64_t first = first_block * block_rows;
    parallel(least(here * block_rows, a.rows - first), 1, a.threads, [&](Pieces& share) {
      for (int64_t r, end; share.next(r, end);) {
        const double* from = sums.p + r / block_rows * slots * sums_per_block;
        const int64_t rows = rows_of(first_block + r / block_rows);
        double* to = a.out + (first + r) * a.dim;
        for (int64_t d = 0; d < a.dim; ++d) to[d] += from[at(rows, r % block_rows, d)];
      }
    });
  }
}

// ---- Sparse ---------------------------------------------------------------------------------------------------------

// Bytes of each row that are fetched ahead: more rows are read side by side than the processor follows by itself.
constexpr int64_t AHEAD = 512;

constexpr float SIGN[2] = {1.f, -1.f};

// The codes, 2 bucket + (1 for a minus), of the entries u0, u0 + 1, ...: n of them from codes[u0 % 4] on.
void hash(const ProjectArgs& a, int64_t u0, int64_t n, uint32_t* codes) {
  const Wide dim = wide(static_cast<uint64_t>(a.dim)), one = wide(1), low = wide(0xffffffffu);
  const int64_t blocks = (u0 % 4 + n + 3) / 4;
  for (int64_t b = 0; b < blocks; b += L) {
    Words words = philox_at(u0 / 4 + b, 0, SPARSE, a.key0, a.key1);
#pragma GCC unroll 4
    for (Wide& w : words.w) {
      const Wide bucket = shift_right<31>(multiply_low_halves(shift_right<1>(w & low), dim));
      w = (bucket + bucket) ^ (w & one);
    }
    store_words(codes + 4 * b, words);
  }
}

// sums[bucket][lane] += sign x[lane][c] for n coordinates of at most W rows: W x W blocks are transposed, so that a
// coordinate's numbers are one vector.
template <class T>
void add_lanes(const T* x, int64_t stride, int64_t rows, int64_t n, const uint32_t* codes, int64_t nonzeros,
               float* sums) {
  const auto add = [&](Vec v, int64_t c) __attribute__((always_inline)) {
    for (int64_t k = 0; k < nonzeros; ++k) {
      const uint32_t code = codes[c * nonzeros + k];
      float* p = sums + static_cast<int64_t>(code >> 1) * W;
      store(p, fma(splat(SIGN[code & 1]), v, load(p)));
    }
  };
  Vec t[W];
  int64_t c = 0;
  if constexpr (std::is_same<T, bf16>::value) {  // two numbers go through the transposition as one
    for (; rows == W && c + 2 * W <= n; c += 2 * W) {
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        prefetch(x + r * stride + c + AHEAD / sizeof(T));
        t[r] = load_pairs(x + r * stride + c);
      }
      transpose(t);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        add(first_of_pairs(t[j]), c + 2 * j);
        add(second_of_pairs(t[j]), c + 2 * j + 1);
      }
    }
  }
  for (; rows == W && c + W <= n; c += W) {
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      prefetch(x + r * stride + c + AHEAD / sizeof(T));
      t[r] = load(x + r * stride + c);
    }
    transpose(t);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) add(t[j], c + j);
  }
  for (; c < n; c += W) {
    for (int r = 0; r < W; ++r) t[r] = r < rows ? load_first(x + r * stride + c, n - c, 0.f) : splat(0.f);
    transpose(t);
    for (int64_t j = 0; j < least(W, n - c); ++j) add(t[j], c + j);
  }
}

// The same for one row.
template <class T>
void add_row(const T* x, int64_t n, const uint32_t* codes, int64_t nonzeros, float* sums) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t k = 0; k < nonzeros; ++k) {
      const uint32_t code = codes[c * nonzeros + k];
      sums[code >> 1] += SIGN[code & 1] * to_float(x[c]);
    }
}

// Rows that go side by side through lanes; a few that are left over go one by one.
ASSAY_INLINE int64_t rows_in_lanes(int64_t rows) { return rows % W > W / 4 ? round_up(rows, W) : rows / W * W; }

// float32 -> double, and zero again
void flush(float* from, double* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    add_to(to + i, load(from + i));
    store(from + i, splat(0.f));
  }
  for (; i < n; ++i) {
    to[i] += static_cast<double>(from[i]);
    from[i] = 0.f;
  }
}

template <class T>
void sparse(const ProjectArgs& a) {
  const Cut cut(a.cols, most(16, HASHES / a.nonzeros / 16 * 16), TERMS * a.dim / a.nonzeros);
  int64_t block_rows = SHARING_ROWS;
  while (block_rows > W && (block_rows * a.dim * 4 > SUM_BYTES || a.rows <= block_rows / 2)) block_rows /= 2;
  const auto sums_of = [&](int64_t rows) { return most(rows_in_lanes(rows), rows) * a.dim; };
  if (sums_of(least(block_rows, a.rows)) * 8 > a.scratch_bytes) block_rows = 1;  // slower, but none for empty lanes
  const int64_t block_sums = sums_of(least(block_rows, a.rows));
  const auto add = [&](int64_t piece, int64_t row, int64_t rows, float* sums, double* out) {
    const int64_t lanes = rows_in_lanes(rows), count = sums_of(rows);
    const T* x = static_cast<const T*>(a.vectors) + row * a.stride;
    Scratch<uint32_t> codes(cut.block * a.nonzeros + 4 * L + 4);
    for (int64_t i = 0; i < count; ++i) sums[i] = 0.f;
    const int64_t end = cut.end(piece);
    for (int64_t slice = cut.begin(piece); slice < end; slice += cut.slice) {
      const int64_t slice_end = least(end, slice + cut.slice);
      for (int64_t c = slice; c < slice_end; c += cut.block) {
        const int64_t n = least(cut.block, slice_end - c), u = (a.first + c) * a.nonzeros;
        hash(a, u, n * a.nonzeros, codes.p);
        const uint32_t* at = codes.p + u % 4;
        int64_t r = 0;
        for (; r < lanes; r += W)
          add_lanes(x + r * a.stride + c, a.stride, least(W, rows - r), n, at, a.nonzeros, sums + r * a.dim);
        for (; r < rows; ++r) add_row(x + r * a.stride + c, n, at, a.nonzeros, sums + r * a.dim);
      }
      flush(sums, out, count);
    }
  };
  const auto at = [&](int64_t rows, int64_t r, int64_t d) {
    return r < rows_in_lanes(rows) ? r / W * W * a.dim + d * W + r % W : r * a.dim + d;
  };
  for_all_pieces(a, cut, block_rows, block_sums, round_up(block_sums, 16), add, at);
}

// ---- Rademacher -----------------------------------------------------------------------------------------------------

constexpr int ROWS = W > 1 ? W : 4;  // of accumulators: they fill half of the registers
ASSAY_INLINE int64_t accumulators_of(int64_t rows) { return rows == 1 ? 1 : rows <= ROWS / 2 ? ROWS / 2 : ROWS; }

// bits[w][c]: word w of the Philox blocks of COLUMNS coordinates, the signs of 128 rows of the matrix.
void hash_signs(const ProjectArgs& a, int64_t coordinate, int64_t block, uint32_t (*bits)[COLUMNS]) {
  for (int64_t c = 0; c < COLUMNS; c += L) {
    const Words words = philox_at(coordinate + c, static_cast<uint32_t>(block), RADEMACHER, a.key0, a.key1);
    for (int w = 0; w < 4; ++w) store_low_halves(bits[w] + c, words.w[w]);
  }
}

// out[b][0 .. W) += sum_c sign_c x[b][c] for N rows x: the W signs of a coordinate begin at bit `shift` of its word.
template <int N>
void add_signed(const float* x, const uint32_t* bits, int shift, double* out, int64_t stride) {
  Vec s[N];
#pragma GCC unroll 16
  for (int b = 0; b < N; ++b) s[b] = splat(0.f);
  for (int64_t c = 0; c < COLUMNS; ++c) {
    const Vec sign = plus_minus(bits[c] >> shift);
#pragma GCC unroll 16
    for (int b = 0; b < N; ++b) s[b] = fma(sign, splat(x[b * COLUMNS + c]), s[b]);
  }
#pragma GCC unroll 16
  for (int b = 0; b < N; ++b) add_to(out + b * stride, s[b]);
}

template <int N>
void add_columns(const ProjectArgs& a, int64_t coordinate, const float* x, double* out, int64_t stride) {
  uint32_t bits[4][COLUMNS];
  for (int64_t d = 0; d < a.dim; d += W) {
    if (d % 128 == 0) hash_signs(a, coordinate, d / 128, bits);
    add_signed<N>(x, bits[d % 128 / 32], static_cast<int>(d % 32), out + d, stride);
  }
}

template <class T>
void rademacher(const ProjectArgs& a) {
  const Cut cut(a.cols, COLUMNS, most(TERMS * a.dim, 16 * COLUMNS));
  const int64_t stride = round_up(a.dim, W);
  const auto add = [&](int64_t piece, int64_t row, int64_t rows, float* x, double* out) {
    const int64_t end = cut.end(piece);
    for (int64_t c = cut.begin(piece); c < end; c += COLUMNS) {
      const int64_t n = least(COLUMNS, end - c);
      for (int64_t r = 0; r < ROWS; ++r) {
        const T* from = static_cast<const T*>(a.vectors) + (row + r) * a.stride + c;
        for (int64_t i = 0; i < COLUMNS; i += W)
          store(x + r * COLUMNS + i, r < rows ? load_first(from + i, n - i, 0.f) : splat(0.f));
      }
      const int64_t accumulators = accumulators_of(rows);
      if (accumulators == 1) {
        add_columns<1>(a, a.first + c, x, out, stride);
      } else if (accumulators == ROWS / 2) {
        add_columns<ROWS / 2>(a, a.first + c, x, out, stride);
      } else {
        add_columns<ROWS>(a, a.first + c, x, out, stride);
      }
    }
  };
  const auto at = [&](int64_t, int64_t r, int64_t d) { return r * stride + d; };
  for_all_pieces(a, cut, ROWS, accumulators_of(least(ROWS, a.rows)) * stride, ROWS * COLUMNS, add, at);
}

template <class T>
void run(const ProjectArgs& a) {
  if (a.nonzeros > 0) {
    sparse<T>(a);
  } else {
    rademacher<T>(a);
  }
}

}  // namespace

void project(const ProjectArgs& a) {
  switch (a.dtype) {
    case DType::f32:
      return run<float>(a);
    case DType::bf16:
      return run<bf16>(a);
    case DType::f16:
      return run<f16>(a);
  }
}

void philox(const PhiloxArgs& a) {
  parallel(a.n, HASHES, a.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t c = begin; c < end; c += L) {
        Words words = philox_at(a.first + c, a.c2, a.c3, a.key0, a.key1);
        for (Wide& w : words.w) w = w & wide(0xffffffffu);
        uint32_t buffer[4 * L];
        store_words(buffer, words);
        for (int64_t i = 0; i < 4 * least(L, end - c); ++i) a.out[4 * c + i] = buffer[i];
      }
  });
}

}  // namespace assay::ASSAY_ISA
