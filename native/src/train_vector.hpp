// What training needs of V beside the vector headers. Included by each train_*.cpp after one of them.
#pragma once

namespace xception::XCEPTION_LEVEL {

#if defined(__AVX512F__)

// The first lanes of a vector, where behind them is somebody else's memory.
inline __mmask16 lane_mask(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1u); }
inline V load_some(const float* p, int lanes) { return {_mm512_maskz_loadu_ps(lane_mask(lanes), p)}; }
inline V load_some(const bf16* p, int lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lane_mask(lanes), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store_some(float* p, V v, int lanes) { _mm512_mask_storeu_ps(p, lane_mask(lanes), v.a); }
inline void store_some(bf16* p, V v, int lanes) {
  bf16 copy[16];
  store(copy, v);
  _mm256_mask_storeu_epi16(p, lane_mask(lanes), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(copy)));
}

inline V sub(V x, V y) { return {_mm512_sub_ps(x.a, y.a)}; }
// x > y ? yes : no, a lane; and `no` where one is NaN.
inline V select_greater(V x, V y, V yes, V no) {
  return {_mm512_mask_mov_ps(no.a, _mm512_cmp_ps_mask(x.a, y.a, _CMP_GT_OQ), yes.a)};
}
// Lanes as bytes; they hold small whole numbers.
inline void store_bytes(std::uint8_t* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x.a)));
}
// The lanes whose byte is `wanted`, zeros elsewhere.
inline V where_byte(const std::uint8_t* p, int wanted, V x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(wanted))), x.a)};
}
// `into` with the first `count` lanes of x from lane `first` on.
inline V placed(V into, int first, int count, V x) {
  return {_mm512_mask_expand_ps(into.a, static_cast<__mmask16>(((1u << count) - 1u) << first), x.a)};
}
// Rounded, side by side: even[0], odd[0], even[1], ...
inline void store_pairs(bf16* to, V even, V odd) {
  bf16 halves[2][16];
  store(halves[0], even);
  store(halves[1], odd);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves[0])));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves[1])));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// Two lines of 32 halves, the second one zero if it is not there, as 32 pairs.
inline void pair_lines(const std::uint16_t* lines, bool second, std::uint16_t* low, std::uint16_t* high) {
  const __m512i a = _mm512_loadu_si512(lines);
  const __m512i b = second ? _mm512_loadu_si512(lines + 32) : _mm512_setzero_si512();
  const __m512i even = _mm512_and_si512(a, _mm512_set1_epi32(0xffff));
  const __m512i first = _mm512_or_si512(even, _mm512_slli_epi32(b, 16));                  // channels 0, 2, 4, ...
  const __m512i odd = _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_andnot_si512(_mm512_set1_epi32(0xffff), b));
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_si512(low, _mm512_permutex2var_epi32(first, order, odd));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi32(first, _mm512_add_epi32(order, _mm512_set1_epi32(8)), odd));
}
// 16 lines of 16 numbers or pairs, transposed: `to` gets line c of what was column c. It may be `from`.
inline void transpose_16x16(const std::uint32_t* from, std::uint32_t* to) {
  __m512i rows[16], other[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * 16);
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
    }
  // rows[4 * q + c] holds, in each 128-bit part p, column 4 * p + c of the four lines from 4 * q on.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88), b = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd), e = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    _mm512_storeu_si512(to + c * 16, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + (8 + c) * 16, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + (4 + c) * 16, _mm512_shuffle_i32x4(d, e, 0x88));
    _mm512_storeu_si512(to + (12 + c) * 16, _mm512_shuffle_i32x4(d, e, 0xdd));
  }
}
inline constexpr int kOuterRows = 8, kOuterColumns = 3;

#else

// The first lanes of a vector, where behind them is somebody else's memory.
template <class S>
inline V load_some(const S* p, int lanes) {
  if (lanes == 16) return load(p);
  S copy[16] = {};
  for (int i = 0; i < lanes; ++i) copy[i] = p[i];
  return load(static_cast<const S*>(copy));
}
template <class S>
inline void store_some(S* p, V v, int lanes) {
  if (lanes == 16) return store(p, v);
  S copy[16];
  store(copy, v);
  for (int i = 0; i < lanes; ++i) p[i] = copy[i];
}

// `into` with the first `count` lanes of x from lane `first` on.
inline V placed(V into, int first, int count, V x) {
  float lanes[16], from[16];
  store(lanes, into);
  store(from, x);
  for (int i = 0; i < count; ++i) lanes[first + i] = from[i];
  return load(static_cast<const float*>(lanes));
}

inline void store_pairs(bf16* to, V even, V odd) {
  bf16 halves[2][16];
  store(halves[0], even);
  store(halves[1], odd);
  for (int i = 0; i < 16; ++i) {
    to[2 * i] = halves[0][i];
    to[2 * i + 1] = halves[1][i];
  }
}
inline void pair_lines(const std::uint16_t* lines, bool second, std::uint16_t* low, std::uint16_t* high) {
  for (int i = 0; i < 32; ++i) {
    std::uint16_t* pair = (i < 16 ? low : high) + (i % 16) * 2;
    pair[0] = lines[i];
    pair[1] = second ? lines[32 + i] : std::uint16_t{0};
  }
}

inline void transpose_16x16(const std::uint32_t* from, std::uint32_t* to) {
  std::uint32_t lines[256];
  for (int i = 0; i < 256; ++i) lines[i] = from[i];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * 16 + i] = lines[i * 16 + j];
}

#if defined(__AVX2__)

inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V select_greater(V x, V y, V yes, V no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
inline void store_bytes(std::uint8_t* p, V x) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(lanes[i]);
}
inline V where_byte(const std::uint8_t* p, int wanted, V x) {
  const __m128i bytes = _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                                       _mm_set1_epi8(static_cast<char>(wanted)));
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(bytes))),
          _mm256_and_ps(x.b, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))))};
}
inline constexpr int kOuterRows = 6, kOuterColumns = 1;

#else

inline V sub(V x, V y) {
  return make([&](int i) { return x.v[i] - y.v[i]; });
}
inline V select_greater(V x, V y, V yes, V no) {
  return make([&](int i) { return x.v[i] > y.v[i] ? yes.v[i] : no.v[i]; });
}
inline void store_bytes(std::uint8_t* p, V x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(x.v[i]);
}
inline V where_byte(const std::uint8_t* p, int wanted, V x) {
  return make([&](int i) { return p[i] == wanted ? x.v[i] : 0.0f; });
}
inline constexpr int kOuterRows = 4, kOuterColumns = 1;

#endif
#endif

}  // namespace xception::XCEPTION_LEVEL
