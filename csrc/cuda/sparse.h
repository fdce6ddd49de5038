// project, Sparse: every bucket's sum over the coordinates that its entries name, in their order.
//
// Buckets do not depend on the data, so each chunk of coordinates comes with its entries sorted by bucket, 2 bytes each
// (ops/_sparse.py). A block of threads takes a piece of the coordinates, chunk by chunk: the values go to shared memory,
// several rows of a coordinate side by side in a unit of 16 bytes, or one row as it lies; then a thread that owns a bucket
// adds up what its entries name, in registers: no atomics, and an order that no other row has a part in. At the end of a
// slice the float32 sums are added to the piece's, in double.
//
// What a thread does between two barriers is a function here, which the native tests call for one thread after the other.
#pragma once
#include "assay_cuda.h"
#include "logits.h"
#include "portable.h"

#include <type_traits>

namespace assay::cuda {

constexpr int SPARSE_THREADS = 1024;   // of a block, at most
constexpr int SPARSE_UNITS = 8192;     // of a chunk, 128 KB
constexpr int SPARSE_ROW_CHUNK = 8192;  // values of one row

// How a shape is cut up. A function of dim and of whether there is one row: a row's bits do not depend on it.
struct SparsePlan {
  int planes;   // units of a coordinate, 1 or 2; 0: one row
  int threads, chunk;
  int buckets;  // of a thread: 1 or 4
  int bounds, width;  // 16-bit numbers of a chunk's order: where the buckets begin, and with the entries
};

ASSAY_HD constexpr int up_to_8(int n) { return (n + 7) / 8 * 8; }
ASSAY_HD constexpr int sparse_chunk_of(int planes) { return planes ? SPARSE_UNITS / planes : SPARSE_ROW_CHUNK; }

// Where a coordinate's unit lies in its chunk: threads that hold neighbours in pairs write to different banks.
ASSAY_HD constexpr int sparse_place(int coordinate) { return coordinate ^ (coordinate >> 3 & 1); }

inline SparsePlan sparse_plan(int dim, int nonzeros, bool one_row) {
  SparsePlan p{};
  const bool narrow = dim <= SPARSE_THREADS / 2;
  p.planes = one_row ? 0 : narrow ? 2 : 1;
  p.threads = one_row && narrow ? SPARSE_THREADS / 2 : SPARSE_THREADS;
  p.chunk = sparse_chunk_of(p.planes);
  p.buckets = dim <= SPARSE_THREADS ? 1 : 4;
  p.bounds = up_to_8(dim + 1);
  p.width = p.bounds + p.chunk * nonzeros;
  return p;
}

// The values, once or, of one row, twice; a unit of zeros; and the order, twice: the next chunk's comes while this one is
// added up.
ASSAY_HD constexpr int64_t sparse_value_bytes(int planes, int itemsize) {
  return (planes ? SPARSE_UNITS * int64_t{sizeof(Granule)} : 2 * int64_t{SPARSE_ROW_CHUNK} * itemsize) +
         int64_t{sizeof(Granule)};
}
inline int64_t sparse_shared(const SparsePlan& p, int itemsize) {
  return sparse_value_bytes(p.planes, itemsize) + 2 * 2 * int64_t{p.width};
}

// Whether both ways fit so much shared memory: which rows are together must not choose the kernel.
inline bool sparse_fits(int64_t dim, int64_t nonzeros, int itemsize, int64_t shared_bytes) {
  if (dim > 4 * SPARSE_THREADS || nonzeros > 7) return false;
  for (bool one_row : {false, true})
    if (sparse_shared(sparse_plan(int(dim), int(nonzeros), one_row), itemsize) > shared_bytes) return false;
  return true;
}

// 16 bytes from global to shared memory; there at the barrier that follows sparse_arrived.
ASSAY_HD void copy_16(void* to, const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  std::memcpy(to, from, 16);
#endif
}

// One thread of a block. PLANES of 16 / sizeof(T) rows, or 0: one row.
template <class T, int PLANES, int BUCKETS>
struct SparseThread {
  static constexpr int R = PLANES ? 16 / int(sizeof(T)) : 1;  // rows that a thread adds up
  static constexpr int CHUNK = sparse_chunk_of(PLANES);
  static constexpr int NEIGHBOURS = 4 / int(sizeof(T));  // coordinates that a load of 4 bytes takes
  static constexpr int ITEMS = SPARSE_UNITS / NEIGHBOURS / SPARSE_THREADS;  // of R such loads
  static constexpr int LANES = SPARSE_THREADS / (PLANES ? PLANES : 1);      // threads of a plane
  static constexpr int ZERO = PLANES ? SPARSE_UNITS : 2 * CHUNK;            // of the units, or values: it is 0
  static constexpr int UNROLL = 4;  // entries in flight
  using Value = std::conditional_t<PLANES == 0, T, Granule>;

  const SparseArgs& a;
  const SparsePlan& p;
  Value* s_values;
  uint16_t* s_orders;
  int t, plane;
  int row0, piece, begin, end;  // chunks from begin to end
  float sums[BUCKETS][R];

  ASSAY_HD SparseThread(const SparseArgs& a_, const SparsePlan& p_, Granule* s_memory, int64_t block, int t_)
      : a(a_), p(p_), s_values(reinterpret_cast<Value*>(s_memory)), t(t_), plane(PLANES > 1 && t_ >= LANES) {
    s_orders = reinterpret_cast<uint16_t*>(reinterpret_cast<char*>(s_memory) + sparse_value_bytes(PLANES, sizeof(T)));
    const int64_t rows = PLANES ? PLANES * R : 1, tiles = ceil_div(a.rows, rows), chunks = ceil_div(a.count, CHUNK);
    piece = static_cast<int>(block / tiles);
    row0 = static_cast<int>(block % tiles * rows);
    const int64_t per_piece = a.slices_of_piece * a.slice / CHUNK;
    begin = static_cast<int>(piece * per_piece);
    end = static_cast<int>(begin + per_piece < chunks ? begin + per_piece : chunks);
    if (t == 0) s_values[ZERO] = Value{};
    ASSAY_UNROLL
    for (int i = 0; i < BUCKETS; ++i)
      ASSAY_UNROLL
      for (int r = 0; r < R; ++r) sums[i][r] = 0.f;
  }

  ASSAY_HD int buffer(int chunk) const { return PLANES ? 0 : (chunk & 1) * CHUNK; }
  ASSAY_HD uint16_t* order(int chunk) const { return s_orders + (chunk & 1) * p.width; }

  // Starts what a chunk needs on its way to shared memory: its order, and the values of one row.
  ASSAY_HD void copy(int chunk) const {
    const uint16_t* from = a.order + int64_t{chunk} * p.width;
    uint16_t* to = order(chunk);
    for (int i = 8 * t; i < p.width; i += 8 * p.threads) copy_16(to + i, from + i);
    if constexpr (PLANES == 0) {
      constexpr int V = 16 / int(sizeof(T));
      const int64_t left = a.count - int64_t{chunk} * CHUNK;
      const int n = left < CHUNK ? int(left) : CHUNK;
      const T* x = static_cast<const T*>(a.vectors) + int64_t{row0} * a.stride + int64_t{chunk} * CHUNK;
      T* value = s_values + buffer(chunk);
      const int whole = reinterpret_cast<uintptr_t>(x) % 16 ? 0 : n / V * V;
      for (int i = V * t; i < whole; i += V * p.threads) copy_16(value + i, x + i);
      for (int i = whole + t; i < n; i += p.threads) value[i] = x[i];
    }
  }

  struct Item {
    uint32_t word[R];  // each row's at NEIGHBOURS coordinates
  };
  // Of a thread's q-th item: the plane, and its first coordinate in the chunk.
  static ASSAY_HD constexpr int plane_of(int q) { return PLANES > 1 && q >= ITEMS / 2; }
  ASSAY_HD int coordinate(int q) const { return (t + q * SPARSE_THREADS) * NEIGHBOURS - plane_of(q) * CHUNK; }

  // Whether all of a chunk is there and may be read 4 bytes at a time.
  ASSAY_HD bool whole(int chunk) const {
    const bool paired = NEIGHBOURS == 1 || (reinterpret_cast<uintptr_t>(a.vectors) % 4 == 0 && a.stride % 2 == 0);
    return paired && a.rows - row0 >= PLANES * R && a.count - int64_t{chunk} * CHUNK >= CHUNK;
  }

  // WHOLE: whole(chunk).
  template <bool WHOLE>
  ASSAY_HD Item load(int chunk, int q) const {
    const int row = plane_of(q) * R;
    const T* at = static_cast<const T*>(a.vectors) + int64_t{row0 + row} * a.stride + int64_t{chunk} * CHUNK + coordinate(q);
    const int64_t left = a.count - int64_t{chunk} * CHUNK - coordinate(q);
    Item item;
    ASSAY_UNROLL
    for (int r = 0; r < R; ++r, at += a.stride) {
      if constexpr (WHOLE) {
        item.word[r] = *reinterpret_cast<const uint32_t*>(at);
      } else {
        item.word[r] = row0 + row + r < a.rows ? word(at, left) : 0;
      }
    }
    return item;
  }

  // Items from `first` on, as many as `held` has.
  template <int N>
  ASSAY_HD void load_all(int chunk, int first, Item (&held)[N]) const {
    if (whole(chunk)) {
      ASSAY_UNROLL
      for (int q = 0; q < N; ++q) held[q] = load<true>(chunk, first + q);
    } else {
      ASSAY_UNROLL
      for (int q = 0; q < N; ++q) held[q] = load<false>(chunk, first + q);
    }
  }

  template <int N>
  ASSAY_HD void store_all(int first, const Item (&held)[N]) const {
    ASSAY_UNROLL
    for (int q = 0; q < N; ++q) store(first + q, held[q]);
  }

  // Two halves one by one, or one float, and 0 beyond the last.
  static ASSAY_HD uint32_t word(const T* at, int64_t left) {
    if (left <= 0) return 0;
    if constexpr (NEIGHBOURS == 1) {
      return *reinterpret_cast<const uint32_t*>(at);
    } else {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(at);
      return half[0] | (left > 1 ? static_cast<uint32_t>(half[1]) << 16 : 0u);
    }
  }

  // ... and from registers into units.
  ASSAY_HD void store(int q, const Item& item) const {
    Granule* s_units = s_values + plane_of(q) * CHUNK;
    Granule first, second;
    ASSAY_UNROLL
    for (int k = 0; k < 4; ++k) {
      if constexpr (NEIGHBOURS == 1) {
        first.word[k] = item.word[k];
      } else {
        const uint32_t even = item.word[2 * k], odd = item.word[2 * k + 1];
        first.word[k] = (even & 0xffffu) | odd << 16;
        second.word[k] = even >> 16 | (odd & 0xffff0000u);
      }
    }
    s_units[sparse_place(coordinate(q))] = first;
    if constexpr (NEIGHBOURS == 2) s_units[sparse_place(coordinate(q) + 1)] = second;
  }

  ASSAY_HD int bucket(int i) const { return t - plane * LANES + i * LANES; }

  // Adds what this thread's buckets' entries name: 2 places + (1 for a minus).
  ASSAY_HD void gather(int chunk) {
    const uint16_t* s_bounds = order(chunk);
    const uint16_t* s_entries = s_bounds + p.bounds;
    const int offset = PLANES ? plane * CHUNK : buffer(chunk);
    const Value* s_own = s_values + offset;
    ASSAY_UNROLL
    for (int i = 0; i < BUCKETS; ++i) {
      if (bucket(i) >= a.dim) break;
      const int last = s_bounds[bucket(i) + 1];
      ASSAY_NO_UNROLL
      for (int j = s_bounds[bucket(i)]; j < last; j += UNROLL) {
        uint32_t entry[UNROLL];
        ASSAY_UNROLL
        for (int u = 0; u < UNROLL; ++u)
          entry[u] = j + u < last ? s_entries[j + u] : 2 * static_cast<uint32_t>(ZERO - offset);
        Value value[UNROLL];
        ASSAY_UNROLL
        for (int u = 0; u < UNROLL; ++u) value[u] = s_own[entry[u] >> 1];
        ASSAY_UNROLL
        for (int u = 0; u < UNROLL; ++u) add(sums[i], value[u], bits_to_float(0x3f800000u | entry[u] << 31));
      }
    }
  }

  static ASSAY_HD void add(float* sum, const T& value, float sign) { sum[0] = fmaf(sign, to_float(value), sum[0]); }
  static ASSAY_HD void add(float* sum, const Granule& unit, float sign) {
    float r_x[16 / sizeof(T)];
    unpack(unit, r_x, T{});
    ASSAY_UNROLL
    for (int r = 0; r < R; ++r) sum[r] = fmaf(sign, r_x[r], sum[r]);
  }

  // Where a slice ends with this chunk, its sums go to the piece's.
  ASSAY_HD void flush(int chunk) {
    const int chunks = static_cast<int>(a.slice) / CHUNK;  // of a slice
    if (chunk + 1 != end && (chunk + 1) % chunks) return;
    const bool first = chunk < begin + chunks;
    const int rows = a.rows - row0 < PLANES * R ? static_cast<int>(a.rows - row0) - plane * R : R;  // of this plane
    double* out = a.partial + (int64_t{piece} * a.rows + row0 + plane * R) * a.dim + bucket(0);
    ASSAY_UNROLL
    for (int r = 0; r < R; ++r, out += a.dim) {
#ifdef __CUDA_ARCH__
      asm volatile("" : "+l"(out));  // or the compiler holds all rows' addresses at once, and spills
#endif
      ASSAY_UNROLL
      for (int i = 0; i < BUCKETS; ++i) {
        if (r < rows && bucket(i) < a.dim)
          out[i * LANES] = (first ? 0. : out[i * LANES]) + static_cast<double>(sums[i][r]);
        sums[i][r] = 0.f;
      }
    }
  }
};

inline int64_t sparse_pieces(const SparseArgs& a) { return ceil_div(a.count, a.slice * a.slices_of_piece); }
inline int64_t sparse_blocks(const SparseArgs& a, const SparsePlan& p, int itemsize) {
  return sparse_pieces(a) * ceil_div(a.rows, p.planes ? p.planes * 16 / itemsize : 1);
}

}  // namespace assay::cuda
