// Arithmetic of the masked squared distance that the CPU and the CUDA kernels share. No torch headers.
#pragma once

#include "layout.h"

namespace fbkd {

// Half the gradient of weight * (student - teacher)^2 by the student.
template <typename A>
FBKD_HOST_DEVICE A weighted_difference(A student, A teacher, A weight) {
  return weight * (student - teacher);
}

}  // namespace fbkd
