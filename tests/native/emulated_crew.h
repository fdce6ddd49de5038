// A crew of threads on the host that runs the GPU's row computation (csrc/cuda/ensemble_rows.h): one std::thread per
// CUDA thread, barriers where CUDA has them, shuffles through memory. A barrier that not all of its threads reach hangs
// here as it does there; a missing one is a race that ThreadSanitizer sees.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/ensemble_rows.h"

namespace emulated {

class Barrier {
 public:
  explicit Barrier(int threads) : count_(threads) {}
  void wait() {
    if (count_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

// What the blocks that share a row have in common.
struct Hardware {
  Hardware(int warp_, int threads_, int slices_, int64_t bytes)
      : warp(warp_), threads(threads_), slices(slices_), all(threads_ * slices_), exchange(static_cast<size_t>(threads_ * slices_)) {
    for (int s = 0; s < slices; ++s) {
      blocks.push_back(std::make_unique<Barrier>(threads));
      memory.push_back(static_cast<char*>(std::aligned_alloc(16, static_cast<size_t>(bytes))));  // not a byte more
      std::memset(memory.back(), 0xff, static_cast<size_t>(bytes));                             // NaN, as good as garbage
      for (int w = 0; w < threads / warp; ++w) warps.push_back(std::make_unique<Barrier>(warp));
    }
  }
  ~Hardware() {
    for (char* m : memory) std::free(m);
  }
  Hardware(const Hardware&) = delete;
  Hardware& operator=(const Hardware&) = delete;

  const int warp, threads, slices;
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> blocks, warps;
  std::vector<char*> memory;
  std::vector<uint64_t> exchange;
};

template <int WARP_>
struct Crew {
  static constexpr int WARP = WARP_;
  Hardware* hardware;
  int thread, threads, slice, slices, crew, crews;

  int first_tile() const { return crew; }
  int tile_step() const { return crews; }

  template <class T>
  T shuffle_xor(T x, int offset) const {
    static_assert(sizeof(T) <= 8);
    Barrier& warp = *hardware->warps[static_cast<size_t>((slice * threads + thread) / WARP)];
    uint64_t* mine = &hardware->exchange[static_cast<size_t>(slice * threads + thread)];
    std::memcpy(mine, &x, sizeof x);
    warp.wait();
    T other;
    std::memcpy(&other, &hardware->exchange[static_cast<size_t>(slice * threads + (thread ^ offset))], sizeof other);
    warp.wait();
    return other;
  }
  float warp_max(float x) const {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = assay::cuda::max_nan(x, shuffle_xor(x, offset));
    return assay::cuda::from_ordered(assay::cuda::to_ordered(x));  // as the GPU's integers have it
  }
  uint32_t ballot(bool yes) const {
    uint32_t votes = yes ? 1u << thread % WARP : 0u;
    for (int offset = WARP / 2; offset > 0; offset /= 2) votes |= shuffle_xor(votes, offset);
    return votes;
  }
  int warp_min(int x) const {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = std::min(x, shuffle_xor(x, offset));
    return x;
  }
  void atomic_min(uint32_t* p, uint32_t value) const {
    uint32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  void sync_warp() const { hardware->warps[static_cast<size_t>((slice * threads + thread) / WARP)]->wait(); }
  void sync_block() const { hardware->blocks[static_cast<size_t>(slice)]->wait(); }
  void sync() const { hardware->all.wait(); }
  template <class T>
  const T* peer(const T* mine, int of) const {
    const char* address = reinterpret_cast<const char*>(mine) - hardware->memory[static_cast<size_t>(slice)] +
                          hardware->memory[static_cast<size_t>(of)];
    return reinterpret_cast<const T*>(address);
  }
};

// The rows of a launch, by `crews` crews in turn and a thread per row after them, as csrc/cuda/ensemble.cu does.
template <class T, assay::cuda::Path PATH, assay::cuda::Sweeps SWEEPS, int WARP>
void launch(assay::cuda::Problem p, int crews) {
  using namespace assay::cuda;
  constexpr bool NARROW = PATH == Path::NARROW;
  p.layout = make_layout(p.plan, p.K, SWEEPS == Sweeps::TWO && p.plan.keeps());
  p.sums_layout = make_sums(p.K, p.plan.slices, NARROW ? p.plan.rows() : p.rows);
  const std::unique_ptr<char, decltype(&std::free)> sums(
      static_cast<char*>(std::aligned_alloc(16, static_cast<size_t>(p.sums_layout.bytes))), &std::free);
  std::memset(sums.get(), 0xff, static_cast<size_t>(p.sums_layout.bytes));  // tops begin so; the rest is as good as garbage
  p.sums = sums_at(sums.get(), p.sums_layout, p.rows);
  for (int crew = 0; crew < crews; ++crew) {
    Hardware hardware(WARP, p.plan.threads(), p.plan.slices, p.layout.bytes);
    const auto body = [&](int slice, int thread) {
      const Crew<WARP> c{&hardware, thread, p.plan.threads(), slice, p.plan.slices, crew, crews};
      EnsembleRows<T, PATH, SWEEPS, Crew<WARP>>(p, c, hardware.memory[static_cast<size_t>(slice)]).run();
    };
    if (p.plan.threads() * p.plan.slices == 1) {
      body(0, 0);
      continue;
    }
    std::vector<std::thread> threads;
    for (int s = 0; s < p.plan.slices; ++s)
      for (int t = 0; t < p.plan.threads(); ++t) threads.emplace_back(body, s, t);
    for (std::thread& t : threads) t.join();
  }
  for (int64_t n = 0; !NARROW && n < p.rows; ++n) FinishRow<T>(p, p.sums, n, n).run();
}

// Every row of the problem, in two launches.
template <class T, assay::cuda::Path PATH, assay::cuda::Sweeps SWEEPS, int WARP>
void run(assay::cuda::Problem p, int crews) {
  const int64_t at_once = p.N / 2 + 1;
  for (; p.first < p.N; p.first += at_once) {
    p.rows = p.N - p.first < at_once ? p.N - p.first : at_once;
    launch<T, PATH, SWEEPS, WARP>(p, crews);
  }
}

}  // namespace emulated
