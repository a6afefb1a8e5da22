// Patches of an input that is of the matrix's type: lines are copied as they are. Included like depthwise_work.hpp,
// after it.

inline void copy_patches(const ProducerArgs& a) {
  const Window& w = a.window;
  const int blocks = a.channels / kPanel;
  for (int b = 0; b < blocks; ++b)
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, a.input + b * a.input_block, a.first_row + r, rows);
      for (int ky = 0; ky < w.kernel; ++ky)
        for (int kx = 0; kx < w.kernel; ++kx) {
          std::byte* out = a.matrix + ((ky * w.kernel + kx) * blocks + b) * a.matrix_block +
                           static_cast<std::int64_t>(r) * w.out_width * kLineBytes;
          for (int x = 0; x < w.out_width; ++x) {
            const int column = x * w.stride - w.pad_left + kx * w.dilation;
            const bool inside = rows[ky] != nullptr && column >= 0 && column < w.in_width;
            const __m512i line = inside ? _mm512_loadu_si512(rows[ky] + static_cast<std::int64_t>(column) * kLineBytes)
                                        : _mm512_setzero_si512();
            _mm512_storeu_si512(out + static_cast<std::int64_t>(x) * kLineBytes, line);
          }
        }
    }
}

template <class S, class T>
void patch_lines(const ProducerArgs& a) {
  if ((kSame<S, T> || a.input_as_matrix) && !a.input_relu) return copy_patches(a);
  a.input_as_matrix ? patches<T, T>(a) : patches<S, T>(a);
}
