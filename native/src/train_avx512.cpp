#define XCEPTION_LEVEL avx512
#include "vector_avx512.hpp"
#include "train_floats.hpp"
