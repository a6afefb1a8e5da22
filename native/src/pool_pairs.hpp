// Pooling of bf16, 32 numbers at a time, as integers. Included like depthwise_work.hpp, after it, where PairLine is.

// Integers in the numbers' order: negative ones have all bits but the sign inverted. Its own inverse.
inline __m512i ordered(__m512i x) {
  const __m512i negative = _mm512_srai_epi16(x, 15);
  return _mm512_ternarylogic_epi32(x, negative, _mm512_set1_epi16(0x7fff), 0x78);  // x ^ (negative & rest)
}

struct Extremes {
  __m512i largest, least;
};
inline void take(Extremes& e, const std::byte* p) {
  const __m512i x = ordered(_mm512_loadu_si512(p));
  e.largest = _mm512_max_epi16(e.largest, x);
  e.least = _mm512_min_epi16(e.least, x);
}

inline void max_pool_pairs(const PoolArgs& a) {
  const Window& w = a.window;
  const Interior inside = interior(w);
  const __m512i infinity = _mm512_set1_epi16(0x7f80);
  const __m512i minus_infinity = ordered(_mm512_set1_epi16(static_cast<short>(0xff80)));
  for (int block = 0; block < a.groups / 2; ++block) {
    const std::byte* input = a.input + block * a.input_block;
    std::byte* output = a.output + block * a.output_block;
    const std::byte* residual = a.residual ? a.residual + block * a.residual_block : nullptr;
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, input, a.first_row + r, rows);
      bool whole = w.kernel == 3;
      for (int ky = 0; ky < w.kernel; ++ky) whole = whole && rows[ky] != nullptr;
      for (int x = 0; x < w.out_width; ++x) {
        const int x0 = x * w.stride - w.pad_left;
        Extremes found{minus_infinity, infinity};
        if (whole && x >= inside.begin && x < inside.end) {
          for (int ky = 0; ky < 3; ++ky)
            for (int kx = 0; kx < 3; ++kx)
              take(found, rows[ky] + static_cast<std::int64_t>(x0 + kx * w.dilation) * kLineBytes);
        } else {
          for (int ky = 0; ky < w.kernel; ++ky) {
            if (rows[ky] == nullptr) continue;
            for (int kx = 0; kx < w.kernel; ++kx) {
              const int column = x0 + kx * w.dilation;
              if (column >= 0 && column < w.in_width)
                take(found, rows[ky] + static_cast<std::int64_t>(column) * kLineBytes);
            }
          }
        }
        // A NaN is beyond infinity, on either side.
        const __mmask32 nan = _mm512_cmplt_epi16_mask(found.least, minus_infinity);
        const __m512i best = _mm512_mask_mov_epi16(ordered(found.largest), nan, _mm512_set1_epi16(0x7fc0));
        const std::int64_t at = static_cast<std::int64_t>((a.first_row + r) * w.out_width + x) * kLineBytes;
        if (residual == nullptr && !a.relu) {
          _mm512_storeu_si512(output + at, best);
          continue;
        }
        PairLine total = PairLine::of_bits(best);
        if (residual != nullptr) {
          const PairLine other = PairLine::load_line(residual + at);
          total = {{add(total.v.lo, other.v.lo), add(total.v.hi, other.v.hi)}};
        }
        if (a.relu) total = {{relu(total.v.lo), relu(total.v.hi)}};
        total.put(reinterpret_cast<bf16*>(output + at));
      }
    }
  }
}
