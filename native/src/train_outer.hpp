// The weights' gradient: a product over pixels. Included by train_kernels.hpp, inside a namespace.

template <class Dot, int Rows, int Columns>
[[gnu::flatten]] inline void outer_tile(const std::byte* left, const std::byte* right, std::int64_t right_group,
                                        int steps, float* output, std::int64_t row) {
  V sums[Rows][Columns];
  each<Rows>([&](auto r) {
    each<Columns>([&](auto c) {
      __builtin_prefetch(output + r * row + c * kGroup, 1);  // the sums so far come from far away
      sums[r][c] = zero();
    });
  });
  for (int s = 0; s < steps; ++s) {
    V w[Columns];
    each<Columns>([&](auto c) { w[c] = Dot::weights(right + c * right_group + s * std::int64_t{kLineBytes}); });
    const std::byte* at = left + s * std::int64_t{kLineBytes};
    each<Rows>([&](auto r) {
      each<Columns>([&](auto c) { sums[r][c] = Dot::step(at + r * 4, w[c], sums[r][c]); });
    });
  }
  each<Rows>([&](auto r) {
    each<Columns>([&](auto c) {
      float* out = output + r * row + c * kGroup;
      store(out, add(load(static_cast<const float*>(out)), sums[r][c]));
    });
  });
}

template <class Dot, int Columns>
inline void outer_columns(const OuterArgs& a, int begin, int steps, int right_group) {
  const std::int64_t row = static_cast<std::int64_t>(a.right_groups) * kGroup;
  const std::int64_t from = begin * std::int64_t{kLineBytes};
  const std::byte* right = a.right + right_group * a.right_group + from;
  for (int g = 0; g < a.left_groups; ++g) {
    const std::byte* left = a.left + g * a.left_group + from;
    float* output = a.output + g * kGroup * row + right_group * kGroup;
    int r = 0;
    for (; r + kOuterRows <= kGroup; r += kOuterRows)
      outer_tile<Dot, kOuterRows, Columns>(left + r * 4, right, a.right_group, steps, output + r * row, row);
    if constexpr (kGroup % kOuterRows != 0)
      outer_tile<Dot, kGroup % kOuterRows, Columns>(left + r * 4, right, a.right_group, steps, output + r * row, row);
  }
}

// Not too many pixels at a time, about as many each time: the right side's lines stay in the cache for all of the left
// side. Not few: the sums, which lie behind the second-level cache, come and go each time.
template <class Dot>
void outer(const OuterArgs& a) {
  constexpr int kSteps = 512 / Dot::kPerStep;
  const int parts = (a.steps + kSteps - 1) / kSteps;
  for (int part = 0; part < parts; ++part) {
    const int begin = static_cast<int>(static_cast<std::int64_t>(a.steps) * part / parts);
    const int steps = static_cast<int>(static_cast<std::int64_t>(a.steps) * (part + 1) / parts) - begin;
    int c = 0;
    for (; c + kOuterColumns <= a.right_groups; c += kOuterColumns) outer_columns<Dot, kOuterColumns>(a, begin, steps, c);
    for (; c < a.right_groups; ++c) outer_columns<Dot, 1>(a, begin, steps, c);
  }
}

inline void pairs(const PairArgs& a) {
  const int filled = (a.pixels + 1) / 2;
  for (int b = 0; b < a.blocks; ++b) {
    const auto* lines = reinterpret_cast<const std::uint16_t*>(a.lines + b * a.block);
    auto* low = reinterpret_cast<std::uint16_t*>(a.pairs + 2 * b * a.group);
    auto* high = reinterpret_cast<std::uint16_t*>(a.pairs + (2 * b + 1) * a.group);
    for (int s = 0; s < filled; ++s) pair_lines(lines + s * 64, 2 * s + 1 < a.pixels, low + s * 32, high + s * 32);
    for (int i = filled * 32; i < a.steps * 32; ++i) low[i] = high[i] = 0;
  }
}
