// For tests on processors with neither.
#define XCEPTION_LEVEL amx_half_emulated
#define XCEPTION_HALF_LANES
#define XCEPTION_EMULATE_TILES
#include "kernels_amx.hpp"
