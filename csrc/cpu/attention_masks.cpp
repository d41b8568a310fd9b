// Attention masks on the CPU: the softmax's maximum and sum by tile, then the mask in one write.
#include "../stable_abi.h"

#include "../attention_masks_levels.h"

#include <torch/csrc/stable/library.h>

#include <limits>

#include "pieces.h"
#include "tiles.h"
#include "vector.h"

namespace fbkd {
namespace {

constexpr int64_t kTile = 4 * kPiece;

// Largest element, and the sum of e^((x - largest) / temperature).
template <typename A>
struct Normaliser {
  A largest = -std::numeric_limits<A>::infinity();
  A sum = 0;

  void add(const Normaliser& other, A temperature) {
    const A both = other.largest > largest ? other.largest : largest;
    // A side of nothing but -Inf would make NaN of -Inf - -Inf.
    sum = (sum == 0 ? A(0) : sum * std::exp((largest - both) / temperature)) +
          (other.sum == 0 ? A(0) : other.sum * std::exp((other.largest - both) / temperature));
    largest = both;
  }
};

template <typename A>
FBKD_CLONES A largest_of(const A* __restrict__ x, int64_t count) {
  A result = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <typename A>
FBKD_CLONES A exponential_sum(const A* __restrict__ x, int64_t count, A largest, A temperature) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exponential((x[i] - largest) / temperature);
  return sum;
}

template <typename A>
FBKD_CLONES void add_softmax(const A* __restrict__ x, int64_t count, A largest, A temperature, A scale,
                             A* __restrict__ mask) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) mask[i] += scale * exponential((x[i] - largest) / temperature);
}

// One level's softmaxes: of the student's and the teacher's map, or of their sum (joint), or of the teacher's alone.
template <typename A>
struct Softmaxes : StagedTiles {
  explicit Softmaxes(const MaskLevel& level)
      : level(level),
        tiles(ceil_div(level.length, kTile)),
        maps(level.student != nullptr && !level.joint ? 2 : 1),
        temperature(static_cast<A>(level.temperature)),
        partial(static_cast<size_t>(level.images * tiles * maps)) {}

  int64_t count() const override { return level.images * tiles; }
  int64_t elements() const override { return 4 * level.images * level.length; }
  void run(int64_t tile) override {
    A buffer[kTile];
    for (int64_t map = 0; map < maps; ++map) {
      const int64_t size = load(tile, map, buffer);
      const A largest = largest_of(buffer, size);
      // Nothing but -Inf (and perhaps NaN) adds nothing (or NaN).
      const A finite = largest == -std::numeric_limits<A>::infinity() ? A(0) : largest;
      A sum = 0;
      for (int64_t i = 0; i < size; i += kPiece)
        sum += exponential_sum(buffer + i, min64(kPiece, size - i), finite, temperature);
      partial[tile * maps + map] = {largest, sum};
    }
  }
  std::unique_ptr<Tiles> second_stage() const override;

  // A tile of a map, or of the sum of both; its number of elements.
  int64_t load(int64_t tile, int64_t map, A* buffer) const {
    const int64_t image = tile / tiles, begin = tile % tiles * kTile;
    const int64_t size = min64(kTile, level.length - begin), first = image * level.length + begin;
    const bool of_student = maps == 2 && map == 0;
    copy(of_student ? level.student_type : level.teacher_type, of_student ? level.student : level.teacher, first, size,
         buffer);
    if (level.joint && level.student != nullptr) {
      A other[kTile];
      copy(level.student_type, level.student, first, size, other);
      add_vector(buffer, other, size);
    }
    return size;
  }

  static void copy(ScalarType type, const void* data, int64_t first, int64_t size, A* buffer) {
    const A* piece = load_piece(type, data, first, 1, size, buffer);
    if (piece != buffer) std::copy(piece, piece + size, buffer);
  }

  MaskLevel level;
  int64_t tiles, maps;
  A temperature;
  std::vector<Normaliser<A>> partial;  // (images, tiles, maps)
};

template <typename A>
struct Masks : Tiles {
  explicit Masks(const Softmaxes<A>& first) : first(first), total(first.level.images * first.maps) {
    for (int64_t image = 0; image < first.level.images; ++image)
      for (int64_t tile = 0; tile < first.tiles; ++tile)
        for (int64_t map = 0; map < first.maps; ++map)
          total[image * first.maps + map].add(first.partial[(image * first.tiles + tile) * first.maps + map],
                                              first.temperature);
  }

  int64_t count() const override { return first.count(); }
  int64_t elements() const override { return first.elements(); }
  void run(int64_t tile) override {
    A buffer[kTile];
    const int64_t image = tile / first.tiles;
    A* mask = static_cast<A*>(first.level.mask) + image * first.level.length + tile % first.tiles * kTile;
    for (int64_t map = 0; map < first.maps; ++map) {
      const int64_t size = first.load(tile, map, buffer);
      const Normaliser<A>& norm = total[image * first.maps + map];
      if (map == 0) std::fill(mask, mask + size, A(0));
      const A scale = static_cast<A>(first.level.length) / (static_cast<A>(first.maps) * norm.sum);
      add_softmax(buffer, size, norm.largest, first.temperature, scale, mask);
    }
  }

  const Softmaxes<A>& first;
  std::vector<Normaliser<A>> total;  // (images, maps)
};

template <typename A>
std::unique_ptr<Tiles> Softmaxes<A>::second_stage() const {
  return std::make_unique<Masks<A>>(*this);
}

void launch_attention_masks(const std::vector<MaskLevel>& levels) {
  std::vector<std::unique_ptr<StagedTiles>> softmaxes;
  for (const MaskLevel& level : levels)
    softmaxes.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<StagedTiles> {
      return std::make_unique<Softmaxes<typename decltype(type)::type>>(level);
    }));
  run_tiles(softmaxes);
  run_second_stages(softmaxes);
}

Tensors attention_masks(const OptionalTensors& student, const Tensors& teacher, const std::vector<double>& temperature,
                        const std::vector<bool>& joint) {
  Tensors masks;
  launch_attention_masks(mask_levels(student, teacher, temperature, joint, masks, "attention_masks"));
  return masks;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) { m.impl("attention_masks", TORCH_BOX(&fbkd::attention_masks)); }
