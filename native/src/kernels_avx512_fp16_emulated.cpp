// For tests on processors without AVX-512 FP16.
#define XCEPTION_LEVEL avx512_fp16_emulated
#include "kernels_avx512_half.hpp"
