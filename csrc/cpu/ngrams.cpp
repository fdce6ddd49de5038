// Texts -> tokens -> 64-bit hashes of n-grams. ops/ngrams.py has the definition, which this equals bit for bit.
#include "../ngrams.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"

namespace assay {
namespace {

enum Class : uint32_t { SPACE, WORD, MARK, ALONE };  // ALONE: a letter that is a word by itself

// The tables of Texts, read.
struct Reader : Texts {
  explicit Reader(const Texts& texts) : Texts(texts) {}
  uint32_t kind(uint32_t code) const {
    const uint32_t kind = characters[code] >> 24;
    return kind == MARK && !punctuation ? static_cast<uint32_t>(SPACE) : kind;
  }
  uint32_t lower(uint32_t code) const { return characters[code] & 0xFFFFFF; }
};

constexpr int64_t ROWS = 32;  // handed out at a time
constexpr int64_t MOST_ORDER = 16;

uint64_t mix(uint64_t x) {  // SplitMix64's finaliser
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

struct Character {
  uint32_t code, length;  // of bytes; code 0 (a control character) for a byte that begins no character
};

bool continues(uint8_t c) { return (c & 0xC0) == 0x80; }

// Of a byte >= 0x80: well-formed UTF-8 as Unicode defines it (table 3-7), else one byte that is no character.
Character decode(const uint8_t* p, const uint8_t* end) {
  const uint32_t c = p[0];
  const int64_t left = end - p;
  if (c >= 0xC2 && c < 0xE0 && left > 1 && continues(p[1])) return {(c & 0x1F) << 6 | (p[1] & 0x3Fu), 2};
  if (c >= 0xE0 && c < 0xF0 && left > 2 && continues(p[1]) && continues(p[2])) {
    const uint32_t code = (c & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {code, 3};
  }
  if (c >= 0xF0 && c < 0xF5 && left > 3 && continues(p[1]) && continues(p[2]) && continues(p[3])) {
    const uint32_t code = (c & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
    if (code >= 0x10000 && code <= 0x10FFFF) return {code, 4};
  }
  return {0, 1};
}

constexpr uint64_t ONES = 0x0101010101010101u, HIGH = 0x80 * ONES;

// Eight bytes, the first in the lowest bits.
uint64_t load(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  x = __builtin_bswap64(x);
#endif
  return x;
}

// Of bytes below 0x80: 0x80 where one is from `first` to `last`.
uint64_t between(uint64_t x, uint64_t first, uint64_t last) {
  return (x + (0x80 - first) * ONES) & ~(x + (0x7F - last) * ONES) & HIGH;
}

// Masks of eight bytes: 0x80 for each that is a capital, a word's, a mark, a blank; 0 for those that are not ASCII.
struct Eight {
  Eight(uint64_t bytes, bool punctuation) {
    const uint64_t x = bytes & ~HIGH, ascii = ~bytes & HIGH;
    capitals = between(x, 'A', 'Z') & ascii;
    words = (capitals | between(x, 'a', 'z') | between(x, '0', '9') | between(x, '_', '_')) & ascii;
    marks = punctuation ? between(x, '!', '~') & ~words & ascii : 0;
    blanks = ascii & ~words & ~marks;
  }
  uint64_t capitals, words, marks, blanks;
};

// How many of the first bytes have the mask.
uint32_t leading(uint64_t mask) {
  const uint64_t others = ~mask & HIGH;
  return others ? static_cast<uint32_t>(__builtin_ctzll(others)) / 8 : 8;
}

// The hash of the token at hand: its bytes in words of eight, the last filled up with zeros.
class Hash {
 public:
  explicit Hash(uint64_t start) : start_(start), h_(start) {}

  // The lowest `count` < 8 bytes of x; the others are zero.
  void few(uint64_t x, uint32_t count) {
    word_ |= x << shift_;
    shift_ += 8 * count;
    if (shift_ < 64) return;
    h_ = mix(h_ ^ word_);
    shift_ -= 64;
    word_ = shift_ ? x >> (8 * count - shift_) : 0;
  }
  void eight(uint64_t x) {
    h_ = mix(h_ ^ (word_ | x << shift_));
    word_ = shift_ ? x >> (64 - shift_) : 0;
  }
  void character(uint32_t c) {
    if (c < 0x80) return few(c, 1);
    if (c < 0x800) return few((0xC0 | c >> 6) | (0x80 | (c & 0x3F)) << 8, 2);
    if (c < 0x10000) return few((0xE0 | c >> 12) | (0x80 | (c >> 6 & 0x3F)) << 8 | (0x80 | (c & 0x3F)) << 16, 3);
    few((0xF0 | c >> 18) | (0x80 | (c >> 12 & 0x3F)) << 8 | (0x80 | (c >> 6 & 0x3F)) << 16 |
            (0x80 | (c & 0x3F)) << 24, 4);
  }
  uint64_t finish() {
    const uint64_t h = mix(h_ ^ word_);
    h_ = start_;
    word_ = 0;
    shift_ = 0;
    return h;
  }

 private:
  uint64_t start_, h_, word_ = 0;
  uint32_t shift_ = 0;
};

// token(hash) for every token of a text, in order.
template <class F>
void tokens(const Reader& texts, int64_t row, uint64_t start, const F& token) {
  const uint8_t* p = texts.bytes + texts.offset(row);
  const uint8_t* end = texts.bytes + texts.offset(row + 1);
  Hash hash(start);
  uint32_t run = SPACE;
  const auto becomes = [&](uint32_t kind) {
    if (run != SPACE && (kind != run || kind == ALONE)) token(hash.finish());
    run = kind;
  };
  while (p < end) {
    if (end - p >= 8) {  // some blanks, and then some of a word or of a run of marks, as far as they are ASCII
      const uint32_t blanks = leading(Eight(load(p), texts.punctuation).blanks);
      if (blanks) becomes(SPACE);
      p += blanks;
      if (blanks == 8 || end - p < 8) continue;
      uint64_t x = load(p);  // anew, so that few words are cut in two
      const Eight own(x, texts.punctuation);
      x |= own.capitals >> 2;
      if ((own.words | own.marks) & 0x80) {
        const bool word = own.words & 0x80;
        const uint32_t count = leading(word ? own.words : own.marks);
        becomes(word ? WORD : MARK);
        p += count;
        count == 8 ? hash.eight(x) : hash.few(x & ((uint64_t{1} << 8 * count) - 1), count);
        continue;
      }
    }
    const Character c = *p < 0x80 ? Character{*p, 1} : decode(p, end);
    const uint32_t kind = texts.kind(c.code);
    becomes(kind);
    p += c.length;
    if (kind != SPACE) hash.character(texts.lower(c.code));
  }
  becomes(SPACE);
}

int64_t tokens_in(const Reader& texts, int64_t row) {
  const uint8_t* p = texts.bytes + texts.offset(row);
  const uint8_t* end = texts.bytes + texts.offset(row + 1);
  int64_t count = 0;
  uint32_t run = SPACE;
  while (p < end) {
    if (end - p >= 8) {
      const uint64_t x = load(p);
      if (!(x & HIGH)) {  // a token begins where the byte before is of another kind
        const Eight own(x, texts.punctuation);
        const uint64_t first = (own.words & ~(own.words << 8 | (run == WORD ? 0x80 : 0))) |
                               (own.marks & ~(own.marks << 8 | (run == MARK ? 0x80 : 0)));
        count += static_cast<int64_t>((first >> 7) * ONES >> 56);
        run = own.words >> 63 ? WORD : own.marks >> 63 ? MARK : SPACE;
        p += 8;
        continue;
      }
    }
    const Character c = *p < 0x80 ? Character{*p, 1} : decode(p, end);
    const uint32_t kind = texts.kind(c.code);
    count += kind != SPACE && (kind != run || kind == ALONE);
    run = kind;
    p += c.length;
  }
  return count;
}

// each(hash) for every n-gram of `least` to `order` tokens of a text: those that end at its first token, at its second,
// ..., the shortest first.
template <class F>
void ngrams(const Reader& texts, int64_t row, int64_t least, int64_t order, uint64_t start, const F& each) {
  if (order == 1) return tokens(texts, row, start, each);
  if (order == 2 && least == 1) {  // what nearly everybody asks for
    uint64_t before = 0;
    bool first = true;
    return tokens(texts, row, start, [&](uint64_t token) {
      each(token);
      if (!first) each(mix(before * 0x9E3779B97F4A7C15u + token));
      first = false;
      before = token;
    });
  }
  uint64_t ends[MOST_ORDER];  // of the n-grams of 1, 2, ... tokens that end at the token before
  int64_t there = 0;
  tokens(texts, row, start, [&](uint64_t token) {
    for (int64_t n = std::min(there, order - 1); n > 0; --n) ends[n] = mix(ends[n - 1] * 0x9E3779B97F4A7C15u + token);
    ends[0] = token;
    there = std::min(there + 1, order);
    for (int64_t n = least - 1; n < there; ++n) each(ends[n]);
  });
}

uint64_t start_of(uint64_t seed) { return mix(seed + 0x9E3779B97F4A7C15u); }

// The feature of a hash, or -1.
int64_t feature_of(const Features& f, uint64_t hash) {
  if (f.buckets) return static_cast<int64_t>((hash >> 32) * static_cast<uint64_t>(f.buckets) >> 32);
  const uint64_t first = f.bits ? hash >> (64 - f.bits) : 0;
  for (int64_t i = f.starts[first]; i < f.starts[first + 1]; ++i)
    if (f.terms[i] == hash) return i;
  return -1;
}

// Which features a row has had so far: a hash table of their places in the row, plus one.
class Seen {
 public:
  // Empty, with room for so many features. False if there is no memory for it.
  bool clear(int64_t most) {
    int64_t size = 16;
    shift_ = 60;
    for (; size < 2 * most; size *= 2) --shift_;
    if (size > room_) {
      places_.reset(new (std::nothrow) uint32_t[static_cast<size_t>(size)]);
      room_ = places_ ? size : 0;
    }
    if (places_) std::fill_n(places_.get(), size, 0u);
    return places_ != nullptr;
  }
  // The place of a feature among a row's `count`, which is `count` if it is new.
  uint32_t place(int64_t feature, const int64_t* features, uint32_t count) {
    const uint64_t mask = ~uint64_t{0} >> shift_;
    uint64_t slot = static_cast<uint64_t>(feature) * 0x9E3779B97F4A7C15u >> shift_;
    for (; places_[slot] != 0; slot = (slot + 1) & mask)
      if (features[places_[slot] - 1] == feature) return places_[slot] - 1;
    places_[slot] = count + 1;
    return count;
  }

 private:
  std::unique_ptr<uint32_t[]> places_;
  int64_t room_ = 0;
  uint32_t shift_ = 60;
};

}  // namespace

void count_tokens(const Texts& texts, int64_t* counts) {
  const Reader reader(texts);
  parallel(texts.rows, ROWS, texts.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) counts[r] = tokens_in(reader, r);
  });
}

void hash_ngrams(const Texts& texts, int64_t least, int64_t order, uint64_t seed, const int64_t* places, uint64_t* out) {
  const Reader reader(texts);
  const uint64_t start = start_of(seed);
  parallel(texts.rows, ROWS, texts.threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) {
        uint64_t* to = out + places[r];
        ngrams(reader, r, least, order, start, [&](uint64_t hash) { *to++ = hash; });
      }
  });
}

bool count_ngrams(const Texts& texts, int64_t order, uint64_t seed, const Features& f, const int64_t* places,
                  int64_t* features, int64_t* counts, int64_t* found) {
  const Reader reader(texts);
  const uint64_t start = start_of(seed);
  std::atomic<bool> enough{true};
  parallel(texts.rows, ROWS, texts.threads, [&](Pieces& pieces) {
    Seen seen;
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) {
        int64_t *const own = features + places[r], *const times = counts + places[r];
        uint32_t n = 0;
        if (!seen.clear(places[r + 1] - places[r])) {
          enough = false;
          return;
        }
        ngrams(reader, r, 1, order, start, [&](uint64_t hash) {
          const int64_t feature = feature_of(f, hash);
          if (feature < 0) return;
          const uint32_t place = seen.place(feature, own, n);
          if (place == n) {
            own[n] = feature;
            times[n++] = 0;
          }
          ++times[place];
        });
        found[r] = n;
      }
  });
  if (!enough) return false;
  int64_t to = 0;
  for (int64_t r = 0; r < texts.rows; ++r) {  // to the left only, so that no row overwrites one that is to come
    const size_t bytes = static_cast<size_t>(found[r]) * sizeof(int64_t);
    if (bytes != 0 && to != places[r]) {
      std::memmove(features + to, features + places[r], bytes);
      std::memmove(counts + to, counts + places[r], bytes);
    }
    to += found[r];
  }
  return true;
}

void least_hashes(const uint64_t* hashes, const int64_t* places, int64_t rows, const uint32_t* multipliers,
                  const uint32_t* addends, int64_t count, uint32_t* out, int32_t threads) {
  parallel(rows, ROWS, threads, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.next(begin, end);)
      for (int64_t r = begin; r < end; ++r) {
        uint32_t* const least = out + r * count;
        std::fill_n(least, count, ~uint32_t{0});
        for (int64_t i = places[r]; i < places[r + 1]; ++i) {
          const uint32_t x = static_cast<uint32_t>(hashes[i] >> 32);
          for (int64_t k = 0; k < count; ++k) least[k] = std::min(least[k], multipliers[k] * x + addends[k]);
        }
      }
  });
}

}  // namespace assay
