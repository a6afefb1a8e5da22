#define XCEPTION_LEVEL amx
#include "train_amx.hpp"
