#define XCEPTION_LEVEL amx
#include "kernels_amx.hpp"
