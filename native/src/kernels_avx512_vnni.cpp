// AVX-512 with dot products of bytes, for processors that have none of bf16: activations are bf16, and what is not of
// bytes is float.
#include <math.h>

#define XCEPTION_LEVEL avx512_vnni
#include "vector_avx512.hpp"

namespace xception::avx512_vnni {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "float_kernels.hpp"

}  // namespace

const Kernels* kernels(Type type) { return type == Type::bf16 ? float_tables(type) : nullptr; }

}  // namespace xception::avx512_vnni
