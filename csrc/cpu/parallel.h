// Fork-join: a team of threads pulls pieces of [0, n). Who does which piece is left to chance, so results must not
// depend on it.
#pragma once
#include <atomic>
#include <cstdint>

namespace assay {

class Pieces {
 public:
  Pieces(int64_t n, int64_t grain) : n_(n), grain_(grain) {}
  int64_t count() const;

  // The next piece, at most `grain` items; false when there is none left.
  bool next(int64_t& begin, int64_t& end);

 private:  // nothing inline: this header is part of units built for different processors
  const int64_t n_, grain_;
  std::atomic<int64_t> next_{0};
};

// Runs fn(context) on at most `threads` threads, this one among them, and returns when all are done.
void run_team(int64_t threads, void (*fn)(void*), void* context);

// Every member of the team calls member(pieces) once: set up scratch there, then pull pieces until there are none.
template <class F>
void parallel(int64_t n, int64_t grain, int32_t threads, const F& member) {
  struct Context {
    Pieces pieces;
    const F& member;
  } context{{n, grain}, member};
  const int64_t count = context.pieces.count();
  if (count == 0) return;
  run_team(
      threads < count ? threads : count,
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        c.member(c.pieces);
      },
      &context);
}

}  // namespace assay
