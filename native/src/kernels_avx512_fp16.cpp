// For processors with AVX-512 FP16 whose tiles are hidden, or are none.
#define XCEPTION_LEVEL avx512_fp16
#include "kernels_avx512_half.hpp"
