// 32 half precision numbers, one line, as an AVX-512 FP16 register; or the same numbers by AVX-512 without FP16, each
// operation rounded to half precision, so that what is written with them can be tested on processors that have none.
// Included like vector_avx512.hpp, after it.
#pragma once

#include <immintrin.h>

namespace xception::XCEPTION_LEVEL {

// Half precision ends at 65,504. The processor remembers in a flag of each thread that something became infinite that
// was not (conversions and arithmetic alike, Intel SDM vol. 1, 14.5): nothing has to be looked at to know it.
inline unsigned begin_overflow_watch() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~static_cast<unsigned>(_MM_EXCEPT_OVERFLOW));
  return before;
}
// Whether there was an overflow since. Puts the flag back as it was.
inline bool end_overflow_watch(unsigned before) {
  const bool found = (_mm_getcsr() & static_cast<unsigned>(_MM_EXCEPT_OVERFLOW)) != 0;
  _mm_setcsr((_mm_getcsr() & ~static_cast<unsigned>(_MM_EXCEPT_OVERFLOW)) |
             (before & static_cast<unsigned>(_MM_EXCEPT_OVERFLOW)));
  return found;
}

#if defined(__AVX512FP16__)

struct H {
  __m512h a;
};

inline H zero_half() { return {_mm512_setzero_ph()}; }
inline H load(const H* p) { return {_mm512_loadu_ph(p)}; }
inline void store(H* p, H x) { _mm512_storeu_ph(p, x.a); }
// The two numbers there, again and again.
inline H pair(const std::byte* p) {
  return {_mm512_castps_ph(_mm512_set1_ps(*reinterpret_cast<const float*>(p)))};
}
// Rounded to the nearest, ties to even, and counted from `zero`; what lies beyond a byte is its end, and so is NaN.
inline void store(u8* p, H x, int zero) {
  const __m512h top = _mm512_set1_ph(static_cast<_Float16>(255 - zero));
  const __m512h bottom = _mm512_set1_ph(static_cast<_Float16>(-zero));
  const __m512h kept = _mm512_max_ph(_mm512_min_ph(x.a, top), bottom);
  const __m512i steps = _mm512_add_epi16(_mm512_cvtph_epi16(kept), _mm512_set1_epi16(static_cast<short>(zero)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(steps));
}
inline H add(H x, H y) { return {_mm512_add_ph(x.a, y.a)}; }
inline H fma(H x, H y, H z) { return {_mm512_fmadd_ph(x.a, y.a, z.a)}; }
// The instruction gives its second operand where one is NaN.
inline H relu(H x) { return {_mm512_max_ph(_mm512_setzero_ph(), x.a)}; }
inline H max(H x, H y) {
  const __mmask32 nan = _mm512_cmp_ph_mask(x.a, x.a, _CMP_UNORD_Q);
  return {_mm512_mask_blend_ph(nan, _mm512_max_ph(x.a, y.a), x.a)};
}
// The second where either is NaN.
inline H quick_max(H x, H y) { return {_mm512_max_ph(x.a, y.a)}; }
// A lane where either is NaN, each lane a bit.
inline unsigned any_unordered(H x, H y) { return _cvtmask32_u32(_mm512_cmp_ph_mask(x.a, y.a, _CMP_UNORD_Q)); }
// The lanes 0-15 and 16-31.
inline V low(H x) { return {_mm512_cvtxph_ps(_mm512_castph512_ph256(x.a))}; }
inline V high(H x) {
  return {_mm512_cvtxph_ps(_mm256_castsi256_ph(_mm512_extracti64x4_epi64(_mm512_castph_si512(x.a), 1)))};
}
inline H narrow(V lo, V hi) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_castph_si256(_mm512_cvtxps_ph(lo.a))),
                                          _mm256_castph_si256(_mm512_cvtxps_ph(hi.a)), 1);
  return {_mm512_castsi512_ph(both)};
}

#else

struct H {
  __m512i a;
};

inline V low(H x) { return {_mm512_cvtph_ps(_mm512_castsi512_si256(x.a))}; }
inline V high(H x) { return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x.a, 1))}; }
inline H narrow(V lo, V hi) {
  const __m256i first_half = _mm512_cvtps_ph(lo.a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i second_half = _mm512_cvtps_ph(hi.a, _MM_FROUND_TO_NEAREST_INT);
  return {_mm512_inserti64x4(_mm512_castsi256_si512(first_half), second_half, 1)};
}
inline H zero_half() { return {_mm512_setzero_si512()}; }
inline H load(const H* p) { return {_mm512_loadu_si512(p)}; }
inline void store(H* p, H x) { _mm512_storeu_si512(p, x.a); }
inline H pair(const std::byte* p) { return {_mm512_set1_epi32(*reinterpret_cast<const int*>(p))}; }
inline void store(u8* p, H x, int zero) {
  store(p, low(x), zero);
  store(p + 16, high(x), zero);
}
inline H add(H x, H y) { return narrow(add(low(x), low(y)), add(high(x), high(y))); }
inline H fma(H x, H y, H z) { return narrow(fma(low(x), low(y), low(z)), fma(high(x), high(y), high(z))); }
inline H relu(H x) { return narrow(relu(low(x)), relu(high(x))); }
inline H max(H x, H y) { return narrow(max(low(x), low(y)), max(high(x), high(y))); }
inline H quick_max(H x, H y) {
  return narrow({_mm512_max_ps(low(x).a, low(y).a)}, {_mm512_max_ps(high(x).a, high(y).a)});
}
inline unsigned any_unordered(H x, H y) {
  const unsigned first_half = _mm512_cmp_ps_mask(low(x).a, low(y).a, _CMP_UNORD_Q);
  return first_half | (static_cast<unsigned>(_mm512_cmp_ps_mask(high(x).a, high(y).a, _CMP_UNORD_Q)) << 16);
}

#endif

}  // namespace xception::XCEPTION_LEVEL
