// A step of `multiply` over pairs of bf16. Included like multiply.hpp, after it.

struct DotPairs : FloatSums {
  using Element = bf16;
  static constexpr int kPerStep = 2;
  static V step(const std::byte* pixel, V weights, V sum) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int*>(pixel));
    return {_mm512_dpbf16_ps(sum.a, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(weights.a))};
  }
};
