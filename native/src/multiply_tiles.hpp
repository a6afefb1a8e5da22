// The matrix product on AMX tiles. Included like multiply.hpp, after it.
//
// A line of the matrix is a row of a tile (a pixel, 32 values), a panel's 16 steps of K are the rows of two tiles (a
// pair of values for each of 16 output channels). 32 pixels times 32 channels are summed in four tiles over all of K,
// then stored as floats and finished by vectors. Rows beyond the last pixel are computed from whatever lies there, and
// dropped; K is padded with zero weights to a whole line, and lines have no lanes that nobody wrote.

template <class Half>
inline constexpr bool kBf16 = false;
template <>
inline constexpr bool kBf16<bf16> = true;

template <class Half>
inline void multiply_four_tiles(const MultiplyArgs& a, int pixel, const std::byte* weights, float* sums) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  const int lines = (a.depth + 31) / 32;
  const std::byte* matrix = a.matrix + static_cast<std::int64_t>(pixel) * kLineBytes;
  for (int k = 0; k < lines; ++k) {
    tile_load<4>(matrix, kLineBytes);
    tile_load<5>(matrix + 16 * kLineBytes, kLineBytes);
    tile_load<6>(weights, 2 * kLineBytes);
    tile_load<7>(weights + kLineBytes, 2 * kLineBytes);
    if constexpr (kBf16<Half>) {
      tile_dot_bf16<0, 4, 6>();
      tile_dot_bf16<1, 4, 7>();
      tile_dot_bf16<2, 5, 6>();
      tile_dot_bf16<3, 5, 7>();
    } else {
      tile_dot_f16<0, 4, 6>();
      tile_dot_f16<1, 4, 7>();
      tile_dot_f16<2, 5, 6>();
      tile_dot_f16<3, 5, 7>();
    }
    matrix += a.matrix_block;
    weights += 16 * 2 * kLineBytes;
  }
  constexpr std::int64_t row = kPanel * sizeof(float);
  tile_store<0>(sums, row);
  tile_store<1>(sums + 16, row);
  tile_store<2>(sums + 16 * kPanel, row);
  tile_store<3>(sums + 16 * kPanel + 16, row);
}

template <class Half>
void multiply_tiles(const MultiplyArgs& a) {
  float* sums = reinterpret_cast<float*>(a.workspace);
  for (int p = a.first_panel; p < a.first_panel + a.panels; ++p) {
    const std::byte* weights = a.weights + p * a.panel_bytes;
    const V bias[2] = {load(a.bias + p * kPanel), load(a.bias + p * kPanel + kGroup)};
    std::byte* output = a.output + p * a.output_block;  // a panel is a block
    const std::byte* residual = a.residual ? a.residual + p * a.residual_block : nullptr;
    for (int pixel = 0; pixel < a.pixels; pixel += 32) {
      multiply_four_tiles<Half>(a, pixel, weights, sums);
      const int rows = least(32, a.pixels - pixel);
      for (int r = 0; r < rows; ++r)
        for (int half = 0; half < 2; ++half) {
          V v = add(load(static_cast<const float*>(sums + r * kPanel + half * kGroup)), bias[half]);
          if (residual) v = add(v, load(line<Half>(residual, pixel + r) + half * kGroup));
          v = activate(v, a.activation);
          const int valid = a.out_channels - p * kPanel - half * kGroup;
          store(line<Half>(output, pixel + r) + half * kGroup, valid < kGroup ? first(v, valid) : v);
        }
    }
  }
}
