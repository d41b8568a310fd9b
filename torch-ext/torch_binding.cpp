// The module that a build of kernel-builder imports as its library. Loading it registers the kernels of csrc/, whose
// schemas src/fbkd_ops/ops defines in Python. kernel-builder writes registration.h and defines TORCH_EXTENSION_NAME.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
