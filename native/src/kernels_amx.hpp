// The kernels on AMX tiles; compiled twice, for the tiles and for their emulation.
#include <math.h>

#include "vector_avx512.hpp"
#include "tiles.hpp"

namespace xception::XCEPTION_LEVEL {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "multiply_tiles.hpp"

template <class Half>
constexpr Kernels table(Type type) {
  return {
      .type = type,
      .matrix_type = type,
      .depth_unit = 32,
      .depthwise = depthwise<Half, Half>,
      .filter = filter<Half>,
      .patches = patches<Half, Half>,
      .image = image_patches<Half>,
      .load = load_blocks<Half>,
      .unload = unload_blocks<Half>,
      .pool = max_pool<Half>,
      .reduce = reduce<Half>,
      .multiply = multiply_tiles<Half>,
      .multiply_f32 = multiply<DotFloat, float>,
      .begin_thread = begin_tiles,
      .end_thread = end_tiles,
  };
}

constexpr Kernels kBf16Table = table<bf16>(Type::bf16);
constexpr Kernels kF16Table = table<f16>(Type::f16);

}  // namespace

const Kernels* kernels(Type type) {
  if (type == Type::bf16) return &kBf16Table;
  return type == Type::f16 ? &kF16Table : nullptr;
}

}  // namespace xception::XCEPTION_LEVEL
