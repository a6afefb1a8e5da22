#include <math.h>

#define XCEPTION_LEVEL avx512
#include "vector_avx512.hpp"

namespace xception::avx512 {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "float_kernels.hpp"

}  // namespace

const Kernels* kernels(Type type) { return float_tables(type); }

}  // namespace xception::avx512
