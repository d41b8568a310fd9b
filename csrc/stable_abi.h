// Goes before any torch header, in every file but the pybind11 module: torch's copy of pybind11 refuses to be included
// together with it.
#pragma once

// The oldest torch under which the libraries load: 2.10.
#define TORCH_TARGET_VERSION 0x020a000000000000
