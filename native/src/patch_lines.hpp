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

// Patches in bytes, a line of 32 channels at a time: see patches_u8.
template <class Line>
void patch_lines_u8(const ProducerArgs& a) {
  const Window& w = a.window;
  const int blocks = a.channels / kPanel;
  const Line none = Line::of({zero(), zero()});
  for (int b = 0; b < blocks; ++b) {
    const float* factors = static_cast<const float*>(a.weights) + b * kPanel;
    const Line factor = Line::of({load(factors), load(factors + kGroup)});
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, a.input + b * a.input_block, a.first_row + r, rows);
      for (int ky = 0; ky < w.kernel; ++ky) {
        std::byte* out[kMaxKernel];
        for (int kx = 0; kx < w.kernel; ++kx)
          out[kx] = a.matrix + group_offset<u8>(2 * ((ky * w.kernel + kx) * blocks + b), a.matrix_block) +
                    static_cast<std::int64_t>(r) * w.out_width * kLineBytes;
        windows_of_row(
            w, rows[ky] == nullptr, none,
            [&](int column) {
              return mul(Line::load_line(rows[ky] + static_cast<std::int64_t>(column) * kLineBytes), factor);
            },
            [&](int kx, int x, Line steps) { steps.put(line<u8>(out[kx], x), a.zero_point); });
      }
    }
  }
}
