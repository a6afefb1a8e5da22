// Products of floats on tiles that multiply bf16: each number is taken apart into three that sum to it. Included like
// producers.hpp, after it and tiles.hpp, where V is an AVX-512 register.
//
// A float has 24 significant bits, a bf16 eight: with each piece rounded to the nearest, a = a0 + a1 + a2 exactly, |a1|
// is at most 2^-8 of a's power of two, |a2| 2^-17. Of the nine products of two such numbers' pieces six are summed, the
// small ones first; those left out (a1 b2, a2 b1, a2 b2) are together less than 2^-24 of a b at worst, and of either
// sign. So sums are as exact as those of floats multiplied one after another (Henry, Tang and Heinecke, "Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019). Tiles take numbers below
// 2^-126 for zero, pieces too.
//
// What has no such pieces is infinite, or would round to infinity: the caller learns of it, and sums without tiles.

inline constexpr int kPieces = 3;
inline constexpr std::int64_t kTileBytes = 16 * kLineBytes;

inline __m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xffff0000u)); }

// The nearest number of eight significant bits; of two as near, the one further from zero.
inline __m512 rounded_to_eight_bits(__m512 x) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, high_half()));
}

// 16 pairs, one a lane, of numbers that are bf16 already.
inline __m512i pairs_of(__m512 first, __m512 second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  return _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(second), high_half()));
}

// Two vectors as pairs, a line for each piece, `distance` bytes apart. `whole` becomes NaN if a number has no pieces.
inline void split(V first, V second, std::byte* to, std::int64_t distance, V& whole) {
  __m512 a = first.a, b = second.a;
  for (int i = 0; i < kPieces - 1; ++i) {
    const __m512 top_a = rounded_to_eight_bits(a), top_b = rounded_to_eight_bits(b);
    _mm512_store_si512(to + i * distance, pairs_of(top_a, top_b));
    a = _mm512_sub_ps(a, top_a);
    b = _mm512_sub_ps(b, top_b);
    if (i == 0) {  // infinity less infinity
      whole = fma({a}, zero(), whole);
      whole = fma({b}, zero(), whole);
    }
  }
  _mm512_store_si512(to + (kPieces - 1) * distance, pairs_of(a, b));
}
inline bool is_nan(V x) { return _mm512_cmp_ps_mask(x.a, x.a, _CMP_UNORD_Q) != 0; }

// The lanes that have no pieces, and are not NaN.
inline __mmask16 without_pieces(V x) {
  const __m512 size = _mm512_abs_ps(x.a);
  return _mm512_cmp_ps_mask(size, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f8000)), _CMP_GE_OQ);
}

// Weights, once packed, are split for many products: what would round to infinity is cut off instead, and infinity is
// its own first piece. Says whether there is any.
inline bool split_weights(V first, V second, std::byte* to) {
  const auto one = [](__m512 x, __m512* pieces) {
    const __mmask16 infinite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
    const __mmask16 cut = without_pieces({x});
    const __m512 down = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), high_half()));
    pieces[0] = _mm512_mask_mov_ps(rounded_to_eight_bits(x), cut, down);
    const __m512 rest = _mm512_maskz_sub_ps(static_cast<__mmask16>(~infinite), x, pieces[0]);
    pieces[1] = rounded_to_eight_bits(rest);
    pieces[2] = _mm512_sub_ps(rest, pieces[1]);
    return infinite != 0;
  };
  __m512 a[kPieces], b[kPieces];
  const bool infinite_a = one(first.a, a), infinite_b = one(second.a, b);
  for (int i = 0; i < kPieces; ++i) _mm512_store_si512(to + i * 2 * kTileBytes, pairs_of(a[i], b[i]));
  return infinite_a || infinite_b;
}

// A panel's weights. For each 32 steps of K three pairs of tiles, one a piece; steps k and k + 16 are the pairs of a
// row. Behind them a line that says whether one of them is infinite.
inline constexpr std::int64_t kPanelLine = kPieces * 2 * kTileBytes;

inline const std::byte* weights_row(const std::byte* panel, int k) {
  return panel + k / 32 * kPanelLine + k % 16 * 2 * kLineBytes;
}
// Step k's 16 weights there, put together again.
inline V whole_weights(const std::byte* row, int k) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < kPieces; ++i) {
    const __m512i pairs = _mm512_load_si512(row + i * 2 * kTileBytes);
    const __m512i piece = k / 16 % 2 == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, high_half());
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(piece));
  }
  return {sum};
}
inline bool has_infinity(const std::byte* panel, std::int64_t panel_bytes) {
  return *reinterpret_cast<const std::uint32_t*>(panel + panel_bytes - kLineBytes) != 0;
}

// The tiles of a side: those of a piece, and of the one beside it, in bytes behind the first.
struct TileSide {
  const std::byte* at;
  std::int64_t second, piece, stride;
};

// 32 steps of K: tiles 0 to 3 are the sums, of the left side's two by the right side's two, where there are two. Each
// side's pair of tiles stays for as many products as can be: 14 loads for 24.
template <bool TwoLeft, bool TwoRight, class Meanwhile>
inline void dot_pieces(const TileSide& left, const TileSide& right, Meanwhile&& meanwhile) {
  const auto next_left = [&](int i) {
    const std::byte* at = left.at + i * left.piece;
    tile_load<4>(at, left.stride);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (TwoRight) tile_dot_bf16<1, 4, 7>();
    if constexpr (TwoLeft) {
      tile_load<5>(at + left.second, left.stride);
      tile_dot_bf16<2, 5, 6>();
      if constexpr (TwoRight) tile_dot_bf16<3, 5, 7>();
    }
  };
  const auto next_right = [&](int i) {
    const std::byte* at = right.at + i * right.piece;
    tile_load<6>(at, right.stride);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (TwoLeft) tile_dot_bf16<2, 5, 6>();
    if constexpr (TwoRight) {
      tile_load<7>(at + right.second, right.stride);
      tile_dot_bf16<1, 4, 7>();
      if constexpr (TwoLeft) tile_dot_bf16<3, 5, 7>();
    }
  };
  tile_load<4>(left.at + 2 * left.piece, left.stride);
  if constexpr (TwoLeft) tile_load<5>(left.at + 2 * left.piece + left.second, left.stride);
  next_right(0);  // a2 b0
  next_left(1);   // a1 b0
  next_right(1);  // a1 b1
  meanwhile();
  next_left(0);   // a0 b1
  next_right(2);  // a0 b2
  next_right(0);  // a0 b0
}
