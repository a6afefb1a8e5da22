// For tests on processors without AMX.
#define XCEPTION_LEVEL amx_emulated
#define XCEPTION_EMULATE_TILES
#include "train_amx.hpp"
