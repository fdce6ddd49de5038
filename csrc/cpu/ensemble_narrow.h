// One row per SIMD lane. Part of ensemble.cpp.
//
// A tile is one row per lane. Its models are taken one after the other, and each is mixed in before the next is looked
// at: what a tile needs stays in L1 and does not grow with K.

// Sums over columns go by runs of this many, so that 256 columns are 16 + 16 float32 additions, not 256.
constexpr int64_t RUN = 16;

// What a tile needs besides its logits; made once per thread.
struct NarrowScratch {
  Scratch<Vec> t;        // (C, padded to whole tiles): one model's logits, then t with e^(z - max) = 2^t
  Scratch<Vec> e;        // (C,): 2^t
  Scratch<Vec> p;        // (C,): the mixture of the models so far, sum_k w_k p_k
  Scratch<Vec> p_log_p;  // (C,): sum_k w_k p_k log p_k
  Scratch<Vec> weight, log_py, top;  // (K,)
  explicit NarrowScratch(const EnsembleArgs& a)
      : t((a.C + Vec::W - 1) / Vec::W * Vec::W), e(a.C), p(a.C), p_log_p(a.C), weight(a.K), log_py(a.K), top(a.K) {
    for (int64_t k = 0; k < a.K; ++k) weight[k] = splat(static_cast<float>(a.weights[k]));
  }
};

// A tile's rows n0.. and labels. Lanes past the last row repeat it.
struct Tile {
  int64_t n0, rows;
  Vec label;             // -1: none, or ignored
  Vec unlabelled;        // NaN where there is none, else 0
  int64_t place[Vec::W];  // of the label's logit in a transposed tile, or of some other's
  bool ignored[Vec::W];

  Tile(const EnsembleArgs& a, int64_t first) : n0(first), rows(a.N - first < Vec::W ? a.N - first : Vec::W) {
    float lanes[Vec::W];
    for (int64_t i = 0; i < Vec::W; ++i) {
      int64_t y = a.labels && i < rows ? a.labels[n0 + i] : -1;
      ignored[i] = a.labels && i < rows && y == a.ignore_index;
      if (ignored[i]) y = -1;
      lanes[i] = static_cast<float>(y);
      place[i] = (y < 0 ? 0 : y * Vec::W) + i;
    }
    label = load(lanes);
    unlabelled = select(label < splat(0.f), splat(NaN), splat(0.f));
  }
};

struct Top {
  Vec value, index;

  // NaN is dropped here and comes back through the sums.
  ASSAY_INLINE void look(Vec v, Vec at) {
    index = select(value < v, at, index);
    value = max(v, value);
  }
};

// One model's logits, transposed: z[c] holds column c of all rows, -inf past the last column. Returns their maxima.
// WHOLE: rows for all lanes and columns for a vector.
template <bool WHOLE, class T>
Top load_tile(const EnsembleArgs& a, int64_t k, const Tile& tile, Vec* z) {
  constexpr int64_t W = Vec::W;
  const int64_t stride = a.row_strides[k], last = tile.rows - 1;
  Top top{splat(-INF), splat(0.f)};
  for (int64_t next = 0; next < a.C; next += W) {
    const int64_t c = !WHOLE || next + W <= a.C ? next : a.C - W;  // the last columns overlap: no tails
    const T* row = row_pointer<T>(a, k, tile.n0) + c;
    Vec r[W];
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) {
      r[i] = WHOLE ? load(row) : load_first(row, a.C - c, -INF);
      row += WHOLE || i < last ? stride : 0;
    }
    transpose(r);
    Top here{splat(-INF), splat(0.f)};
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) here.look(z[c + i] = r[i], splat(static_cast<float>(i)));
    top.look(here.value, splat(static_cast<float>(c)) + here.index);
  }
  return top;
}

// The same of columns that are not adjacent.
template <class T>
Top gather_tile(const EnsembleArgs& a, int64_t k, const Tile& tile, Vec* z) {
  const int64_t stride = a.row_strides[k], last = tile.rows - 1;
  const T* first = row_pointer<T>(a, k, tile.n0);
  Top top{splat(-INF), splat(0.f)};
  for (int64_t c = 0; c < a.C; ++c, first += a.col_strides[k]) {
    float lanes[Vec::W];
    for (int64_t i = 0; i < Vec::W; ++i) lanes[i] = to_float(first[(i < last ? i : last) * stride]);
    top.look(z[c] = load(lanes), splat(static_cast<float>(c)));
  }
  return top;
}

// Where this model's logits of the next tile begin, to be asked for while this tile is worked on: rows are short and
// models far apart, so the hardware finds no stream to follow. A whole tile ahead, for one model ahead comes too late.
// With rows one after the other a tile is one run of C * W logits.
template <class T>
const char* next_tile(const EnsembleArgs& a, int64_t k, int64_t n0) {
  n0 += Vec::W;
  return reinterpret_cast<const char*>(row_pointer<T>(a, k, n0 + Vec::W <= a.N ? n0 : 0));
}

// z becomes t with e^(z - m) = 2^t, and e 2^t; returns the sum of e.
Vec exponentials(Vec* z, Vec* e, int64_t C, Vec m, const char* ahead, int64_t column_bytes) {
  Vec d = splat(0.f);
  for (int64_t c = 0; c < C; c += RUN) {
    const int64_t end = C - c < RUN ? C : c + RUN;
    for (int64_t byte = c * column_bytes; byte < end * column_bytes; byte += 64) prefetch_l2(ahead + byte);
    Vec run = splat(0.f);
    for (int64_t i = c; i < end; ++i) {
      const Vec t = reachable((z[i] - m) * splat(LOG2E)), p = exp2_reachable(t);  // never -inf, which times 0 is NaN
      run = run + p;
      z[i] = t;
      e[i] = p;
    }
    d = d + run;
  }
  return d;
}

// p += w p_k and p_log_p += w p_k log p_k, column by column; FIRST: set, not added to.
template <bool FIRST>
void mix(const NarrowScratch& s, int64_t C, Vec scale, Vec log_d) {
  const Vec ln2 = splat(LN2);
  for (int64_t c = 0; c < C; ++c) {
    const Vec share = s.e[c] * scale, log_p = fms(s.t[c], ln2, log_d);
    s.p[c] = FIRST ? share : s.p[c] + share;
    s.p_log_p[c] = FIRST ? share * log_p : fma(share, log_p, s.p_log_p[c]);
  }
}

// What is known of each lane's row after its models' own softmaxes.
struct NarrowModels {
  Vec nll, mean_nll, agreement, vote_entropy;
  Vec bad;  // NaN where a model's distribution is undefined, else 0
};

// Each model's own softmax, mixed into s.p.
template <class T>
NarrowModels narrow_models(const EnsembleArgs& a, const Tile& tile, const NarrowScratch& s) {
  constexpr int64_t W = Vec::W;
  const Vec zero = splat(0.f);
  NarrowModels r{zero, zero, zero, zero, zero};
  const bool whole = tile.rows == W && a.C >= W;
  float zy[W];

  for (int64_t k = 0; k < a.K; ++k) {
    const Top top = (a.col_strides[k] != 1 ? gather_tile<T> : whole ? load_tile<true, T> : load_tile<false, T>)(a, k, tile, s.t.p);
    for (int64_t i = 0; i < W; ++i) std::memcpy(zy + i, reinterpret_cast<const float*>(s.t.p) + tile.place[i], sizeof(float));
    const Mask empty = top.value == splat(-INF);
    const Vec m = select(empty, zero, top.value);
    const Vec d = exponentials(s.t.p, s.e.p, a.C, m, next_tile<T>(a, k, tile.n0), W * sizeof(T));
    r.bad = select(empty, splat(NaN), fma(zero, d, r.bad));  // 0 * NaN and 0 * inf are NaN
    const Vec log_d = log(d), w = s.weight[k];
    (k == 0 ? mix<true> : mix<false>)(s, a.C, w / d, log_d);
    s.log_py[k] = (load(zy) - m) - log_d;
    s.top[k] = top.index;
    if (a.weights[k] > 0) r.mean_nll = r.mean_nll - w * s.log_py[k];
    r.agreement = r.agreement + select(top.index == tile.label, w, zero);
  }

  // -log sum_k w_k p_k,y
  Vec m = splat(-INF);
  for (int64_t k = 0; k < a.K; ++k)
    if (a.weights[k] > 0) m = max(s.log_py[k], m);
  const Vec base = select(m == splat(-INF), zero, m);
  Vec d = zero;
  for (int64_t k = 0; k < a.K; ++k)
    if (a.weights[k] > 0) d = fma(s.weight[k], exp(s.log_py[k] - base), d);
  r.nll = select(m == splat(-INF), splat(INF), zero - (base + log(d)));

  // A class's share of the vote, seen from each of its voters: H = -sum_k w_k log(share of k's choice)
  for (int64_t k = 0; a.wants(VOTE_ENTROPY) && k < a.K; ++k) {
    if (!(a.weights[k] > 0)) continue;
    Vec share = zero;
#pragma GCC unroll 4
    for (int64_t j = 0; j < a.K; ++j) share = share + select(s.top[j] == s.top[k], s.weight[j], zero);
    r.vote_entropy = r.vote_entropy - s.weight[k] * log(share);
  }
  return r;
}

struct NarrowMixture {
  Vec entropy, expected_entropy, information, confidence, prediction, p_label, rest, squares, top_other;
};

// The mixture's statistics: one pass over its columns. Of one model the entropy is known: LOG is for several.
template <bool LOG>
NarrowMixture narrow_mixture(const EnsembleArgs& a, const Tile& tile, const NarrowScratch& s) {
  const Vec zero = splat(0.f), one = splat(1.f);
  NarrowMixture r{zero, zero, zero, splat(-1.f), zero, zero, zero, zero, zero};
  Vec index = zero;
  for (int64_t c = 0; c < a.C; c += RUN) {
    const int64_t end = a.C - c < RUN ? a.C : c + RUN;
    Vec entropy = zero, expected = zero, information = zero, rest = zero, squares = zero;
    for (int64_t i = c; i < end; ++i, index = index + one) {
      const Vec p = s.p[i];
      expected = expected - s.p_log_p[i];
      if (LOG) {
        // sum_k w_k p_k log p_k - p log p is never negative by Jensen's inequality; what rounding leaves below 0 is cut.
        const Vec p_log_p = p * log(p);
        entropy = entropy - p_log_p;
        information = information + max(s.p_log_p[i] - p_log_p, zero);
      }
      const Mask higher = r.confidence < p, is_label = tile.label == index;
      r.confidence = select(higher, p, r.confidence);
      r.prediction = select(higher, index, r.prediction);
      r.p_label = select(is_label, p, r.p_label);
      const Vec other = select(is_label, zero, p);
      rest = rest + other;
      squares = fma(other, other, squares);
      r.top_other = max(other, r.top_other);
    }
    r.entropy = r.entropy + entropy;
    r.expected_entropy = r.expected_entropy + expected;
    r.information = r.information + information;
    r.rest = r.rest + rest;
    r.squares = r.squares + squares;
  }
  if (!LOG) r.entropy = r.expected_entropy;
  return r;
}

template <class T>
void narrow_tile(const EnsembleArgs& a, const Tile& tile, const NarrowScratch& s) {
  constexpr int W = Vec::W;
  const NarrowModels models = narrow_models<T>(a, tile, s);
  const NarrowMixture mix = a.K > 1 ? narrow_mixture<true>(a, tile, s) : narrow_mixture<false>(a, tile, s);

  const Vec bad = models.bad;
  const Vec bad_label = bad + tile.unlabelled;
  Vec value[NUM_FLOAT_FIELDS];
  value[NLL] = models.nll + bad_label;
  value[MEAN_NLL] = models.mean_nll + bad_label;
  value[MARGIN] = mix.p_label - mix.top_other + bad_label;
  value[AGREEMENT] = models.agreement + bad_label;
  value[EL2N] = sqrt(fma(mix.rest, mix.rest, mix.squares)) + bad_label;
  value[ENTROPY] = mix.entropy + bad;
  value[EXPECTED_ENTROPY] = mix.expected_entropy + bad;
  value[MUTUAL_INFORMATION] = mix.information + bad;
  value[CONFIDENCE] = mix.confidence + bad;
  value[VOTE_ENTROPY] = models.vote_entropy + bad;

  float lanes[W], undefined[W];
  for (int f = 0; f < NUM_FLOAT_FIELDS; ++f) {
    if (!(a.fields >> f & 1)) continue;
    float* out = a.out + f * a.N + tile.n0;
    if (tile.rows == W) {
      store(out, value[f]);
      continue;
    }
    store(lanes, value[f]);
    for (int64_t i = 0; i < tile.rows; ++i) out[i] = lanes[i];
  }
  store(lanes, a.K == 1 ? s.top[0] : mix.prediction);
  store(undefined, bad);
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (tile.ignored[i]) {
      write_nan(a, tile.n0 + i);
    } else if (a.wants(PREDICTION)) {
      a.prediction[tile.n0 + i] = undefined[i] == 0.f ? static_cast<int64_t>(lanes[i]) : -1;
    }
  }
}

template <class T>
void narrow(const EnsembleArgs& a) {
  constexpr int64_t W = Vec::W;
  const int64_t tiles = (a.N + W - 1) / W;
  // A piece of work is about 64 KB of logits: small enough to share out, large enough to be worth handing over.
  const int64_t grain = 1 + 65536 / (W * a.K * a.C * 4);
  parallel(tiles, grain, a.threads, [&](Pieces& pieces) {
    const NarrowScratch scratch(a);
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t t = begin; t < end; ++t) narrow_tile<T>(a, Tile(a, t * W), scratch);
  });
}
