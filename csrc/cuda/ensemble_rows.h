// The computation of ensemble_stats for a crew of threads, on a GPU or emulated.
//
// A crew is the threads of one block, or of the blocks ("slices") that share a row. Its groups of lanes take a row's
// columns in chunks. The logits are gone through twice at most:
//   1. every model's softmax is summed; the parts of a wide row meet, once per row
//   2. the groups mix the models over their own columns
// and FinishRow makes the fields of the sums: a block's own threads, if rows are narrow, else another kernel, so that no
// row waits for what a single thread does. A single model is its own mixture: its sweep leaves the label's column out.
// A group's lanes share one maximum, so that their sums are added as they are. Every sum has an order given by the plan:
// the same bits on every run.
#pragma once
#include "ensemble_finish.h"

namespace assay::cuda {

template <class T, Path PATH, Sweeps SWEEPS, class Crew>
class EnsembleRows {
  static constexpr bool NARROW = PATH == Path::NARROW, PACKED = is_packed(PATH);
  static constexpr bool MIXTURE = SWEEPS == Sweeps::TWO, SQUARES = SWEEPS == Sweeps::SQUARES;
  static constexpr bool KEEP = MIXTURE && !NARROW && keeps_logits(PATH);
  static constexpr int V = NARROW ? 1 : 16 / static_cast<int>(sizeof(T)), U = NARROW ? NARROW_COLUMNS : VECTORS;
  using S = Slots<V, U>;
  // A lane mixes so many columns at a time: their probabilities and logarithms fit registers, beside vectors on their way.
  static constexpr int PIECE = NARROW || (!KEEP && V == 4) ? 8 : 16, PIECES = S::COUNT / PIECE, PIECE_VECTORS = PIECE / V;

  // A lane's part of a chunk, or of a piece: as it is in memory, until it is used.
  template <int COUNT>
  struct Vectors {
    Granule g[COUNT];
  };
  struct Columns {
    float z[U];
    int left;  // columns of the row from this chunk's first on
  };
  using Part = std::conditional_t<NARROW, Columns, Vectors<U>>;
  using Piece = std::conditional_t<NARROW, Columns, Vectors<NARROW ? U : PIECE_VECTORS>>;

 public:
  ASSAY_HD EnsembleRows(const Problem& problem, const Crew& its_crew, char* its_memory)
      : p(problem),
        plan(problem.plan),
        crew(its_crew),
        memory(its_memory),
        lanes(NARROW ? plan.lanes : Crew::WARP),
        lane(crew.thread % lanes),
        group(crew.thread / lanes),
        row(PACKED ? group : 0),
        row_group(PACKED ? 0 : group) {}

  ASSAY_HD void run() {
    if (MIXTURE && !PACKED && crew.thread == (plan.row_groups - 1) * lanes) mixed_row() = -1;
    n = static_cast<int64_t>(crew.first_tile()) * plan.rows() + row;
    for (; n - row < p.rows; n += static_cast<int64_t>(crew.tile_step()) * plan.rows()) run_tile();
    crew.sync();  // nobody leaves while others read its shared memory
    if constexpr (MIXTURE && !PACKED) pass_on();
  }

 private:
  ASSAY_HD void run_tile() {
    if constexpr (NARROW) copy_tiles();
    const Part r_part = fetch(0, 0);  // on its way while the label comes
    label = NO_LABEL;
    const bool live = n < p.rows && p.read_label(n, label);
    if (!PACKED && !live) return;  // the same for the whole crew
    sweep_models(r_part);
    if constexpr (PACKED) {
      crew.sync_warp();
      ASSAY_NO_UNROLL
      for (int k = lane; k < p.K; k += lanes) {
        const State all = joined(k);
        publish(k, all);
      }
      crew.sync_warp();
    } else {
      crew.sync();
      ASSAY_NO_UNROLL
      for (int k = row_group; k < p.K; k += plan.row_groups) {
        const State all = gathered(k);
        if (lane == 0) publish(k, all);
      }
      if constexpr (MIXTURE) pass_on();
      crew.sync_block();
      if (p.todo.tops) find_tops();
    }
    if constexpr (MIXTURE) sweep_mixture();
    parity ^= 1;  // of live rows: others meet nobody
    if constexpr (NARROW) {
      crew.sync_block();
      const int64_t it = n - row + crew.thread;
      if (crew.thread < plan.rows() && it < p.rows) FinishRow<T>(p, sums(), crew.thread, it).run();
      crew.sync_block();
    }
  }

  // ---- the logits -----------------------------------------------------------------------------------------------------

  ASSAY_HD int first_column(int j) const {
    return (PACKED ? j : plan.chunk(crew.slice, j, row_group)) * S::columns(lanes);
  }
  ASSAY_HD int column(int j, int slot) const { return first_column(j) + S::column(lane, lanes, slot); }
  // Whether the group's j-th chunk has columns. The same for its lanes.
  ASSAY_HD bool holds(int j) const { return j < plan.chunks && first_column(j) < p.C; }

  // Narrow rows are copied first, as they lie: a model's tile where its rows are adjacent, else number by number.
  ASSAY_HD void copy_tiles() const {
    const int64_t first = n - row, left = p.rows - first;
    const int count = static_cast<int>(left < plan.rows() ? left : plan.rows()) * p.C;
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      const ModelLogits model = p.model(k);
      const T* g_from = p.row<T>(model, first);
      const bool adjacent = model.col_stride == 1 && model.row_stride == p.C;
      // As far from a multiple of 16 bytes as it is in memory.
      const int misaligned = adjacent ? static_cast<int>(reinterpret_cast<uintptr_t>(g_from) & 15) : 0;
      const int begin = static_cast<int>(p.layout.logits) + k * plan.tile_bytes + misaligned;
      T* const s_to = reinterpret_cast<T*>(memory + begin);
      if (crew.thread == 0) tile_begin(k) = begin;
      if (adjacent) {
        copy_numbers(s_to, g_from, count, crew.thread, crew.threads);
        continue;
      }
      ASSAY_NO_UNROLL
      for (int i = crew.thread; i < count; i += crew.threads)
        s_to[i] = g_from[i / p.C * model.row_stride + i % p.C * model.col_stride];
    }
    wait_for_copies();
    crew.sync_block();
  }

  // Model k's j-th chunk. Of a packed tile's rows past the end: -inf, or, narrow, whatever there is.
  ASSAY_HD Part fetch(int k, int j) const {
    Part r;
    if constexpr (NARROW) {
      const T* s_row = reinterpret_cast<const T*>(memory + tile_begin(k)) + row * p.C + first_column(j);
      r.left = p.C - first_column(j);
      if (r.left >= U * lanes) {
        load_columns(s_row + lane, lanes, r.z);
      } else {
        load_columns(s_row, r.left, lane, lanes, r.z);
      }
    } else {
      load(k, j, 0, r.g);
    }
    return r;
  }
  template <int COUNT>
  ASSAY_HD void load(int k, int j, int vector, Granule (&r_g)[COUNT]) const {
    const bool inside = !PACKED || n < p.rows;
    const ModelLogits model = p.model(k);
    load_vectors(p.row<T>(model, inside ? n : 0), model.col_stride, inside ? p.C : 0, first_column(j) + vector * lanes * V,
                 lane, lanes, r_g);
  }

  // f(slot, logit), a vector at a time: a whole chunk's floats would take too many registers.
  template <class F>
  ASSAY_HD void each_logit(const Columns& r, const F& f) const {
    ASSAY_UNROLL
    for (int i = 0; i < U; ++i)
      if (i / 4 * 4 * lanes < r.left) f(i, r.z[i]);  // the same for all lanes
  }
  template <int COUNT, class F>
  ASSAY_HD void each_logit(const Vectors<COUNT>& r, const F& f) const {
    ASSAY_UNROLL
    for (int u = 0; u < COUNT; ++u) {
      float r_z[V];
      unpack(r.g[u], r_z, T{});
      ASSAY_UNROLL
      for (int v = 0; v < V; ++v) f(u * V + v, r_z[v]);
    }
  }
  ASSAY_HD static float highest_of(const Part& r) {
    if constexpr (NARROW) {
      float m = r.z[0];
      ASSAY_UNROLL
      for (int i = 1; i < U; ++i) m = max_nan(m, r.z[i]);
      return m;
    } else {
      Granule g = r.g[0];
      ASSAY_UNROLL
      for (int u = 1; u < U; ++u) g = max_nan(g, r.g[u], T{});
      return max_of(g, T{});
    }
  }

  // ---- the block's memory -----------------------------------------------------------------------------------------------

  template <class X>
  ASSAY_HD X* at(int64_t offset) const {
    return reinterpret_cast<X*>(memory + offset);
  }
  ASSAY_HD State* states(int k) const { return at<State>(p.layout.states) + (parity * p.K + k) * plan.row_groups; }
  ASSAY_HD Mixer& mixer(int k) const { return at<Mixer>(p.layout.mixers)[row * p.K + k]; }
  ASSAY_HD State& joined(int k) const { return at<State>(p.layout.mixers)[row * p.K + k]; }  // of a packed row, until mixer(k)
  ASSAY_HD int& first_chunk(int k) const { return at<int>(p.layout.firsts)[k * plan.row_groups + row_group]; }
  ASSAY_HD int& tile_begin(int k) const { return at<int>(p.layout.firsts)[k]; }
  ASSAY_HD Mixture* parts() const { return at<Mixture>(p.layout.parts); }
  ASSAY_HD int64_t& mixed_row() const { return *at<int64_t>(p.layout.mixed_row); }  // of parts(): one thread's
  ASSAY_HD Sums sums() const { return NARROW ? sums_at(memory + p.layout.sums, p.sums_layout, plan.rows()) : p.sums; }
  ASSAY_HD int64_t place() const { return NARROW ? row : n; }  // of this row in sums
  ASSAY_HD bool past_the_end() const { return PACKED && !NARROW && n >= p.rows; }
  ASSAY_HD Granule& kept(int k, int j, int u) const {
    return at<Granule>(p.layout.logits)[((k * plan.chunks + j) * VECTORS + u) * crew.threads + crew.thread];
  }
  // A piece of the chunk once more.
  ASSAY_HD Piece again(int k, int j, int piece) const {
    if constexpr (NARROW) {
      return fetch(k, j);
    } else {
      Piece r;
      if constexpr (KEEP) {
        ASSAY_UNROLL
        for (int u = 0; u < PIECE_VECTORS; ++u) r.g[u] = kept(k, j, piece * PIECE_VECTORS + u);
      } else {
        load(k, j, piece * PIECE_VECTORS, r.g);
      }
      return r;
    }
  }

  // ---- first sweep: each model's softmax ------------------------------------------------------------------------------

  // r_next: the group's first chunk. Each is asked for while the one before is worked on.
  ASSAY_HD void sweep_models(Part r_next) {
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      Growing r_sum = NOTHING;
      int first = 0;
      ASSAY_NO_UNROLL
      for (int j = 0; j == 0 || holds(j); ++j) {
        Part r_part = r_next;
        const bool more = holds(j + 1);
        if (more || k + 1 < p.K) r_next = fetch(more ? k : k + 1, more ? j + 1 : 0);
        if constexpr (KEEP) {
          ASSAY_UNROLL
          for (int u = 0; u < VECTORS; ++u) kept(k, j, u) = r_part.g[u];
        }
        if constexpr (!MIXTURE) {
          if (p.K == 1) take_label_out(j, r_part);
        }
        const float highest = highest_of(r_part), m = group_max(highest);
        if (!(m <= r_sum.m)) {  // higher, or NaN
          r_sum = rescaled(r_sum, max_nan(r_sum.m, m));
          first = !PACKED ? j : p.todo.tops && highest == m ? column(j, first_slot(r_part, m)) : NO_COLUMN;
        }
        add_chunk(r_part, r_sum);
      }
      join(k, r_sum, first);
    }
  }

  ASSAY_HD float group_max(float x) const {
    if constexpr (NARROW) {
      ASSAY_NO_UNROLL
      for (int offset = lanes / 2; offset > 0; offset /= 2) x = max_nan(x, crew.shuffle_xor(x, offset));
      return x;
    } else {
      return crew.warp_max(x);
    }
  }
  ASSAY_HD int group_min(int x) const {
    if constexpr (NARROW) {
      ASSAY_NO_UNROLL
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        const int other = crew.shuffle_xor(x, offset);
        x = other < x ? other : x;
      }
      return x;
    } else {
      return crew.warp_min(x);
    }
  }
  template <class X>
  ASSAY_HD X group_sum(X x) const {
    if constexpr (NARROW) {
      ASSAY_NO_UNROLL
      for (int offset = lanes / 2; offset > 0; offset /= 2) x += crew.shuffle_xor(x, offset);
    } else {
      ASSAY_UNROLL
      for (int offset = Crew::WARP / 2; offset > 0; offset /= 2) x += crew.shuffle_xor(x, offset);
    }
    return x;
  }

  // The label's slot in the j-th chunk; -1 if it is not this lane's.
  ASSAY_HD int label_slot(int j) const {
    const int y = label - first_column(j);
    return label < 0 || y < 0 || y >= S::columns(lanes) ? -1 : S::slot(lane, lanes, y);
  }

  ASSAY_HD void take_label_out(int j, Part& r_part) const {
    const int mine = label_slot(j);
    if (mine < 0) return;
    ASSAY_UNROLL
    for (int i = 0; i < S::COUNT; ++i) {
      if (i != mine) continue;
      if constexpr (NARROW) {
        r_part.z[i] = -INF;
      } else {
        take_column_out(r_part.g[i / V], i % V, T{});
      }
    }
  }

  // r_sum.m is the chunk's maximum, or higher.
  ASSAY_HD void add_chunk(const Part& r_part, Growing& r_sum) const {
    const float origin = r_sum.m > -INF ? r_sum.m : 0.f;  // nothing but -inf so far: -inf - 0 gives e = 0
    float r_d[4] = {0, 0, 0, 0}, r_s[4] = {0, 0, 0, 0}, r_q[4] = {0, 0, 0, 0};
    each_logit(r_part, [&](int i, float z) {
      const float x = fmaxf(z - origin, FAR), e = exp2_approx(x * LOG2E);
      r_d[i % 4] += e;
      r_s[i % 4] = fmaf(x, e, r_s[i % 4]);
      if constexpr (SQUARES) r_q[i % 4] = fmaf(e, e, r_q[i % 4]);
    });
    r_sum.d += static_cast<double>((r_d[0] + r_d[1]) + (r_d[2] + r_d[3]));
    r_sum.s += static_cast<double>((r_s[0] + r_s[1]) + (r_s[2] + r_s[3]));
    if constexpr (SQUARES) r_sum.q += static_cast<double>((r_q[0] + r_q[1]) + (r_q[2] + r_q[3]));
  }

  // The lanes' sums of model k become the group's. first: where it has met the maximum first, a lane's column of a packed
  // row, the chunk of a wide one.
  ASSAY_HD void join(int k, const Growing& r_sum, int first) const {
    State all = rounded(r_sum);
    all.d = group_sum(all.d);
    all.s = group_sum(all.s);
    if constexpr (SQUARES) all.q = group_sum(all.q);
    if constexpr (!PACKED) {
      if (lane == 0) states(k)[row_group] = all, first_chunk(k) = first;
    } else {
      if (lane == 0) joined(k) = all;
      if (!p.todo.tops) return;
      first = group_min(first);
      if (lane == 0 && !past_the_end()) sums().tops[k * sums().rows + place()] = static_cast<uint32_t>(first);
    }
  }

  // The parts of a wide row's model, by one warp: its lanes take a group of a slice each, then of later slices.
  ASSAY_HD State gathered(int k) const {
    const int at_once = Crew::WARP / plan.row_groups, first = quotient_of_small(lane, plan.row_groups);
    Growing sum = NOTHING;
    ASSAY_NO_UNROLL
    for (int slice = first; slice < plan.slices && first < at_once; slice += at_once) {
      const State part = crew.peer(states(k), slice)[lane - first * plan.row_groups];
      sum = rescaled(sum, max_nan(sum.m, part.m));
      add(sum, part);
    }
    sum = rescaled(sum, crew.warp_max(sum.m));
    sum.d = group_sum(sum.d);
    sum.s = group_sum(sum.s);
    if constexpr (SQUARES) sum.q = group_sum(sum.q);
    return rounded(sum);
  }

  ASSAY_HD void publish(int k, const State& all) const {
    mixer(k) = mixer_of(all, p.model(k).weight);
    if (crew.slice == 0 && !past_the_end()) sums().models[k * sums().rows + place()] = all;
  }

  // ---- argmax per model -----------------------------------------------------------------------------------------------

  // The first slot of a chunk or a piece that holds m; a chunk's count of slots if none does.
  template <class Logits>
  ASSAY_HD int first_slot(const Logits& r, float m) const {
    int slot = S::COUNT;
    each_logit(r, [&](int i, float z) { slot = z == m && i < slot ? i : slot; });
    return slot;
  }

  // Of a wide row: the groups that met a model's maximum look for it again in the first chunk where they did.
  ASSAY_HD void find_tops() const {
    ASSAY_NO_UNROLL
    for (int k0 = 0; k0 < p.K; k0 += Crew::WARP) {
      const int mine = k0 + lane;
      uint32_t met = crew.ballot(mine < p.K && states(mine)[row_group].m == mixer(mine).m);
      ASSAY_NO_UNROLL
      for (int k = k0; met != 0; ++k, met >>= 1)
        if (met & 1) find_top(k, mixer(k).m);
    }
  }
  ASSAY_HD void find_top(int k, float m) const {
    const int j = first_chunk(k);
    ASSAY_NO_UNROLL
    for (int piece = 0; piece < PIECES; ++piece) {
      const int slot = first_slot(again(k, j, piece), m);
      if (slot < S::COUNT) crew.atomic_min(&p.sums.tops[k * p.sums.rows + n], static_cast<uint32_t>(column(j, piece * PIECE + slot)));
    }
  }

  // ---- second sweep: the mixture --------------------------------------------------------------------------------------

  // A lane's sums over its columns, times powers of 2^origin.
  struct Mixed {
    double information = 0, rest = 0, squares = 0;
    float p_label = 0, top = 0;
    int top_column = NO_COLUMN;
  };

  ASSAY_HD void sweep_mixture() {
    float bits = 0;
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) bits += mixer(k).bits;
    const float origin = origin_of(bits);
    Mixed r_mixed;
    ASSAY_NO_UNROLL
    for (int j = 0; holds(j); ++j) {
      ASSAY_NO_UNROLL
      for (int piece = 0; piece < PIECES; ++piece) {
        float r_p[PIECE], r_bits[PIECE];
        if (p.todo.logs) {
          mix<true>(j, piece, origin, r_p, r_bits);
          add_information(r_p, r_bits, r_mixed);
        } else {
          mix<false>(j, piece, origin, r_p, r_bits);
        }
        take_label(j, piece, r_p, r_mixed);
        add_piece(j, piece, r_p, r_mixed);
      }
    }
    join_mixed(r_mixed, origin);
  }

  // r_p: the mixture's probabilities of a piece; r_bits: sums of its models' p log2 p. The same logits give the same bits
  // in every column.
  template <bool LOGS>
  ASSAY_HD void mix(int j, int piece, float origin, float (&r_p)[PIECE], float (&r_bits)[PIECE]) const {
    ASSAY_UNROLL
    for (int i = 0; i < PIECE; ++i) r_p[i] = r_bits[i] = 0.f;
    constexpr bool AHEAD = !KEEP && !NARROW;  // what comes from L2 is asked for before its turn
    Piece r_next;
    if constexpr (AHEAD) r_next = again(0, j, piece);
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      const Piece r_piece = AHEAD ? r_next : again(k, j, piece);
      if (AHEAD && k + 1 < p.K) r_next = again(k + 1, j, piece);
      const Mixer by = mixer(k);
      const float m = by.m, shift = (by.whole + origin) + by.rest;
      each_logit(r_piece, [&](int i, float z) {
        const float x = fmaxf(fmaf(z - m, LOG2E, shift), FAR), e = exp2_approx(x);
        r_p[i] += e;
        if constexpr (LOGS) r_bits[i] = fmaf(e, x, r_bits[i]);
      });
    }
  }

  ASSAY_HD void add_information(const float (&r_p)[PIECE], const float (&r_bits)[PIECE], Mixed& r_mixed) const {
    float r_sum[4] = {0, 0, 0, 0};
    ASSAY_UNROLL
    for (int i = 0; i < PIECE; ++i) r_sum[i % 4] += fmaf(-r_p[i], log2_approx(fmaxf(r_p[i], TINY)), r_bits[i]);  // 0 log 0 = 0
    r_mixed.information += static_cast<double>((r_sum[0] + r_sum[1]) + (r_sum[2] + r_sum[3]));
  }

  ASSAY_HD void take_label(int j, int piece, float (&r_p)[PIECE], Mixed& r_mixed) const {
    const int mine = label_slot(j) - piece * PIECE;
    if (mine < 0 || mine >= PIECE) return;
    ASSAY_UNROLL
    for (int i = 0; i < PIECE; ++i) {
      if (i != mine) continue;
      r_mixed.p_label = r_p[i];
      r_p[i] = 0.f;
    }
  }

  ASSAY_HD void add_piece(int j, int piece, const float (&r_p)[PIECE], Mixed& r_mixed) const {
    float r_rest[4] = {0, 0, 0, 0}, r_squares[4] = {0, 0, 0, 0}, top = 0;
    int slot = 0;
    ASSAY_UNROLL
    for (int i = 0; i < PIECE; ++i) {
      r_rest[i % 4] += r_p[i];
      r_squares[i % 4] = fmaf(r_p[i], r_p[i], r_squares[i % 4]);
    }
    r_mixed.rest += static_cast<double>((r_rest[0] + r_rest[1]) + (r_rest[2] + r_rest[3]));
    r_mixed.squares += static_cast<double>((r_squares[0] + r_squares[1]) + (r_squares[2] + r_squares[3]));
    ASSAY_UNROLL
    for (int i = 0; i < PIECE; ++i) {
      slot = r_p[i] > top ? i : slot;
      top = fmaxf(r_p[i], top);
    }
    if (!(top > r_mixed.top)) return;
    r_mixed.top = top;
    r_mixed.top_column = column(j, piece * PIECE + slot);
  }

  ASSAY_HD void join_mixed(const Mixed& r_mixed, float origin) {
    const float unit = power_of_two(-origin);
    Mixture all{static_cast<float>(r_mixed.information) * unit, static_cast<float>(r_mixed.rest) * unit,
                static_cast<float>(r_mixed.squares) * unit * unit, r_mixed.p_label * unit, r_mixed.top * unit,
                r_mixed.top_column};
    all.information = group_sum(all.information);
    all.rest = group_sum(all.rest);
    all.squares = group_sum(all.squares);
    all.p_label = group_sum(all.p_label);  // one lane's
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      take_higher(all.top, all.top_column, crew.shuffle_xor(all.top, offset), crew.shuffle_xor(all.top_column, offset));
    if (lane != 0 || past_the_end()) return;
    if constexpr (PACKED) {
      sums().mixtures[place()] = all;
    } else {
      parts()[row_group] = all;
      if (row_group == plan.row_groups - 1) mixed_row() = n;
    }
  }

  // The block's parts of the wide row before, merged by its last warp once a barrier has been met since: none waits for it.
  ASSAY_HD void pass_on() {
    if (row_group != plan.row_groups - 1 || lane != 0 || mixed_row() < 0) return;
    Mixture all = parts()[0];
    ASSAY_NO_UNROLL
    for (int i = 1; i < plan.row_groups; ++i) {
      const Mixture x = parts()[i];
      all.information += x.information;
      all.rest += x.rest;
      all.squares += x.squares;
      all.p_label += x.p_label;
      take_higher(all.top, all.top_column, x.top, x.top_column);
    }
    p.sums.mixtures[crew.slice * p.sums.rows + mixed_row()] = all;
    mixed_row() = -1;
  }

  const Problem& p;
  const Plan& plan;
  const Crew crew;
  char* const memory;
  const int lanes, lane, group, row, row_group;
  int64_t n = 0;  // this thread's row, of the launch's
  int parity = 0, label = NO_LABEL;
};

}  // namespace assay::cuda
