// The gradient of the weights on AMX tiles. Included after tiles.hpp and train_kernels.hpp.
//
// A tile of the left side is 16 channels by 16 pairs of pixels, [channel][pair], a tile of the right side 16 pairs by 16
// channels: so the left side's pairs are transposed, 16 steps at a time, and lie as whole tiles.

// 16 lines of 16 pairs, transposed in place of 32-bit numbers: `to` gets line c of what was column c.
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

inline void transposed_pairs(const PairArgs& a) {
  pairs(a);
  for (int g = 0; g < 2 * a.blocks; ++g)
    for (int s = 0; s < a.steps; s += 16) {
      auto* tile = reinterpret_cast<std::uint32_t*>(a.pairs + g * a.group + s * kLineBytes);
      transpose_16x16(tile, tile);  // all lines are read before one is written
    }
}

// Two groups of the left side by two of the right: four sums. Groups come in twos, since lines hold 32 halves.
inline void outer_tiles(const OuterArgs& a) {
  const std::int64_t row = static_cast<std::int64_t>(a.right_groups) * kGroup;
  constexpr int kTileBytes = 16 * kLineBytes;
  constexpr int kSteps = 256;  // 32 KB of the right side, which all of the left side meets
  for (int begin = 0; begin < a.steps; begin += kSteps) {
    const int tiles = least(kSteps, a.steps - begin) / 16;
    for (int k = 0; k < a.right_groups; k += 2)
      for (int o = 0; o < a.left_groups; o += 2) {
        float* output = a.output + o * kGroup * row + k * kGroup;
        const std::int64_t stride = row * static_cast<std::int64_t>(sizeof(float));
        tile_load<0>(output, stride);
        tile_load<1>(output + kGroup, stride);
        tile_load<2>(output + kGroup * row, stride);
        tile_load<3>(output + kGroup * row + kGroup, stride);
        const std::byte* left = a.left + o * a.left_group + begin * std::int64_t{kLineBytes};
        const std::byte* right = a.right + k * a.right_group + begin * std::int64_t{kLineBytes};
        for (int t = 0; t < tiles; ++t, left += kTileBytes, right += kTileBytes) {
          tile_load<4>(left, kLineBytes);
          tile_load<6>(right, kLineBytes);
          tile_dot_bf16<0, 4, 6>();
          tile_load<7>(right + a.right_group, kLineBytes);
          tile_dot_bf16<1, 4, 7>();
          tile_load<5>(left + a.left_group, kLineBytes);
          tile_dot_bf16<2, 5, 6>();
          tile_dot_bf16<3, 5, 7>();
        }
        tile_store<0>(output, stride);
        tile_store<1>(output + kGroup, stride);
        tile_store<2>(output + kGroup * row, stride);
        tile_store<3>(output + kGroup * row + kGroup, stride);
      }
  }
}
