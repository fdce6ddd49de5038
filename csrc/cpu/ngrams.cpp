// Hashes of the n-grams of texts, how often which features are among them, and the least of hashes.
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace assay::ASSAY_ISA {

namespace {

constexpr int64_t ROWS = 32;  // handed out at a time

// With as many features at most, and as many for an n-gram, each has a counter of its own: 4 MB, zeroed once a call.
constexpr int64_t MOST_COUNTERS = int64_t{1} << 20, COUNTERS_PER_NGRAM = 4;

int64_t tokens_in(const Texts& texts, int64_t row) {
  uint8_t unread[BLOCK];
  int64_t count = 0;
  for (Reader reader(texts, row); reader.more();)
    count += reader.at_ascii() ? __builtin_popcountll(reader.ascii(unread).begins)
                               : static_cast<int64_t>(reader.character(unread).begins);
  return count;
}

ASSAY_INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

ASSAY_INLINE int64_t bucket_of(const CountArgs& a, uint64_t hash) {
  return static_cast<int64_t>((hash >> 32) * static_cast<uint64_t>(a.buckets) >> 32);
}

// The place of a hash among the terms, or their number. Few begin with the same bits: one comparison of a vector.
ASSAY_INLINE int64_t term_of(const CountArgs& a, uint64_t hash) {
  static_assert(Wide::L <= CountArgs::PADDING);
  const Wide wanted = wide(hash);
  const uint64_t first = a.bits ? hash >> (64 - a.bits) : 0;
  int64_t i = a.starts[first];
  const int64_t end = a.starts[first + 1];
  uint32_t same = equal(load(a.terms + i), wanted);
  while (__builtin_expect(end - i > Wide::L, 0) && !same) same = equal(load(a.terms + (i += Wide::L)), wanted);
  i = same ? i + __builtin_ctz(same) : a.count;
  return i < a.count ? i : a.count;  // a hash may be what the terms are padded with
}

// How often a row has which features: a counter for each feature, and those above 0 in the order in which they came.
class Counters {
 public:
  // A row has `most` features at most. The counter of what is no feature is never 0.
  Counters(int64_t features, int64_t most)
      : none_(features), counts_(features + 1, Size::LARGE), came_(most + 1, Size::LARGE) {
    std::memset(counts_.p, 0, static_cast<size_t>(features) * sizeof(uint32_t));
  }
  void begin(int64_t*, int64_t*, int64_t) {
    n_ = 0;
    counts_[none_] = 1;
  }
  ASSAY_INLINE void add(int64_t feature) {
    came_[n_] = static_cast<uint32_t>(feature);
    n_ += counts_[feature]++ == 0;
  }
  int64_t finish(int64_t* features, int64_t* counts) {
    for (int64_t i = 0; i < n_; ++i) {
      const uint32_t feature = came_[i];
      features[i] = feature;
      counts[i] = counts_[feature];
      counts_[feature] = 0;
    }
    return n_;
  }

 private:
  const int64_t none_;
  Scratch<uint32_t> counts_, came_;
  int64_t n_ = 0;
};

// The same where features are many: a hash table of their places in the row, plus one.
class Places {
 public:
  Places(int64_t features, int64_t most) : none_(features), places_(slots(most), Size::LARGE) {}

  // A row that has so many features at most.
  void begin(int64_t* features, int64_t* counts, int64_t most) {
    features_ = features;
    counts_ = counts;
    n_ = 0;
    const int64_t size = slots(most);
    shift_ = 64 - __builtin_ctzll(static_cast<uint64_t>(size));
    std::memset(places_.p, 0, static_cast<size_t>(size) * sizeof(uint32_t));
  }
  ASSAY_INLINE void add(int64_t feature) {
    if (feature == none_) return;
    const uint64_t mask = ~uint64_t{0} >> shift_;
    uint64_t slot = static_cast<uint64_t>(feature) * WEYL >> shift_;
    for (; places_[static_cast<int64_t>(slot)] != 0; slot = (slot + 1) & mask)
      if (const uint32_t place = places_[static_cast<int64_t>(slot)] - 1; features_[place] == feature) {
        ++counts_[place];
        return;
      }
    features_[n_] = feature;
    counts_[n_] = 1;
    places_[static_cast<int64_t>(slot)] = ++n_;
  }
  int64_t finish(int64_t*, int64_t*) { return n_; }

 private:
  static int64_t slots(int64_t most) {
    int64_t size = 16;
    while (size < 2 * most) size *= 2;
    return size;
  }

  const int64_t none_;
  Scratch<uint32_t> places_;
  int64_t *features_ = nullptr, *counts_ = nullptr;
  uint32_t n_ = 0;
  int shift_ = 60;
};

// The features of some rows, one row after the other from `to` on; where they end.
template <class Counter>
int64_t count_rows(const Texts& texts, const CountArgs& a, const NGrams& own, int64_t begin, int64_t end, int64_t to,
                   Counter& counter) {
  for (int64_t r = begin; r < end; ++r) {
    counter.begin(a.features + to, a.counts + to, a.places[r + 1] - a.places[r]);
    if (a.buckets) {
      ngrams(texts, r, own, [&](uint64_t hash) { counter.add(bucket_of(a, hash)); });
    } else {
      ngrams(texts, r, own, [&](uint64_t hash) { counter.add(term_of(a, hash)); });
    }
    to += a.found[r] = counter.finish(a.features + to, a.counts + to);
  }
  return to;
}

// A piece begins where there is room for all before it, or, on one thread, where they end. False if a thread cannot have
// its counter.
template <class Make>
bool count_all(const Texts& texts, const CountArgs& a, const Make& make) {
  bool enough = true;
  parallel(texts.rows, ROWS, texts.threads, [&](Pieces& pieces) {
    try {
      const NGrams own(1, a.order, a.seed);
      auto counter = make();
      for (int64_t begin, end, to = 0; pieces.next(begin, end);)
        to = count_rows(texts, a, own, begin, end, texts.threads > 1 ? a.places[begin] : to, counter);
    } catch (const OutOfMemory&) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    }
  });
  return enough;
}

// To the left only, so that no piece overwrites one that is to come.
void close_gaps(const CountArgs& a, int64_t rows) {
  int64_t to = 0;
  for (int64_t begin = 0; begin < rows; begin += ROWS) {
    int64_t count = 0;
    for (int64_t r = begin; r < rows && r < begin + ROWS; ++r) count += a.found[r];
    const int64_t from = a.places[begin];
    if (count != 0 && from != to) {
      std::memmove(a.features + to, a.features + from, static_cast<size_t>(count) * sizeof(int64_t));
      std::memmove(a.counts + to, a.counts + from, static_cast<size_t>(count) * sizeof(int64_t));
    }
    to += count;
  }
}

}  // namespace

void count_tokens(const Texts& texts, int64_t* counts) {
  parallel(texts.rows, ROWS, texts.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) counts[r] = tokens_in(texts, r);
  });
}

void hash_ngrams(const Texts& texts, const HashArgs& a) {
  parallel(texts.rows, ROWS, texts.threads, [&](Pieces& pieces) {
    const NGrams own(a.least, a.order, a.seed);
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) {
        uint64_t* to = a.out + a.places[r];
        ngrams(texts, r, own, [&](uint64_t hash) { *to++ = hash; });
      }
  });
}

bool count_ngrams(const Texts& texts, const CountArgs& a) {
  const int64_t features = a.buckets ? a.buckets : a.count, room = a.places[texts.rows];
  int64_t most = 0, longest = 0;
  for (int64_t r = 0; r < texts.rows; ++r) {
    const int64_t own = a.places[r + 1] - a.places[r], bytes = offset(texts, r + 1) - offset(texts, r);
    most = own > most ? own : most;
    longest = bytes > longest ? bytes : longest;
  }
  const bool countable = longest < (int64_t{1} << 32) / (a.order + 1);  // in 32 bits
  const bool enough = countable && features <= MOST_COUNTERS && features <= COUNTERS_PER_NGRAM * room
                          ? count_all(texts, a, [&] { return Counters(features, most); })
                          : count_all(texts, a, [&] { return Places(features, most); });
  if (enough && texts.threads > 1) close_gaps(a, texts.rows);
  return enough;
}

void weighted_sums(const SumsArgs& a) {
  parallel(a.rows, ROWS, a.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r)
        for (int64_t t = 0; t < a.targets; ++t) {
          double sum = 0;
          for (int64_t i = a.offsets[r]; i < a.offsets[r + 1]; ++i)
            sum += a.values[i] * a.weights[a.features[i] * a.targets + t];
          a.out[r * a.targets + t] = sum;
        }
  });
}

void least_hashes(const LeastArgs& a) {
  parallel(a.rows, ROWS, a.threads, [&](Pieces& pieces) {
    const uint32_t *__restrict const multipliers = a.multipliers, *__restrict const addends = a.addends;
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) {
        uint32_t* __restrict const least = a.out + r * a.count;
        std::memset(least, 0xFF, static_cast<size_t>(a.count) * sizeof(uint32_t));
        for (int64_t i = a.places[r]; i < a.places[r + 1]; i += 4) {  // the last may come again
          const auto x = [&](int64_t j) {
            const int64_t last = a.places[r + 1] - 1;
            return static_cast<uint32_t>(a.hashes[i + j < last ? i + j : last] >> 32);
          };
          const uint32_t x0 = x(0), x1 = x(1), x2 = x(2), x3 = x(3);
          for (int64_t k = 0; k < a.count; ++k) {
            const uint32_t m = multipliers[k], b = addends[k];
            least[k] = smaller(smaller(smaller(m * x0 + b, m * x1 + b), smaller(m * x2 + b, m * x3 + b)), least[k]);
          }
        }
      }
  });
}

}  // namespace assay::ASSAY_ISA
