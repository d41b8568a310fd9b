// The attention masks on CUDA.
#include "launch.h"

#include <torch/csrc/stable/library.h>

#include "../attention_masks_levels.h"
#include "attention_masks.cuh"

namespace fbkd::cuda {
namespace {

MapType map_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return MapType::kDouble;
    case ScalarType::Half:
      return MapType::kHalf;
    case ScalarType::BFloat16:
      return MapType::kBFloat16;
    default:
      return MapType::kFloat;
  }
}

template <typename A>
void launch_levels_in(const std::vector<MaskLevel>& levels, ScalarType accumulation, Queue& queue) {
  std::vector<MaskLevel> same;
  std::copy_if(levels.begin(), levels.end(), std::back_inserter(same),
               [&](const MaskLevel& level) { return level.accumulation() == accumulation; });
  const auto type = [](const MaskLevel& level, bool of_student) {
    return map_type(of_student ? level.student_type : level.teacher_type);
  };
  launch_attention_masks<A>(same, type, queue);
}

void launch(const std::vector<MaskLevel>& levels, const Tensor& like) {
  Queue queue(like);
  launch_levels_in<float>(levels, ScalarType::Float, queue);
  launch_levels_in<double>(levels, ScalarType::Double, queue);
}

Tensors attention_masks(const OptionalTensors& student, const Tensors& teacher, const std::vector<double>& temperature,
                        const std::vector<bool>& joint) {
  Tensors masks;
  const auto levels = mask_levels(student, teacher, temperature, joint, masks, "attention_masks");
  if (!levels.empty()) launch(levels, teacher[0]);
  return masks;
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) { m.impl("attention_masks", TORCH_BOX(&fbkd::cuda::attention_masks)); }
