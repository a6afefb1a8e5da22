// 16 floats as two AVX2 registers.
#pragma once

#include <immintrin.h>

#include "halves.hpp"
#include "kernels.hpp"

namespace xception::avx2 {

struct V {
  __m256 a, b;
};

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

inline __m256 widen8(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 widen8(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V load(const bf16* p) { return {widen8(p), widen8(p + 8)}; }
inline V load(const f16* p) { return {widen8(p), widen8(p + 8)}; }

inline void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline __m256i rounded_bits(__m256 x) {  // bf16 in the low halves; to the nearest even, NaN quiet
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
}
inline void store(bf16* p, V x) {
  const __m256i packed = _mm256_packus_epi32(rounded_bits(x.a), rounded_bits(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(f16* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

// Rounded to the nearest, ties to even, and counted from `zero`; what lies beyond a byte is its end, and so is NaN.
inline void store(u8* p, V x, int zero) {
  const __m256 top = _mm256_set1_ps(static_cast<float>(255 - zero));
  const __m256i offset = _mm256_set1_epi32(zero);
  const __m256i lower = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(x.a, top)), offset);
  const __m256i upper = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(x.b, top)), offset);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lower, upper), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline V held(V x) { return x; }  // there are too few registers
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// The instruction gives its second operand where one is NaN.
inline V relu(V x) {
  return {_mm256_max_ps(_mm256_setzero_ps(), x.a), _mm256_max_ps(_mm256_setzero_ps(), x.b)};
}
inline __m256 max8(__m256 x, __m256 y) {
  return _mm256_blendv_ps(_mm256_max_ps(x, y), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
// The first `count` lanes, zeros behind them.
inline __m256 first8(__m256 x, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes)));
}
inline V first(V x, int count) { return {first8(x.a, count), first8(x.b, count - 8)}; }
inline V max(V x, V y) { return {max8(x.a, y.a), max8(x.b, y.b)}; }

// 16 sums of bytes.
struct I {
  __m256i a, b;
};
inline I load(const std::int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// Four weights, signed, of each sum.
using Bytes = I;
inline Bytes load_bytes(const std::byte* p) { return load(reinterpret_cast<const std::int32_t*>(p)); }
// The instruction adds two neighbours' products in 16 bits, where they may not fit: so the even ones go first.
inline __m256i dot8(__m256i even, __m256i odd, __m256i weights, __m256i sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i first = _mm256_madd_epi16(_mm256_maddubs_epi16(even, weights), ones);
  const __m256i second = _mm256_madd_epi16(_mm256_maddubs_epi16(odd, weights), ones);
  return _mm256_add_epi32(sum, _mm256_add_epi32(first, second));
}
inline I dot(const std::byte* four, Bytes weights, I sum) {
  int bits;
  __builtin_memcpy(&bits, four, sizeof bits);
  const __m256i pixel = _mm256_set1_epi32(bits);
  const __m256i even = _mm256_and_si256(pixel, _mm256_set1_epi16(0xff)), odd = _mm256_xor_si256(pixel, even);
  return {dot8(even, odd, weights.a, sum.a), dot8(even, odd, weights.b, sum.b)};
}

inline constexpr int kRows = 6;  // 12 sums, 2 weights, 1 pixel: 15 of 16 registers
inline constexpr int kColumns = 1;

}  // namespace xception::avx2
