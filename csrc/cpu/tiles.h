// Work of several levels in one parallel region.
#pragma once

#include "../stable_abi.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../layout.h"

namespace fbkd {

// Below this many elements a thread costs more than it brings.
constexpr int64_t kThreadElements = int64_t(1) << 15;
// Threads take work in this many turns or more, so that they end together.
constexpr int64_t kTurns = 16;

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

// Runs body(begin, end) for all of [0, count) on several threads. ThreadSanitizer does not know OpenMP's fork and join,
// so it is told of them.
template <typename Body>
void parallel_region(int64_t count, int64_t grain, Body&& body) {
#if defined(__SANITIZE_THREAD__)
  static char forked, joined;
  const auto reported = [&](int64_t begin, int64_t end) {
    __tsan_acquire(&forked);
    body(begin, end);
    __tsan_release(&joined);
  };
  __tsan_release(&forked);
  torch::stable::parallel_for(0, count, grain, reported);
  __tsan_acquire(&joined);
#else
  torch::stable::parallel_for(0, count, grain, body);
#endif
}

// One level's share of a region: tiles that can run in any order, on any thread.
struct Tiles {
  virtual ~Tiles() = default;
  virtual int64_t count() const = 0;
  virtual int64_t elements() const = 0;  // of all tiles, as a measure of the work
  virtual void run(int64_t tile) = 0;
};

// Runs the tiles of every level in one parallel region, beginning with the first level's. `at_least = 2` forces a
// parallel region, inside which the BLAS calls of a tile stay single-threaded.
inline void run_tiles(const std::vector<Tiles*>& levels, int64_t at_least = 1) {
  std::vector<int64_t> ends;
  int64_t tiles = 0, elements = 0;
  for (const Tiles* level : levels) {
    ends.push_back(tiles += level->count());
    elements += level->elements();
  }
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = max64(at_least, min64(min64(most, tiles), ceil_div(elements, kThreadElements)));
  const int64_t step = max64(1, tiles / max64(1, threads * kTurns));
  std::atomic<int64_t> next{0};
  parallel_region(threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(step); begin < tiles; begin = next.fetch_add(step)) {
      size_t level = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
      for (int64_t tile = begin; tile < min64(begin + step, tiles); ++tile) {
        while (tile >= ends[level]) ++level;
        levels[level]->run(tile - (ends[level] - levels[level]->count()));
      }
    }
  });
}

template <class Level>
void run_tiles(const std::vector<std::unique_ptr<Level>>& levels) {
  std::vector<Tiles*> pointers;
  for (const auto& level : levels) pointers.push_back(level.get());
  run_tiles(pointers);
}

// Tiles that leave partial sums, which a second stage adds up once all of them have run.
struct StagedTiles : Tiles {
  virtual std::unique_ptr<Tiles> second_stage() const = 0;
};

template <class Level>
void run_second_stages(const std::vector<std::unique_ptr<Level>>& levels) {
  std::vector<std::unique_ptr<Tiles>> stages;
  for (const auto& level : levels) stages.push_back(level->second_stage());
  run_tiles(stages);
}

// Partial sums of tiles, added up in the tiles' order.
inline double total_of(const std::vector<double>& partials) {
  return std::accumulate(partials.begin(), partials.end(), 0.0);
}

}  // namespace fbkd
