// One row per SIMD lane. Part of ensemble.cpp.

// Sums over columns go by runs of this many, so that 256 columns are 16 + 16 float32 additions, not 256.
constexpr int64_t RUN = 16;

// The logits of `rows` rows from n0 on, transposed: z[c] holds column c of all of them. Missing lanes hold zeros.
template <class T>
void load_tile(const EnsembleArgs& a, int64_t k, int64_t n0, int64_t rows, Vec* z) {
  constexpr int W = Vec::W;
  if (a.col_strides[k] != 1) {
    for (int64_t c = 0; c < a.C; ++c) {
      float lanes[W] = {};
      for (int64_t i = 0; i < rows; ++i) lanes[i] = to_float(row_pointer<T>(a, k, n0 + i)[c * a.col_strides[k]]);
      z[c] = load(lanes);
    }
    return;
  }
  const T* p = row_pointer<T>(a, k, n0);
  const int64_t stride = a.row_strides[k];
  for (int64_t c0 = 0; c0 < a.C; c0 += W) {
    const int64_t left = a.C - c0;
    Vec r[W];
    if (rows == W && left >= W) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) r[i] = load(p + i * stride + c0);
    } else {
      for (int64_t i = 0; i < W; ++i) r[i] = i < rows ? load_first(p + i * stride + c0, left, 0.f) : splat(0.f);
    }
    transpose(r);
    if (left >= W) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) z[c0 + i] = r[i];
    } else {
      for (int64_t i = 0; i < left; ++i) z[c0 + i] = r[i];
    }
  }
}

// Where this model's logits of the next tile begin, to be asked for while this tile is worked on: rows are short and
// models far apart, so the hardware finds no stream to follow. A whole tile ahead, for one model ahead comes too late.
// With rows one after the other a tile is one run of C * W logits.
template <class T>
const char* next_tile(const EnsembleArgs& a, int64_t k, int64_t n0) {
  n0 += Vec::W;
  return reinterpret_cast<const char*>(row_pointer<T>(a, k, n0 + Vec::W <= a.N ? n0 : 0));
}

// What is known of each lane's row after its models' own softmaxes.
struct NarrowModels {
  Vec expected_entropy, mean_nll, agreement, vote_entropy;
  Vec nll;
  Vec bad;  // NaN where a model's distribution is undefined, else 0
};

// Per-model sweep: turns the logits in z (K x C) into x = z - max in place, with e^x in e; inverse[k] = 1 / sum e^x.
template <class T>
NarrowModels narrow_models(const EnsembleArgs& a, int64_t n0, int64_t rows, const int64_t* y, Vec* z, Vec* e,
                           Vec* inverse, Vec* log_d, Vec* log_py, Vec* top) {
  constexpr int W = Vec::W;
  const Vec zero = splat(0.f);
  NarrowModels r{zero, zero, zero, zero, zero, zero};
  float label[W], zy[W] = {};
  for (int i = 0; i < W; ++i) label[i] = static_cast<float>(y[i]);
  const Vec vlabel = load(label);

  for (int64_t k = 0; k < a.K; ++k, z += a.C, e += a.C) {
    load_tile<T>(a, k, n0, rows, z);
    const char* ahead = next_tile<T>(a, k, n0);
    for (int i = 0; i < W; ++i) zy[i] = y[i] >= 0 ? lane(z[y[i]], i) : 0.f;
    Vec m = splat(-INF);
    for (int64_t c = 0; c < a.C; ++c) m = max(z[c], m);  // NaN is dropped here and comes back through the sum
    const Mask empty = m == splat(-INF);
    const Vec base = select(empty, zero, m);
    Vec arg = zero, d = zero, s = zero;
    for (int64_t end = a.C; end > 0; end -= RUN) {
      Vec run_d = zero, run_s = zero;
      for (int64_t c = end; c-- > (end > RUN ? end - RUN : 0);) {  // downwards: the first of equal maxima comes last
        prefetch_l2(ahead + c * static_cast<int64_t>(W * sizeof(T)));
        arg = select(z[c] == m, splat(static_cast<float>(c)), arg);
        const Vec x = clamp_exponent(z[c] - base), p = exp_finite(x);
        run_d = run_d + p;
        run_s = fma(x, p, run_s);
        z[c] = x;
        e[c] = p;
      }
      d = d + run_d;
      s = s + run_s;
    }
    r.bad = select(empty, splat(NaN), fma(zero, d, r.bad));  // 0 * NaN and 0 * inf are NaN
    log_d[k] = log(d);
    const float w = static_cast<float>(a.weights[k]);
    inverse[k] = splat(1.f) / d;
    log_py[k] = (load(zy) - base) - log_d[k];
    top[k] = arg;
    r.expected_entropy = fma(splat(w), log_d[k] - s * inverse[k], r.expected_entropy);
    if (w > 0.f) r.mean_nll = r.mean_nll - splat(w) * log_py[k];
    r.agreement = r.agreement + select(arg == vlabel, splat(w), zero);
  }

  // -log sum_k w_k p_k,y
  Vec m = splat(-INF);
  for (int64_t k = 0; k < a.K; ++k)
    if (a.weights[k] > 0) m = max(log_py[k], m);
  const Vec base = select(m == splat(-INF), zero, m);
  Vec d = zero;
  for (int64_t k = 0; k < a.K; ++k)
    if (a.weights[k] > 0) d = fma(splat(static_cast<float>(a.weights[k])), exp(log_py[k] - base), d);
  r.nll = select(m == splat(-INF), splat(INF), zero - (base + log(d)));

  // A class's share of the vote, seen from each of its voters: H = -sum_k w_k log(share of k's choice)
  for (int64_t k = 0; a.wants(VOTE_ENTROPY) && k < a.K; ++k) {
    if (!(a.weights[k] > 0)) continue;
    Vec share = zero;
    for (int64_t j = 0; j < a.K; ++j)
      share = share + select(top[j] == top[k], splat(static_cast<float>(a.weights[j])), zero);
    r.vote_entropy = r.vote_entropy - splat(static_cast<float>(a.weights[k])) * log(share);
  }
  return r;
}

struct NarrowMixture {
  Vec entropy, information, confidence, prediction, p_label, rest, squares, top_other;
};

// The mixture's statistics from x = z - max and e^x: one pass over the columns, all models of a column at hand.
NarrowMixture narrow_mixture(const EnsembleArgs& a, const int64_t* y, const Vec* x, const Vec* e, const Vec* inverse,
                             const Vec* log_d, Vec* scale) {
  constexpr int W = Vec::W;
  const Vec zero = splat(0.f);
  float label[W];
  for (int i = 0; i < W; ++i) label[i] = static_cast<float>(y[i]);
  const Vec vlabel = load(label);
  const bool information = a.wants(MUTUAL_INFORMATION) && a.K > 1;
  for (int64_t k = 0; k < a.K; ++k) scale[k] = splat(static_cast<float>(a.weights[k])) * inverse[k];

  NarrowMixture r{zero, zero, splat(-1.f), zero, zero, zero, zero, zero};
  Vec run_entropy = zero, run_information = zero, run_rest = zero, run_squares = zero;
  for (int64_t c = 0; c < a.C; ++c) {
    if (c % RUN == 0) {
      r.entropy = r.entropy + run_entropy;
      r.information = r.information + run_information;
      r.rest = r.rest + run_rest;
      r.squares = r.squares + run_squares;
      run_entropy = run_information = run_rest = run_squares = zero;
    }
    Vec p = zero;
    for (int64_t k = 0; k < a.K; ++k) p = fma(e[k * a.C + c], scale[k], p);
    const Vec log_p = log(p);
    run_entropy = run_entropy - p * log_p;
    if (information) {
      // sum_k w_k p_k log(p_k / p): log p_k = x_k - log d_k is at hand, no logarithm needed. Never negative in a column
      // by Jensen's inequality; what rounding leaves below 0 is cut.
      Vec sum = zero;
      for (int64_t k = 0; k < a.K; ++k) {
        const int64_t i = k * a.C + c;
        sum = fma(e[i] * scale[k], (x[i] - log_d[k]) - log_p, sum);
      }
      run_information = run_information + max(sum, zero);
    }
    const Vec index = splat(static_cast<float>(c));
    const Mask higher = r.confidence < p, is_label = vlabel == index;
    r.confidence = select(higher, p, r.confidence);
    r.prediction = select(higher, index, r.prediction);
    r.p_label = select(is_label, p, r.p_label);
    const Vec other = select(is_label, zero, p);
    run_rest = run_rest + other;
    run_squares = fma(other, other, run_squares);
    r.top_other = max(other, r.top_other);
  }
  r.entropy = r.entropy + run_entropy;
  r.information = r.information + run_information;
  r.rest = r.rest + run_rest;
  r.squares = r.squares + run_squares;
  return r;
}

template <class T>
void narrow_tile(const EnsembleArgs& a, int64_t n0, int64_t rows, Vec* scratch) {
  constexpr int W = Vec::W;
  Vec *z = scratch, *e = z + a.K * a.C, *inverse = e + a.K * a.C, *log_d = inverse + a.K, *log_py = log_d + a.K,
      *top = log_py + a.K, *scale = top + a.K;
  int64_t y[W];
  bool ignored[W] = {};
  for (int64_t i = 0; i < W; ++i) {
    const int64_t label = a.labels && i < rows ? a.labels[n0 + i] : -1;
    ignored[i] = a.labels && i < rows && label == a.ignore_index;
    y[i] = ignored[i] ? -1 : label;
  }
  const NarrowModels models = narrow_models<T>(a, n0, rows, y, z, e, inverse, log_d, log_py, top);
  const NarrowMixture mix = narrow_mixture(a, y, z, e, inverse, log_d, scale);

  const Vec bad = models.bad;
  float labelled[W];
  for (int i = 0; i < W; ++i) labelled[i] = y[i] >= 0 ? 0.f : NaN;
  const Vec bad_label = bad + load(labelled);
  Vec value[NUM_FLOAT_FIELDS];
  value[NLL] = models.nll + bad_label;
  value[MEAN_NLL] = models.mean_nll + bad_label;
  value[MARGIN] = mix.p_label - mix.top_other + bad_label;
  value[AGREEMENT] = models.agreement + bad_label;
  value[EL2N] = sqrt(fma(mix.rest, mix.rest, mix.squares)) + bad_label;
  value[ENTROPY] = mix.entropy + bad;
  value[EXPECTED_ENTROPY] = models.expected_entropy + bad;
  value[MUTUAL_INFORMATION] = mix.information + bad;
  value[CONFIDENCE] = mix.confidence + bad;
  value[VOTE_ENTROPY] = models.vote_entropy + bad;

  float lanes[W], undefined[W];
  for (int f = 0; f < NUM_FLOAT_FIELDS; ++f) {
    if (!(a.fields >> f & 1)) continue;
    store(lanes, value[f]);
    for (int64_t i = 0; i < rows; ++i) a.out[f * a.N + n0 + i] = lanes[i];
  }
  store(lanes, a.K == 1 ? top[0] : mix.prediction);
  store(undefined, bad);
  for (int64_t i = 0; i < rows; ++i) {
    if (ignored[i]) {
      write_nan(a, n0 + i);
    } else if (a.wants(PREDICTION)) {
      a.prediction[n0 + i] = undefined[i] == 0.f ? static_cast<int64_t>(lanes[i]) : -1;
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
    Scratch<Vec> scratch(a.K * (2 * a.C + 5));
    for (int64_t begin, end; pieces.next(begin, end);) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n0 = t * W;
        narrow_tile<T>(a, n0, a.N - n0 < W ? a.N - n0 : W, scratch.p);
      }
    }
  });
}
