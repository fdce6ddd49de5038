// One row at a time, in blocks of columns. Part of ensemble.cpp.
//
// A sweep per model: every block becomes e^(z - base) in scratch, and a partial state. States merge in block order, in
// double: the blocks follow from C alone, so the bits do not depend on how many threads shared the row. A block of the
// scratch is mixed in when the next model's sweep comes by and overwrites it: the scratch, two rows of float32, does not
// grow with K and fits the L2 cache. One last sweep takes the mixture's statistics. No exponential is taken twice, but
// for models that agree so well that their mutual information is a matter of its own.

// 64 vectors (4 KB of float32 with AVX-512): no float32 accumulator takes more than 64 terms.
constexpr int64_t BLOCK = 64 * Vec::W;

// A block's exponentials are relative to the maximum of its first columns, so that one read suffices; a block whose
// true maximum is further above than this is done again relative to it.
constexpr float REACH = 8.f;

// Mutual information below this, relative to 1 + entropy, is recomputed as a KL divergence: the difference of
// entropies carries an error of about 2e-7 (1 + entropy), and models that agree would drown in it.
constexpr double SMALL_INFORMATION = 1e-4;

// One model's columns of one block: its maximum m, and sums of e^(z-base) and (z-base) e^(z-base).
struct Partial {
  double d, s, base;
  float m;
};

// One model's whole row.
struct RowModel {
  double entropy, log_py, rest;  // rest: 1 - p_y
  int64_t top;
  float m, scale;  // w e^(z - m) / sum e^(z - m) = scale e^(z - m)
};

// The mixture over one block, the label's column left out of `squares` and `top_other`.
struct MixturePartial {
  double entropy, squares, divergence;
  float top_other, top;
};

// Exponents relative to a base this far from 0 are not formed in one operation: they would be relative to it only within
// a rounding of its product with log2(e), which must stay well below 1.
constexpr float LARGE = 0x1p20f;

// The first sweep's loop over one block. e: the exponentials, whole vectors; null: not kept.
//
// FINITE takes one operation for the exponent: t = z log2(e) - shift in one rounding, so that e^(z - base) has exactly
// base = shift / log2(e), whatever the rounding of `shift`. -inf makes its sum s NaN. Otherwise z - base is formed
// first and clamped, and only NaN gives NaN.
template <bool FINITE, bool KEEP, class T>
ASSAY_INLINE Partial exponentials(const T* z, int64_t n, float about, float* e) {
  constexpr int W = Vec::W;
  constexpr int64_t AHEAD = 8192;  // bytes: two blocks
  const float shift = about * LOG2E;
  const Vec zero = splat(0.f), low = splat(-INF), log2e = splat(LOG2E), vshift = splat(shift), vbase = splat(about);
  Vec d[4] = {zero, zero, zero, zero}, s[4] = {zero, zero, zero, zero}, m[4] = {low, low, low, low};
  auto add = [&](Vec logit, int j, float* to) __attribute__((always_inline)) {
    const Vec t = FINITE ? fms(logit, log2e, vshift) : reachable((logit - vbase) * log2e), p = exp2(t);
    d[j] = d[j] + p;
    s[j] = fma(t, p, s[j]);
    m[j] = max(logit, m[j]);  // NaN is dropped here and comes back through the sums
    if (KEEP) store(to, p);
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int64_t line = 0; line < static_cast<int64_t>(4 * W * sizeof(T)); line += 64)
      prefetch_l2(reinterpret_cast<const char*>(z + i) + line + AHEAD);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add(load(z + i + j * W), j, e + i + j * W);
  }
  // Past the last column stands a logit so low that its exponential is 0, but not -inf.
  for (; i < n; i += W) {
    const Vec tail = load_first(z + i, n - i, FINITE ? about - 200.f : -INF);
    add(tail, 0, e + i);
  }
  const double log2e_used = static_cast<double>(LOG2E), base = FINITE ? shift / log2e_used : about;
  return {sum((d[0] + d[1]) + (d[2] + d[3])), sum((s[0] + s[1]) + (s[2] + s[3])) / log2e_used, base,
          maximum(max(max(m[0], m[1]), max(m[2], m[3])))};
}

template <bool KEEP, class T>
Partial partial(const T* z, int64_t n, float* e) {
  constexpr int W = Vec::W;
  Vec first = splat(-INF);
  for (int64_t i = 0; i < 4 * W && i < n; i += W) first = max(load_first(z + i, n - i, -INF), first);
  const float base = maximum(first);
  if (base > -LARGE && base < LARGE) {
    const Partial p = exponentials<true, KEEP>(z, n, base, e);
    if (p.m - base <= REACH && p.s == p.s) return p;  // -inf and NaN make s NaN
  }
  // A higher maximum further on, or -inf, +inf or NaN among the logits.
  float m = base;
  for (int64_t i = 0; i < n; i += W) m = maximum(max(load_first(z + i, n - i, -INF), splat(m)));
  return exponentials<false, KEEP>(z, n, m == -INF ? 0.f : m, e);
}

template <class T>
int64_t first_equal(const T* z, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += Vec::W) {
    const uint32_t hit = bits(load_first(z + i, n - i, NaN) == splat(value));
    if (hit) return i + __builtin_ctz(hit);
  }
  return -1;
}

// What one row needs besides its logits; made once per thread.
struct WideScratch {
  Scratch<Partial> partials;         // (K, blocks)
  Scratch<float> inverse;            // (K, blocks): e * inverse is the model's probability
  Scratch<float> scale;              // (K, blocks): e * scale is its share of the mixture's
  Scratch<float> e;                  // (blocks, BLOCK): e^(z - base) of the model at hand, 0 beyond the last column
  Scratch<float> mixed;              // (blocks, BLOCK): the mixture of the models before it
  Scratch<RowModel> models;          // (K,)
  Scratch<MixturePartial> mixtures;  // (blocks,)
  WideScratch(int64_t K, int64_t blocks)
      : partials(K * blocks),
        inverse(K * blocks),
        scale(K * blocks),
        e(blocks * BLOCK),
        mixed(K > 1 ? blocks * BLOCK : 0),
        models(K),
        mixtures(blocks) {}
};

template <class T>
class WideRow {
 public:
  WideRow(const EnsembleArgs& args, int64_t row, int32_t team, WideScratch& scratch)
      : a(args),
        n(row),
        threads(team),
        blocks((args.C + BLOCK - 1) / BLOCK),
        label(args.labels ? args.labels[row] : -1),
        s(scratch) {}

  void run() {
    const uint32_t mixture_fields = 1u << MARGIN | 1u << EL2N | 1u << ENTROPY | 1u << MUTUAL_INFORMATION |
                                    1u << CONFIDENCE | (a.K > 1 ? 1u << PREDICTION : 0u);
    const bool mixture = a.fields & mixture_fields;
    if (!(mixture ? sweep_models<true>() : sweep_models<false>())) return write_nan(a, n);
    write_model_fields();
    if (mixture) {
      // The entropy of one model's mixture is that model's: no logarithms needed.
      a.K > 1 && (a.wants(ENTROPY) || a.wants(MUTUAL_INFORMATION)) ? sweep_mixture<true>() : sweep_mixture<false>();
      write_mixture_fields();
    }
    if (a.wants(PREDICTION) && a.K == 1) a.prediction[n] = s.models[0].top;
  }

 private:
  int64_t columns(int64_t b) const { return a.C - b * BLOCK < BLOCK ? a.C - b * BLOCK : BLOCK; }

  // Block b of model k's row: in place if its columns are adjacent, else gathered into `buffer`.
  const T* block(int64_t k, int64_t b, T* buffer) const {
    const int64_t stride = a.col_strides[k];
    const T* p = row_pointer<T>(a, k, n) + b * BLOCK * stride;
    if (stride == 1) return p;
    for (int64_t i = 0; i < columns(b); ++i) buffer[i] = p[i * stride];
    return buffer;
  }

  // Each model's own softmax; false if one of them is undefined. KEEP: and the mixture of all but the last.
  template <bool KEEP>
  bool sweep_models() {
    bool defined = true;
    for (int64_t k = 0; k < a.K; ++k) {
      parallel(blocks, threads > 1 ? 4 : blocks, threads, [&](Pieces& pieces) {
        T buffer[BLOCK];
        for (int64_t begin, end; pieces.next(begin, end);)
          for (int64_t b = begin; b < end; ++b) {
            if (KEEP && k > 0) mix_in(k - 1, b);
            s.partials[k * blocks + b] =
                partial<KEEP>(block(k, b, buffer), columns(b), KEEP ? s.e.p + b * BLOCK : nullptr);
          }
      });
      defined = merge(k) && defined;
    }
    return defined;
  }

  // Adds model k's share of block b, whose e is in scratch. In whole steps: what is past the last column is not looked at.
  void mix_in(int64_t k, int64_t b) const {
    const float* e = s.e.p + b * BLOCK;
    float* p = s.mixed.p + b * BLOCK;
    const Vec scale = splat(s.scale[k * blocks + b]);
    const int64_t width = columns(b);
    for (int64_t i = 0; i < width; i += 4 * Vec::W)
#pragma GCC unroll 4
      for (int64_t j = i; j < i + 4 * Vec::W; j += Vec::W)
        store(p + j, k == 0 ? load(e + j) * scale : fma(load(e + j), scale, load(p + j)));
  }

  bool merge(int64_t k) {
    const Partial* p = s.partials.p + k * blocks;
    float* inverse = s.inverse.p + k * blocks;
    float m = -INF;
    for (int64_t b = 0; b < blocks; ++b) m = p[b].m > m ? p[b].m : m;
    if (!(m > -INF && m < INF)) return false;
    double d = 0, t = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      // A block of nothing but -inf has sums of 0 relative to a base that means nothing.
      const double shift = p[b].m == -INF ? 0 : p[b].base - m, r = std::exp(shift);
      d += r * p[b].d;
      t += r * (p[b].s + shift * p[b].d);
      inverse[b] = static_cast<float>(r);
    }
    if (!(d > 0)) return false;  // NaN
    for (int64_t b = 0; b < blocks; ++b) {
      inverse[b] = static_cast<float>(inverse[b] / d);
      s.scale[k * blocks + b] = static_cast<float>(a.weights[k] * inverse[b]);
    }
    RowModel& out = s.models[k];
    const double log_d = std::log(d);
    out.entropy = log_d - t / d;
    out.m = m;
    out.scale = static_cast<float>(a.weights[k] / d);
    T buffer[BLOCK];
    out.top = -1;
    for (int64_t b = 0; out.top < 0; ++b)
      if (p[b].m == m) out.top = b * BLOCK + first_equal(block(k, b, buffer), columns(b), m);
    if (label >= 0) {
      const double zy = to_float(row_pointer<T>(a, k, n)[label * a.col_strides[k]]);
      out.log_py = (zy - m) - log_d;
      out.rest = (d - std::exp(zy - m)) / d;
    }
    return true;
  }

  void put(Field f, double value) {
    if (a.wants(f)) a.out[f * a.N + n] = static_cast<float>(value);
  }

  void write_model_fields() {
    const RowModel* models = s.models.p;
    double mean_nll = 0, agreement = 0, votes = 0, highest = -INF, sum = 0;
    expected_entropy = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      const double w = a.weights[k];
      expected_entropy += w * models[k].entropy;
      if (!(w > 0)) continue;
      double share = 0;  // of the vote for this model's choice: H = -sum_k w_k log(share of k's choice)
      for (int64_t j = 0; j < a.K; ++j) share += models[j].top == models[k].top ? a.weights[j] : 0;
      votes -= w * std::log(share < 1 ? share : 1);
      if (label < 0) continue;
      mean_nll -= w * models[k].log_py;
      agreement += models[k].top == label ? w : 0;
      highest = models[k].log_py > highest ? models[k].log_py : highest;
    }
    for (int64_t k = 0; label >= 0 && highest > -INF && k < a.K; ++k)
      if (a.weights[k] > 0) sum += a.weights[k] * std::exp(models[k].log_py - highest);
    put(NLL, label < 0 ? NaN : highest == -INF ? INF : -(highest + std::log(sum)));
    put(MEAN_NLL, label < 0 ? NaN : mean_nll);
    put(AGREEMENT, label < 0 ? NaN : agreement);
    put(EXPECTED_ENTROPY, expected_entropy);
    put(VOTE_ENTROPY, votes);
  }

  // Probabilities of the mixture in U vectors of columns from i on, in block b: the last model is still to be mixed in.
  template <int U>
  ASSAY_INLINE void mixture(int64_t b, int64_t i, Vec (&p)[U]) const {
    const float *e = s.e.p + b * BLOCK + i, *before = s.mixed.p + b * BLOCK + i;
    const Vec scale = splat(s.scale[(a.K - 1) * blocks + b]);
#pragma GCC unroll 4
    for (int j = 0; j < U; ++j) {
      const Vec share = load(e + j * Vec::W);
      p[j] = a.K == 1 ? share * scale : fma(share, scale, load(before + j * Vec::W));
    }
  }

  // This sweep leaves the memory bus idle: ask for the row that this thread most likely takes next.
  ASSAY_INLINE void prefetch_next_row(int64_t column, int64_t count) const {
    if (n + 1 >= a.N) return;
    for (int64_t k = 0; k < a.K; ++k) {
      const char* p = reinterpret_cast<const char*>(row_pointer<T>(a, k, n + 1) + column);
      for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) prefetch_l2(p + byte);
    }
  }

  template <bool LOG>
  void sweep_mixture() {
    parallel(blocks, threads > 1 ? 4 : blocks, threads, [&](Pieces& pieces) {
      for (int64_t begin, end; pieces.next(begin, end);)
        for (int64_t b = begin; b < end; ++b) s.mixtures[b] = mixture_block<LOG>(b);
    });
  }

  template <bool LOG>
  MixturePartial mixture_block(int64_t b) {
    constexpr int W = Vec::W, U = 4;
    const int64_t y = label - b * BLOCK;
    const Vec zero = splat(0.f);
    Vec entropy = zero, squares = zero, top_other = zero;
    float py = 0;
    for (int64_t i = 0; i < columns(b); i += U * W) {
      const int64_t vectors = (columns(b) - i + W - 1) / W;
      prefetch_next_row(b * BLOCK + i, U * W);
      Vec p[U];
      if (vectors >= U) {
        mixture(b, i, p);
      } else {
        for (int64_t j = 0; j < U; ++j) {
          Vec one[1] = {zero};
          if (j < vectors) mixture(b, i + j * W, one);
          p[j] = one[0];
        }
      }
      if (LOG) {
#pragma GCC unroll 4
        for (int j = 0; j < U; ++j) entropy = entropy - p[j] * log(p[j]);
      }
      if (y >= i && y < i + U * W) {  // take the label's column out
        float lanes[U * W];
        for (int j = 0; j < U; ++j) store(lanes + j * W, p[j]);
        py = lanes[y - i];
        lanes[y - i] = 0.f;
        for (int j = 0; j < U; ++j) p[j] = load(lanes + j * W);
      }
#pragma GCC unroll 4
      for (int j = 0; j < U; ++j) {
        squares = fma(p[j], p[j], squares);
        top_other = max(p[j], top_other);
      }
    }
    if (y >= 0 && y < BLOCK) p_label = py;
    const float other = maximum(top_other);
    return {sum(entropy), sum(squares), 0, other, other > py ? other : py};
  }

  void write_mixture_fields() {
    double entropy = 0, rest = 0, squares = 0;
    float top_other = 0, top = 0;
    for (int64_t k = 0; label >= 0 && k < a.K; ++k) rest += a.weights[k] * s.models[k].rest;
    for (int64_t b = 0; b < blocks; ++b) {
      const MixturePartial& x = s.mixtures[b];
      entropy += x.entropy;
      squares += x.squares;
      top_other = x.top_other > top_other ? x.top_other : top_other;
      top = x.top > top ? x.top : top;
    }
    if (a.K == 1) entropy = expected_entropy;
    put(MARGIN, label < 0 ? NaN : p_label - top_other);
    put(EL2N, label < 0 ? NaN : std::sqrt(rest * rest + squares));
    put(ENTROPY, entropy);
    put(CONFIDENCE, top);
    if (a.wants(MUTUAL_INFORMATION)) {
      double information = entropy - expected_entropy;
      if (a.K > 1 && information < SMALL_INFORMATION * (1 + entropy)) information = divergence();
      put(MUTUAL_INFORMATION, information);
    }
    if (a.wants(PREDICTION) && a.K > 1) a.prediction[n] = mixture_argmax(top);
  }

  // sum_k w_k KL(p_k || p), term by term never negative: w_k p (q log q - q + 1) with q = p_k / p
  double divergence() {
    parallel(blocks, threads > 1 ? 4 : blocks, threads, [&](Pieces& pieces) {
      for (int64_t begin, end; pieces.next(begin, end);)
        for (int64_t b = begin; b < end; ++b) s.mixtures[b].divergence = divergence_block(b);
    });
    double information = 0;
    for (int64_t b = 0; b < blocks; ++b) information += s.mixtures[b].divergence;
    return information;
  }

  // The models' exponentials are gone by now, and taken again.
  double divergence_block(int64_t b) const {
    constexpr int W = Vec::W;
    const Vec one = splat(1.f), zero = splat(0.f);
    const int64_t width = columns(b);
    T buffer[BLOCK];
    float e[BLOCK], p[BLOCK], reciprocal[BLOCK], terms[BLOCK];
    for (int64_t i = 0; i < width; i += W) {
      Vec now[1];
      mixture(b, i, now);
      store(p + i, now[0]);
      store(reciprocal + i, select(now[0] < splat(1e-37f), zero, one / now[0]));
    }
    for (int64_t k = 0; k < a.K; ++k) {
      partial<true>(block(k, b, buffer), width, e);
      const Vec inverse = splat(s.inverse[k * blocks + b]), w = splat(static_cast<float>(a.weights[k]));
      for (int64_t i = 0; i < width; i += W) {
        const Vec q = load(e + i) * inverse * load(reciprocal + i), so_far = k == 0 ? zero : load(terms + i);
        store(terms + i, fma(w, fma(q, log(q), one - q), so_far));
      }
    }
    Vec total = zero;
    for (int64_t i = 0; i < width; i += W) total = fma(load(p + i), max(load(terms + i), zero), total);
    return sum(total);
  }

  // The first column whose probability is the highest. Blocks have bases of their own, so that equal columns of two
  // blocks may differ in the last bits: if several come close, they are compared again relative to the row's maximum.
  int64_t mixture_argmax(float top) const {
    constexpr float NEARLY = 1 - 0x1p-19f;
    int64_t close = 0, block_of_top = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      close += !(s.mixtures[b].top < top * NEARLY);
      if (s.mixtures[b].top == top) block_of_top = b;
    }
    if (close == 1) return first_in_block(block_of_top, top);
    Scratch<T> buffer(BLOCK);
    Scratch<float> sums(BLOCK);
    float best = -1;
    int64_t arg = -1;
    for (int64_t b = 0; b < blocks; ++b) {
      if (s.mixtures[b].top < top * NEARLY) continue;
      const int64_t width = columns(b);
      for (int64_t k = 0; k < a.K; ++k) {
        const T* z = block(k, b, buffer.p);
        const Vec m = splat(s.models[k].m), scale = splat(s.models[k].scale);
        for (int64_t i = 0; i < width; i += Vec::W) {
          const Vec so_far = k == 0 ? splat(0.f) : load(sums.p + i);
          store(sums.p + i, fma(exp(load_first(z + i, width - i, -INF) - m), scale, so_far));
        }
      }
      for (int64_t i = 0; i < width; ++i)
        if (sums[i] > best) best = sums[i], arg = b * BLOCK + i;
    }
    return arg;
  }

  // The first column of block b whose probability is `top`, which one has.
  int64_t first_in_block(int64_t b, float top) const {
    for (int64_t i = 0;; i += Vec::W) {
      Vec p[1];
      mixture(b, i, p);
      const uint32_t hit = bits(p[0] == splat(top));
      if (hit) return b * BLOCK + i + __builtin_ctz(hit);
    }
  }

  const EnsembleArgs& a;
  const int64_t n;
  const int32_t threads;
  const int64_t blocks, label;
  WideScratch& s;
  double expected_entropy = 0;
  float p_label = 0;
};

template <class T>
void wide(const EnsembleArgs& a) {
  constexpr int64_t ROWS_PER_PIECE = 4;
  // Rows are shared out if there are enough of them to go round, else the blocks of each row are.
  const bool many_rows = a.N >= 2 * ROWS_PER_PIECE * static_cast<int64_t>(a.threads);
  const int32_t row_team = many_rows ? a.threads : 1, block_team = many_rows ? 1 : a.threads;
  parallel(a.N, ROWS_PER_PIECE, row_team, [&](Pieces& pieces) {
    WideScratch scratch(a.K, (a.C + BLOCK - 1) / BLOCK);
    for (int64_t begin, end; pieces.next(begin, end);) {
      for (int64_t n = begin; n < end; ++n) {
        if (a.labels && a.labels[n] == a.ignore_index) {
          write_nan(a, n);
        } else {
          WideRow<T>(a, n, block_team, scratch).run();
        }
      }
    }
  });
}
