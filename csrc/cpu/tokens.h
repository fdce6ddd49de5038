// Texts -> tokens -> 64-bit hashes of n-grams. ops/ngrams.py has the definition, which this equals bit for bit.
//
// A text is read 64 characters at a time: masks say which are a word's and which are punctuation, and so where tokens
// begin and end. These are hashed a tile of a text at a time, from a copy in lower case where all of a token lies
// together; hashes of n-grams are made of the hashes of their tokens. What a branch would have to guess is selected.
#pragma once
#include <cstring>

#include "scratch.h"
#include "simd.h"

namespace assay::ASSAY_ISA {

enum Class : uint32_t { SPACE, WORD, MARK, ALONE };  // ALONE: a letter that is a word by itself

constexpr int64_t BLOCK = 64;           // characters, a bit of a mask each
constexpr int64_t TILE = 1024;          // bytes, after which what is complete is hashed
constexpr int64_t MOST = TILE + BLOCK;  // bytes of a tile, and so tokens
constexpr uint64_t WEYL = 0x9E3779B97F4A7C15u;

ASSAY_INLINE uint64_t mix(uint64_t x) {  // SplitMix64's finaliser
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

ASSAY_INLINE int64_t offset(const Texts& t, int64_t r) {
  return t.wide ? static_cast<const int64_t*>(t.offsets)[r] : static_cast<const int32_t*>(t.offsets)[r];
}

struct Character {
  uint32_t code, length;  // of bytes; code 0 (a control character) for a byte that begins no character
};

ASSAY_INLINE bool continues(uint8_t c) { return (c & 0xC0) == 0x80; }

// Well-formed UTF-8 as Unicode defines it (table 3-7), else one byte that is no character.
ASSAY_INLINE Character decode(const uint8_t* p, const uint8_t* end) {
  const uint32_t c = p[0];
  if (c < 0x80) return {c, 1};
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

// UTF-8 of a character, at most 4 bytes; how many.
ASSAY_INLINE int64_t encode(uint32_t c, uint8_t* to) {
  const auto tail = [&](int64_t i, uint32_t shift) { to[i] = static_cast<uint8_t>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return to[0] = static_cast<uint8_t>(c), 1;
  if (c < 0x800) return to[0] = static_cast<uint8_t>(0xC0 | c >> 6), tail(1, 0), 2;
  if (c < 0x10000) return to[0] = static_cast<uint8_t>(0xE0 | c >> 12), tail(1, 6), tail(2, 0), 3;
  return to[0] = static_cast<uint8_t>(0xF0 | c >> 18), tail(1, 12), tail(2, 6), tail(3, 0), 4;
}

ASSAY_INLINE uint64_t first_bits(int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; }

// Some characters, in lower case: how many bytes they take, and which of these begin a token, or come after one's last.
struct Step {
  int64_t bytes;
  uint64_t begins, ends;
};

class Reader {
 public:
  ASSAY_INLINE Reader(const Texts& texts, int64_t row)
      : texts_(texts),
        p_(texts.bytes + offset(texts, row)),
        end_(texts.bytes + offset(texts, row + 1)),
        last_(texts.bytes + offset(texts, texts.rows)) {}

  ASSAY_INLINE bool more() const { return p_ < end_; }

  // Whether more than one character of ASCII comes next. One alone, between others, is read as these are.
  ASSAY_INLINE bool at_ascii() const { return *p_ < 0x80 && (end_ - p_ == 1 || p_[1] < 0x80); }

  // What comes after the last: whether a token ends there.
  ASSAY_INLINE bool in_token() const { return run_ != SPACE; }

  // The next characters of ASCII, up to 64, at `lower`, where there is room for as many.
  ASSAY_INLINE Step ascii(uint8_t* lower) {
    uint8_t copy[BLOCK];
    const uint8_t* p = p_;
    if (last_ - p < BLOCK) {  // beyond the text lie others, but for the last
      std::memset(copy, 0, BLOCK);
      std::memcpy(copy, p, static_cast<size_t>(last_ - p));
      p = copy;
    }
    uint64_t words = 0, marks = 0, others = 0;
    for (int64_t i = 0; i < BLOCK; i += Bytes::N) {
      const Bytes x = load_bytes(p + i), low = lower_case(x);
      store(lower + i, low);
      words |= (between<'a', 'z'>(low) | between<'0', '9'>(x) | between<'_', '_'>(x)) << i;
      marks |= between<'!', '~'>(x) << i;
      others |= high_bits(x) << i;
    }
    int64_t size = end_ - p_ < BLOCK ? end_ - p_ : BLOCK;
    if (others) size = size < __builtin_ctzll(others) ? size : __builtin_ctzll(others);
    p_ += size;
    const uint64_t valid = first_bits(size);
    words &= valid;
    marks = texts_.punctuation ? marks & ~words & valid : 0;
    const uint64_t after_word = words << 1 | (run_ == WORD), after_mark = marks << 1 | (run_ == MARK);
    const Step step{size, (words & ~after_word) | (marks & ~after_mark),
                    ((~words & after_word) | (~marks & after_mark) | (run_ == ALONE)) & valid};
    run_ = static_cast<uint32_t>((words >> (size - 1) & 1) * WORD + (marks >> (size - 1) & 1) * MARK);
    return step;
  }

  // The next character, of up to 4 bytes: masks of one bit.
  ASSAY_INLINE Step character(uint8_t* lower) {
    const Character c = decode(p_, end_);
    p_ += c.length;
    const uint32_t entry = texts_.characters[c.code];
    const uint32_t kind = entry >> 24 == MARK && !texts_.punctuation ? static_cast<uint32_t>(SPACE) : entry >> 24;
    const bool edge = kind != run_ || kind == ALONE;
    const Step step{kind == SPACE ? 0 : encode(entry & 0xFFFFFF, lower), edge && kind != SPACE, edge && run_ != SPACE};
    run_ = kind;
    return step;
  }

 private:
  const Texts& texts_;
  const uint8_t *p_, *const end_, *const last_;
  uint32_t run_ = SPACE;
};

// What goes on from `h` with the last bytes of a token, in words of eight of which the last is filled up with one zero at
// least. Reads 16 bytes.
ASSAY_INLINE uint64_t hash_bytes(uint64_t h, const uint8_t* p, int64_t n) {
  for (; n >= 16; n -= 8, p += 8) h = mix(h ^ load_word(p));
  const bool two = n >= 8;
  const uint64_t ones = (uint64_t{1} << (8 * (n & 7))) - 1, a = load_word(p), b = load_word(p + 8);
  const uint64_t first = mix(h ^ (two ? a : a & ones)), second = mix(first ^ (b & ones));
  return two ? second : first;
}

// The tokens of a part of a text.
struct Tile {
  uint8_t bytes[MOST + 16];
  uint16_t begins[MOST], ends[MOST];
  int64_t size = 0, begun = 0, ended = 0;
  uint64_t first;  // what the first token's hash goes on from

  // The places of bits, from `at` on.
  ASSAY_INLINE static int64_t places(uint64_t bits, int64_t at, uint16_t* to) {
    int64_t n = 0;
    for (; bits != 0; bits &= bits - 1) to[n++] = static_cast<uint16_t>(at + __builtin_ctzll(bits));
    return n;
  }

  ASSAY_INLINE void fill(Reader& reader) {
    while (reader.more() && size < TILE) {
      if (reader.at_ascii()) {
        const Step step = reader.ascii(bytes + size);
        begun += places(step.begins, size, begins + begun);
        ended += places(step.ends, size, ends + ended);
        size += step.bytes;
      } else {
        const Step step = reader.character(bytes + size);
        begins[begun] = ends[ended] = static_cast<uint16_t>(size);
        begun += static_cast<int64_t>(step.begins);
        ended += static_cast<int64_t>(step.ends);
        size += step.bytes;
      }
    }
    if (!reader.more() && reader.in_token()) ends[ended++] = static_cast<uint16_t>(size);
  }

  ASSAY_INLINE void hash(uint64_t start, uint64_t* out) const {
    uint64_t from = first;
    for (int64_t i = 0; i < ended; ++i) {
      out[i] = hash_bytes(from, bytes + begins[i], ends[i] - begins[i]);
      from = start;
    }
  }

  // Begins a new tile, with what is left of a token that has not ended: less than eight bytes.
  ASSAY_INLINE void clear(uint64_t start) {
    const bool open = begun > ended;
    uint64_t h = ended ? start : first;
    int64_t from = open ? begins[ended] : size;
    for (; size - from >= 8; from += 8) h = mix(h ^ load_word(bytes + from));
    std::memmove(bytes, bytes + from, 8);
    size -= from;
    begins[0] = 0;
    begun = open;
    ended = 0;
    first = open ? h : start;
  }
};

// Which n-grams, and memory for the hashes of a tile: row n has those of n + 1 tokens, after that of the tile before.
struct NGrams {
  int64_t least, order;
  uint64_t start;
  Scratch<uint64_t> hashes;

  NGrams(int64_t least, int64_t order, uint64_t seed)
      : least(least), order(order), start(mix(seed + WEYL)), hashes(order * (MOST + 1)) {}

  uint64_t* of(int64_t n) const { return hashes.p + n * (MOST + 1); }
};

// each(hash) for every n-gram of a text: those that end at its first token, at its second, ..., the shortest first.
template <class F>
ASSAY_INLINE void ngrams(const Texts& texts, int64_t row, const NGrams& own, const F& each) {
  Reader reader(texts, row);
  Tile tile;
  tile.first = own.start;
  for (int64_t before = 0;;) {  // tokens before the tile, as far as n-grams reach
    tile.fill(reader);
    const int64_t count = tile.ended;
    tile.hash(own.start, own.of(0) + 1);
    for (int64_t n = 1; n < own.order; ++n) {
      const uint64_t *const last = own.of(0) + 1, *const others = own.of(n - 1);
      uint64_t* const whole = own.of(n) + 1;
      for (int64_t i = 0; i < count; ++i) whole[i] = mix(others[i] * WEYL + last[i]);
    }
    int64_t i = 1;
    for (; i <= count && before < own.order - 1; ++i, ++before)
      for (int64_t n = own.least - 1; n <= before; ++n) each(own.of(n)[i]);
    for (; i <= count; ++i)
      for (int64_t n = own.least - 1; n < own.order; ++n) each(own.of(n)[i]);
    if (!reader.more()) return;
    for (int64_t n = 0; n < own.order; ++n) own.of(n)[0] = own.of(n)[count];
    tile.clear(own.start);
  }
}

}  // namespace assay::ASSAY_ISA
