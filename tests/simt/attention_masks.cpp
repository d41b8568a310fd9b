// Launches of the attention masks, for levels that accumulate in one type.
#include "queue.h"

#include "../../csrc/cuda/attention_masks.cuh"

using namespace fbkd;

namespace {

struct Level {
  int64_t student_type, teacher_type;
  int64_t images, length;
  const void* student;
  const void* teacher;
  void* mask;
  double temperature;
  bool joint;
};

}  // namespace

extern "C" const char* masks(int64_t count, bool in_double, void** student, void** teacher, const int64_t* student_type,
                             const int64_t* teacher_type, const int64_t* images, const int64_t* length,
                             const double* temperature, const bool* joint, void** mask, int64_t most_blocks) {
  return simt::report([&] {
    Queue queue(most_blocks);
    std::vector<Level> levels;
    for (int64_t i = 0; i < count; ++i)
      levels.push_back({student_type[i], teacher_type[i], images[i], length[i], student[i], teacher[i], mask[i],
                        temperature[i], joint[i]});
    const auto type = [](const Level& level, bool of_student) {
      return static_cast<cuda::MapType>(of_student ? level.student_type : level.teacher_type);
    };
    if (in_double)
      cuda::launch_attention_masks<double>(levels, type, queue);
    else
      cuda::launch_attention_masks<float>(levels, type, queue);
  });
}
