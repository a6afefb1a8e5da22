// AVX-512 with dot products of pairs of bf16, which double the throughput: for activations in bf16 only.
#include <math.h>

#define XCEPTION_LEVEL avx512_bf16
#include "vector_avx512.hpp"

namespace xception::avx512_bf16 {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "depthwise_work.hpp"
#include "image_lines.hpp"
#include "patch_lines.hpp"
#include "pool_pairs.hpp"

struct DotPairs {
  using Element = bf16;
  static constexpr int kPerStep = 2;
  static V step(const std::byte* pixel, V weights, V sum) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int*>(pixel));
    return {_mm512_dpbf16_ps(sum.a, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(weights.a))};
  }
  static V weights(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
};

constexpr Kernels kTable{
    .type = Type::bf16,
    .matrix_type = Type::bf16,
    .depthwise = depthwise_lines<PairLine, bf16>,
    .patches = patch_lines<bf16, bf16>,
    .image = image_lines<bf16>,
    .load = load_blocks<bf16>,
    .unload = unload_blocks<bf16>,
    .pool = max_pool_pairs,
    .reduce = reduce<bf16>,
    .multiply = multiply<DotPairs, bf16>,
    .multiply_f32 = multiply<DotFloat, float>,
};

}  // namespace

const Kernels* kernels(Type type) { return type == Type::bf16 ? &kTable : nullptr; }

}  // namespace xception::avx512_bf16
