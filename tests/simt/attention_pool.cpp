// Launches of the attention pool, for levels of one element type. sizes and strides: four a level.
#include "queue.h"

#include "../../csrc/cuda/attention_pool.cuh"

using namespace fbkd;

namespace {

struct Level {
  MatrixView view;
  const void* x;
  void* dx;
  ByDirection<void*> means;
  ByDirection<const void*> grads;
};

// means and grads: four a level, in the op's order; null where the direction does not need them.
std::vector<Level> levels_of(int64_t count, void** x, const int64_t* sizes, const int64_t* strides, void** means,
                             void** grads, void** dx) {
  std::vector<Level> levels;
  for (int64_t i = 0; i < count; ++i) {
    Level level{matrix_view(sizes + 4 * i, strides + 4 * i), x[i], nullptr, {}, {}};
    if (means != nullptr) {
      void** of = means + 4 * i;
      level.means = by_direction(level.view, of[0], of[1], of[2], of[3]);
    }
    if (dx != nullptr) {
      const auto grad = [&](int64_t k) { return static_cast<const void*>(grads[4 * i + k]); };
      level.grads = by_direction(level.view, grad(0), grad(1), grad(2), grad(3));
      level.dx = dx[i];
      if (level.grads.row_abs == nullptr && level.grads.col_abs == nullptr) level.x = nullptr;
    }
    levels.push_back(level);
  }
  return levels;
}

}  // namespace

extern "C" const char* forward(int64_t count, int64_t type, void** x, const int64_t* sizes, const int64_t* strides,
                               void** means, int64_t most_blocks) {
  return simt::report([&] {
    Queue queue(most_blocks);
    const auto levels = levels_of(count, x, sizes, strides, means, nullptr, nullptr);
    with_type(type, [&](auto element) {
      using T = typename decltype(element)::type;
      cuda::launch_attention_pool_forward<T, Accumulator<T>>(levels, queue);
    });
  });
}

extern "C" const char* backward(int64_t count, int64_t type, void** x, const int64_t* sizes, const int64_t* strides,
                                void** grads, void** dx, int64_t most_blocks) {
  return simt::report([&] {
    Queue queue(most_blocks);
    const auto levels = levels_of(count, x, sizes, strides, nullptr, grads, dx);
    with_type(type, [&](auto element) {
      using T = typename decltype(element)::type;
      cuda::launch_attention_pool_backward<T, Accumulator<T>>(levels, queue);
    });
  });
}
