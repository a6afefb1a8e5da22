// The matrix product for vectors of 16 floats, with everything that follows it: bias, residual, activation, rounding.
// Included like producers.hpp, after it.
//
// kRows pixels times kColumns * 16 output channels are summed in registers over all of K. A step of K is four bytes of
// each pixel's line: one float, a pair of bf16 where the processor multiplies pairs, or four bytes (`Dot`).

// How sums of floats begin and end, whatever is multiplied.
struct FloatSums {
  using Sum = V;
  static V begin(const MultiplyArgs& a, int channel) { return load(a.bias + channel); }
  static V weights(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
  static V end(V sum, const MultiplyArgs&, int) { return sum; }
};

struct DotFloat : FloatSums {
  using Element = float;  // of the matrix and the packed weights
  static constexpr int kPerStep = 1;
  static V step(const std::byte* pixel, V weights, V sum) {
    return fma(set1(*reinterpret_cast<const float*>(pixel)), weights, sum);
  }
};

struct DotBytes {
  static constexpr int kPerStep = 4;
  using Sum = I;
  static I begin(const MultiplyArgs& a, int channel) { return load(a.offset + channel); }
  static I step(const std::byte* pixel, Bytes weights, I sum) { return dot(pixel, weights, sum); }
  static Bytes weights(const std::byte* p) { return load_bytes(p); }
  static V end(I sum, const MultiplyArgs& a, int channel) {
    return fma(to_float(sum), load(a.scale + channel), load(a.bias + channel));
  }
};

// The weights that are read next, so many lines of them for each line of K.
struct Coming {
  const std::byte* begin;
  int lines;
};

// What follows the sums of 16 channels. They come one by one and by value: a function that is handed the array of a
// tile's sums keeps it in memory, and plain C++ was four times slower for it.
template <class S>
class Finish {
 public:
  Finish(const MultiplyArgs& a, int channel)
      : a_(a),
        output_(a.output + group_offset<S>(channel / kGroup, a.output_block)),
        residual_(a.residual ? a.residual + group_offset<S>(channel / kGroup, a.residual_block) : nullptr),
        valid_(a.out_channels - channel) {}

  void operator()(int pixel, V sum) const {
    if (residual_) sum = add(sum, load(line<S>(residual_, pixel)));
    sum = activate(sum, a_.activation);
    store(line<S>(output_, pixel), valid_ < kGroup ? first(sum, valid_) : sum);
  }

 private:
  const MultiplyArgs& a_;
  std::byte* output_;
  const std::byte* residual_;
  int valid_;  // lanes behind them are zero: infinity times a padded weight is not
};

template <class Dot, class S, int Rows, int Columns>
struct Tile {
  [[gnu::flatten]] static void run(const MultiplyArgs& a, int pixel, const std::byte* weights, int channel,
                                   const Coming& coming) {
    typename Dot::Sum sums[Rows][Columns];
    each<Columns>([&](auto c) {
      const auto begin = Dot::begin(a, channel + c * kGroup);
      each<Rows>([&](auto r) { sums[r][c] = begin; });
    });
    constexpr int steps_per_line = kLineBytes / 4;
    const int steps = (a.depth + Dot::kPerStep - 1) / Dot::kPerStep;
    const std::byte* matrix = a.matrix + static_cast<std::int64_t>(pixel) * kLineBytes;
    auto step = [&](const std::byte* at) {
      decltype(Dot::weights(weights)) w[Columns];
      each<Columns>([&](auto c) { w[c] = Dot::weights(weights + c * kLineBytes); });
      each<Rows>([&](auto r) {
        each<Columns>([&](auto c) { sums[r][c] = Dot::step(at + r * kLineBytes, w[c], sums[r][c]); });
      });
      weights += 2 * kLineBytes;  // a panel is two vectors wide
    };
    int done = 0;
    const std::byte* fetched = coming.begin;
    for (; done + steps_per_line <= steps; done += steps_per_line) {
      for (int i = 0; i < coming.lines; ++i, fetched += kLineBytes) __builtin_prefetch(fetched, 0, 2);
      for (int s = 0; s < steps_per_line; ++s) step(matrix + s * 4);
      matrix += a.matrix_block;
    }
    for (int s = 0; done + s < steps; ++s) step(matrix + s * 4);
    each<Columns>([&](auto c) {
      const Finish<S> finish(a, channel + c * kGroup);
      each<Rows>([&](auto r) { finish(pixel + r, Dot::end(sums[r][c], a, channel + c * kGroup)); });
    });
  }
};

template <class Dot, class S, int Rows>
inline void multiply_rows(const MultiplyArgs& a, int rows, int pixel, const std::byte* weights, int channel,
                          const Coming& coming) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      Tile<Dot, S, Rows, kColumns>::run(a, pixel, weights, channel, coming);
    else
      multiply_rows<Dot, S, Rows - 1>(a, rows, pixel, weights, channel, coming);
  }
}

template <class Dot, class S>
void multiply(const MultiplyArgs& a) {
  // Tiles of nearly equal height: 76 pixels are 6 of 12 or 13, not 5 of 14 and one of 6.
  const int tiles = (a.pixels + kRows - 1) / kRows;
  constexpr int kHalves = 2 / kColumns;
  const int lines = (a.depth + Dot::kPerStep - 1) / Dot::kPerStep / (kLineBytes / 4);  // whole ones, of K, a tile
  const std::int64_t turns = static_cast<std::int64_t>(tiles) * kHalves * lines;
  for (int p = a.first_panel; p < a.first_panel + a.panels; ++p) {
    const std::byte* panel = a.weights + p * a.panel_bytes;
    const std::byte* ahead = p + 1 < a.first_panel + a.panels ? panel + a.panel_bytes : a.next_weights;
    const bool fetches = ahead != nullptr && turns > 0;
    const int coming = fetches ? static_cast<int>((a.panel_bytes / kLineBytes + turns - 1) / turns) : 0;
    for (int half = 0; half < 2; half += kColumns) {
      const std::byte* weights = panel + half * kLineBytes;
      const int channel = p * kPanel + half * kGroup;
      for (int t = 0; t < tiles; ++t) {
        const int begin = static_cast<int>(static_cast<std::int64_t>(a.pixels) * t / tiles);
        const int end = static_cast<int>(static_cast<std::int64_t>(a.pixels) * (t + 1) / tiles);
        multiply_rows<Dot, S, kRows>(a, end - begin, begin, weights, channel, {ahead, coming});
        if (coming > 0) ahead += std::int64_t{coming} * lines * kLineBytes;
      }
    }
  }
}
