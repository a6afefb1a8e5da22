// Weights for the product of floats in pieces, and their gradient. Included after pieces.hpp and train_kernels.hpp.

// A panel, 32 steps of K at a time: packed as floats, and split.
template <void (*Pack)(const PackArgs&)>
void pack_pieces(const PackArgs& a) {
  alignas(64) float floats[32 * kPanel];
  const bool transposed = Pack == pack_transposed<float>;
  bool infinite = false;
  std::byte* to = a.panel;
  for (int k = 0; k < a.depth; k += 32, to += kPanelLine) {
    PackArgs part = a;
    part.weights = a.weights + (transposed ? k * a.stride : k);
    part.depth = least(a.depth - k, 32);
    part.steps = 32;
    part.panel = reinterpret_cast<std::byte*>(floats);
    Pack(part);
    for (int row = 0; row < kGroup; ++row)
      for (int column = 0; column < kPanel; column += kGroup) {
        const float* first = floats + row * kPanel + column;
        std::byte* pairs = to + row * 2 * kLineBytes + column * 4;
        const bool found = split_weights(load(first), load(first + kGroup * kPanel), pairs);
        infinite = infinite || found;
      }
  }
  __builtin_memset(to, infinite ? 1 : 0, kLineBytes);
}

// Pixels that are split at a time, and groups of the right side: what fits into a second-level cache beside the rest.
inline constexpr int kSplitPixels = 256, kSplitGroups = 48;
inline constexpr std::int64_t kSplitGroupBytes = kSplitPixels / 32 * kPieces * kTileBytes;
static_assert((kSplitGroups + 2) * kSplitGroupBytes <= static_cast<std::int64_t>(kOuterRoom));

// 16 lines from this pixel on, zeros behind the last one.
inline void pixel_lines(const std::byte* lines, int pixels, V* out) {
  for (int i = 0; i < kGroup; ++i) out[i] = i < pixels ? load(line<float>(lines, i)) : zero();
}

// A group of 16 channels as tiles: [32 pixels][piece][16 rows], pixels p and p + 16 a pair. Of the right side a row is
// a pair of pixels; of the left side, where `Channels`, a channel.
template <bool Channels>
inline void split_group(const std::byte* lines, int pixels, std::byte* to, V& whole) {
  for (int p = 0; p < pixels; p += 32, to += kPieces * kTileBytes) {
    V first[kGroup], second[kGroup];
    pixel_lines(lines + p * std::int64_t{kLineBytes}, pixels - p, first);
    pixel_lines(lines + (p + kGroup) * std::int64_t{kLineBytes}, pixels - p - kGroup, second);
    if constexpr (Channels) {
      transpose_16x16(reinterpret_cast<const std::uint32_t*>(first), reinterpret_cast<std::uint32_t*>(first));
      transpose_16x16(reinterpret_cast<const std::uint32_t*>(second), reinterpret_cast<std::uint32_t*>(second));
    }
    for (int row = 0; row < kGroup; ++row) split(first[row], second[row], to + row * kLineBytes, kTileBytes, whole);
  }
}

// Two groups of the left side, or one, by as many of the right: their sums, over `tiles` times 32 pixels.
template <bool TwoLeft, bool TwoRight>
inline void outer_block(const std::byte* left, const std::byte* right, int tiles, float* output, std::int64_t row) {
  const std::int64_t stride = row * static_cast<std::int64_t>(sizeof(float));
  float* below = output + kGroup * row;
  tile_load<0>(output, stride);
  if constexpr (TwoRight) tile_load<1>(output + kGroup, stride);
  if constexpr (TwoLeft) tile_load<2>(below, stride);
  if constexpr (TwoLeft && TwoRight) tile_load<3>(below + kGroup, stride);
  for (int t = 0; t < tiles; ++t) {
    const std::int64_t at = t * kPieces * kTileBytes;
    dot_pieces<TwoLeft, TwoRight>({left + at, kSplitGroupBytes, kTileBytes, kLineBytes},
                                  {right + at, kSplitGroupBytes, kTileBytes, kLineBytes}, [] {});
  }
  tile_store<0>(output, stride);
  if constexpr (TwoRight) tile_store<1>(output + kGroup, stride);
  if constexpr (TwoLeft) tile_store<2>(below, stride);
  if constexpr (TwoLeft && TwoRight) tile_store<3>(below + kGroup, stride);
}

// The sums come from far away: the next block's are fetched during this one.
inline void fetch_sums(const float* sums, std::int64_t row, int rows) {
  for (int r = 0; r < rows; ++r, sums += row) {
    __builtin_prefetch(sums);
    __builtin_prefetch(sums + kGroup);
  }
}

// Some of the right side's groups, already split, and all of the left side's.
inline void outer_split(const OuterArgs& a, int begin, int pixels, int first, int groups, bool whole_right) {
  const std::int64_t row = static_cast<std::int64_t>(a.right_groups) * kGroup;
  const std::int64_t from = begin * std::int64_t{kLineBytes};
  const std::byte* right = a.workspace;
  std::byte* left = a.workspace + kSplitGroups * kSplitGroupBytes;
  const int tiles = (pixels + 31) / 32;
  for (int o = 0; o < a.left_groups; o += 2) {
    const int rows = least(2, a.left_groups - o);
    V whole = zero();
    for (int i = 0; i < rows; ++i)
      split_group<true>(a.left + (o + i) * a.left_group + from, pixels, left + i * kSplitGroupBytes, whole);
    float* output = a.output + o * kGroup * row + first * kGroup;
    if (!whole_right || is_nan(whole)) {  // without tiles
      OuterArgs part = a;
      part.left += o * a.left_group;
      part.left_groups = rows;
      part.output += o * kGroup * row;
      for (int k = first; k < first + groups; ++k) outer_columns<DotFloat, 1>(part, begin, pixels, k);
      continue;
    }
    for (int k = 0; k < groups; k += 2, output += 2 * kGroup) {
      if (k + 2 < groups) fetch_sums(output + 2 * kGroup, row, rows * kGroup);
      const bool two = k + 1 < groups;
      const std::byte* columns = right + k * kSplitGroupBytes;
      if (rows == 2)
        two ? outer_block<true, true>(left, columns, tiles, output, row)
            : outer_block<true, false>(left, columns, tiles, output, row);
      else
        two ? outer_block<false, true>(left, columns, tiles, output, row)
            : outer_block<false, false>(left, columns, tiles, output, row);
    }
  }
}

inline void outer_pieces(const OuterArgs& a) {
  const int parts = (a.steps + kSplitPixels - 1) / kSplitPixels;
  const int shares = (a.right_groups + kSplitGroups - 1) / kSplitGroups;
  for (int part = 0; part < parts; ++part) {
    const int begin = part * kSplitPixels, pixels = least(kSplitPixels, a.steps - begin);
    for (int share = 0; share < shares; ++share) {
      const int first = a.right_groups * share / shares, groups = a.right_groups * (share + 1) / shares - first;
      V whole = zero();
      for (int k = 0; k < groups; ++k)
        split_group<false>(a.right + (first + k) * a.right_group + begin * std::int64_t{kLineBytes}, pixels,
                           a.workspace + k * kSplitGroupBytes, whole);
      outer_split(a, begin, pixels, first, groups, !is_nan(whole));
    }
  }
}
