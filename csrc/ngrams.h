// N-grams of texts: plain structs of pointers and sizes, as in assay.h, which includes this.
#pragma once
#include <cstdint>

namespace assay {

// Row r is bytes[offsets[r]] to bytes[offsets[r + 1]], as Arrow has strings.
struct Texts {
  const uint8_t* bytes;
  const void* offsets;  // (rows + 1,) int32, or int64 if `wide`
  bool wide;
  int64_t rows;
  const uint32_t* characters;  // (0x110000,): class << 24 | lower case; see ops/_characters.py
  bool punctuation;            // whether runs of it are tokens too
  int32_t threads;
};

// The hashes of all n-grams of `least` to `order` tokens, row r's at out[places[r]] to out[places[r + 1]].
struct HashArgs {
  int64_t least, order;
  uint64_t seed;
  const int64_t* places;  // (rows + 1,)
  uint64_t* out;
};

// The features among the n-grams of up to `order` tokens, those of row r in the order in which they first come, with
// how often they do. A feature is a bucket of `buckets`, or the place of a term among `terms`, which are ascending and no
// two the same; those whose first `bits` bits are x lie from starts[x] up to starts[x + 1].
struct CountArgs {
  int64_t order;
  uint64_t seed;
  int64_t buckets;        // 0: terms
  const uint64_t* terms;  // (count + PADDING,): all bits of the last are 1
  int64_t count;
  const int64_t* starts;  // (2^bits + 1,)
  int64_t bits;
  const int64_t* places;  // (rows + 1,): between two there is room for as many features as the row can have
  int64_t* features;      // (places[rows],): row after row, without room between them
  int64_t* counts;        // likewise
  int64_t* found;         // (rows,): how many each row has

  static constexpr int64_t PADDING = 8;
};

// out[r, t] = Σ of value * weights[feature, t] over row r's features, in their order.
struct SumsArgs {
  const int64_t* offsets;  // (rows + 1,)
  int64_t rows;
  const int64_t* features;
  const double* values;
  const double* weights;  // (features, targets)
  int64_t targets;
  double* out;  // (rows, targets)
  int32_t threads;
};

// out[r, k] = the least of multipliers[k] * ⌊h / 2^32⌋ + addends[k] mod 2^32 over row r's hashes h; 2^32 - 1 of none.
struct LeastArgs {
  const uint64_t* hashes;
  const int64_t* places;  // (rows + 1,)
  int64_t rows;
  const uint32_t* multipliers;  // (count,)
  const uint32_t* addends;
  int64_t count;
  uint32_t* out;  // (rows, count)
  int32_t threads;
};

}  // namespace assay
