// What the kernels of training are asked to do, and their table. Included by files that are compiled for one processor:
// plain data only, nothing that a linker might merge.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace xception {

inline constexpr int kTaps = 9;
inline constexpr int kMostDepth = 4096;  // numbers in a window of more than a pixel

// A map: rows of channels as PyTorch has them with channels last, or channel blocks as in kernels.hpp. Pixels are
// counted over all images.
struct Pixels {
  std::byte* data = nullptr;
  std::int64_t pixel = 0;  // bytes from a pixel to the next
  std::int64_t block = 0;  // bytes from a block of channels to the next
  int groups = 1;          // groups of 16 channels in a block: one or two
  int channels = 0;        // that are there: lanes behind them are taken for zeros, and not written
};

// A padded map of 16 channels: float [rows + 2 * pad][width + 2 * pad][16], zeros around.
struct FillArgs {
  Pixels input = {};
  int group = 0;
  std::int64_t first_pixel = 0;  // of the image
  int height = 0, width = 0, pad = 0;
  int first_row = 0, rows = 0;
  const float* scale = nullptr;  // one a channel, or null: the input is taken as it is
  const float* shift = nullptr;
  bool relu = false;
  float* padded = nullptr;
};

struct FilterArgs {
  const float* padded = nullptr;
  const float* filter = nullptr;  // [9][16]
  int width = 0, rows = 0, dilation = 1;
  Pixels output = {};
  int group = 0;
  std::int64_t first_pixel = 0;
};

// Backward through the depthwise convolution: from the output's gradient, a padded map, to the input's gradient and the
// filter's, which is added to; and sums for the normalisation before it.
struct FilterBackArgs {
  Pixels input = {};
  const float* scale = nullptr;  // how it is loaded, one a channel; or null: as it is
  const float* shift = nullptr;
  bool relu = false;
  const float* gradient = nullptr;
  const float* filter = nullptr;  // [9][16]
  int width = 0, rows = 0, dilation = 1;
  Pixels output = {};            // not there: the input's gradient is not asked for
  Pixels residual = {};          // added to it, if there
  const float* mean = nullptr;   // of the input, one a channel; null: no sums
  int group = 0;
  std::int64_t first_pixel = 0;
  float* filter_gradient = nullptr;  // [9][16]
  float* sums = nullptr;             // [2][16]: of the gradient, and of gradient * (input - mean)
};

// Over `pixels` pixels from `first_pixel` on, in groups [first_group, last_group).
struct MapArgs {
  Pixels z = {}, gradient = {}, residual = {}, output = {};
  const float* scale = nullptr;  // the normalisation's, one a channel
  const float* shift = nullptr;
  const float* mean = nullptr;
  const float* factors = nullptr;  // [3][channels padded]: output = f0 * gradient + f1 * z + f2
  std::int64_t stride = 0;         // of `factors` and `sums`: padded channels
  const float* residual_scale = nullptr;  // the residual's own normalisation, or null
  const float* residual_shift = nullptr;
  bool relu = false;  // after the normalisation
  int first_group = 0, last_group = 0;
  std::int64_t first_pixel = 0, output_pixel = 0;
  int pixels = 0;
  float* sums = nullptr;  // [2][stride]
};

// 3x3 max-pooling of a normalised map.
struct PoolTrainArgs {
  Pixels z = {};
  const float* scale = nullptr;
  const float* shift = nullptr;
  Window window = {};
  Pixels residual = {};
  const float* residual_scale = nullptr;  // the residual's own normalisation, or null
  const float* residual_shift = nullptr;
  Pixels output = {};                   // forward: pooled; backward: the gradient of the normalised map
  Pixels gradient = {};                 // backward: of what was pooled
  std::uint8_t* winners = nullptr;  // [groups][output pixels][16]: which of the window's taps
  std::int64_t winner_group = 0;    // bytes
  int first_group = 0, last_group = 0;
  int image = 0;
};

// The k x k windows of a map with channels last, as matrix lines whose K is (row, column, channel), without gaps.
struct WindowArgs {
  Pixels input = {};
  Window window = {};
  int image = 0, first_row = 0, rows = 0;  // rows of windows
  Pixels output = {};
  std::int64_t output_pixel = 0;
  int groups = 0;  // of the lines
};

// The reverse: for each pixel of rows [first_row, first_row + rows) of the map, the lines of the windows that read it, by
// tap: `blocks` lines for tap (0, 0), then for (0, 1), ...; zeros where there is no window.
struct ReaderArgs {
  const std::byte* lines = nullptr;  // of the windows of rows [first_window_row, ...)
  std::int64_t block = 0;
  int blocks = 0, first_window_row = 0;
  Window window = {};
  int first_row = 0, rows = 0;
  std::byte* matrix = nullptr;
  std::int64_t matrix_block = 0;
};

// From channel blocks of windows to the pixels of the map, channels last, that the windows' first tap reads: written,
// with zeros between them; or added to what is there.
struct SpreadArgs {
  Pixels input = {};
  std::int64_t first_pixel = 0;  // of the input
  Pixels output = {};
  Window window = {};  // its sizes and stride
  int image = 0, first_row = 0, rows = 0;
  bool add = false;
};

// out[o][k] += the sum over `steps` of left[o] * right[k], a step being a pixel, or a pair of them for halves.
// Both are lines [groups][steps][64 bytes].
struct OuterArgs {
  const std::byte* left = nullptr;
  std::int64_t left_group = 0;
  int left_groups = 0;
  const std::byte* right = nullptr;
  std::int64_t right_group = 0;
  int right_groups = 0;
  int steps = 0;
  float* output = nullptr;  // [left_groups * 16][right_groups * 16]
  std::byte* workspace = nullptr;  // kOuterRoom bytes, for products in pieces
};
inline constexpr std::size_t kOuterRoom = 1300 << 10;

// Lines of 32 halves, [blocks][pixels][32], as pairs of pixels: [2 * blocks][steps][16][2]. Steps behind the last pixel
// are zeros.
struct PairArgs {
  const std::byte* lines = nullptr;
  std::int64_t block = 0;
  int blocks = 0, pixels = 0, steps = 0;
  std::byte* pairs = nullptr;
  std::int64_t group = 0;
};

// Weights as a panel of the product: [steps][32 columns] of numbers, or of pairs of 16-bit ones; or in pieces, as
// pieces.hpp says, of as many steps as are needed. Steps and columns behind the last are zeros.
struct PackArgs {
  const float* weights = nullptr;
  std::int64_t stride = 0;  // from a column's numbers to the next column's; `pack_transposed`: from a step's to the next's
  int depth = 0, steps = 0, columns = 0;
  std::byte* panel = nullptr;
};

struct TrainKernels {
  void (*pack)(const PackArgs&);
  void (*pack_transposed)(const PackArgs&);
  void (*fill)(const FillArgs&);
  void (*filter)(const FilterArgs&);
  void (*filter_back)(const FilterBackArgs&);
  void (*statistics)(const MapArgs&);     // sums: the sum, and the sum of squared distances from these pixels' mean
  void (*finish)(const MapArgs&);         // output = [relu](z * scale + shift) [+ residual]
  void (*gradient_sums)(const MapArgs&);  // of the gradient, and of gradient * (z - mean)
  void (*gradient)(const MapArgs&);       // through the normalisation, to matrix lines
  void (*pool)(const PoolTrainArgs&);
  void (*pool_back)(const PoolTrainArgs&);
  void (*windows)(const WindowArgs&);
  void (*readers)(const ReaderArgs&);
  void (*spread)(const SpreadArgs&);
  void (*outer)(const OuterArgs&);
  void (*left_pairs)(const PairArgs&);   // as `outer` wants its left side; and its right side
  void (*right_pairs)(const PairArgs&);
  int step_unit;  // `outer` takes multiples of it
};

// `type` is the maps', `matrix` that of the lines that are multiplied. Null where the file has no such kernels.
namespace scalar {
const TrainKernels* train_kernels(Type type, Type matrix);
}
#if defined(XCEPTION_HAS_X86_KERNELS)
namespace avx2 {
const TrainKernels* train_kernels(Type type, Type matrix);
}
namespace avx512 {
const TrainKernels* train_kernels(Type type, Type matrix);
}
namespace avx512_bf16 {
const TrainKernels* train_kernels(Type type, Type matrix);
}
namespace amx {
const TrainKernels* train_kernels(Type type, Type matrix);
}
namespace amx_emulated {
const TrainKernels* train_kernels(Type type, Type matrix);
}
#endif

}  // namespace xception
