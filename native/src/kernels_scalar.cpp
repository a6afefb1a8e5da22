#include <math.h>

#include "vector_scalar.hpp"

namespace xception::scalar {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "float_kernels.hpp"

}  // namespace

const Kernels* kernels(Type type) { return float_tables(type); }

}  // namespace xception::scalar
