// The kernels on AMX tiles; compiled for the tiles and for their emulation, with AVX-512 FP16 and without.
#include <math.h>

#include "vector_avx512.hpp"
#if defined(XCEPTION_HALF_LANES)
#include "vector_half.hpp"
#endif
#include "tiles.hpp"

namespace xception::XCEPTION_LEVEL {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "depthwise_work.hpp"
#include "multiply_tiles.hpp"
#include "image_lines.hpp"
#include "patch_lines.hpp"
#if defined(XCEPTION_HALF_LANES)
#include "pool_lines.hpp"
#else
#include "pieces.hpp"
#include "multiply_pieces.hpp"
#include "float_kernels.hpp"
#endif

// `Half` is the type of the matrix and the weights, the line's that of the activations.
template <class Line, class Half>
constexpr Kernels table(Type type, Type matrix_type) {
  using Stored = typename Line::Stored;
  return {
      .type = type,
      .matrix_type = matrix_type,
      .interleaves = true,
      .depth_unit = 32,
      .depthwise = depthwise_lines<Line, Half>,
      .filter = filter<Stored>,
      .patches = patch_lines<Stored, Half>,
      .image = image_lines<Half>,
      .load = load_blocks<Stored>,
      .unload = unload_blocks<Stored>,
      .pool = max_pool<Stored>,
      .reduce = reduce<Stored>,
      .multiply = multiply_tiles<Line, Half>,
      .multiply_f32 = multiply<DotFloat, float>,
      .depthwise_u8 = depthwise_lines<Line, u8>,
      .patches_u8 = patches_u8<Stored>,  // in floats: how many steps make one may be beyond half precision
      .multiply_u8 = multiply_tiles<Line, u8>,
      .begin_thread = begin_tiles,
      .end_thread = end_tiles,
  };
}

#if defined(XCEPTION_HALF_LANES)

// Activations are half precision even where the product is of bf16: their arithmetic is twice as fast as that of
// floats, and rounds eight times finer than bf16.
template <class Half>
constexpr Kernels half_table(Type matrix_type) {
  Kernels kernels = table<HalfLine, Half>(Type::f16, matrix_type);
  kernels.half_filters = true;
  kernels.pool = max_pool_halves;
  kernels.begin_overflow_watch = begin_overflow_watch;
  kernels.end_overflow_watch = end_overflow_watch;
  return kernels;
}
constexpr Kernels kBf16Table = half_table<bf16>(Type::bf16);
constexpr Kernels kF16Table = half_table<f16>(Type::f16);

#else

constexpr Kernels kBf16Table = table<FloatLine<bf16>, bf16>(Type::bf16, Type::bf16);
constexpr Kernels kF16Table = table<FloatLine<f16>, f16>(Type::f16, Type::f16);

// Floats are multiplied in pieces; everything else of theirs is as without tiles.
constexpr Kernels pieces_table() {
  Kernels kernels = float_kernels<float>(Type::f32);
  kernels.in_pieces = true;
  kernels.depth_unit = 32;
  kernels.multiply = multiply_pieces;
  kernels.begin_thread = begin_tiles;
  kernels.end_thread = end_tiles;
  return kernels;
}
constexpr Kernels kF32Table = pieces_table();

#endif

}  // namespace

const Kernels* kernels(Type type) {
  if (type == Type::bf16) return &kBf16Table;
  if (type == Type::f16) return &kF16Table;
#if defined(XCEPTION_HALF_LANES)
  return nullptr;  // there is nothing in half precision about floats
#else
  return type == Type::f32 ? &kF32Table : nullptr;
#endif
}

}  // namespace xception::XCEPTION_LEVEL
