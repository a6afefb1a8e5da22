// Small sums that several files need, and how memory is laid out for kernels.
#pragma once

#include "kernels.hpp"

namespace xception {

// The matrix of one strip: it should stay in a core's second-level cache beside a panel of weights.
inline constexpr std::int64_t kMatrixBytes = 256 << 10;
// Of a thread that has a share of an image only: one strip more would read all weights once more.
inline constexpr std::int64_t kSharedMatrixBytes = 384 << 10;
// Tiles read whole: up to 31 lines behind the last pixel.
inline constexpr std::size_t kSlack = 32 * kLineBytes;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int rounded_up(int value, int unit) { return ceil_div(value, unit) * unit; }
constexpr std::size_t index_of(int i) { return static_cast<std::size_t>(i); }
constexpr int panels_of(int channels) { return ceil_div(channels, kPanel); }

// Channels that a producer of a matrix handles, and has filters for: all lanes of the matrix's lines, so that none is left
// unwritten. Of bytes only whole panels: whatever lies behind them, a weight of zero makes it zero.
constexpr int whole_lines(int channels, Type type) {
  return rounded_up(channels, type == Type::u8 ? kPanel : lane_count(type));
}

// A panel of weights, of which a step of K takes four bytes a channel: a float, or a pair of 16-bit numbers. In pieces it
// takes six for each float, and a line behind the last says whether one of them is infinite.
constexpr std::int64_t panel_bytes(const Kernels& kernels, int depth) {
  const int padded = rounded_up(depth, kernels.depth_unit);
  if (kernels.in_pieces) return std::int64_t{padded} * kPanel * 6 + kLineBytes;
  return std::int64_t{ceil_div(padded, kernels.matrix_type == Type::f32 ? 1 : 2)} * 2 * kLineBytes;
}

// Images of this size that go through layers together, so that weights are worth loading: one of 299 x 299.
constexpr int images_together(int height, int width) {
  const std::int64_t pixels = static_cast<std::int64_t>(height) * width;
  return pixels < 1 ? 90'000 : pixels > 90'000 ? 1 : static_cast<int>(90'000 / pixels);
}

struct Range {
  int begin, end;
};
constexpr Range share(int total, int index, int count) {
  return {static_cast<int>(static_cast<std::int64_t>(total) * index / count),
          static_cast<int>(static_cast<std::int64_t>(total) * (index + 1) / count)};
}

}  // namespace xception
