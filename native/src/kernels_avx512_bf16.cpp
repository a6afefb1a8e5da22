// AVX-512 with dot products of pairs of bf16, which double the throughput, and of four bytes, which double it again:
// for activations in bf16 only.
#include <math.h>

#define XCEPTION_LEVEL avx512_bf16
#include "vector_avx512.hpp"

namespace xception::avx512_bf16 {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "dot_pairs.hpp"
#include "depthwise_work.hpp"
#include "image_lines.hpp"
#include "patch_lines.hpp"
#include "pool_pairs.hpp"

constexpr Kernels kTable{
    .type = Type::bf16,
    .matrix_type = Type::bf16,
    .depthwise = depthwise_lines<PairLine, bf16>,
    .filter = filter<bf16>,
    .patches = patch_lines<bf16, bf16>,
    .image = image_lines<bf16>,
    .load = load_blocks<bf16>,
    .unload = unload_blocks<bf16>,
    .pool = max_pool_pairs,
    .reduce = reduce<bf16>,
    .multiply = multiply<DotPairs, bf16>,
    .multiply_f32 = multiply<DotFloat, float>,
    .depthwise_u8 = depthwise_lines<PairLine, u8>,
    .patches_u8 = patch_lines_u8<PairLine>,
    .multiply_u8 = multiply<DotBytes, bf16>,
};

}  // namespace

const Kernels* kernels(Type type) { return type == Type::bf16 ? &kTable : nullptr; }

}  // namespace xception::avx512_bf16
