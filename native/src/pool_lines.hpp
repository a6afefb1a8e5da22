// Pooling, 32 half precision numbers at a time. Included like depthwise_work.hpp, after it.

// The largest over a window inside the map, NaN where it holds one. The processor's maximum takes its second operand
// where either is NaN, so one comparison of two pixels tells about both, and the slow way is taken where there is one.
template <class Pixel>
inline H largest_of_nine(const Pixel& pixel) {
  const H a = pixel(0, 0), b = pixel(0, 1), c = pixel(0, 2), d = pixel(1, 0), e = pixel(1, 1), f = pixel(1, 2),
          g = pixel(2, 0), h = pixel(2, 1), i = pixel(2, 2);
  if (any_unordered(a, b) | any_unordered(c, d) | any_unordered(e, f) | any_unordered(g, h) | any_unordered(i, i))
    return max(max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h))), i);
  return quick_max(quick_max(quick_max(quick_max(a, b), quick_max(c, d)), quick_max(quick_max(e, f), quick_max(g, h))),
                   i);
}

inline void max_pool_halves(const PoolArgs& a) {
  const Window& w = a.window;
  const Interior inside = interior(w);
  const H least_half = narrow(set1(-__builtin_inff()), set1(-__builtin_inff()));
  for (int block = 0; block < a.groups / 2; ++block) {
    const std::byte* input = a.input + block * a.input_block;
    std::byte* output = a.output + block * a.output_block;
    const std::byte* residual = a.residual ? a.residual + block * a.residual_block : nullptr;
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, input, a.first_row + r, rows);
      bool whole = true;
      for (int ky = 0; ky < w.kernel; ++ky) whole = whole && rows[ky] != nullptr;
      for (int x = 0; x < w.out_width; ++x) {
        const int x0 = x * w.stride - w.pad_left;
        H best = least_half;
        if (whole && w.kernel == 3 && x >= inside.begin && x < inside.end) {
          best = largest_of_nine([&](int ky, int kx) {
            return HalfLine::load_line(rows[ky] + static_cast<std::int64_t>(x0 + kx * w.dilation) * kLineBytes).v;
          });
        } else {
          for (int ky = 0; ky < w.kernel; ++ky) {
            if (rows[ky] == nullptr) continue;
            for (int kx = 0; kx < w.kernel; ++kx) {
              const int column = x0 + kx * w.dilation;
              if (column >= 0 && column < w.in_width)
                best = max(best, HalfLine::load_line(rows[ky] + column * static_cast<std::int64_t>(kLineBytes)).v);
            }
          }
        }
        const int pixel = (a.first_row + r) * w.out_width + x;
        if (residual)
          best = add(best, HalfLine::load_line(reinterpret_cast<const std::byte*>(line<f16>(residual, pixel))).v);
        if (a.relu) best = relu(best);
        HalfLine{best}.put(line<f16>(output, pixel));
      }
    }
  }
}
