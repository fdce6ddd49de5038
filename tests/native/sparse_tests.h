// project, Sparse, without a GPU: blocks of its threads, one after the other between barriers, against plain sums. Signed
// float32 terms of a slice, in the order of the coordinates, then double: equal to the last bit.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "cuda/sparse.h"

namespace assay::cuda {

struct SparseShape {
  int64_t rows, gap, count;  // gap: from a row's end to the next row
  int dim, nonzeros, slices_of_piece;
  int64_t offset;  // of the first number from a 16-byte boundary
};

// entries[c * nonzeros + j]: 2 bucket + (1 for a minus). As ops/_sparse.py sorts them.
inline std::vector<uint16_t> sparse_order(const std::vector<uint32_t>& entries, const SparseShape& s,
                                          const SparsePlan& p) {
  const int64_t chunks = ceil_div(s.count, p.chunk);
  std::vector<uint16_t> out(static_cast<size_t>(chunks * p.width));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    uint16_t* bounds = out.data() + chunk * p.width;
    std::vector<std::vector<uint16_t>> of(static_cast<size_t>(s.dim));
    for (int c = 0; c < p.chunk && chunk * p.chunk + c < s.count; ++c)
      for (int j = 0; j < s.nonzeros; ++j) {
        const uint32_t e = entries[static_cast<size_t>((chunk * p.chunk + c) * s.nonzeros + j)];
        const int place = p.planes ? sparse_place(c) : c;
        of[e >> 1].push_back(static_cast<uint16_t>(2 * place + static_cast<int>(e & 1)));
      }
    uint16_t* to = bounds + p.bounds;
    for (int b = 0; b < s.dim; ++b) {
      bounds[b] = static_cast<uint16_t>(to - bounds - p.bounds);
      for (uint16_t e : of[static_cast<size_t>(b)]) *to++ = e;
    }
    bounds[s.dim] = static_cast<uint16_t>(to - bounds - p.bounds);
  }
  return out;
}

template <class T, int PLANES, int BUCKETS>
void run_sparse_block(const SparseArgs& a, const SparsePlan& p, int64_t block, std::vector<Granule>& memory) {
  using Thread = SparseThread<T, PLANES, BUCKETS>;
  for (Granule& u : memory) u = {{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u}};  // NaN in every type
  std::vector<Thread> threads;
  for (int t = 0; t < p.threads; ++t) threads.emplace_back(a, p, memory.data(), block, t);
  for (int chunk = threads[0].begin; chunk < threads[0].end; ++chunk) {
    for (Thread& me : threads) {
      me.copy(chunk);
      if constexpr (PLANES > 0) {
        typename Thread::Item held[Thread::ITEMS];
        me.load_all(chunk, 0, held);
        me.store_all(0, held);
      }
    }
    for (Thread& me : threads) {
      me.gather(chunk);
      me.flush(chunk);
    }
  }
}

template <class T>
void run_sparse(const SparseArgs& a, const SparsePlan& p, int64_t block, std::vector<Granule>& memory) {
  if (p.planes == 2) return run_sparse_block<T, 2, 1>(a, p, block, memory);
  if (p.planes == 1 && p.buckets == 1) return run_sparse_block<T, 1, 1>(a, p, block, memory);
  if (p.planes == 1) return run_sparse_block<T, 1, 4>(a, p, block, memory);
  if (p.buckets == 1) return run_sparse_block<T, 0, 1>(a, p, block, memory);
  run_sparse_block<T, 0, 4>(a, p, block, memory);
}

// The sums of every piece, (pieces, rows, dim).
template <class T>
std::vector<double> emulated_sparse(const T* x, DType dtype, const SparseShape& s, const std::vector<uint32_t>& entries,
                                    int64_t slice) {
  const SparsePlan p = sparse_plan(s.dim, s.nonzeros, s.rows == 1);
  const std::vector<uint16_t> order = sparse_order(entries, s, p);
  std::vector<Granule> aligned(order.size() / 8 + 1);
  std::memcpy(aligned.data(), order.data(), 2 * order.size());
  SparseArgs a{x, dtype, s.rows, s.count + s.gap, s.count, reinterpret_cast<uint16_t*>(aligned.data()), s.dim,
               s.nonzeros, slice, s.slices_of_piece, nullptr, nullptr};
  std::vector<double> partial(static_cast<size_t>(sparse_pieces(a) * s.rows * s.dim), 1e30);
  a.partial = partial.data();
  std::vector<Granule> memory(static_cast<size_t>(ceil_div(sparse_shared(p, sizeof(T)), 16)));
  for (int64_t block = 0; block < sparse_blocks(a, p, sizeof(T)); ++block) run_sparse<T>(a, p, block, memory);
  return partial;
}

template <class T>
std::vector<double> plain_sparse(const T* x, const SparseShape& s, const std::vector<uint32_t>& entries, int64_t slice) {
  const int64_t length = slice * s.slices_of_piece;
  std::vector<double> out(static_cast<size_t>(ceil_div(s.count, length) * s.rows * s.dim));
  std::vector<float> sums(static_cast<size_t>(s.dim));
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t begin = 0; begin < s.count; begin += slice) {
      for (float& sum : sums) sum = 0;
      for (int64_t c = begin; c < begin + slice && c < s.count; ++c)
        for (int j = 0; j < s.nonzeros; ++j) {
          const uint32_t e = entries[static_cast<size_t>(c * s.nonzeros + j)];
          const float value = to_float(x[row * (s.count + s.gap) + c]);
          sums[e >> 1] += e & 1 ? -value : value;
        }
      double* to = out.data() + (begin / length * s.rows + row) * s.dim;
      for (int b = 0; b < s.dim; ++b) to[b] += static_cast<double>(sums[static_cast<size_t>(b)]);
    }
  return out;
}

// What differs, or nothing.
template <class T>
std::string test_sparse(const SparseShape& s, DType dtype, std::mt19937& rng) {
  constexpr int64_t SLICE = 8192;
  std::vector<Granule> memory(static_cast<size_t>((s.offset + s.rows * (s.count + s.gap)) * int64_t{sizeof(T)} / 16 + 1));
  T* x = reinterpret_cast<T*>(memory.data()) + s.offset;
  std::uniform_int_distribution<uint32_t> bits(0, 1023), bucket(0, static_cast<uint32_t>(s.dim) - 1);
  for (int64_t i = 0; i < s.rows * (s.count + s.gap); ++i) {
    // finite, of either sign and of many magnitudes in each type
    if constexpr (sizeof(T) == 4) {
      x[i] = static_cast<float>(bits(rng)) * 0x1.234p-7f - 4.f;
    } else {
      x[i].bits = static_cast<uint16_t>((0x3800u + bits(rng)) | (bits(rng) & 1 ? 0x8000u : 0u));
    }
  }
  std::vector<uint32_t> entries(static_cast<size_t>(s.count * s.nonzeros));
  for (uint32_t& e : entries) e = 2 * bucket(rng) | (bits(rng) & 1);
  const std::string name = "sparse rows=" + std::to_string(s.rows) + " count=" + std::to_string(s.count) +
                           " dim=" + std::to_string(s.dim) + " dtype=" + std::to_string(static_cast<int>(dtype));
  return emulated_sparse(x, dtype, s, entries, SLICE) == plain_sparse(x, s, entries, SLICE) ? "" : name;
}

}  // namespace assay::cuda
