// The kernels of training, in terms of V: 16 floats. Included once by each train_*.cpp after its vector header, inside
// that file's namespace; so, as in producers.hpp, nothing here may use the standard library's templates.

inline bool there(const Pixels& p) { return p.data != nullptr; }
inline std::byte* group_at(const Pixels& p, int group, std::int64_t pixel, int lane_bytes) {
  return p.data + (group / p.groups) * p.block + static_cast<std::int64_t>(group % p.groups) * 16 * lane_bytes +
         pixel * p.pixel;
}
inline int lanes_of(const Pixels& p, int group) {
  const int left = p.channels - group * kGroup;
  return left < 0 ? 0 : left < kGroup ? left : kGroup;
}

// The first lanes of a vector, where behind them is somebody else's memory.
template <class S>
inline V load_some(const S* p, int lanes) {
  if (lanes == kGroup) return load(p);
  S copy[kGroup] = {};
  for (int i = 0; i < lanes; ++i) copy[i] = p[i];
  return load(static_cast<const S*>(copy));
}
template <class S>
inline void store_some(S* p, V v, int lanes) {
  if (lanes == kGroup) return store(p, v);
  S copy[kGroup];
  store(copy, v);
  for (int i = 0; i < lanes; ++i) p[i] = copy[i];
}
inline V load_or_zero(const float* p, int group) { return p == nullptr ? zero() : load(p + group * kGroup); }

// ------------------------------------------------------------------------------------------- depthwise, forward

template <class S, bool Normalise, bool Relu, bool Whole>
inline void fill_row(const FillArgs& a, const std::byte* from, float* to, int lanes, V scale, V shift) {
  for (int x = 0; x < a.width; ++x) {
    const S* p = reinterpret_cast<const S*>(from + x * a.input.pixel);
    V v = Whole ? load(p) : load_some(p, lanes);
    if constexpr (Normalise) v = fma(v, scale, shift);
    if constexpr (Relu) v = relu(v);
    store(to + x * kGroup, v);
  }
}

template <class S, bool Normalise, bool Relu>
void fill_rows(const FillArgs& a) {
  const int lanes = lanes_of(a.input, a.group);
  const V scale = Normalise ? load_or_zero(a.scale, a.group) : zero();
  const V shift = Normalise ? load_or_zero(a.shift, a.group) : zero();
  const int line = (a.width + 2 * a.pad) * kGroup;
  float* row = a.padded;
  for (int y = a.first_row - a.pad; y < a.first_row + a.rows + a.pad; ++y, row += line) {
    if (y < 0 || y >= a.height) {
      for (int i = 0; i < line; i += kGroup) store(row + i, zero());
      continue;
    }
    for (int i = 0; i < a.pad; ++i) {
      store(row + i * kGroup, zero());
      store(row + line - (i + 1) * kGroup, zero());
    }
    const std::byte* from = group_at(a.input, a.group, a.first_pixel + static_cast<std::int64_t>(y) * a.width, sizeof(S));
    if (lanes == kGroup)
      fill_row<S, Normalise, Relu, true>(a, from, row + a.pad * kGroup, lanes, scale, shift);
    else
      fill_row<S, Normalise, Relu, false>(a, from, row + a.pad * kGroup, lanes, scale, shift);
  }
}

template <class S>
void fill(const FillArgs& a) {
  if (a.scale != nullptr)
    a.relu ? fill_rows<S, true, true>(a) : fill_rows<S, true, false>(a);
  else
    a.relu ? fill_rows<S, false, true>(a) : fill_rows<S, false, false>(a);
}

// `N` neighbours of a row at once, so that a pixel is loaded once for all of its windows in the row.
template <int N>
inline void filter_some(const float* const* rows, int x, int dilation, const V* filter, V* sums) {
  for (int i = 0; i < N; ++i) sums[i] = zero();
  for (int ky = 0; ky < 3; ++ky) {
    if (dilation == 1) {
      V pixels[N + 2];
      for (int i = 0; i < N + 2; ++i) pixels[i] = load(rows[ky] + (x + i) * kGroup);
      for (int i = 0; i < N; ++i)
        for (int kx = 0; kx < 3; ++kx) sums[i] = fma(pixels[i + kx], filter[ky * 3 + kx], sums[i]);
    } else {
      for (int i = 0; i < N; ++i)
        for (int kx = 0; kx < 3; ++kx)
          sums[i] = fma(load(rows[ky] + (x + i + kx * dilation) * kGroup), filter[ky * 3 + kx], sums[i]);
    }
  }
}

template <class T>
void filter_rows(const FilterArgs& a) {
  V filter[kTaps];
  for (int i = 0; i < kTaps; ++i) filter[i] = load(a.filter + i * kGroup);
  const std::int64_t line = static_cast<std::int64_t>(a.width + 2 * a.dilation) * kGroup;
  for (int y = 0; y < a.rows; ++y) {
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = a.padded + (y + k * a.dilation) * line;
    std::byte* out = group_at(a.output, a.group, a.first_pixel + static_cast<std::int64_t>(y) * a.width, sizeof(T));
    int x = 0;
    V sums[4];
    for (; x + 4 <= a.width; x += 4) {
      filter_some<4>(rows, x, a.dilation, filter, sums);
      for (int i = 0; i < 4; ++i) store(reinterpret_cast<T*>(out + (x + i) * a.output.pixel), sums[i]);
    }
    for (; x < a.width; ++x) {
      filter_some<1>(rows, x, a.dilation, filter, sums);
      store(reinterpret_cast<T*>(out + x * a.output.pixel), sums[0]);
    }
  }
}

// ------------------------------------------------------------------------------------------ depthwise, backward

template <class S, bool Relu, bool Sums>
void input_gradient(const FilterBackArgs& a) {
  V filter[kTaps];  // turned by 180 degrees
  for (int i = 0; i < kTaps; ++i) filter[i] = load(a.filter + (kTaps - 1 - i) * kGroup);
  const int d = a.dilation, lanes = lanes_of(a.output, a.group);
  const std::int64_t line = static_cast<std::int64_t>(a.width + 2 * d) * kGroup;
  const V mean = Sums ? load_or_zero(a.mean, a.group) : zero();
  V sum = zero(), product = zero();
  for (int y = 0; y < a.rows; ++y) {
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = a.gradient + (y + k * d) * line;
    const float* input = a.padded + (y + d) * line + d * kGroup;
    const std::int64_t pixel = a.first_pixel + static_cast<std::int64_t>(y) * a.width;
    std::byte* out = group_at(a.output, a.group, pixel, sizeof(S));
    const std::byte* residual = there(a.residual) ? group_at(a.residual, a.group, pixel, sizeof(S)) : nullptr;
    const std::byte* z = Sums ? group_at(a.z, a.group, pixel, sizeof(S)) : nullptr;
    auto put = [&](int x, V v) {
      if constexpr (Relu) v = select_greater(load(input + x * kGroup), zero(), v, zero());
      if (residual != nullptr) v = add(v, load_some(reinterpret_cast<const S*>(residual + x * a.residual.pixel), lanes));
      if constexpr (Sums) {
        sum = add(sum, v);
        product = fma(v, sub(load(reinterpret_cast<const S*>(z + x * a.z.pixel)), mean), product);
      }
      store_some(reinterpret_cast<S*>(out + x * a.output.pixel), v, lanes);
    };
    int x = 0;
    V sums[4];
    for (; x + 4 <= a.width; x += 4) {
      filter_some<4>(rows, x, d, filter, sums);
      for (int i = 0; i < 4; ++i) put(x + i, sums[i]);
    }
    for (; x < a.width; ++x) {
      filter_some<1>(rows, x, d, filter, sums);
      put(x, sums[0]);
    }
  }
  if constexpr (Sums) {
    store(a.sums, add(load(static_cast<const float*>(a.sums)), sum));
    store(a.sums + kGroup, add(load(static_cast<const float*>(a.sums + kGroup)), product));
  }
}

inline void filter_gradient(const FilterBackArgs& a) {
  const int d = a.dilation;
  const std::int64_t line = static_cast<std::int64_t>(a.width + 2 * d) * kGroup;
  V sums[kTaps];
  for (int i = 0; i < kTaps; ++i) sums[i] = zero();
  for (int y = 0; y < a.rows; ++y) {
    const float* gradient = a.gradient + (y + d) * line + d * kGroup;
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = a.padded + (y + k * d) * line;
    for (int x = 0; x < a.width; ++x) {
      const V g = load(gradient + x * kGroup);
      for (int ky = 0; ky < 3; ++ky)
        for (int kx = 0; kx < 3; ++kx)
          sums[ky * 3 + kx] = fma(load(rows[ky] + (x + kx * d) * kGroup), g, sums[ky * 3 + kx]);
    }
  }
  for (int i = 0; i < kTaps; ++i)
    store(a.filter_gradient + i * kGroup, add(load(static_cast<const float*>(a.filter_gradient + i * kGroup)), sums[i]));
}

template <class S>
void filter_back(const FilterBackArgs& a) {
  filter_gradient(a);
  if (!there(a.output)) return;
  if (there(a.z))
    a.relu ? input_gradient<S, true, true>(a) : input_gradient<S, false, true>(a);
  else
    a.relu ? input_gradient<S, true, false>(a) : input_gradient<S, false, false>(a);
}

// ------------------------------------------------------------------------------------------------ normalisation

template <class S>
void statistics(const MapArgs& a) {
  const V count = set1(1.0f / static_cast<float>(a.pixels));
  for (int g = a.first_group; g < a.last_group; ++g) {
    const std::byte* z = group_at(a.z, g, a.first_pixel, sizeof(S));
    V sums[4] = {zero(), zero(), zero(), zero()};
    for (int p = 0; p < a.pixels; ++p) sums[p & 3] = add(sums[p & 3], load(reinterpret_cast<const S*>(z + p * a.z.pixel)));
    const V sum = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
    const V mean = mul(sum, count);
    for (V& s : sums) s = zero();
    for (int p = 0; p < a.pixels; ++p) {
      const V distance = sub(load(reinterpret_cast<const S*>(z + p * a.z.pixel)), mean);
      sums[p & 3] = fma(distance, distance, sums[p & 3]);
    }
    store(a.sums + g * kGroup, sum);
    store(a.sums + a.stride + g * kGroup, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
}

template <class S>
void finish(const MapArgs& a) {
  for (int g = a.first_group; g < a.last_group; ++g) {
    const int lanes = lanes_of(a.output, g);
    if (lanes == 0) continue;
    const std::byte* z = group_at(a.z, g, a.first_pixel, sizeof(S));
    std::byte* out = group_at(a.output, g, a.first_pixel, sizeof(S));
    const std::byte* residual = there(a.residual) ? group_at(a.residual, g, a.first_pixel, sizeof(S)) : nullptr;
    const V scale = load(a.scale + g * kGroup), shift = load(a.shift + g * kGroup);
    for (int p = 0; p < a.pixels; ++p) {
      V v = fma(load(reinterpret_cast<const S*>(z + p * a.z.pixel)), scale, shift);
      if (a.relu) v = relu(v);
      if (residual != nullptr) v = add(v, load_some(reinterpret_cast<const S*>(residual + p * a.residual.pixel), lanes));
      store_some(reinterpret_cast<S*>(out + p * a.output.pixel), v, lanes);
    }
  }
}

// What arrives behind the normalisation, and its ReLU if there is one.
template <class S>
struct Arriving {
  const MapArgs& a;
  int lanes;
  const std::byte *z, *gradient;
  V scale, shift;

  Arriving(const MapArgs& args, int g)
      : a(args),
        lanes(lanes_of(args.gradient, g)),
        z(group_at(args.z, g, args.first_pixel, sizeof(S))),
        gradient(group_at(args.gradient, g, args.first_pixel, sizeof(S))),
        scale(load_or_zero(args.scale, g)),
        shift(load_or_zero(args.shift, g)) {}

  V z_at(int p) const { return load(reinterpret_cast<const S*>(z + p * a.z.pixel)); }
  V at(int p, V z_there) const {
    const V v = load_some(reinterpret_cast<const S*>(gradient + p * a.gradient.pixel), lanes);
    return a.relu ? select_greater(fma(z_there, scale, shift), zero(), v, zero()) : v;
  }
};

template <class S>
void gradient_sums(const MapArgs& a) {
  for (int g = a.first_group; g < a.last_group; ++g) {
    const Arriving<S> arriving(a, g);
    const V mean = load(a.mean + g * kGroup);
    V sums[2] = {zero(), zero()}, products[2] = {zero(), zero()};
    for (int p = 0; p < a.pixels; ++p) {
      const V z = arriving.z_at(p), v = arriving.at(p, z);
      sums[p & 1] = add(sums[p & 1], v);
      products[p & 1] = fma(v, sub(z, mean), products[p & 1]);
    }
    store(a.sums + g * kGroup, add(sums[0], sums[1]));
    store(a.sums + a.stride + g * kGroup, add(products[0], products[1]));
  }
}

template <class S, class T>
void gradient(const MapArgs& a) {
  for (int g = a.first_group; g < a.last_group; ++g) {
    const Arriving<S> arriving(a, g);
    std::byte* out = group_at(a.output, g, a.output_pixel, sizeof(T));
    const V of_gradient = load(a.factors + g * kGroup), of_z = load(a.factors + a.stride + g * kGroup);
    const V offset = load(a.factors + 2 * a.stride + g * kGroup);
    for (int p = 0; p < a.pixels; ++p) {
      const V z = arriving.z_at(p);
      store(reinterpret_cast<T*>(out + p * a.output.pixel), fma(arriving.at(p, z), of_gradient, fma(z, of_z, offset)));
    }
  }
}

// ------------------------------------------------------------------------------------------------------ pooling

// Input rows and columns that a window's taps read; -1 outside of the map.
struct Taps {
  int at[3];
  Taps(int out, int pad, int size, int stride, int dilation) {
    for (int k = 0; k < 3; ++k) {
      const int i = out * stride - pad + k * dilation;
      at[k] = i >= 0 && i < size ? i : -1;
    }
  }
};

template <class S>
void pool(const PoolTrainArgs& a) {
  const Window& w = a.window;
  const std::int64_t in_first = static_cast<std::int64_t>(a.image) * w.in_height * w.in_width;
  const std::int64_t out_first = static_cast<std::int64_t>(a.image) * w.out_height * w.out_width;
  for (int g = a.first_group; g < a.last_group; ++g) {
    const int lanes = lanes_of(a.output, g);
    const V scale = load(a.scale + g * kGroup), shift = load(a.shift + g * kGroup);
    const std::byte* z = group_at(a.z, g, in_first, sizeof(S));
    for (int oy = 0; oy < w.out_height; ++oy) {
      const Taps ys(oy, w.pad_top, w.in_height, w.stride, w.dilation);
      for (int ox = 0; ox < w.out_width; ++ox) {
        const Taps xs(ox, w.pad_left, w.in_width, w.stride, w.dilation);
        V best = set1(-__builtin_inff()), winner = zero();
        for (int ky = 0; ky < 3; ++ky)
          for (int kx = 0; kx < 3; ++kx) {
            if (ys.at[ky] < 0 || xs.at[kx] < 0) continue;
            const std::int64_t pixel = static_cast<std::int64_t>(ys.at[ky]) * w.in_width + xs.at[kx];
            const V v = fma(load(reinterpret_cast<const S*>(z + pixel * a.z.pixel)), scale, shift);
            winner = select_greater(v, best, set1(static_cast<float>(ky * 3 + kx)), winner);
            best = max(v, best);
          }
        const std::int64_t pixel = out_first + static_cast<std::int64_t>(oy) * w.out_width + ox;
        store_bytes(a.winners + g * a.winner_group + pixel * kGroup, winner);
        if (lanes == 0) continue;
        if (there(a.residual))
          best = add(best, load_some(reinterpret_cast<const S*>(group_at(a.residual, g, pixel, sizeof(S))), lanes));
        store_some(reinterpret_cast<S*>(group_at(a.output, g, pixel, sizeof(S))), best, lanes);
      }
    }
  }
}

// The windows that read a pixel of an axis, and by which tap: window (in + pad - tap * dilation) / stride, where that is
// whole and there.
struct Readers {
  int count = 0;
  int tap[3], window[3];
  Readers(int in, int pad, int windows, int stride, int dilation) {
    for (int k = 0; k < 3; ++k) {
      const int i = in + pad - k * dilation;
      const int at = stride == 2 ? i >> 1 : i;  // pools have stride 2, or 1
      if (i < 0 || at * stride != i || at >= windows) continue;
      tap[count] = k;
      window[count++] = at;
    }
  }
};

template <class S, bool Whole>
inline void pool_back_row(const PoolTrainArgs& a, int y, const std::byte* gradient, const std::uint8_t* winners, int lanes,
                          std::byte* out) {
  const Window& w = a.window;
  const Readers ys(y, w.pad_top, w.out_height, w.stride, w.dilation);
  for (int x = 0; x < w.in_width; ++x) {
    const Readers xs(x, w.pad_left, w.out_width, w.stride, w.dilation);
    V sum = zero();
    for (int i = 0; i < ys.count; ++i)
      for (int j = 0; j < xs.count; ++j) {
        const std::int64_t pixel = static_cast<std::int64_t>(ys.window[i]) * w.out_width + xs.window[j];
        const S* from = reinterpret_cast<const S*>(gradient + pixel * a.gradient.pixel);
        const V v = Whole ? load(from) : load_some(from, lanes);
        sum = add(sum, where_byte(winners + pixel * kGroup, ys.tap[i] * 3 + xs.tap[j], v));
      }
    store(reinterpret_cast<S*>(out + x * a.output.pixel), sum);
  }
}

template <class S>
void pool_back(const PoolTrainArgs& a) {
  const Window& w = a.window;
  const std::int64_t in_first = static_cast<std::int64_t>(a.image) * w.in_height * w.in_width;
  const std::int64_t out_first = static_cast<std::int64_t>(a.image) * w.out_height * w.out_width;
  for (int g = a.first_group; g < a.last_group; ++g) {
    const int lanes = lanes_of(a.gradient, g);
    const std::uint8_t* winners = a.winners + g * a.winner_group + out_first * kGroup;
    const std::byte* gradient = group_at(a.gradient, g, out_first, sizeof(S));
    for (int y = 0; y < w.in_height; ++y) {
      std::byte* out = group_at(a.output, g, in_first + static_cast<std::int64_t>(y) * w.in_width, sizeof(S));
      if (lanes == kGroup)
        pool_back_row<S, true>(a, y, gradient, winners, lanes, out);
      else
        pool_back_row<S, false>(a, y, gradient, winners, lanes, out);
    }
  }
}

// ------------------------------------------------------------------------------------------- weights' gradients

template <class Dot, int Rows, int Columns>
inline void outer_tile(const std::byte* left, const std::byte* right, std::int64_t right_group, int steps, float* output,
                       std::int64_t row) {
  V sums[Rows][Columns];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) sums[r][c] = zero();
  for (int s = 0; s < steps; ++s) {
    V w[Columns];
    for (int c = 0; c < Columns; ++c) w[c] = Dot::weights(right + c * right_group + s * std::int64_t{kLineBytes});
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) sums[r][c] = Dot::step(left + s * std::int64_t{kLineBytes} + r * 4, w[c], sums[r][c]);
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) {
      float* out = output + r * row + c * kGroup;
      store(out, add(load(static_cast<const float*>(out)), sums[r][c]));
    }
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

// Some steps at a time, so that the right side's lines stay in the first-level cache for all of the left side.
template <class Dot>
void outer(const OuterArgs& a) {
  constexpr int kSteps = 128;
  for (int begin = 0; begin < a.steps; begin += kSteps) {
    const int steps = least(kSteps, a.steps - begin);
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

template <class S, class T, class Dot>
constexpr TrainKernels train_table() {
  return {
      .fill = fill<S>,
      .filter = filter_rows<T>,
      .filter_back = filter_back<S>,
      .statistics = statistics<S>,
      .finish = finish<S>,
      .gradient_sums = gradient_sums<S>,
      .gradient = gradient<S, T>,
      .pool = pool<S>,
      .pool_back = pool_back<S>,
      .outer = outer<Dot>,
      .left_pairs = pairs,
      .right_pairs = pairs,
      .step_unit = 1,
  };
}
