// The masked distance's levels as the kernels of both devices take them: checks, allocations, pointers.
#pragma once

#include "pair_level.h"

namespace fbkd {

struct MaskedLevel : PairLevel {
  const void* row_mask;  // (images, rows), in the accumulation type; nullptr: ones
  const void* col_mask;  // (images, cols)
};

// The levels that have elements. Gradients of all levels are allocated where `gradients` is given.
inline std::vector<MaskedLevel> masked_levels(const Tensors& student, const Tensors& teacher,
                                              const OptionalTensors& spatial_mask, const OptionalTensors& channel_mask,
                                              Tensors* gradients, const char* op) {
  check_pair_lists(student, teacher, op);
  check_length(spatial_mask, student.size(), op, "spatial_mask");
  check_length(channel_mask, student.size(), op, "channel_mask");
  std::vector<MaskedLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const PairLevel pair = pair_level(student, teacher, index, gradients, op);
    const Tensor& s = student[index];
    const int64_t pixels = s.size(0) * s.size(2) * s.size(3), channels = s.size(0) * s.size(1);
    const void* spatial = checked_data(spatial_mask[index], pair.accumulation(), pixels, s, op, "spatial_mask");
    const void* channel = checked_data(channel_mask[index], pair.accumulation(), channels, s, op, "channel_mask");
    const bool by_channel = pair.student.rows_are_channels;
    if (s.numel() > 0) levels.push_back({pair, by_channel ? channel : spatial, by_channel ? spatial : channel});
  }
  return levels;
}

}  // namespace fbkd
