#include <math.h>

#include "vector_avx2.hpp"

namespace xception::avx2 {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "float_kernels.hpp"

}  // namespace

const Kernels* kernels(Type type) { return float_tables(type); }

}  // namespace xception::avx2
