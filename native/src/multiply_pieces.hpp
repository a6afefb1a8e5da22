// The product of floats on tiles: the strip's matrix is taken into pieces first, which costs a few vector operations
// for 32 numbers that then meet every panel of weights. Included like multiply_tiles.hpp, after it and pieces.hpp.

// The matrix in pieces, [K / 32][piece][pixels][32]: of 32 steps of K lanes k and k + 16 are neighbours. Whether all
// numbers have pieces.
struct SplitMatrix {
  std::byte* at;
  std::int64_t block;  // bytes from a piece to the next
};
inline bool split_matrix(const MultiplyArgs& a, const SplitMatrix& to) {
  V whole = zero();
  for (int k = 0; k < a.depth; k += 2 * kGroup) {
    const __mmask16 lanes = first_lanes(a.depth - k), more_lanes = first_lanes(a.depth - k - kGroup);
    const std::byte* line = a.matrix + k / kGroup * a.matrix_block;
    const std::byte* next = more_lanes != 0 ? line + a.matrix_block : line;
    std::byte* out = to.at + k / (2 * kGroup) * kPieces * to.block;
    for (std::int64_t at = 0; at < static_cast<std::int64_t>(a.pixels) * kLineBytes; at += kLineBytes)
      split({_mm512_maskz_loadu_ps(lanes, line + at)}, {_mm512_maskz_loadu_ps(more_lanes, next + at)}, out + at,
            to.block, whole);
  }
  return !is_nan(whole);
}

// Sums of a block that are still to be finished, a pixel a row.
template <Activation A, bool Residual>
struct UnfinishedFloats {
  const float* sums = nullptr;
  const float* bias = nullptr;
  std::byte* output[2] = {};
  const std::byte* residual[2] = {};
  __mmask16 valid[2] = {};  // lanes behind the last channel stay zero: infinity times a padded zero is NaN
  int left = 0;

  void rows(int count) {
    const V biases[2] = {load(bias), load(bias + kGroup)};
    for (int r = least(count, left); r > 0; --r)
      for (int half = 0; half < 2; ++half) {
        V sum{_mm512_maskz_add_ps(valid[half], load(sums).a, biases[half].a)};
        sums += kGroup;
        if constexpr (Residual) {
          sum = add(sum, load(reinterpret_cast<const float*>(residual[half])));
          residual[half] += kLineBytes;
        }
        store(reinterpret_cast<float*>(output[half]), activate(sum, A));
        output[half] += kLineBytes;
      }
    left -= least(count, left);
  }
};

template <Activation A, bool Residual>
inline UnfinishedFloats<A, Residual> unfinished(const MultiplyArgs& a, int panel, int pixel, int pixels,
                                                const float* sums) {
  UnfinishedFloats<A, Residual> out;
  out.sums = sums;
  out.bias = a.bias + panel * kPanel;
  for (int half = 0; half < 2; ++half) {
    const std::int64_t group = 2 * panel + half, at = static_cast<std::int64_t>(pixel) * kLineBytes;
    out.output[half] = a.output + group * a.output_block + at;
    if constexpr (Residual) out.residual[half] = a.residual + group * a.residual_block + at;
    out.valid[half] = first_lanes(a.out_channels - panel * kPanel - half * kGroup);
  }
  out.left = pixels;
  return out;
}

// A pixel's sums without tiles.
inline void sum_floats(const MultiplyArgs& a, const std::byte* panel, int pixel, float* sums) {
  V low = zero(), high = zero();
  for (int k = 0; k < a.depth; ++k) {
    const V x = set1(line<float>(a.matrix + k / kGroup * a.matrix_block, pixel)[k % kGroup]);
    const std::byte* row = weights_row(panel, k);
    low = fma(x, whole_weights(row, k), low);
    high = fma(x, whole_weights(row + kLineBytes, k), high);
  }
  store(sums, low);
  store(sums + kGroup, high);
}

// Of a pixel with NaN nothing else is wanted: every sum is NaN in pieces too.
inline bool needs_floats(const MultiplyArgs& a, int pixel) {
  bool found = false;
  for (int k = 0; k < a.depth; k += kGroup) {
    const float* numbers = line<float>(a.matrix + k / kGroup * a.matrix_block, pixel);
    const V x{_mm512_maskz_loadu_ps(first_lanes(a.depth - k), numbers)};
    if (is_nan(x)) return false;
    found = found || without_pieces(x) != 0;
  }
  return found;
}

// What tiles could not sum is summed again: of an infinite weight a panel, of a pixel that has no pieces all panels.
// Which other pixels are in the strip does not show in a pixel's numbers.
template <Activation A, bool Residual>
[[gnu::noinline]] void sum_again(const MultiplyArgs& a, bool whole) {
  float* sums = reinterpret_cast<float*>(a.workspace);
  for (int pixel = 0; pixel < a.pixels; ++pixel) {
    const bool all = !whole && needs_floats(a, pixel);
    for (int p = a.first_panel; p < a.first_panel + a.panels; ++p) {
      const std::byte* panel = a.weights + p * a.panel_bytes;
      if (!all && !has_infinity(panel, a.panel_bytes)) continue;
      sum_floats(a, panel, pixel, sums);
      unfinished<A, Residual>(a, p, pixel, 1, sums).rows(1);
    }
  }
}

// The sums of 32 pixels (`Second`) or 16, while `before` is finished.
template <bool Second, class Before>
inline void sum_pieces(const std::byte* matrix, std::int64_t block, const std::byte* weights, int lines,
                       const std::byte* coming, int coming_lines, Before& before) {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (Second) {
    tile_zero<2>();
    tile_zero<3>();
  }
  const int wait = lines >= 4 ? 1 : 0;  // the sums before are still on their way into memory
  const int rows = (32 + lines - wait - 1) / (lines - wait);
  for (int k = 0; k < lines; ++k) {
    const TileSide left{matrix, kTileBytes, block, kLineBytes};
    const TileSide right{weights, kLineBytes, 2 * kTileBytes, 2 * kLineBytes};
    dot_pieces<Second, true>(left, right, [&] {
      if (k >= wait) before.rows(rows);
      for (int i = 0; i < coming_lines; ++i)
        _mm_prefetch(reinterpret_cast<const char*>(coming + i * kLineBytes), _MM_HINT_T1);
    });
    coming += coming_lines * kLineBytes;
    matrix += kPieces * block;
    weights += kPanelLine;
  }
}

template <Activation A, bool Residual>
void multiply_split(const MultiplyArgs& a, const SplitMatrix& matrix, bool whole) {
  float* sums = reinterpret_cast<float*>(a.workspace);
  const int lines = (a.depth + 31) / 32, blocks = (a.pixels + 31) / 32;
  const int coming_lines = static_cast<int>((kPanelLine / kLineBytes + blocks - 1) / blocks);
  UnfinishedFloats<A, Residual> before;
  before.bias = a.bias;  // of nothing yet
  bool infinite = false;
  for (int p = a.first_panel; p < a.first_panel + a.panels; ++p) {
    const std::byte* weights = a.weights + p * a.panel_bytes;
    infinite = infinite || has_infinity(weights, a.panel_bytes);
    const std::byte* coming = p + 1 < a.first_panel + a.panels ? weights + a.panel_bytes : a.next_weights;
    for (int b = 0; b < blocks; ++b) {
      const int pixel = b * 32, pixels = least(32, a.pixels - pixel);
      const std::byte* from = matrix.at + static_cast<std::int64_t>(pixel) * kLineBytes;
      const std::int64_t fetched = static_cast<std::int64_t>(coming_lines) * lines * kLineBytes;
      const bool fetches = coming != nullptr && (b + 1) * fetched <= a.panel_bytes;
      const std::byte* ahead = fetches ? coming + b * fetched : weights;
      if (pixels > 16)
        sum_pieces<true>(from, matrix.block, weights, lines, ahead, fetches ? coming_lines : 0, before);
      else
        sum_pieces<false>(from, matrix.block, weights, lines, ahead, fetches ? coming_lines : 0, before);
      before.rows(32);
      constexpr std::int64_t row = kPanel * sizeof(float);
      tile_store<0>(sums, row);
      tile_store<1>(sums + kGroup, row);
      if (pixels > 16) {
        tile_store<2>(sums + 16 * kPanel, row);
        tile_store<3>(sums + 16 * kPanel + kGroup, row);
      }
      before = unfinished<A, Residual>(a, p, pixel, pixels, sums);
    }
  }
  before.rows(32);
  if (infinite || !whole) sum_again<A, Residual>(a, whole);
}

template <Activation A>
void multiply_split(const MultiplyArgs& a, const SplitMatrix& matrix, bool whole) {
  a.residual != nullptr ? multiply_split<A, true>(a, matrix, whole) : multiply_split<A, false>(a, matrix, whole);
}

inline void multiply_pieces(const MultiplyArgs& a) {
  if (a.pixels == 0 || a.panels == 0) return;
  const SplitMatrix matrix{a.workspace + kWorkspace, xception::spread(static_cast<std::int64_t>(a.pixels) * kLineBytes)};
  const bool whole = split_matrix(a, matrix);
  switch (a.activation) {
    case Activation::none:
      return multiply_split<Activation::none>(a, matrix, whole);
    case Activation::relu:
      return multiply_split<Activation::relu>(a, matrix, whole);
    case Activation::elu:
      return multiply_split<Activation::elu>(a, matrix, whole);
  }
}
