// Launches of the masked squared distance, for levels of one pair of element types. sizes and strides: four a level.
#include "queue.h"

#include "../../csrc/cuda/masked_l2.cuh"

using namespace fbkd;

namespace {

struct Level {
  MatrixView student, teacher;
  const void* s;
  const void* t;
  const void* row_mask;
  const void* col_mask;
  int64_t index;
  void* ds;
};

std::vector<Level> levels_of(int64_t count, void** s, void** t, const int64_t* sizes, const int64_t* s_strides,
                             const int64_t* t_strides, void** spatial, void** channel, void** ds) {
  std::vector<Level> levels;
  for (int64_t i = 0; i < count; ++i) {
    const MatrixView view = matrix_view(sizes + 4 * i, s_strides + 4 * i);
    const MatrixView teacher = oriented(matrix_view(sizes + 4 * i, t_strides + 4 * i), view.rows_are_channels);
    levels.push_back({view, teacher, s[i], t[i], view.rows_are_channels ? channel[i] : spatial[i],
                      view.rows_are_channels ? spatial[i] : channel[i], i, ds != nullptr ? ds[i] : nullptr});
  }
  return levels;
}

template <typename F>
void with_types(int64_t student, int64_t teacher, F&& f) {
  with_type(student, [&](auto s) { with_type(teacher, [&](auto t) { f(s, t); }); });
}

}  // namespace

extern "C" const char* forward(int64_t count, int64_t student_type, int64_t teacher_type, void** s, void** t,
                               const int64_t* sizes, const int64_t* s_strides, const int64_t* t_strides, void** spatial,
                               void** channel, void* squares, bool squares_are_double, int64_t most_blocks) {
  return simt::report([&] {
    Queue queue(most_blocks);
    const auto levels = levels_of(count, s, t, sizes, s_strides, t_strides, spatial, channel, nullptr);
    with_types(student_type, teacher_type, [&](auto student, auto teacher) {
      using S = typename decltype(student)::type;
      using T = typename decltype(teacher)::type;
      cuda::launch_masked_l2_forward<S, T, Accumulator<S, T>>(levels, squares, squares_are_double, queue);
    });
  });
}

extern "C" const char* backward(int64_t count, int64_t student_type, int64_t teacher_type, void** s, void** t,
                                const int64_t* sizes, const int64_t* s_strides, const int64_t* t_strides,
                                void** spatial, void** channel, const void* grad, bool grad_is_double, void** ds,
                                int64_t most_blocks) {
  return simt::report([&] {
    Queue queue(most_blocks);
    const auto levels = levels_of(count, s, t, sizes, s_strides, t_strides, spatial, channel, ds);
    with_types(student_type, teacher_type, [&](auto student, auto teacher) {
      using S = typename decltype(student)::type;
      using T = typename decltype(teacher)::type;
      cuda::launch_masked_l2_backward<S, T, Accumulator<S, T>>(levels, grad, grad_is_double, queue);
    });
  });
}
