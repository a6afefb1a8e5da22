#include <math.h>

#define XCEPTION_LEVEL avx512

#include "vector_avx512.hpp"

namespace xception::avx512 {
namespace {

#include "producers.hpp"
// (multiply needs group_offset and line of producers)
#include "multiply.hpp"

template <class S>
constexpr Kernels table(Type type) {
  return {
      .type = type,
      .matrix_type = Type::f32,
      .depthwise = depthwise<S, float>,
      .patches = patches<S, float>,
      .image = image_patches<float>,
      .load = load_blocks<S>,
      .unload = unload_blocks<S>,
      .pool = max_pool<S>,
      .reduce = reduce<S>,
      .multiply = multiply<DotFloat, S>,
      .multiply_f32 = multiply<DotFloat, float>,
  };
}

constexpr Kernels kTables[] = {table<float>(Type::f32), table<bf16>(Type::bf16), table<f16>(Type::f16)};

}  // namespace

const Kernels* kernels(Type type) { return &kTables[static_cast<int>(type)]; }

}  // namespace xception::avx512
