// The attention masks on CUDA.
#include "launch.h"

#include <torch/csrc/stable/library.h>

#include "../attention_masks_levels.h"
#include "attention_masks.cuh"

namespace fbkd::cuda {
namespace {

MapType map_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return MapType::kDouble;
    case ScalarType::Half: return MapType::kHalf;
    case ScalarType::BFloat16: return MapType::kBFloat16;
    default: return MapType::kFloat;
  }
}

template <typename A>
void masks_in(const std::vector<MaskLevel>& levels, ScalarType accumulation, Queue& queue) {
  std::vector<MaskLevel> same;
  std::copy_if(levels.begin(), levels.end(), std::back_inserter(same), [&](const MaskLevel& level) {
    return level.accumulation() == accumulation;
  });
  attention_masks<A>(same, [](const MaskLevel& level, bool of_student) {
    return map_type(of_student ? level.student_type : level.teacher_type);
  }, queue);
}

Tensors masks(const OptionalTensors& student, const Tensors& teacher, const std::vector<double>& temperature,
              const std::vector<bool>& joint) {
  return fbkd::attention_masks(student, teacher, temperature, joint,
                               [](const std::vector<MaskLevel>& levels, const Tensor& like) {
                                 Queue queue(like);
                                 masks_in<float>(levels, ScalarType::Float, queue);
                                 masks_in<double>(levels, ScalarType::Double, queue);
                               });
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) {
  m.impl("attention_masks", TORCH_BOX(&fbkd::cuda::masks));
}
