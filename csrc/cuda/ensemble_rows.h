// The computation of ensemble_stats for a crew of threads, on a GPU or emulated.
//
// A crew is the threads of one block, or of the blocks ("slices") that share a row. Its groups of lanes take a row's
// columns in chunks. Three meetings per row:
//   1. every model's (max, sum) states are merged into its softmax                        -> log p_y, entropies
//   2. the groups mix the models over their own columns, and the parts are merged         -> the mixture's fields
//   3. only if asked for: the highest column compared exactly, a small mutual information summed as a divergence
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

template <class T, bool NARROW, bool MIXTURE, bool KEEP, class Crew>
class EnsembleRows {
  static constexpr int V = NARROW ? 1 : 16 / static_cast<int>(sizeof(T)), U = NARROW ? NARROW_COLUMNS_PER_LANE : 4;
  using S = Slots<V, U>;
  static constexpr int SLOTS = S::COUNT, QUADS = SLOTS / 4;

 public:
  ASSAY_HD EnsembleRows(const Problem& problem, const Crew& its_crew, char* its_memory)
      : p(problem),
        plan(problem.plan),
        crew(its_crew),
        memory(its_memory),
        lanes(NARROW ? plan.lanes : Crew::WARP),
        lane(crew.thread % lanes),
        group(crew.thread / lanes),
        row(NARROW ? group : 0),
        row_group(NARROW ? 0 : group),
        item_lanes(NARROW ? 1 : Crew::WARP) {}

  ASSAY_HD void run() {
    n = static_cast<int64_t>(crew.first_tile()) * plan.rows() + row;
    for (; first_row() < p.N; n += static_cast<int64_t>(crew.tile_step()) * plan.rows()) run_tile();
    crew.sync();  // nobody leaves while others read its shared memory
  }

 private:
  // ---- one tile: rows first_row() .. first_row() + plan.rows() - 1 ----------------------------------------------------

  ASSAY_HD int64_t first_row() const { return n - row; }

  ASSAY_HD void run_tile() {
    label = NO_LABEL;
    live = n < p.N && read_label(n, label);
    if (!NARROW && !live) {  // the same for the whole crew
      if (leads(0)) write_undefined(n);
      return;
    }
    sweep_models();
    crew.sync();
    each_item(plan.rows() * p.K, [&](int i) { finish_model_of(i); });
    crew.sync_block();
    if (!NARROW && p.todo.tops) find_tops();
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

  // Calls f(i) for each i < count with the lanes of an item together: one thread each if narrow, else one warp.
  template <class F>
  ASSAY_HD void each_item(int count, const F& f) const {
    ASSAY_NO_UNROLL
    for (int i = crew.thread / item_lanes; i < count; i += crew.threads / item_lanes) f(i);
  }
  // Merges `count` parts (i-th: part(i)) over an item's lanes; the result is lane 0's.
  template <class Part, class F>
  ASSAY_HD Part gather(int count, Part sum, const F& part) const {
    ASSAY_NO_UNROLL
    for (int i = NARROW ? 0 : lane; i < count; i += item_lanes) sum = merge(sum, part(i));
    ASSAY_NO_UNROLL
    for (int offset = item_lanes / 2; offset > 0; offset /= 2) sum = merge(sum, shuffled(sum, offset));
    return sum;
  }
  ASSAY_HD bool leads(int item) const { return crew.slice == 0 && crew.thread == item * item_lanes; }

  ASSAY_HD State shuffled(const State& x, int offset) const {
    return {crew.shuffle_xor(x.m, offset), crew.shuffle_xor(x.d, offset), crew.shuffle_xor(x.s, offset)};
  }
  ASSAY_HD Mixture shuffled(const Mixture& x, int offset) const {
    return {crew.shuffle_xor(x.entropy, offset), crew.shuffle_xor(x.rest, offset), crew.shuffle_xor(x.squares, offset),
            crew.shuffle_xor(x.top_other, offset), crew.shuffle_xor(x.p_label, offset)};
  }
  ASSAY_HD Refined shuffled(const Refined& x, int offset) const {
    return {crew.shuffle_xor(x.information, offset), crew.shuffle_xor(x.best, offset)};
  }
  template <class Part>  // over a group's lanes
  ASSAY_HD Part reduce(Part x) const {
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2) x = merge(x, shuffled(x, offset));
    return x;
  }

  // False: the row is not read (ignored, or its label is no class, which a captured graph cannot report otherwise).
  ASSAY_HD bool read_label(int64_t row_index, int& to) const {
    if (!p.g_labels) return true;
    const int64_t y = p.g_labels[row_index];
    if (y == p.ignore_index || y < 0 || y >= p.C) return false;
    to = static_cast<int>(y);
    return true;
  }

  // ---- the logits -----------------------------------------------------------------------------------------------------

  ASSAY_HD const T* row_logits(const ModelLogits& model) const {
    return static_cast<const T*>(model.g_logits) + (!NARROW || live ? n : 0) * model.row_stride;
  }
  ASSAY_HD int first_column(int j) const { return plan.chunk(crew.slice, j, row_group) * S::columns(lanes); }
  ASSAY_HD int column(int j, int slot) const { return first_column(j) + S::column(lane, lanes, slot); }
  // COUNT vectors of model k's j-th chunk, from the u-th on.
  template <int COUNT>
  ASSAY_HD void load(int k, int j, int u, float (&r_z)[V * COUNT]) const {
    const ModelLogits& model = p.model(k);
    load_chunk<T, V, COUNT>(row_logits(model), model.col_stride, !NARROW || live ? p.C : 0,
                            first_column(j) + u * lanes * V, lane, lanes, r_z);
  }
  // Quads of the j-th chunk that hold columns; 0 beyond the row's end. The same for a group's lanes.
  ASSAY_HD int quads_of(int j) const {
    if constexpr (NARROW) return plan.quads;
    const int left = p.C - first_column(j);
    if (left <= 0) return 0;
    const int vectors = (left + lanes * V - 1) / (lanes * V);
    return vectors < U ? vectors * (V / 4) : QUADS;
  }
  // f(q) for the chunk's quads. Whole chunks, the usual ones, are unrolled without a branch per quad.
  template <class F>
  ASSAY_HD static void each_quad(int quads, const F& f) {
    if (quads == QUADS) {
      ASSAY_UNROLL
      for (int q = 0; q < QUADS; ++q) f(q);
    } else {
      ASSAY_UNROLL
      for (int q = 0; q < QUADS; ++q)
        if (q < quads) f(q);
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
  ASSAY_HD float& base(int k, int j) const { return at<float>(p.layout.base)[(k * plan.chunks + j) * plan.groups + group]; }
  ASSAY_HD Quad& kept(int k, int j, int q) const {
    return at<Quad>(p.layout.e)[((k * plan.chunks + j) * plan.quads + q) * crew.threads + crew.thread];
  }

  // ---- first sweep: each model's softmax ------------------------------------------------------------------------------

  ASSAY_HD void sweep_models() {
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      State r_state = EMPTY_STATE;
      ASSAY_NO_UNROLL
      for (int j = 0; j < plan.chunks; ++j) {
        const int quads = quads_of(j);
        if (quads == 0) break;
        float r_z[SLOTS];
        load<U>(k, j, 0, r_z);
        add_chunk(k, j, quads, r_z, r_state);
      }
      r_state = reduce(r_state);  // the lanes agree on m: sums only
      if (lane == 0) states()[(row * p.K + k) * plan.row_groups + row_group] = r_state;
    }
  }

  ASSAY_HD void add_chunk(int k, int j, int quads, const float (&r_z)[SLOTS], State& r_state) {
    float m = r_state.m;
    each_quad(quads, [&](int q) {
      ASSAY_UNROLL
      for (int i = 0; i < 4; ++i) m = max_nan(m, r_z[4 * q + i]);
    });
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2) m = max_nan(m, crew.shuffle_xor(m, offset));
    if (NARROW && p.todo.tops) find_top(k, m, r_z);
    r_state = rescaled(r_state, m);
    if (lane == 0) base(k, j) = m;

    const float origin = m > -INF ? m : 0.f;  // nothing but -inf so far: -inf - 0 gives e = 0
    float r_d[2] = {0, 0}, r_s[2] = {0, 0};
    each_quad(quads, [&](int q) {
      Quad r_e;
      ASSAY_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float x = fmaxf(r_z[4 * q + i] - origin, FAR);
        r_e.v[i] = exp2_approx(x * LOG2E);
        r_d[i % 2] += r_e.v[i];
        r_s[i % 2] = fmaf(x, r_e.v[i], r_s[i % 2]);
      }
      if constexpr (KEEP) kept(k, j, q) = r_e;
    });
    r_state.d += static_cast<double>(r_d[0] + r_d[1]);
    r_state.s += static_cast<double>(r_s[0] + r_s[1]);
  }

  ASSAY_HD void finish_model_of(int item) const {
    const int r = item / p.K, k = item % p.K;
    const int64_t row_index = first_row() + r;
    const int parts = plan.row_groups;
    const State sum = gather(parts * plan.slices, EMPTY_STATE,
                             [&](int i) { return crew.peer(states(), i / parts)[item * parts + i % parts]; });
    if (NARROW || lane == 0) {
      int y = NO_LABEL;
      float zy = NaN;
      const ModelLogits& model = p.model(k);
      if (row_index < p.N && read_label(row_index, y) && y >= 0)
        zy = to_float(static_cast<const T*>(model.g_logits)[row_index * model.row_stride + y * model.col_stride]);
      models()[item] = finish_model(sum, zy);
      if (!NARROW) tops()[item] = NO_TOP;
    }
  }

  // ---- argmax per model -----------------------------------------------------------------------------------------------

  // The first slot that holds m; SLOTS if none does.
  ASSAY_HD static int first_slot(const float (&r_z)[SLOTS], float m) {
    int slot = SLOTS;
    ASSAY_UNROLL
    for (int i = SLOTS - 1; i >= 0; --i) slot = r_z[i] == m ? i : slot;
    return slot;
  }

  // Of a narrow row, while its logits are at hand: m is the row's maximum.
  ASSAY_HD void find_top(int k, float m, const float (&r_z)[SLOTS]) const {
    const int slot = first_slot(r_z, m);
    int top = slot < SLOTS ? S::column(lane, lanes, slot) : NO_TOP;
    ASSAY_NO_UNROLL
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const int other = crew.shuffle_xor(top, offset);
      top = other < top ? other : top;
    }
    if (lane == 0) tops()[row * p.K + k] = top;
  }

  // Of a wide row: the groups that met a model's maximum look for it again in the first chunk where they did.
  ASSAY_HD void find_tops() const {
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) {
      const float m = models()[k].m;
      int j = 0;
      while (j < plan.chunks && quads_of(j) > 0 && base(k, j) != m) ++j;
      if (j == plan.chunks || quads_of(j) == 0) continue;
      float r_z[SLOTS];
      load<U>(k, j, 0, r_z);
      const int slot = first_slot(r_z, m);
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

  // e times this is the model's probability.
  ASSAY_HD float inverse(int k, int j) const {
    const Model& model = models()[row * p.K + k];
    return KEEP && !NARROW ? model.inverse * exp2_approx((base(k, j) - model.m) * LOG2E) : model.inverse;
  }

  // Adds a chunk's probabilities under model k, times its weight.
  ASSAY_HD void mix_model(int k, int j, int quads, float (&r_p)[SLOTS]) const {
    const float scale = p.model(k).weight * inverse(k, j);
    if constexpr (KEEP) {
      each_quad(quads, [&](int q) {
        const Quad r_e = kept(k, j, q);
        ASSAY_UNROLL
        for (int i = 0; i < 4; ++i) r_p[4 * q + i] = fmaf(r_e.v[i], scale, r_p[4 * q + i]);
      });
    } else {
      const float m = models()[row * p.K + k].m;
      ASSAY_UNROLL
      for (int u = 0; u < U; u += U / 2) {  // by halves: logits and sums of a whole chunk are more than the registers
        float r_z[SLOTS / 2];
        if (u * V >= 4 * quads) break;
        load<U / 2>(k, j, u, r_z);
        ASSAY_UNROLL
        for (int i = 0; i < SLOTS / 2; ++i)
          r_p[u * V + i] = fmaf(exp2_approx((r_z[i] - m) * LOG2E), scale, r_p[u * V + i]);
      }
    }
  }

  // r_p: the mixture's probabilities of the j-th chunk
  ASSAY_HD void mix_chunk(int j, int quads, float (&r_p)[SLOTS]) const {
    ASSAY_UNROLL
    for (int i = 0; i < SLOTS; ++i) r_p[i] = 0.f;
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k) mix_model(k, j, quads, r_p);
  }

  ASSAY_HD void sweep_mixture() {
    Mixture r_mix = EMPTY_MIXTURE;
    ASSAY_NO_UNROLL
    for (int j = 0; j < plan.chunks; ++j) {
      const int quads = quads_of(j);
      if (quads == 0) break;
      float r_p[SLOTS];
      mix_chunk(j, quads, r_p);
      add_mixture(j, quads, r_p, r_mix);
    }
    highest = r_mix.top_other > r_mix.p_label ? r_mix.top_other : r_mix.p_label;
    r_mix = reduce(r_mix);
    if (lane == 0) mixtures()[row * plan.row_groups + row_group] = r_mix;
  }

  ASSAY_HD void add_mixture(int j, int quads, float (&r_p)[SLOTS], Mixture& r_mix) const {
    if (p.todo.logs) {  // 0 log 0 = 0
      float r_h[4] = {0, 0, 0, 0};
      each_quad(quads, [&](int q) {
        ASSAY_UNROLL
        for (int i = 0; i < 4; ++i) r_h[i] = fmaf(-r_p[4 * q + i], log2_approx(fmaxf(r_p[4 * q + i], TINY)), r_h[i]);
      });
      r_mix.entropy += static_cast<double>((r_h[0] + r_h[1]) + (r_h[2] + r_h[3]));
    }
    const int y = label - first_column(j);
    if (y >= 0 && y < S::columns(lanes)) {  // take the label's column out
      const int mine = S::slot(lane, lanes, y);
      ASSAY_UNROLL
      for (int i = 0; i < SLOTS; ++i) {
        if (i != mine) continue;
        r_mix.p_label = r_p[i];
        r_p[i] = 0.f;
      }
    }
    float r_rest[4] = {0, 0, 0, 0}, r_squares[4] = {0, 0, 0, 0};
    each_quad(quads, [&](int q) {
      ASSAY_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float x = r_p[4 * q + i];
        r_rest[i] += x;
        r_squares[i] = fmaf(x, x, r_squares[i]);
        r_mix.top_other = fmaxf(x, r_mix.top_other);
      }
    });
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
    const int* s_tops = NARROW ? tops() + r * p.K : gather_tops();
    if (!(NARROW || lane == 0)) return;
    if (row_index >= p.N) {  // the last rows of a narrow tile
      verdicts()[r] = RowVerdict{0, false, false};
      return;
    }
    int y = NO_LABEL;
    const bool alive = read_label(row_index, y);
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
    verdicts()[r] = RowVerdict{confidence * NEARLY, divergence, defined};
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
    if (verdict.defined) {
      const bool rivals = p.todo.prediction && highest >= verdict.nearly;
      ASSAY_NO_UNROLL
      for (int j = 0; j < plan.chunks; ++j) {
        if (rivals) add_rivals(j, verdict.nearly, r_sum);
        if (verdict.divergence) add_divergence(j, r_sum);
      }
    }
    r_sum = reduce(r_sum);
    if (lane == 0) refined()[row * plan.row_groups + row_group] = r_sum;
  }

  ASSAY_HD void add_rivals(int j, float nearly, Refined& r_sum) const {
    float r_p[SLOTS];
    mix_chunk(j, quads_of(j), r_p);
    uint32_t near = 0;
    ASSAY_UNROLL
    for (int i = 0; i < SLOTS; ++i) near |= r_p[i] >= nearly ? 1u << i : 0u;
    ASSAY_NO_UNROLL
    for (int i = 0; i < SLOTS && near >> i; ++i) {
      if (!(near >> i & 1)) continue;
      const int c = column(j, i);
      const uint64_t best = make_best(exact_probability(c), c);
      r_sum.best = best > r_sum.best ? best : r_sum.best;
    }
  }

  ASSAY_HD void add_divergence(int j, Refined& r_sum) const {
    ASSAY_NO_UNROLL
    for (int q = 0; q < quads_of(j); ++q) {
      float r_p[4] = {0, 0, 0, 0}, r_terms[4] = {0, 0, 0, 0};
      ASSAY_NO_UNROLL
      for (int k = 0; k < p.K; ++k) {
        const Quad r_e = quad(k, j, q);
        const float scale = p.model(k).weight * inverse(k, j);
        ASSAY_UNROLL
        for (int i = 0; i < 4; ++i) r_p[i] = fmaf(r_e.v[i], scale, r_p[i]);
      }
      ASSAY_NO_UNROLL
      for (int k = 0; k < p.K; ++k) {
        const Quad r_e = quad(k, j, q);
        const float scale = inverse(k, j), weight = p.model(k).weight;
        ASSAY_UNROLL
        for (int i = 0; i < 4; ++i)
          r_terms[i] += r_p[i] > 1e-37f ? divergence_term(weight, r_e.v[i] * scale / r_p[i]) : 0.f;
      }
      ASSAY_UNROLL
      for (int i = 0; i < 4; ++i) r_sum.information += static_cast<double>(r_p[i] * fmaxf(r_terms[i], 0.f));
    }
  }

  // Slots 4q .. 4q + 3 of model k's j-th chunk, as e^(z - base).
  ASSAY_HD Quad quad(int k, int j, int q) const {
    if constexpr (KEEP) {
      return kept(k, j, q);
    } else {
      Quad r_e;
      ASSAY_UNROLL
      for (int i = 0; i < 4; ++i) r_e.v[i] = exponential(k, column(j, 4 * q + i));
      return r_e;
    }
  }

  ASSAY_HD float exponential(int k, int c) const {
    if (c >= p.C) return 0.f;
    const ModelLogits& model = p.model(k);
    return exp2_approx((to_float(row_logits(model)[c * model.col_stride]) - models()[row * p.K + k].m) * LOG2E);
  }

  // The mixture at column c relative to the row's maxima: the same bits for the same logits, wherever they stand.
  ASSAY_HD float exact_probability(int c) const {
    float sum = 0.f;
    ASSAY_NO_UNROLL
    for (int k = 0; k < p.K; ++k)
      sum = fmaf(exponential(k, c), p.model(k).weight * models()[row * p.K + k].inverse, sum);
    return sum;
  }

  ASSAY_HD void finish_refined(int r, int64_t row_index) const {
    const int parts = plan.row_groups;
    const Refined sum = gather(parts * plan.slices, EMPTY_REFINED,
                               [&](int i) { return crew.peer(refined(), i / parts)[r * parts + i % parts]; });
    if (!(NARROW || lane == 0) || crew.slice != 0 || row_index >= p.N || !verdicts()[r].defined) return;
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
  bool live = false;
  float highest = 0.f;  // this thread's highest probability of the mixture
};

}  // namespace assay::cuda
