// For processors with AVX-512 FP16 beside AMX: all that there are so far, but a virtual machine may hide it.
#define XCEPTION_LEVEL amx_half
#define XCEPTION_HALF_LANES
#include "kernels_amx.hpp"
