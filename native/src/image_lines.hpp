// The image's windows where one fits into a line of 16-bit numbers, as 3 x 3 x 3 does: a few masked loads instead of a
// loop over its numbers. Included like producers.hpp, after it, where V is an AVX-512 register.

template <class T>
void image_lines(const ProducerArgs& a) {
  const Window& w = a.window;
  const int run = w.kernel * a.channels, depth = w.kernel * run;
  if (depth > 2 * kGroup || w.dilation != 1) return image_patches<T>(a);
  // Which lanes of the two vectors each row of the window fills.
  __mmask16 lanes[2][kMaxKernel];
  for (int half = 0; half < 2; ++half)
    for (int ky = 0; ky < w.kernel; ++ky) {
      const unsigned all = ((1ull << run) - 1) << (ky * run) & 0xffffffffu;
      lanes[half][ky] = static_cast<__mmask16>(all >> (half * kGroup));
    }
  const Interior inside = interior(w);
  const std::int64_t row_floats = static_cast<std::int64_t>(w.in_width) * a.channels;
  for (int r = 0; r < a.rows; ++r) {
    const int row = a.first_row + r, image = row / w.out_height;
    const int y0 = (row % w.out_height) * w.stride - w.pad_top;
    const bool whole = y0 >= 0 && y0 + w.kernel <= w.in_height;
    const std::byte* first_row = a.input + (static_cast<std::int64_t>(image) * w.in_height + y0) * row_floats * 4;
    for (int x = 0; x < w.out_width; ++x) {
      const int x0 = x * w.stride - w.pad_left, pixel = r * w.out_width + x;
      if (!whole || x < inside.begin || x >= inside.end) {
        image_patch<T>(a, image, y0, x0, pixel);
        continue;
      }
      __m512 halves[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int half = 0; half < 2; ++half)
        for (int ky = 0; ky < w.kernel; ++ky) {
          if (lanes[half][ky] == 0) continue;
          // The address of lane 0, which may lie outside of the image: lanes that are masked out are not read.
          const auto at =
              reinterpret_cast<std::uintptr_t>(first_row) +
              static_cast<std::uintptr_t>((ky * row_floats + x0 * a.channels - ky * run + half * kGroup) * 4);
          halves[half] = _mm512_mask_loadu_ps(halves[half], lanes[half][ky], reinterpret_cast<const void*>(at));
        }
      store_line(line<T>(a.matrix, pixel), Two{{halves[0]}, {halves[1]}});
    }
  }
}
