// The header alone: the library is opened at run time, of whatever version is there.
#include <onnxruntime/onnxruntime_c_api.h>
