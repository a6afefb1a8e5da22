// A depthwise convolution that is done a few pixels at a time, between the steps of a product on tiles. Included like
// producers.hpp, after it.
//
// A line holds 32 channels, and `Line` says how they are computed: as 32 half precision numbers (HalfLine), or as two
// vectors of floats.

template <class S, class T>
inline constexpr bool kSame = false;
template <class S>
inline constexpr bool kSame<S, S> = true;

// Its channels 0-15 and 16-31.
struct Two {
  V lo, hi;
};

// Out of line: a rare activation must not cost the loops around it their registers.
[[gnu::noinline]] inline void activate(Two* x, Activation activation) {
  *x = {activate(x->lo, activation), activate(x->hi, activation)};
}
inline Two activate(Two x, Activation activation) {
  if (activation == Activation::relu) return {relu(x.lo), relu(x.hi)};
  if (activation == Activation::elu) activate(&x, activation);
  return x;
}

inline void store_line(f16* p, Two x) {
  store(p, x.lo);
  store(p + kGroup, x.hi);
}
inline void store_line(bf16* p, Two x) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.hi.a, x.lo.a)));
#else
  store(p, x.lo);
  store(p + kGroup, x.hi);
#endif
}

template <class T>
inline void store_line(T* p, Two x, int /*zero_point*/) {
  store_line(p, x);
}
inline void store_line(u8* p, Two x, int zero_point) {
  store(p, x.lo, zero_point);
  store(p + kGroup, x.hi, zero_point);
}

template <class S>
struct FloatLine {
  using Stored = S;
  Two v;

  static FloatLine load_line(const std::byte* p) {
    const S* line = reinterpret_cast<const S*>(p);
    return {{load(line), load(line + kGroup)}};
  }
  // Filters are float [groups][taps][16]; `at` is a block's first.
  static FloatLine filter(const std::byte* at, int taps, int tap) {
    const float* p = reinterpret_cast<const float*>(at) + tap * kGroup;
    return {{load(p), load(p + taps * kGroup)}};
  }
  static constexpr int kFilterBytes = kPanel * static_cast<int>(sizeof(float));  // of a tap
  static FloatLine of(Two x) { return {x}; }
  Two widen() const { return v; }
  template <class T>
  void put(T* p, int zero_point = 0) const {
    store_line(p, v, zero_point);
  }
};
template <class S>
inline FloatLine<S> fma(FloatLine<S> x, FloatLine<S> y, FloatLine<S> z) {
  return {{fma(x.v.lo, y.v.lo, z.v.lo), fma(x.v.hi, y.v.hi, z.v.hi)}};
}
template <class S>
inline FloatLine<S> add(FloatLine<S> x, FloatLine<S> y) {
  return {{add(x.v.lo, y.v.lo), add(x.v.hi, y.v.hi)}};
}
template <class S>
inline FloatLine<S> relu(FloatLine<S> x) {
  return {{relu(x.v.lo), relu(x.v.hi)}};
}

#if defined(__AVX512BF16__)
// bf16 as floats of its even and its odd channels: two operations split a line, two join it.
struct PairLine {
  using Stored = bf16;
  Two v;  // even, odd

  static PairLine load_line(const std::byte* p) { return of_bits(_mm512_loadu_si512(p)); }
  static PairLine of_bits(__m512i bits) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {{{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))}, {_mm512_castsi512_ps(_mm512_and_si512(bits, upper))}}};
  }
  static PairLine filter(const std::byte* at, int taps, int tap) {
    return of(FloatLine<bf16>::filter(at, taps, tap).v);
  }
  static constexpr int kFilterBytes = FloatLine<bf16>::kFilterBytes;
  static PairLine of(Two x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {{{_mm512_permutex2var_ps(x.lo.a, even, x.hi.a)}, {_mm512_permutex2var_ps(x.lo.a, odd, x.hi.a)}}};
  }
  Two widen() const {
    const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    return {{_mm512_permutex2var_ps(v.lo.a, lower, v.hi.a)}, {_mm512_permutex2var_ps(v.lo.a, upper, v.hi.a)}};
  }
  void put(u8* p, int zero_point) const {
    const __m512i pairs = _mm512_or_si512(count(v.lo, zero_point), _mm512_slli_epi32(count(v.hi, zero_point), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(pairs));
  }
  void put(bf16* p, int /*zero_point*/ = 0) const {
    const __m512i even = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.lo.a)));
    const __m512i odd = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.hi.a)));
    _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
};
inline PairLine mul(PairLine x, PairLine y) { return {{mul(x.v.lo, y.v.lo), mul(x.v.hi, y.v.hi)}}; }
inline PairLine fma(PairLine x, PairLine y, PairLine z) {
  return {{fma(x.v.lo, y.v.lo, z.v.lo), fma(x.v.hi, y.v.hi, z.v.hi)}};
}
inline PairLine relu(PairLine x) { return {{relu(x.v.lo), relu(x.v.hi)}}; }
#endif

#if defined(XCEPTION_HALF_LANES)
struct HalfLine {
  using Stored = f16;
  H v;

  static HalfLine load_line(const std::byte* p) { return {load(reinterpret_cast<const H*>(p))}; }
  static HalfLine filter(const std::byte* at, int /*taps*/, int tap) { return load_line(at + tap * kLineBytes); }
  static constexpr int kFilterBytes = kLineBytes;
  static HalfLine of(Two x) { return {narrow(x.lo, x.hi)}; }
  Two widen() const { return {low(v), high(v)}; }
  void put(f16* p, int /*zero_point*/ = 0) const { store(reinterpret_cast<H*>(p), v); }
  void put(bf16* p, int /*zero_point*/ = 0) const { store_line(p, widen()); }
  void put(u8* p, int zero_point) const { store(p, v, zero_point); }
};
inline HalfLine fma(HalfLine x, HalfLine y, HalfLine z) { return {fma(x.v, y.v, z.v)}; }
inline HalfLine add(HalfLine x, HalfLine y) { return {add(x.v, y.v)}; }
inline HalfLine relu(HalfLine x) { return {relu(x.v)}; }
#endif

template <class Line, bool Relu>
inline Line tap_line(const std::byte* p) {
  const Line line = Line::load_line(p);
  if constexpr (Relu) return relu(line);
  return line;
}

// `T` is the matrix's type.
template <class Line, class T>
class DepthwiseWork {
 public:
  DepthwiseWork(const ProducerArgs& a, int ready)
      : a_(a),
        inside_(interior(a.window)),
        three_(a.window.kernel == 3),
        runs_(three_ && a.window.stride == 1 && a.window.dilation == 1 && inside_.end - inside_.begin >= kRun),
        blocks_(a.channels / kPanel),
        ready_(ready) {
    if (blocks_ > 0 && a.rows > 0) begin_block();
    if (a.rows == 0) block_ = ready_ = blocks_;
  }

  // Pixels of a block, all blocks.
  int pixels() const { return a_.rows * a_.window.out_width; }
  int blocks() const { return blocks_; }

  // `lines` to do at each of the following calls of `advance`, in parts of 256.
  void pace(std::int64_t lines) { pace_ = lines; }
  void advance() {
    owed_ += pace_;
    while (owed_ > 0) {
      if (block_ >= ready_) {
        owed_ = 0;
        return;
      }
      owed_ -= static_cast<std::int64_t>(step()) * 256;
    }
  }
  // All that is ready.
  void complete() {
    while (block_ < ready_) step();
  }
  // So many blocks may be read from now on.
  void ready(int blocks) { ready_ = least(blocks, blocks_); }

 private:
  void begin_block() {
    input_ = a_.input + static_cast<std::int64_t>(a_.input_ring > 0 ? block_ % a_.input_ring : block_) * a_.input_block;
    const int taps = a_.window.kernel * a_.window.kernel;
    filter_ = static_cast<const std::byte*>(a_.weights) + static_cast<std::int64_t>(block_) * taps * Line::kFilterBytes;
    bias_ = a_.bias ? Line::filter(static_cast<const std::byte*>(a_.bias) + block_ * Line::kFilterBytes, 1, 0)
                    : Line::of({zero(), zero()});
    for (int tap = 0; three_ && tap < 9; ++tap) taps_[tap] = Line::filter(filter_, 9, tap);
    row_ = -1;
    begin_row();
  }
  void begin_row() {
    ++row_;
    x_ = 0;
    window_rows(a_.window, input_, a_.first_row + row_, rows_);
    for (int k = 0; k < a_.window.kernel; ++k)
      if (rows_[k] == nullptr) rows_[k] = a_.zeros;
    out_ = a_.matrix + group_offset<T>(2 * block_, a_.matrix_block) +
           static_cast<std::int64_t>(row_) * a_.window.out_width * kLineBytes;
  }

  // A few pixels of a row; how many. The last run of the inside is whole, even where some of it is there already.
  int step() {
    int done = 1;
    if (runs_ && x_ >= inside_.begin && x_ < inside_.end) {
      const int x = least(x_, inside_.end - kRun);
      a_.input_relu ? run<true>(x) : run<false>(x);
      done = x + kRun - x_;
    } else {
      a_.input_relu ? one<true>() : one<false>();
    }
    x_ += done;
    if (x_ == a_.window.out_width) {
      if (row_ + 1 < a_.rows)
        begin_row();
      else if (++block_ < blocks_)
        begin_block();
    }
    return done;
  }

  // Neighbours of a 3x3 filter with stride 1, inside the map: each input pixel is loaded once for all of them.
  static constexpr int kRun = 4;
  template <bool Relu>
  void run(int x) {
    Line sums[kRun] = {bias_, bias_, bias_, bias_};
    const std::int64_t first = static_cast<std::int64_t>(x - a_.window.pad_left) * kLineBytes;
    for (int ky = 0; ky < 3; ++ky) {
      const std::byte* row = rows_[ky] + first;
      Line pixels[kRun + 2];
      for (int i = 0; i < kRun + 2; ++i) pixels[i] = tap_line<Line, Relu>(row + i * kLineBytes);
      for (int kx = 0; kx < 3; ++kx) {
        const Line weight = taps_[ky * 3 + kx];
        for (int i = 0; i < kRun; ++i) sums[i] = fma(pixels[i + kx], weight, sums[i]);
      }
    }
    for (int i = 0; i < kRun; ++i) put(x + i, sums[i]);
  }

  int column_of(int kx) const { return x_ * a_.window.stride - a_.window.pad_left + kx * a_.window.dilation; }
  bool inside(int column) const { return column >= 0 && column < a_.window.in_width; }
  // One pixel, anywhere, of any filter. Long sums are floats whatever the line is.
  template <bool Relu>
  void one() {
    if (three_) {
      Line sum = bias_;
      for (int kx = 0; kx < 3; ++kx) {
        const int column = column_of(kx);
        if (!inside(column)) continue;
        const std::int64_t at = static_cast<std::int64_t>(column) * kLineBytes;
        for (int ky = 0; ky < 3; ++ky) sum = fma(tap_line<Line, Relu>(rows_[ky] + at), taps_[ky * 3 + kx], sum);
      }
      return put(x_, sum);
    }
    const int kernel = a_.window.kernel;
    Two sum = bias_.widen();
    for (int ky = 0; ky < kernel; ++ky)
      for (int kx = 0; kx < kernel; ++kx) {
        const int column = column_of(kx);
        if (!inside(column)) continue;
        const Two pixel = tap_line<Line, Relu>(rows_[ky] + static_cast<std::int64_t>(column) * kLineBytes).widen();
        const Two weight = Line::filter(filter_, kernel * kernel, ky * kernel + kx).widen();
        sum = {fma(pixel.lo, weight.lo, sum.lo), fma(pixel.hi, weight.hi, sum.hi)};
      }
    store_line(line<T>(out_, x_), activate(sum, a_.activation), a_.zero_point);
  }

  void put(int x, Line sum) const {
    if (a_.activation == Activation::none)
      sum.put(line<T>(out_, x), a_.zero_point);
    else
      store_line(line<T>(out_, x), activate(sum.widen(), a_.activation), a_.zero_point);
  }

  const ProducerArgs& a_;
  const Interior inside_;
  const bool three_, runs_;
  const int blocks_;
  int ready_, block_ = 0, row_ = 0, x_ = 0;
  std::int64_t pace_ = 0, owed_ = 0;
  const std::byte *input_ = nullptr, *filter_ = nullptr;
  const std::byte* rows_[kMaxKernel] = {};
  std::byte* out_ = nullptr;
  Line bias_, taps_[9];  // of the block at hand; the taps where there are nine
};

// Nothing to do between the steps.
struct NoWork {
  static int pixels() { return 0; }
  static int blocks() { return 0; }
  void pace(std::int64_t) {}
  void advance() {}
  void complete() {}
  void ready(int) {}
};

// All of it at once.
template <class Line, class T>
void depthwise_lines(const ProducerArgs& a) {
  DepthwiseWork<Line, T> work(a, a.channels / kPanel);
  work.complete();
}
