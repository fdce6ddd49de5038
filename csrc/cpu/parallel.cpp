#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace assay {
namespace {

// torch's own OpenMP team, if its runtime is in this process: a second runtime would run a second team, and the two
// would spin against each other on the same cores. GOMP_parallel is the C entry that GCC compiles `omp parallel` to;
// LLVM's and Intel's runtimes export it too. Linking to no OpenMP keeps the wheel free of a copy of its own.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

}  // namespace

int64_t Pieces::count() const { return n_ > 0 ? (n_ + grain_ - 1) / grain_ : 0; }

bool Pieces::next(int64_t& begin, int64_t& end) {
  begin = next_.fetch_add(grain_, std::memory_order_relaxed);
  end = begin + grain_ < n_ ? begin + grain_ : n_;
  return begin < n_;
}

void run_team(int64_t threads, void (*fn)(void*), void* context) {
  static const GompParallel openmp = find_openmp();
  if (threads <= 1) {
    fn(context);
  } else if (openmp != nullptr) {
    openmp(fn, context, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads - 1));
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(fn, context);
    fn(context);
    for (auto& t : others) t.join();
  }
}

}  // namespace assay
