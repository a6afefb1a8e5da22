// AVX-512 with dot products of pairs of bf16: for maps in bf16 only. Tiles use these too, beside their own product.
#include <math.h>

#define XCEPTION_LEVEL avx512_bf16
#include "vector_avx512.hpp"
#include "train_kernels_table.hpp"
#include "train_vector.hpp"

namespace xception::avx512_bf16 {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "dot_pairs.hpp"
#include "train_kernels.hpp"

constexpr TrainKernels kTable = train_table<bf16, bf16, DotPairs>();

}  // namespace

const TrainKernels* train_kernels(Type type, Type matrix) {
  return type == Type::bf16 && matrix == Type::bf16 ? &kTable : nullptr;
}

}  // namespace xception::avx512_bf16
