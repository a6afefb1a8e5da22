// The kernels in half precision arithmetic, without tiles: activations, matrices and weights are half precision, also
// where bf16 was asked for: that rounds eight times coarser, and processors with half precision multiply it slowly.
// Compiled with AVX-512 FP16 and without, for tests.
#include <math.h>

#include "vector_avx512.hpp"
#include "vector_half.hpp"

namespace xception::XCEPTION_LEVEL {
namespace {

#define XCEPTION_HALF_LANES
#include "producers.hpp"
#include "multiply.hpp"
#include "depthwise_work.hpp"
#include "multiply_halves.hpp"
#include "image_lines.hpp"
#include "patch_lines.hpp"
#include "pool_lines.hpp"

constexpr Kernels kHalves{
    .type = Type::f16,
    .matrix_type = Type::f16,
    .half_filters = true,
    .scales_weights = true,
    .depthwise = depthwise_lines<HalfLine, f16>,
    .filter = filter<f16>,
    .patches = patch_lines<f16, f16>,
    .image = image_lines<f16>,
    .load = load_blocks<f16>,
    .unload = unload_blocks<f16>,
    .pool = max_pool_halves,
    .reduce = reduce<f16>,
    .multiply = multiply<DotHalves, f16>,
    .multiply_f32 = multiply<DotFloat, float>,
    .depthwise_u8 = depthwise_lines<HalfLine, u8>,
    .patches_u8 = patches_u8<f16>,  // in floats: how many steps make one may be beyond half precision
    .multiply_u8 = multiply<DotBytes, f16>,
    .begin_overflow_watch = begin_overflow_watch,
    .end_overflow_watch = end_overflow_watch,
};

// Of the same weights, for images whose numbers are too large for those.
template <class S>
constexpr Kernels widened(Type type) {
  return {
      .type = type,
      .matrix_type = type,
      .scales_weights = true,
      .depthwise = depthwise_lines<FloatLine<S>, S>,
      .filter = filter<S>,
      .patches = patch_lines<S, S>,
      .image = image_lines<S>,
      .load = load_blocks<S>,
      .unload = unload_blocks<S>,
      .pool = max_pool<S>,
      .reduce = reduce<S>,
      .multiply = multiply<DotWidened<S>, S>,
      .multiply_f32 = multiply<DotFloat, float>,
      .depthwise_u8 = depthwise_lines<FloatLine<S>, u8>,
      .patches_u8 = patches_u8<S>,
      .multiply_u8 = multiply<DotBytes, S>,
  };
}
constexpr Kernels kWideBf16 = widened<bf16>(Type::bf16), kWideF16 = widened<f16>(Type::f16);

}  // namespace

const Kernels* kernels(Type type) { return type == Type::f32 ? nullptr : &kHalves; }

const Kernels* wide_kernels(Type type) {
  return type == Type::bf16 ? &kWideBf16 : type == Type::f16 ? &kWideF16 : nullptr;
}

}  // namespace xception::XCEPTION_LEVEL
