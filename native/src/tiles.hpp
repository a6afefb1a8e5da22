// AMX's eight tile registers: the instructions, or the same with AVX-512, so that what is written with them can be
// tested on processors that have none. Tiles are 16 rows of 64 bytes, all of them, always.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "halves.hpp"

#if defined(XCEPTION_EMULATE_TILES)

namespace xception::XCEPTION_LEVEL {

struct Tile {
  alignas(64) std::uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];

inline void begin_tiles() {}
inline void end_tiles() {}
template <int T>
inline void tile_zero() {
  __builtin_memset(&tiles[T], 0, sizeof(Tile));
}
// The thread's tiles are looked up once in each operation: under AddressSanitizer every look is a call.
template <int T>
inline void tile_load(const void* p, std::int64_t stride) {
  Tile& tile = tiles[T];
  for (int r = 0; r < 16; ++r) __builtin_memcpy(tile.bytes[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int T>
inline void tile_store(void* p, std::int64_t stride) {
  const Tile& tile = tiles[T];
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(p) + r * stride, tile.bytes[r], 64);
}
// The first and the second of 16 pairs.
inline void widen_pairs(const bf16*, __m512i pairs, __m512* out) {
  out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void widen_pairs(const f16*, __m512i pairs, __m512* out) {
  out[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  out[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}
// The first of all pairs and the second are summed apart, then together, then onto what is there; each step rounded to
// the nearest, numbers below 2^-126 taken for zero (Intel SDM vol. 2, TDPBF16PS).
template <class Half>
inline void tile_dot_of(Tile& sums, const Tile& pixels, const Tile& weights) {
  const unsigned flags = _mm_getcsr();  // which the instructions leave alone
  _mm_setcsr(0x9fc0);                   // no exceptions, and those numbers zero
  const Half* kind = nullptr;
  __m512 right[16][2];
  for (int k = 0; k < 16; ++k) widen_pairs(kind, _mm512_load_si512(weights.bytes[k]), right[k]);
  for (int m = 0; m < 16; ++m) {
    __m512 left[2];
    widen_pairs(kind, _mm512_load_si512(pixels.bytes[m]), left);
    float factors[2][16];
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(factors[j], left[j]);
    __m512 apart[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 2; ++j) apart[j] = _mm512_fmadd_ps(_mm512_set1_ps(factors[j][k]), right[k][j], apart[j]);
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums.bytes[m]), _mm512_add_ps(apart[0], apart[1]));
    _mm512_store_ps(reinterpret_cast<float*>(sums.bytes[m]), sum);
  }
  _mm_setcsr(flags);
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
  tile_dot_of<bf16>(tiles[C], tiles[A], tiles[B]);
}
template <int C, int A, int B>
inline void tile_dot_f16() {
  tile_dot_of<f16>(tiles[C], tiles[A], tiles[B]);
}

// Unsigned times signed.
template <int C, int A, int B>
inline void tile_dot_u8() {
  Tile& output = tiles[C];
  const Tile &pixels = tiles[A], &weights = tiles[B];
  for (int m = 0; m < 16; ++m) {
    std::int32_t sums[16];
    __builtin_memcpy(sums, output.bytes[m], sizeof sums);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int j = 0; j < 4; ++j)
          sums[n] += pixels.bytes[m][4 * k + j] * static_cast<std::int8_t>(weights.bytes[k][4 * n + j]);
    __builtin_memcpy(output.bytes[m], sums, sizeof sums);
  }
}

}  // namespace xception::XCEPTION_LEVEL

#else

namespace xception::XCEPTION_LEVEL {

// Each thread that uses tiles says first how large they are, and at the end that the system need not save them.
inline void begin_tiles() {
  struct alignas(64) Configuration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Configuration configuration;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
}
inline void end_tiles() { __asm__ volatile("tilerelease"); }

// By assembly rather than intrinsics: gcc 12 has none for half precision, and so no flag has to allow the compiler
// itself to use tiles. The clobbers keep it from moving the loads and stores of ordinary code across.
template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void tile_load(const void* p, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, std::int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// Unsigned times signed.
template <int C, int A, int B>
inline void tile_dot_u8() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// tdpfp16ps by its bytes, since older assemblers do not know it: VEX.128.F2.0F38.W0 5C /r (Intel SDM vol. 2B). The
// registers are fixed; `multiply_tiles` uses these four combinations only.
template <int C, int A, int B>
inline void tile_dot_f16() {
  static_assert(C < 8 && A < 8 && B < 8);
  // C4 E2 vvvv: 0(W) ~vvvv 0(L) 11(pp = F2) 5C 11 reg rm
  __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" : : "i"(((15 - B) << 3) | 3), "i"(0xc0 | (C << 3) | A));
}

}  // namespace xception::XCEPTION_LEVEL

#endif
