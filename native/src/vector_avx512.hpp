// 16 floats as an AVX-512 register. Included by more than one file, each with flags and a namespace of its own.
#pragma once

#include <immintrin.h>

#include "halves.hpp"
#include "kernels.hpp"

namespace xception::XCEPTION_LEVEL {

struct V {
  __m512 a;
};

inline V zero() { return {_mm512_setzero_ps()}; }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline V load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.a); }
inline void store(bf16* p, V x) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zero: nothing that a network could tell.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.a)));
#else
  const __m512i bits = _mm512_castps_si512(x.a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.a, x.a, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
#endif
}
inline void store(f16* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}

// Rounded to the nearest, ties to even, and counted from `zero`; what lies beyond a byte is its end, and so is NaN.
inline __m512i count(V x, int zero) {
  const __m512 kept = _mm512_min_ps(x.a, _mm512_set1_ps(static_cast<float>(255 - zero)));
  const __m512i steps = _mm512_add_epi32(_mm512_cvtps_epi32(kept), _mm512_set1_epi32(zero));
  return _mm512_max_epi32(steps, _mm512_setzero_si512());
}
inline void store(u8* p, V x, int zero) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(count(x, zero)));
}

// In a register from here on: GCC would load it anew for each of its uses, and the loads would be what a loop waits for.
inline V held(V x) {
  __asm__("" : "+v"(x.a));
  return x;
}

inline V add(V x, V y) { return {_mm512_add_ps(x.a, y.a)}; }
inline V mul(V x, V y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline V fma(V x, V y, V z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
// The instruction gives its second operand where one is NaN.
inline V relu(V x) { return {_mm512_max_ps(_mm512_setzero_ps(), x.a)}; }
inline V max(V x, V y) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x.a, x.a, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_max_ps(x.a, y.a), nan, x.a)};
}

// The first `count` lanes, zeros behind them.
inline V first(V x, int count) {
  const unsigned mask = count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u;
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), x.a)};
}

// 16 sums of bytes. As if they were floats: GCC 12 keeps arrays of integer registers in memory.
struct I {
  __m512 bits;

  __m512i a() const { return _mm512_castps_si512(bits); }
};
inline I of_bits(__m512i a) { return {_mm512_castsi512_ps(a)}; }
inline I load(const std::int32_t* p) { return of_bits(_mm512_loadu_si512(p)); }
inline I add(I x, I y) { return of_bits(_mm512_add_epi32(x.a(), y.a())); }
inline V to_float(I x) { return {_mm512_cvtepi32_ps(x.a())}; }
// Four weights, signed, of each sum.
using Bytes = I;
inline Bytes load_bytes(const std::byte* p) { return of_bits(_mm512_loadu_si512(p)); }
inline I dot(const std::byte* four, Bytes weights, I sum) {
#if defined(__AVX512VNNI__)
  // By assembly: with the intrinsic GCC 12 copies every sum to memory at each step.
  const __m512 pixel = _mm512_set1_ps(*reinterpret_cast<const float*>(four));
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.bits) : "v"(pixel), "v"(weights.bits));
  return sum;
#else
  const __m512i pixel = _mm512_set1_epi32(*reinterpret_cast<const int*>(four));
  // The instruction adds two neighbours' products in 16 bits, where they may not fit: so the even ones go first.
  const __m512i even = _mm512_and_si512(pixel, _mm512_set1_epi16(0xff)), odd = _mm512_xor_si512(pixel, even);
  const __m512i ones = _mm512_set1_epi16(1);
  const __m512i first = _mm512_madd_epi16(_mm512_maddubs_epi16(even, weights.a()), ones);
  const __m512i second = _mm512_madd_epi16(_mm512_maddubs_epi16(odd, weights.a()), ones);
  return of_bits(_mm512_add_epi32(sum.a(), _mm512_add_epi32(first, second)));
#endif
}

inline constexpr int kRows = 14;  // 28 sums, 2 weights, 1 pixel: 31 of 32 registers
inline constexpr int kColumns = 2;

}  // namespace xception::XCEPTION_LEVEL
