// Tokens, hashes and counts of texts on every instruction set, against their definition in plain C++: texts of all kinds
// of characters and of what is none, in arrays that end where they do.
#include <algorithm>
#include <cctype>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "assay.h"
#include "check.h"

using namespace assay;

namespace {

// The definition of ops/ngrams.py, a character at a time.
uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// A character that begins at p, and how many bytes it takes: 0 and 1 where none does.
std::pair<uint32_t, size_t> character_at(const std::vector<uint8_t>& text, size_t p) {
  const uint32_t c = text[p], sizes[] = {0xE0, 0xC0, 0xF0, 0xE0, 0xF8, 0xF0}, least[] = {0x80, 0x800, 0x10000};
  if (c < 0x80) return {c, 1};
  for (size_t more = 1; more <= 3; ++more) {
    if ((c & sizes[2 * more - 2]) != sizes[2 * more - 1] || p + more >= text.size()) continue;
    uint32_t code = c & ~sizes[2 * more - 2];
    bool good = true;
    for (size_t i = 1; i <= more; ++i) {
      good = good && (text[p + i] & 0xC0) == 0x80;
      code = code << 6 | (text[p + i] & 0x3Fu);
    }
    if (good && code >= least[more - 1] && code <= 0x10FFFF && (code < 0xD800 || code > 0xDFFF)) return {code, more + 1};
  }
  return {0, 1};
}

std::string utf8(uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

std::vector<std::string> tokens_of(const std::vector<uint8_t>& text, const std::vector<uint32_t>& characters,
                                   bool punctuation) {
  std::vector<std::string> tokens;
  uint32_t run = 0;
  for (size_t p = 0; p < text.size();) {
    const auto [code, size] = character_at(text, p);
    p += size;
    uint32_t kind = characters[code] >> 24;
    if (kind == 2 && !punctuation) kind = 0;
    if (kind != 0 && (kind != run || kind == 3)) tokens.emplace_back();
    if (kind != 0) tokens.back() += utf8(characters[code] & 0xFFFFFF);
    run = kind;
  }
  return tokens;
}

uint64_t hash_of(const std::string& token, uint64_t seed) {
  uint64_t h = mixed(seed + 0x9E3779B97F4A7C15u);
  for (size_t i = 0; i < token.size() + 1; i += 8) {
    uint64_t word = 0;
    for (size_t j = i; j < std::min(token.size(), i + 8); ++j)
      word |= uint64_t{static_cast<uint8_t>(token[j])} << 8 * (j - i);
    h = mixed(h ^ word);
  }
  return h;
}

std::vector<uint64_t> ngrams_of(const std::vector<std::string>& tokens, size_t least, size_t order, uint64_t seed) {
  std::vector<uint64_t> all, ends;
  for (const std::string& token : tokens) {
    const uint64_t last = hash_of(token, seed);
    for (uint64_t& h : ends) h = mixed(h * 0x9E3779B97F4A7C15u + last);
    ends.insert(ends.begin(), last);
    ends.resize(std::min(ends.size(), order));
    for (size_t n = least; n <= ends.size(); ++n) all.push_back(ends[n - 1]);
  }
  return all;
}

std::vector<uint32_t> some_characters() {
  std::vector<uint32_t> characters(0x110000);
  for (uint32_t c = 0; c < characters.size(); ++c) {
    const bool word = c >= 0x80 ? c % 7 != 0 : std::isalnum(static_cast<int>(c)) || c == '_';
    const uint32_t kind = c >= 0x80 && c % 5 == 0 ? 3 : word ? 1 : c < 0x80 && std::ispunct(static_cast<int>(c)) ? 2 : 0;
    const uint32_t other = c % 3 ? c : 0x800 + c % 99;  // some longer than they were, some shorter
    characters[c] = kind << 24 | (c < 0x80 ? static_cast<uint32_t>(std::tolower(static_cast<int>(c))) : other);
  }
  return characters;
}

std::vector<uint8_t> some_text(size_t longest, std::mt19937& rng) {
  const std::string pieces[] = {"a", "Z", "09", "_", " ", "  \n", ".", ",-", "\xc3\xa9", "\xc3\xa0", "\xe2\x82\xac",
                                "\xf0\x9f\x98\x80", "\xed\xa0\x80", "\xc0\xaf", "\xf4\x90\x80\x80", "\xf0\x9f"};
  std::vector<uint8_t> text;
  const size_t length = rng() % (longest + 1);
  while (text.size() < length) {
    const uint32_t choice = rng() % 64;
    const char other = static_cast<char>(choice < 56 ? rng() % 256 : 'x');
    std::string piece = choice < 48 ? pieces[choice % 16] : std::string(1, other);
    if (rng() % 16 == 0) piece = utf8(rng() % 0xD000);
    for (uint32_t times = rng() % 32 ? 1 : rng() % 100; times > 0; --times)
      text.insert(text.end(), piece.begin(), piece.end());
  }
  text.resize(length);
  return text;
}

// Texts in arrays that end where they do.
struct SomeTexts {
  std::vector<uint32_t> characters = some_characters();
  std::vector<std::vector<uint8_t>> rows;
  std::vector<uint8_t> bytes;
  std::vector<int32_t> narrow{0};
  std::vector<int64_t> offsets{0};

  SomeTexts(int64_t count, int64_t longest, std::mt19937& rng) {
    for (int64_t r = 0; r < count; ++r) {
      rows.push_back(some_text(static_cast<size_t>(longest), rng));
      bytes.insert(bytes.end(), rows.back().begin(), rows.back().end());
      offsets.push_back(static_cast<int64_t>(bytes.size()));
      narrow.push_back(static_cast<int32_t>(bytes.size()));
    }
    bytes.shrink_to_fit();
  }
  Texts read(bool wide, bool punctuation) const {
    return {bytes.data(), wide ? static_cast<const void*>(offsets.data()) : narrow.data(), wide,
            static_cast<int64_t>(rows.size()), characters.data(), punctuation, 2};
  }
};

void sums_case(const Kernels& kernels, const std::vector<int64_t>& found, const std::vector<int64_t>& features,
               const std::vector<int64_t>& counts) {
  std::vector<int64_t> offsets{0};
  for (int64_t n : found) offsets.push_back(offsets.back() + n);
  const std::vector<double> values(counts.begin(), counts.end());
  const int64_t most = features.empty() ? 0 : *std::max_element(features.begin(), features.end()) + 1;
  std::vector<double> weights(static_cast<size_t>(most) * 2), sums(found.size() * 2), expected(sums.size());
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<double>(i % 101) - 50;  // sums are exact
  kernels.weighted_sums({offsets.data(), static_cast<int64_t>(found.size()), features.data(), values.data(),
                         weights.data(), 2, sums.data(), 2});
  for (size_t i = 0; i < sums.size(); ++i)
    for (size_t j = static_cast<size_t>(offsets[i / 2]); j < static_cast<size_t>(offsets[i / 2 + 1]); ++j)
      expected[i] += values[j] * weights[static_cast<size_t>(features[j]) * 2 + i % 2];
  check(sums == expected, std::string("weighted sums: ") + kernels.isa);
}

// Features among the n-grams of each text: buckets, or the places of terms.
void counts_case(const Kernels& kernels, const Texts& texts, const std::vector<std::vector<uint64_t>>& hashes,
                 int64_t order, const std::vector<int64_t>& places, int64_t buckets, std::vector<uint64_t> terms) {
  const int64_t count = static_cast<int64_t>(terms.size());
  std::vector<int64_t> expected, expected_counts, expected_found;
  for (const std::vector<uint64_t>& row : hashes) {
    const size_t begin = expected.size();
    for (uint64_t hash : row) {
      const auto term = std::lower_bound(terms.begin(), terms.end(), hash);
      if (!buckets && (term == terms.end() || *term != hash)) continue;
      const int64_t bucket = static_cast<int64_t>((hash >> 32) * static_cast<uint64_t>(buckets) >> 32);
      expected.push_back(buckets ? bucket : term - terms.begin());
      const auto first = std::find(expected.begin() + static_cast<int64_t>(begin), expected.end(), expected.back());
      expected_counts.resize(expected.size());
      ++expected_counts[static_cast<size_t>(first - expected.begin())];
      if (first != expected.end() - 1) expected.pop_back(), expected_counts.pop_back();
    }
    expected_found.push_back(static_cast<int64_t>(expected.size() - begin));
  }
  const std::vector<int64_t> starts{0, count};
  terms.resize(terms.size() + CountArgs::PADDING, ~uint64_t{0});
  std::vector<int64_t> features(static_cast<size_t>(places.back())), counts(features), found(hashes.size());
  const CountArgs args{order, 5, buckets, terms.data(), count, starts.data(), 0, places.data(), features.data(),
                       counts.data(), found.data()};
  const std::string what = std::string(kernels.isa) + ", order " + std::to_string(order) + ", " +
                           std::to_string(buckets) + " buckets or " + std::to_string(count) + " terms";
  check(kernels.count_ngrams(texts, args), "memory: " + what);
  features.resize(expected.size());
  counts.resize(expected.size());
  check(found == expected_found, "how many features: " + what);
  check(features == expected, "features: " + what);
  check(counts == expected_counts, "counts: " + what);
  sums_case(kernels, found, features, counts);
}

void least_case(const Kernels& kernels, const std::vector<uint64_t>& hashes, const std::vector<int64_t>& places) {
  const std::vector<uint32_t> multipliers{1, 3, 5}, addends{0, 1, 2};
  const size_t rows = places.size() - 1;
  std::vector<uint32_t> least(rows * 3), expected(rows * 3, ~uint32_t{0});
  kernels.least_hashes({hashes.data(), places.data(), static_cast<int64_t>(rows), multipliers.data(), addends.data(), 3,
                        least.data(), 2});
  for (size_t i = 0; i < rows * 3; ++i)
    for (int64_t j = places[i / 3]; j < places[i / 3 + 1]; ++j) {
      const uint32_t x = static_cast<uint32_t>(hashes[static_cast<size_t>(j)] >> 32);
      expected[i] = std::min(expected[i], multipliers[i % 3] * x + addends[i % 3]);
    }
  check(least == expected, std::string("the least of hashes: ") + kernels.isa);
}

void texts_case(const Kernels& kernels, int64_t rows, int64_t longest, int64_t order, int form, std::mt19937& rng) {
  const SomeTexts some(rows, longest, rng);
  const bool punctuation = form & 1;
  const Texts texts = some.read(form & 2, punctuation);
  const std::string what = std::string(kernels.isa) + ", up to " + std::to_string(longest) + " bytes";
  std::vector<std::vector<std::string>> tokens;
  std::vector<int64_t> found(static_cast<size_t>(rows)), expected;
  for (const std::vector<uint8_t>& row : some.rows) {
    tokens.push_back(tokens_of(row, some.characters, punctuation));
    expected.push_back(static_cast<int64_t>(tokens.back().size()));
  }
  kernels.count_tokens(texts, found.data());
  check(found == expected, "how many tokens: " + what);
  for (int64_t least : {order, int64_t{1}}) {
    std::vector<std::vector<uint64_t>> by_row;
    std::vector<uint64_t> all;
    std::vector<int64_t> places{0};
    for (const std::vector<std::string>& own : tokens) {
      by_row.push_back(ngrams_of(own, static_cast<size_t>(least), static_cast<size_t>(order), 5));
      all.insert(all.end(), by_row.back().begin(), by_row.back().end());
      places.push_back(static_cast<int64_t>(all.size()));
    }
    std::vector<uint64_t> hashes(all.size());
    kernels.hash_ngrams(texts, {least, order, 5, places.data(), hashes.data()});
    check(hashes == all, "hashes of n-grams: " + what);
    least_case(kernels, hashes, places);
    if (least > 1) continue;
    for (int64_t buckets : {1, 3, 1 << 20}) counts_case(kernels, texts, by_row, order, places, buckets, {});
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    counts_case(kernels, texts, by_row, order, places, 0, all);
    all.resize(all.size() / 2);
    counts_case(kernels, texts, by_row, order, places, 0, all);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  Isa list[4];
  const int n = isa_list(list);
  for (int i = 0; i < n; ++i) {
    if (!list[i].supported) {
      std::printf("skipped %s: this processor does not run it\n", list[i].kernels->isa);
      continue;
    }
    for (int64_t longest : {0, 1, 7, 9, 17, 70, 200, 4000})
      for (int64_t order : {1, 2, 16})
        for (int form = 0; form < 4; ++form)
          texts_case(*list[i].kernels, longest > 200 ? 3 : 70, longest, order, form, rng);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
