// The computation of ensemble_stats for a crew of threads, on a GPU or emulated.
//
// A crew is the threads of one block, or of the blocks ("slices") that share a row. Its groups of lanes take a row's
// columns in chunks. Three meetings per row:
//   1. every model's (max, sum) states are merged into its softmax                        -> log p_y, entropies
//   2. the groups mix the models over their own columns, and the parts are merged         -> the mixture's fields
//   3. only if asked for: the highest column's index, a small mutual information summed as a divergence
// A single model is its own mixture: its first sweep leaves the label's column out, and finds what else is wanted.
// Every merge follows an order given by the plan: the same bits on every run.
#pragma once
#include "ensemble_plan.h"
#include "logits.h"

namespace assay::cuda {

struct ModelLogits {
  const void* g_logits;  // (N, C)
  int64_t row_stride, col_stride;
  float weight;
};

struct Problem {
  ModelLogits inline_models[INLINE_MODELS];
  const ModelLogits* g_models;  // null: inline
  int64_t N;
  int32_t K, C;
  const int64_t* g_labels;
  int64_t ignore_index;
  uint32_t fields;
  Wants todo;             // of fields
  float* g_out;           // (NUM_FLOAT_FIELDS, N)
  int64_t* g_prediction;  // (N,)
  Plan plan;
  Layout layout;

  ASSAY_HD const ModelLogits& model(int k) const { return g_models ? g_models[k] : inline_models[k]; }
};

template <class T, Path PATH, Sweeps SWEEPS, class Crew>
class EnsembleRows {
  static constexpr bool NARROW = PATH == Path::NARROW, PACKED = is_packed(PATH);
  static constexpr bool MIXTURE = SWEEPS == Sweeps::TWO, SQUARES = SWEEPS == Sweeps::SQUARES;
  static constexpr bool KEEP = MIXTURE && keeps_logits(PATH);
  static constexpr int V = NARROW ? 1 : 16 / static_cast<int>(sizeof(T)), U = NARROW ? NARROW_COLUMNS : VECTORS;
  using S = Slots<V, U>;
  static constexpr int SLOTS = S::COUNT;

  // A lane's part of a chunk: as it is in memory, until it is used.
  struct Vectors {
    Granule g[U];
  };
  struct Columns {
    float z[U];
  };
  using Part = std::conditional_t<NARROW, Columns, Vectors>;

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
        row_group(PACKED ? 0 : group),
        item_lanes(PACKED ? 1 : Crew::WARP) {}

  ASSAY_HD void run() {
    n = static_cast<int64_t>(crew.first_tile()) * plan.rows() + row;
    for (; first_row() < p.N; n += static_cast<int64_t>(crew.tile_step()) * plan.rows()) run_tile();
    crew.sync();  // nobody leaves while others read its shared memory
  }

 private:
  // ---- one tile: rows first_row() .. first_row() + plan.rows() - 1 ----------------------------------------------------

  ASSAY_HD int64_t first_row() const { return n - row; }

  ASSAY_HD void run_tile() {
    const Part r_part = fetch(0, 0);  // on its way while the label comes
    label = NO_LABEL;
    const bool live = n < p.N && read_label(n, label);
    if (!PACKED && !live) {  // the same for the whole crew
      if (leads(0)) write_undefined(n);
      return;
    }
    const int first_item = crew.thread / item_lanes;
    const float r_zy = label_logit(first_item);  // on its way while the rest comes
    sweep_models(r_part);
    crew.sync();
    each_item(plan.rows() * p.K, [&](int i) { finish_model_of(i, i == first_item ? r_zy : label_logit(i)); });
    crew.sync_block();
    if (!PACKED && p.todo.tops) find_tops();
    if constexpr (MIXTURE) sweep_mixture();
    crew.sync();
    each_item(plan.rows(), [&](int r) { finish_row(r, first_row() + r); });
    crew.sync_block();
    if constexpr (MIXTURE) {
      if (p.todo.information || p.todo.prediction) {
        look_again();
        crew.sync();
        each_item(plan.rows(), [&](int r) { finish_refined(r, first_row() + r); });
      }
    }
  }

  // Calls f(i) for each i < count with the lanes of an item together: one thread each if packed, else one warp.
  template <class F>
  ASSAY_HD void each_item(int count, const F& f) const {
    ASSAY_NO_UNROLL
    for (int i = crew.thread / item_lanes; i < count; i += crew.threads / item_lanes) f(i);
  }
  // Merges `count` parts (i-th: part(i)) over an item's lanes; the result is lane 0's.
  template <class Sum, class F>
  ASSAY_HD Sum gather(int count, Sum sum, const F& part) const {
    ASSAY_NO_UNROLL
    for (int i = PACKED ? 0 : lane; i < count; i += item_lanes) sum = merge(sum, part(i));
    ASSAY_NO_UNROLL
    for (int offset = item_lanes / 2; offset > 0; offset /= 2) sum = merge(sum, shuffled(sum, offset));
    return sum;
  }
  ASSAY_HD bool leads(int item) const { return crew.slice == 0 && crew.thread == item * item_lanes; }

  ASSAY_HD State shuffled(const State& x, int offset) const {
    return {crew.shuffle_xor(x.m, offset), crew.shuffle_xor(x.d, offset), crew.shuffle_xor(x.s, offset),
            SQUARES ? crew.shuffle_xor(x.q, offset) : 0};
  }
  ASSAY_HD Mixture shuffled(const Mixture& x, int offset) const {
    return {crew.shuffle_xor(x.entropy, offset), crew.shuffle_xor(x.rest, offset), crew.shuffle_xor(x.squares, offset),
            crew.shuffle_xor(x.top_other, offset), crew.shuffle_xor(x.p_label, offset)};
  }
  ASSAY_HD Refined shuffled(const Refined& x, int offset) const {
    return {crew.shuffle_xor(x.information, offset), crew.shuffle_xor(x.best, offset)};
  }
  template <class Sum>  // over a group's lanes
  ASSAY_HD Sum reduce(Sum x) const {
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2) x = merge(x, shuffled(x, offset));
    return x;
  }

  // False: the row counts for nothing (ignored, or its label is no class, which a captured graph cannot report otherwise).
  ASSAY_HD bool read_label(int64_t row_index, int& to) const {
    if (!p.g_labels) return true;
    const int64_t y = p.g_labels[row_index];
    if (y == p.ignore_index || y < 0 || y >= p.C) return false;
    to = static_cast<int>(y);
    return true;
  }
  // The label of the tile's r-th row; NO_LABEL if that counts for nothing.
  ASSAY_HD int label_of(int r) const {
    int y = PACKED ? NO_LABEL : label;
    if (PACKED && first_row() + r < p.N) read_label(first_row() + r, y);
    return y;
  }
  // An item's: row i / K, model i % K. NaN without a label.
  ASSAY_HD float label_logit(int item) const {
    if (item >= plan.rows() * p.K) return NaN;
    const int r = item / p.K, y = label_of(r);
    if (y < 0) return NaN;
    const ModelLogits& model = p.model(item % p.K);
    return to_float(static_cast<const T*>(model.g_logits)[(first_row() + r) * model.row_stride + y * model.col_stride]);
  }

  // ---- the logits -----------------------------------------------------------------------------------------------------

  ASSAY_HD int first_column(int j) const { return plan.chunk(crew.slice, j, row_group) * S::columns(lanes); }
  ASSAY_HD int column(int j, int slot) const { return first_column(j) + S::column(lane, lanes, slot); }
  // Whether the group's j-th chunk has columns. The same for its lanes.
  ASSAY_HD bool holds(int j) const { return j < plan.chunks && first_column(j) < p.C; }

  // Model k's j-th chunk; rows past the end, of a packed tile, are all -inf.
  ASSAY_HD Part fetch(int k, int j) const {
    const ModelLogits& model = p.model(k);
    const bool inside = !PACKED || n < p.N;
    const T* g_row = static_cast<const T*>(model.g_logits) + (inside ? n : 0) * model.row_stride;
    const int C = inside ? p.C : 0;
    Part r;
    if constexpr (NARROW) {
      load_columns(g_row, model.col_stride, C, first_column(j) + lane, lanes, r.z);
    } else {
      load_vectors(g_row, model.col_stride, C, first_column(j), lane, lanes, r.g);
    }
    return r;
  }

  // f(slot, logit), a vector at a time: a whole chunk's floats would take too many registers.
  template <class F>
  ASSAY_HD void each_logit(const Part& r, const F& f) const {
    if constexpr (NARROW) {
      ASSAY_UNROLL
      for (int i = 0; i < SLOTS; ++i)
        if (i < 4 * plan.words) f(i, r.z[i]);
    } else {
      ASSAY_UNROLL
      for (int u = 0; u < U; ++u) {
        float r_z[V];
        unpack(r.g[u], r_z, T{});
        ASSAY_UNROLL
        for (int v = 0; v < V; ++v) f(u * V + v, r_z[v]);
      }
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
  ASSAY_HD State* states() const { return at<State>(p.layout.states); }
  ASSAY_HD Mixture* mixtures() const { return at<Mixture>(p.layout.mixtures); }
  ASSAY_HD Refined* refined() const { return at<Refined>(p.layout.refined); }
  ASSAY_HD Model* models() const { return at<Model>(p.layout.models); }
  ASSAY_HD int* tops() const { return at<int>(p.layout.tops); }
  ASSAY_HD int* votes() const { return at<int>(p.layout.votes); }
  ASSAY_HD RowVerdict* verdicts() const { return at<RowVerdict>(p.layout.verdicts); }
  ASSAY_HD int& first_chunk(int k) const { return at<int>(p.layout.firsts)[k * plan.groups + group]; }
  ASSAY_HD Granule& kept(int k, int j, int w) const {
    return at<Granule>(p.layout.logits)[((k * plan.chunks + j) * plan.words + w) * crew.threads + crew.thread];
  }
  ASSAY_HD void keep(int k, int j, const Part& r) const {
    ASSAY_UNROLL
    for (int w = 0; w < VECTORS; ++w) {
      if constexpr (!NARROW) {
        kept(k, j, w) = r.g[w];
      } else if (4 * w < SLOTS && w < plan.words) {
        kept(k, j, w) = {{float_to_bits(r.z[4 * w % SLOTS]), float_to_bits(r.z[(4 * w + 1) % SLOTS]),
                          float_to_bits(r.z[(4 * w + 2) % SLOTS]), float_to_bits(r.z[(4 * w + 3) % SLOTS])}};
      }
    }
  }
  // The chunk once more.
  ASSAY_HD Part again(int k, int j) const {
    if constexpr (!KEEP) return fetch(k, j);
    Part r;
    if constexpr (NARROW) {
      ASSAY_UNROLL
      for (int i = 0; i < SLOTS; ++i) r.z[i] = i / 4 < plan.words ? bits_to_float(kept(k, j, i / 4).word[i % 4]) : -INF;
    } else {
      ASSAY_UNROLL
      for (int u = 0; u < U; ++u) r.g[u] = kept(k, j, u);
    }
    return r;
  }

  // ---- first sweep: each model's softmax ------------------------------------------------------------------------------

  // r_next: the group's first chunk. Each is asked for while the one before is worked on.
  ASSAY_HD void sweep_models(Part r_next) {
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      State r_state = EMPTY_STATE;
      int first = 0;
      ASSAY_NO_UNROLL
      for (int j = 0; j == 0 || holds(j); ++j) {
        Part r_part = r_next;
        const bool more = holds(j + 1);
        if (more || k + 1 < p.K) r_next = fetch(more ? k : k + 1, more ? j + 1 : 0);
        if constexpr (KEEP) keep(k, j, r_part);
        if (p.K == 1) take_label_out(j, r_part);
        const float m = highest_of(r_part);
        if (!(m <= r_state.m)) {  // higher, or NaN
          r_state = rescaled(r_state, max_nan(r_state.m, m));
          first = PACKED && p.todo.tops ? column(j, first_slot(r_part, m)) : j;
        }
        add_chunk(r_part, r_state);
      }
      join(k, r_state, first);
    }
  }

  ASSAY_HD void take_label_out(int j, Part& r_part) const {
    const int y = label - first_column(j);
    if (label < 0 || y < 0 || y >= S::columns(lanes)) return;
    const int mine = S::slot(lane, lanes, y);
    ASSAY_UNROLL
    for (int i = 0; i < SLOTS; ++i) {
      if (i != mine) continue;
      if constexpr (NARROW) {
        r_part.z[i] = -INF;
      } else {
        take_column_out(r_part.g[i / V], i % V, T{});
      }
    }
  }

  // r_state.m is the chunk's maximum, or higher.
  ASSAY_HD void add_chunk(const Part& r_part, State& r_state) const {
    const float origin = r_state.m > -INF ? r_state.m : 0.f;  // nothing but -inf so far: -inf - 0 gives e = 0
    float r_d[2] = {0, 0}, r_s[2] = {0, 0}, r_q[2] = {0, 0};
    each_logit(r_part, [&](int i, float z) {
      const float x = fmaxf(z - origin, FAR), e = exp2_approx(x * LOG2E);
      r_d[i % 2] += e;
      r_s[i % 2] = fmaf(x, e, r_s[i % 2]);
      if constexpr (SQUARES) r_q[i % 2] = fmaf(e, e, r_q[i % 2]);
    });
    r_state.d += static_cast<double>(r_d[0] + r_d[1]);
    r_state.s += static_cast<double>(r_s[0] + r_s[1]);
    if constexpr (SQUARES) r_state.q += static_cast<double>(r_q[0] + r_q[1]);
  }

  // The lanes' states of model k become the group's. first: where a lane has met its maximum first, a column of a packed
  // row, a chunk of a wide one.
  ASSAY_HD void join(int k, State r_state, int first) const {
    float m = r_state.m;
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2) m = max_nan(m, crew.shuffle_xor(m, offset));
    if (p.todo.tops) {
      first = r_state.m == m ? first : NO_TOP;
      ASSAY_NO_UNROLL
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        const int other = crew.shuffle_xor(first, offset);
        first = other < first ? other : first;
      }
      if (lane == 0) (PACKED ? tops()[row * p.K + k] : first_chunk(k)) = first;
    }
    r_state = rescaled(r_state, m);
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      r_state.d += crew.shuffle_xor(r_state.d, offset);
      r_state.s += crew.shuffle_xor(r_state.s, offset);
      if constexpr (SQUARES) r_state.q += crew.shuffle_xor(r_state.q, offset);
    }
    if (lane == 0) states()[(row * p.K + k) * plan.row_groups + row_group] = r_state;
  }

  ASSAY_HD void finish_model_of(int item, float zy) const {
    const int parts = plan.row_groups;
    const State sum = gather(parts * plan.slices, EMPTY_STATE,
                             [&](int i) { return crew.peer(states(), i / parts)[item * parts + i % parts]; });
    if (!PACKED && lane != 0) return;
    const int r = item / p.K, y = label_of(r);
    const bool apart = p.K == 1 && y >= 0;  // the label's column is not in `sum`
    const Model model = finish_model(apart ? merge(sum, State{zy, 1, 0, 1}) : sum, zy);
    models()[item] = model;
    if constexpr (SQUARES) mixtures()[r] = mixture_of_one(sum, model, zy);
    if (PACKED && p.todo.tops && apart && zy == model.m)
      tops()[item] = zy > sum.m || y < tops()[item] ? y : tops()[item];
    if (!PACKED) tops()[item] = apart && zy == model.m ? y : NO_TOP;
  }

  // ---- argmax per model -----------------------------------------------------------------------------------------------

  // The first slot that holds m; SLOTS if none does.
  ASSAY_HD int first_slot(const Part& r_part, float m) const {
    int slot = SLOTS;
    each_logit(r_part, [&](int i, float z) { slot = z == m && i < slot ? i : slot; });
    return slot;
  }

  // Of a wide row: the groups that met a model's maximum look for it again in the first chunk where they did.
  ASSAY_HD void find_tops() const {
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      const float m = models()[k].m;
      if (states()[k * plan.row_groups + row_group].m != m) continue;
      const int j = first_chunk(k);
      const int slot = first_slot(again(k, j), m);
      if (slot < SLOTS) crew.atomic_min(&tops()[k], column(j, slot));
    }
  }

  // The lowest column of all slices, per model; called by one warp.
  ASSAY_HD const int* gather_tops() const {
    ASSAY_NO_UNROLL
    for (int k = lane; p.todo.tops && k < p.K; k += lanes) {
      int top = NO_TOP;
      ASSAY_NO_UNROLL
      for (int slice = 0; slice < plan.slices; ++slice) {
        const int other = crew.peer(tops(), slice)[k];
        top = other < top ? other : top;
      }
      votes()[k] = top;
    }
    crew.sync_warp();
    return votes();
  }

  // ---- second sweep: the mixture --------------------------------------------------------------------------------------

  // Adds a chunk's probabilities under model k, times its weight. The same logits give the same bits in every column.
  ASSAY_HD void mix_model(int k, const Part& r_part, float (&r_p)[SLOTS]) const {
    const Model& model = models()[row * p.K + k];
    const float m = model.m, scale = p.model(k).weight * model.inverse;
    each_logit(r_part, [&](int i, float z) { r_p[i] = fmaf(exp2_approx((z - m) * LOG2E), scale, r_p[i]); });
  }

  // r_p: the mixture's probabilities of the j-th chunk
  ASSAY_HD void mix_chunk(int j, float (&r_p)[SLOTS]) const {
    ASSAY_UNROLL
    for (int i = 0; i < SLOTS; ++i) r_p[i] = 0.f;
    if constexpr (KEEP) {
      ASSAY_NO_UNROLL
      for (int k = 0; k < p.K; ++k) mix_model(k, again(k, j), r_p);
    } else {
      Part r_next = fetch(0, j);
      ASSAY_NO_UNROLL
      for (int k = 0; k < p.K; ++k) {
        const Part r_part = r_next;
        if (k + 1 < p.K) r_next = fetch(k + 1, j);
        mix_model(k, r_part, r_p);
      }
    }
  }

  ASSAY_HD void sweep_mixture() {
    Mixture r_mix = EMPTY_MIXTURE;
    ASSAY_NO_UNROLL
    for (int j = 0; holds(j); ++j) {
      float r_p[SLOTS];
      mix_chunk(j, r_p);
      add_mixture(j, r_p, r_mix);
    }
    highest = r_mix.top_other > r_mix.p_label ? r_mix.top_other : r_mix.p_label;
    r_mix = reduce(r_mix);
    if (lane == 0) mixtures()[row * plan.row_groups + row_group] = r_mix;
  }

  ASSAY_HD void add_mixture(int j, float (&r_p)[SLOTS], Mixture& r_mix) const {
    if (p.todo.logs) {  // 0 log 0 = 0
      float r_e[2] = {0, 0}, r_h[2] = {0, 0};
      ASSAY_UNROLL
      for (int i = 0; i < SLOTS; ++i) {
        const Log2 log = log2_of(fmaxf(r_p[i], TINY));
        r_e[i % 2] = fmaf(-r_p[i], log.exponent, r_e[i % 2]);
        r_h[i % 2] = fmaf(-r_p[i], log.rest, r_h[i % 2]);
      }
      r_mix.entropy += static_cast<double>(r_e[0] + r_e[1]) + static_cast<double>(r_h[0] + r_h[1]);
    }
    const int y = label - first_column(j);
    if (label >= 0 && y >= 0 && y < S::columns(lanes)) {  // take the label's column out
      const int mine = S::slot(lane, lanes, y);
      ASSAY_UNROLL
      for (int i = 0; i < SLOTS; ++i) {
        if (i != mine) continue;
        r_mix.p_label = r_p[i];
        r_p[i] = 0.f;
      }
    }
    float r_rest[4] = {0, 0, 0, 0}, r_squares[4] = {0, 0, 0, 0};
    ASSAY_UNROLL
    for (int i = 0; i < SLOTS; ++i) {
      r_rest[i % 4] += r_p[i];
      r_squares[i % 4] = fmaf(r_p[i], r_p[i], r_squares[i % 4]);
      r_mix.top_other = fmaxf(r_p[i], r_mix.top_other);
    }
    r_mix.rest += static_cast<double>((r_rest[0] + r_rest[1]) + (r_rest[2] + r_rest[3]));
    r_mix.squares += static_cast<double>((r_squares[0] + r_squares[1]) + (r_squares[2] + r_squares[3]));
  }

  // ---- results --------------------------------------------------------------------------------------------------------

  ASSAY_HD void finish_row(int r, int64_t row_index) const {
    Mixture mix = EMPTY_MIXTURE;
    const int parts = plan.row_groups;
    if constexpr (MIXTURE)
      mix = gather(parts * plan.slices, EMPTY_MIXTURE,
                   [&](int i) { return crew.peer(mixtures(), i / parts)[r * parts + i % parts]; });
    if constexpr (SQUARES) mix = mixtures()[r];
    const int* s_tops = PACKED ? tops() + r * p.K : gather_tops();
    if (!(PACKED || lane == 0)) return;
    if (row_index >= p.N) {  // the last rows of a packed tile
      verdicts()[r] = RowVerdict{0, false, false};
      return;
    }
    const int y = label_of(r);
    const bool alive = y >= 0 || !p.g_labels;
    const Model* s_models = models() + r * p.K;
    const ModelFields own = combine_models(s_models, s_tops, p.K, [&](int k) { return p.model(k).weight; }, y,
                                           p.todo.tops);
    const bool defined = alive && own.defined;
    float information = 0.f, confidence = s_models[0].inverse;
    double entropy = own.expected_entropy;
    if (MIXTURE && p.K > 1) {
      entropy = entropy_of(mix);
      information = static_cast<float>(entropy - own.expected_entropy);
      confidence = fmaxf(mix.top_other, mix.p_label);
    }
    const bool divergence = defined && p.todo.information && information < SMALL_INFORMATION * (1.f + static_cast<float>(entropy));
    verdicts()[r] = RowVerdict{confidence, divergence, defined};
    if (crew.slice != 0) return;
    if (!defined) return write_undefined(row_index);
    const auto put = [&](Field f, float value) { write(f, row_index, value); };
    const bool labelled = p.g_labels != nullptr;
    put(NLL, labelled ? own.nll : NaN);
    put(MEAN_NLL, labelled ? own.mean_nll : NaN);
    put(MARGIN, labelled ? mix.p_label - mix.top_other : NaN);
    put(AGREEMENT, labelled ? own.agreement : NaN);
    put(EL2N, labelled ? el2n(mix) : NaN);
    put(ENTROPY, static_cast<float>(entropy));
    put(EXPECTED_ENTROPY, static_cast<float>(own.expected_entropy));
    put(MUTUAL_INFORMATION, information);  // for now, if `divergence`
    put(CONFIDENCE, confidence);
    put(VOTE_ENTROPY, own.vote_entropy);
    if (p.K == 1) write_prediction(row_index, s_tops[0]);
  }

  ASSAY_HD void write(Field f, int64_t row_index, float value) const {
    if (p.fields & bit(f)) p.g_out[f * p.N + row_index] = value;
  }
  ASSAY_HD void write_prediction(int64_t row_index, int64_t value) const {
    if (p.fields & bit(PREDICTION)) p.g_prediction[row_index] = value;
  }
  ASSAY_HD void write_undefined(int64_t row_index) const {
    ASSAY_NO_UNROLL
    for (int f = 0; f < NUM_FLOAT_FIELDS; ++f) write(static_cast<Field>(f), row_index, NaN);
    write_prediction(row_index, -1);
  }

  // ---- second look ----------------------------------------------------------------------------------------------------

  ASSAY_HD void look_again() const {
    const RowVerdict verdict = verdicts()[row];
    Refined r_sum = EMPTY_REFINED;
    const bool rivals = verdict.defined && p.todo.prediction && highest >= verdict.highest;
    ASSAY_NO_UNROLL
    for (int j = 0; (rivals || (verdict.defined && verdict.divergence)) && holds(j); ++j) {
      float r_p[SLOTS];
      mix_chunk(j, r_p);
      if (rivals) {
        ASSAY_UNROLL
        for (int i = SLOTS - 1; i >= 0; --i) {
          const uint64_t best = make_best(r_p[i], column(j, i));
          r_sum.best = r_p[i] >= verdict.highest && best > r_sum.best ? best : r_sum.best;
        }
      }
      if (verdict.divergence) add_divergence(j, r_p, r_sum);
    }
    r_sum = reduce(r_sum);
    if (lane == 0) refined()[row * plan.row_groups + row_group] = r_sum;
  }

  ASSAY_HD void add_divergence(int j, const float (&r_p)[SLOTS], Refined& r_sum) const {
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      const Model& model = models()[row * p.K + k];
      const float m = model.m, inverse = model.inverse, weight = p.model(k).weight;
      float sum = 0;
      each_logit(again(k, j), [&](int i, float z) {
        if (!(r_p[i] > 1e-37f)) return;
        const float q = exp2_approx((z - m) * LOG2E) * inverse / r_p[i];
        sum = fmaf(r_p[i], fmaxf(divergence_term(weight, q), 0.f), sum);
      });
      r_sum.information += static_cast<double>(sum);
    }
  }

  ASSAY_HD void finish_refined(int r, int64_t row_index) const {
    const int parts = plan.row_groups;
    const Refined sum = gather(parts * plan.slices, EMPTY_REFINED,
                               [&](int i) { return crew.peer(refined(), i / parts)[r * parts + i % parts]; });
    if (!(PACKED || lane == 0) || crew.slice != 0 || row_index >= p.N || !verdicts()[r].defined) return;
    if (verdicts()[r].divergence) write(MUTUAL_INFORMATION, row_index, static_cast<float>(sum.information));
    if (p.todo.prediction) write_prediction(row_index, best_column(sum.best));
  }

  static constexpr int NO_LABEL = -1;
  static constexpr int NO_TOP = std::numeric_limits<int>::max();

  const Problem& p;
  const Plan& plan;
  const Crew crew;
  char* const memory;
  const int lanes, lane, group, row, row_group, item_lanes;
  int64_t n = 0;  // this thread's row
  int label = NO_LABEL;
  float highest = 0.f;  // this thread's highest probability of the mixture
};

}  // namespace assay::cuda
