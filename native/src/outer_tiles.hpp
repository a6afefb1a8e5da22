// The gradient of the weights on AMX tiles. Included after tiles.hpp and train_kernels.hpp.
//
// A tile of the left side is 16 channels by 16 pairs of pixels, [channel][pair], a tile of the right side 16 pairs by 16
// channels: so the left side's pairs are transposed, 16 steps at a time, and lie as whole tiles.

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
        // Sums come from far away: those of the next block are fetched while this one is computed.
        const bool last = o + 2 >= a.left_groups;
        const float* next = last ? a.output + (k + 2) * kGroup : output + 2 * kGroup * row;
        const int fetched = last && k + 2 >= a.right_groups ? 0 : (2 * kGroup + tiles - 1) / tiles;  // rows a step
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
          for (int r = t * fetched; r < least((t + 1) * fetched, 2 * kGroup); ++r) {
            __builtin_prefetch(next + r * row);
            __builtin_prefetch(next + r * row + kGroup);
          }
        }
        tile_store<0>(output, stride);
        tile_store<1>(output + kGroup, stride);
        tile_store<2>(output + kGroup * row, stride);
        tile_store<3>(output + kGroup * row + kGroup, stride);
      }
  }
}
