// N-grams of texts: plain structs of pointers and sizes, as in assay.h. One build of it: it is scalar code, and no
// instruction set makes it faster.
#pragma once
#include <cstdint>

namespace assay {

// Row r is bytes[offset(r)] to bytes[offset(r + 1)], as Arrow has strings.
struct Texts {
  const uint8_t* bytes;
  const void* offsets;  // (rows + 1,) int32, or int64 if `wide`
  bool wide;
  int64_t rows;
  const uint32_t* characters;  // (0x110000,): class << 24 | lower case; see ops/_characters.py
  bool punctuation;            // whether runs of it are tokens too
  int32_t threads;

  int64_t offset(int64_t r) const {
    return wide ? static_cast<const int64_t*>(offsets)[r] : static_cast<const int32_t*>(offsets)[r];
  }
};

// What becomes of a hash: a bucket of `buckets`, or the place of a term among `terms`, which are ascending and no two the
// same; those whose first `bits` bits are x lie from starts[x] up to starts[x + 1].
struct Features {
  int64_t buckets;        // 0: terms
  const uint64_t* terms;  // (count,)
  const int64_t* starts;  // (2^bits + 1,)
  int64_t bits;
};

// counts[r] = tokens of row r
void count_tokens(const Texts&, int64_t* counts);

// The hashes of all n-grams of `least` to `order` tokens, row r's at out[places[r]] to out[places[r + 1]].
void hash_ngrams(const Texts&, int64_t least, int64_t order, uint64_t seed, const int64_t* places, uint64_t* out);

// The features among them, those of row r in the order in which they first come, with how often they do. Rows are
// written at places[r], where there is room for as many as the row can have, and then moved together; found[r] is how
// many it has. False if a thread cannot have eight bytes, or sixteen, for each of a row's.
bool count_ngrams(const Texts&, int64_t order, uint64_t seed, const Features&, const int64_t* places, int64_t* features,
                  int64_t* counts, int64_t* found);

// out[r, k] = the least of multipliers[k] * ⌊h / 2^32⌋ + addends[k] mod 2^32 over row r's hashes h; 2^32 - 1 of none.
void least_hashes(const uint64_t* hashes, const int64_t* places, int64_t rows, const uint32_t* multipliers,
                  const uint32_t* addends, int64_t count, uint32_t* out, int32_t threads);

}  // namespace assay
