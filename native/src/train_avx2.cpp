#define XCEPTION_LEVEL avx2
#include "vector_avx2.hpp"
#include "train_floats.hpp"
