#define XCEPTION_LEVEL scalar
#include "vector_scalar.hpp"
#include "train_floats.hpp"
