// The module behind `import fbkd_ops._C`: loading its library is what registers the CPU kernels. It uses Python's
// limited API alone, so that one library serves every Python from 3.10 on.
#include <Python.h>

namespace {

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Importing it registers the CPU kernels with torch."};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
