// How a problem is cut up: decided from K, C and the dtype's size (and what the device can do), never from N, the fields
// or the number of SMs, so that a row's bits depend on nothing but the row.
#pragma once
#include "ensemble_math.h"

namespace assay::cuda {

// ---- dispatch: every limit and its reason ---------------------------------------------------------------------------

// Narrow rows: many rows per block, copied to shared memory as they lie, each up to 32 columns to a lane, eight of them at
// a time: what a row costs at its end is as much as many columns. Fewer where many models' logits would fill that memory.
constexpr int NARROW_MAX_C = 256;
constexpr int NARROW_COLUMNS_PER_LANE[] = {32, 16, 8}, NARROW_COLUMNS = 8;
// Four warps: enough rows for coalesced results, small enough that five blocks and more share an SM.
constexpr int NARROW_THREADS = 128;

// Wide rows: a warp takes chunks of 512 (float32) or 1024 columns; eight warps hide each other's loads, and three such
// blocks fit an SM's registers.
constexpr int WIDE_MAX_WARPS = 8;

// A warp has a row of up to a chunk to itself, and four warps share a block.
constexpr int WARP_ROWS = 4;

// A single model is read once and keeps nothing: a row has as few warps as there are in one block, since a warp's part in
// its meetings costs as much as four chunks. On an H200, 4 warps took 0.77 of 8 warps' time at 64 KB a row; at 512 KB, 8
// warps of one block took 0.86 of 4 warps' in each of four blocks.
constexpr int64_t ONCE_BYTES = 1 << 20;
constexpr int64_t ONCE_FEW_BYTES = 128 << 10;  // up to here
constexpr int ONCE_FEW_WARPS = 4;

// The logits of a K x C row stay in shared memory for the second sweep, as they are. A row is shared by as few blocks as
// keep a block's part within 72 KB, so that three blocks are on an SM (227 KB) and one loads while others mix; with the
// most blocks a part may grow to 110 KB, two blocks on an SM. Beyond, blocks would wait for each other with the memory
// idle: reading twice through L2 is the better half.
constexpr int64_t KEPT_BYTES = 72 << 10, KEPT_BYTES_LAST = 110 << 10;
// Blocks per row: a power of two up to the cluster size. 8 is portable; 16 needs the device's consent.
constexpr int CLUSTER_SIZES[] = {1, 2, 4, 8, 16};

// Rows that are read twice: 16 blocks each (8 where clusters end there), so that few rows are in flight and their logits
// still lie in L2 when the second sweep comes. Rows in flight hold at most this share of L2: on an H100, 0.95 took 0.75 of the
// time of 0.6 at 2.4 MB a row, and nowhere more.
constexpr int TWICE_SLICES = 16;
constexpr double TWICE_L2_SHARE = 0.95;
// Of rows so long that an SM has a single block of them, which then has more warps. On an H100, 8 warps took 0.90 of 16
// warps' time at 2.5 MB a row, 1.19 at 4 MB.
constexpr int64_t TWICE_LONG_BYTES = 3 << 20;
constexpr int TWICE_MAX_WARPS = 16;

// Rows that are not narrow are finished by a kernel of its own, which finds their sums in the workspace: so many rows to
// a launch that these take about as much.
constexpr int64_t SUMS_BYTES = 64 << 20;

// Models whose addresses and weights travel as kernel arguments; more are written to the workspace first.
constexpr int INLINE_MODELS = 32;

// Columns are 32-bit inside the kernels; a margin for rounding up to whole chunks.
constexpr int64_t MAX_C = (int64_t{1} << 31) - (int64_t{1} << 20);

// ---------------------------------------------------------------------------------------------------------------------

struct Device {
  int64_t shared_bytes;  // that a block may have, opt-in
  int max_cluster;       // 1 before Hopper
};

enum class Path : int32_t {
  NARROW,        // rows of a few columns, packed into blocks; logits in shared memory
  WARP,          // the same with a warp per row, which loads vectors
  ONCE,          // a block or cluster per row of a single model, whose mixture needs no second sweep
  KEPT,          // a block or cluster per row; logits in shared memory
  TWICE,         // a cluster per row, which it reads twice
  TWICE_GLOBAL,  // the same before Hopper or for very many models: blocks meet in global memory, state in the workspace
};

// How often the logits are gone through; of a single model once, with squares if its rivals' fields are asked for.
enum class Sweeps : int32_t { ONE, SQUARES, TWO };
ASSAY_HD constexpr Sweeps sweeps(const Wants& todo) {
  return todo.mixture ? Sweeps::TWO : todo.squares ? Sweeps::SQUARES : Sweeps::ONE;
}

// What follows from a path.
ASSAY_HD constexpr bool is_packed(Path path) { return path == Path::NARROW || path == Path::WARP; }
ASSAY_HD constexpr bool keeps_logits(Path path) { return is_packed(path) || path == Path::KEPT; }
ASSAY_HD constexpr bool has_kernel(Path path, Sweeps sweeps) {
  return sweeps == Sweeps::ONE       ? true
         : sweeps == Sweeps::SQUARES ? is_packed(path) || path == Path::ONCE
                                     : path != Path::ONCE;
}

struct Plan {
  Path path;
  int lanes;       // threads of a warp that share a row's chunk: a group
  int groups;      // groups in a block
  int row_groups;  // groups of a block that share a row: 1 if narrow, else all
  int slices;      // blocks that share a row
  int chunks;      // chunks per group and model
  int tile_bytes;  // of a block's narrow rows of a model, at any alignment

  ASSAY_HD int threads() const { return lanes * groups; }
  ASSAY_HD int rows() const { return groups / row_groups; }  // per block
  ASSAY_HD bool packed() const { return is_packed(path); }
  ASSAY_HD bool keeps() const { return keeps_logits(path); }
  ASSAY_HD bool twice() const { return path == Path::TWICE || path == Path::TWICE_GLOBAL; }
  // The chunk of a wide row that is a group's j-th: a slice's chunks are neighbours.
  ASSAY_HD int chunk(int slice, int j, int row_group) const { return (slice * chunks + j) * row_groups + row_group; }
};

constexpr int64_t padded(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

constexpr int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

inline Plan narrow_plan(int64_t C, int itemsize, int threads, int columns_per_lane = NARROW_COLUMNS_PER_LANE[0]) {
  const int lanes = power_of_two_from(ceil_div(C, columns_per_lane));
  const int64_t chunks = ceil_div(ceil_div(C, lanes), NARROW_COLUMNS), bytes = threads / lanes * C * itemsize;
  return {Path::NARROW, lanes, threads / lanes, 1, 1, static_cast<int>(chunks), static_cast<int>(padded(bytes + 15))};
}

constexpr int VECTORS = 4;  // of 16 bytes: a lane's part of a chunk

inline Plan warp_plan(int warp, int rows) { return {Path::WARP, warp, rows, 1, 1, 1, 0}; }

constexpr int max_warps(Path path) {
  return path == Path::TWICE || path == Path::TWICE_GLOBAL ? TWICE_MAX_WARPS : WIDE_MAX_WARPS;
}
// Of a block of the path's kernels, which are compiled for so many.
constexpr int max_threads(Path path) {
  return path == Path::NARROW ? NARROW_THREADS : 32 * (path == Path::WARP ? WARP_ROWS : max_warps(path));
}

// slot_count: a lane's columns in a chunk
inline Plan wide_plan(Path path, int64_t C, int slot_count, int slices, int warp, int max_warps) {
  const int64_t per_slice = ceil_div(ceil_div(C, warp * slot_count), slices);
  const int64_t chunks = ceil_div(per_slice, max_warps), warps = ceil_div(per_slice, chunks);
  return {path, warp, static_cast<int>(warps), static_cast<int>(warps), slices, static_cast<int>(chunks), 0};
}

// Where things are in a block's memory: shared, or its part of the workspace. Offsets in bytes, made on the host, so that
// they are constants to the kernel and take no registers.
struct Layout {
  int64_t logits;  // narrow rows', as they are (K, tile_bytes); else Granule (K, chunks, VECTORS, threads), if kept
  int64_t states;  // State (2, K, row_groups): of a wide row, and of the one before, which other blocks may still read
  int64_t mixers;  // Mixer (rows, K)
  int64_t firsts;  // int (K, row_groups): of a wide row, the group's first chunk with its maximum; of narrow ones, where
                   // the model's tile begins
  int64_t parts;   // Mixture (row_groups): of the wide row before
  int64_t mixed_row;  // int64_t: which row that was, or -1
  int64_t sums;       // the Sums of narrow rows
  int64_t bytes;
};

// What is known of a row when its logits have been gone through, for FinishRow: in a block's memory if narrow, else in
// the workspace, where a kernel with a thread per row takes it up.
struct Sums {
  State* models;      // (K, rows)
  uint32_t* tops;     // (K, rows): the lowest column with the model's maximum
  Mixture* mixtures;  // (slices, rows)
  int64_t rows;
};
struct SumsLayout {
  int64_t models, tops, mixtures, bytes;
};

inline SumsLayout make_sums(int64_t K, int64_t slices, int64_t rows) {
  SumsLayout l{};
  l.tops = padded(K * rows * static_cast<int64_t>(sizeof(State)));
  l.mixtures = l.tops + padded(K * rows * static_cast<int64_t>(sizeof(uint32_t)));
  l.bytes = l.mixtures + padded(slices * rows * static_cast<int64_t>(sizeof(Mixture)));
  return l;
}
ASSAY_HD Sums sums_at(char* memory, const SumsLayout& l, int64_t rows) {
  return {reinterpret_cast<State*>(memory + l.models), reinterpret_cast<uint32_t*>(memory + l.tops),
          reinterpret_cast<Mixture*>(memory + l.mixtures), rows};
}

inline Layout make_layout(const Plan& p, int64_t K, bool keep) {
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = end;
    end += padded(bytes);
    return at;
  };
  Layout l{};
  l.logits = take(p.path == Path::NARROW ? K * p.tile_bytes : keep ? K * p.chunks * VECTORS * p.threads() * 16 : 0);
  l.states = take(p.packed() ? 0 : 2 * K * p.row_groups * static_cast<int64_t>(sizeof(State)));
  l.mixers = take(p.rows() * K * static_cast<int64_t>(sizeof(Mixer)));
  l.firsts = take(K * p.row_groups * static_cast<int64_t>(sizeof(int)));
  l.parts = take(p.packed() ? 0 : p.row_groups * static_cast<int64_t>(sizeof(Mixture)));
  l.mixed_row = take(p.packed() ? 0 : static_cast<int64_t>(sizeof(int64_t)));
  l.sums = take(p.path == Path::NARROW ? make_sums(K, 1, p.rows()).bytes : 0);
  l.bytes = end;
  return l;
}

// The same for every N and every mask of fields.
inline Plan make_plan(int64_t K, int64_t C, int itemsize, const Device& device) {
  const int slot_count = 16 * VECTORS / itemsize;
  const int warps = K * C * itemsize > TWICE_LONG_BYTES ? TWICE_MAX_WARPS : WIDE_MAX_WARPS;
  const auto wide = [&](Path path, int slices) {
    return wide_plan(path, C, slot_count, slices, 32, path == Path::KEPT ? WIDE_MAX_WARPS : warps);
  };
  const auto twice = [&](Path path, int most) {  // no more slices than chunks: an empty block would only wait
    const int slices = power_of_two_from(ceil_div(C, 32 * slot_count));
    return wide(path, slices < most ? slices : most);
  };
  const auto fits = [&](const Plan& p, int64_t limit) {
    return make_layout(p, K, p.keeps()).bytes <= (limit < device.shared_bytes ? limit : device.shared_bytes);
  };
  if (K <= INLINE_MODELS) {
    for (int columns : NARROW_COLUMNS_PER_LANE)
      if (C <= NARROW_MAX_C)
        if (const Plan p = narrow_plan(C, itemsize, NARROW_THREADS, columns); fits(p, KEPT_BYTES)) return p;
    if (C <= 32 * slot_count)
      if (const Plan p = warp_plan(32, WARP_ROWS); fits(p, KEPT_BYTES_LAST)) return p;
    if (K == 1) {
      const int slices = power_of_two_from(ceil_div(C * itemsize, ONCE_BYTES));
      return wide_plan(Path::ONCE, C, slot_count, slices < device.max_cluster ? slices : device.max_cluster, 32,
                       C * itemsize <= ONCE_FEW_BYTES ? ONCE_FEW_WARPS : WIDE_MAX_WARPS);
    }
    for (int slices : CLUSTER_SIZES) {
      if (slices > device.max_cluster) break;
      const bool last = slices == 16 || 2 * slices > device.max_cluster;
      if (const Plan p = wide(Path::KEPT, slices); fits(p, last ? KEPT_BYTES_LAST : KEPT_BYTES)) return p;
    }
    if (device.max_cluster > 1)
      if (const Plan p = twice(Path::TWICE, device.max_cluster < TWICE_SLICES ? device.max_cluster : TWICE_SLICES);
          fits(p, KEPT_BYTES))
        return p;
  }
  return twice(Path::TWICE_GLOBAL, TWICE_SLICES);
}

}  // namespace assay::cuda
