// Max-pooling of a normalised map, and back. Included by train_kernels.hpp, inside a namespace.

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
inline void pool_row(const PoolTrainArgs& a, int g, int oy) {
  const Window& w = a.window;
  const std::int64_t in_first = static_cast<std::int64_t>(a.image) * w.in_height * w.in_width;
  const std::int64_t out_first = (static_cast<std::int64_t>(a.image) * w.out_height + oy) * w.out_width;
  const int lanes = lanes_of(a.output, g);
  const V scale = load(a.scale + g * kGroup), shift = load(a.shift + g * kGroup);
  const std::byte* z = group_at(a.z, g, in_first, sizeof(S));
  const Residual<S> residual(a.residual, g, 0, a.residual_scale, a.residual_shift);
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
    const std::int64_t pixel = out_first + ox;
    store_bytes(a.winners + g * a.winner_group + pixel * kGroup, winner);
    if (lanes == 0) continue;
    store_some(reinterpret_cast<S*>(group_at(a.output, g, pixel, sizeof(S))), residual.added_to(best, pixel), lanes);
  }
}

template <class S>
void pool(const PoolTrainArgs& a) {
  for (int first = a.first_group; first < a.last_group; first += kBeside<S>)
    for (int oy = 0; oy < a.window.out_height; ++oy)
      for (int g = first; g < least(first + kBeside<S>, a.last_group); ++g) pool_row<S>(a, g, oy);
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

// The same for a pool of stride 2: each window's numbers are loaded once for its three columns, the last of which is the
// next window's first.
template <class S>
inline void pool_back_row_by_two(const PoolTrainArgs& a, int y, const std::byte* gradient, const std::uint8_t* winners,
                                 int lanes, std::byte* out) {
  const Window& w = a.window;
  const Readers ys(y, w.pad_top, w.out_height, w.stride, w.dilation);
  const auto put = [&](int x, V v) {
    if (x >= 0 && x < w.in_width) store(reinterpret_cast<S*>(out + x * a.output.pixel), v);
  };
  V carried = zero();
  for (int ox = 0; ox < w.out_width; ++ox) {
    V first = carried, second = zero(), third = zero();
    for (int i = 0; i < ys.count; ++i) {
      const std::int64_t pixel = static_cast<std::int64_t>(ys.window[i]) * w.out_width + ox;
      const V v = load_some(reinterpret_cast<const S*>(gradient + pixel * a.gradient.pixel), lanes);
      const std::uint8_t* winner = winners + pixel * kGroup;
      const int tap = ys.tap[i] * 3;
      first = add(first, where_byte(winner, tap, v));
      second = add(second, where_byte(winner, tap + 1, v));
      third = add(third, where_byte(winner, tap + 2, v));
    }
    const int x = 2 * ox - w.pad_left;
    put(x, first);
    put(x + 1, second);
    carried = third;
  }
  int x = 2 * w.out_width - w.pad_left;
  put(x, carried);
  for (x = most(x + 1, 0); x < w.in_width; ++x) put(x, zero());
}

template <class S>
void pool_back(const PoolTrainArgs& a) {
  const Window& w = a.window;
  const std::int64_t in_first = static_cast<std::int64_t>(a.image) * w.in_height * w.in_width;
  const std::int64_t out_first = static_cast<std::int64_t>(a.image) * w.out_height * w.out_width;
  for (int first = a.first_group; first < a.last_group; first += kBeside<S>)
    for (int y = 0; y < w.in_height; ++y)
      for (int g = first; g < least(first + kBeside<S>, a.last_group); ++g) {
        const int lanes = lanes_of(a.gradient, g);
        const std::uint8_t* winners = a.winners + g * a.winner_group + out_first * kGroup;
        const std::byte* gradient = group_at(a.gradient, g, out_first, sizeof(S));
        std::byte* out = group_at(a.output, g, in_first + static_cast<std::int64_t>(y) * w.in_width, sizeof(S));
        if (w.stride == 2 && w.dilation == 1)
          pool_back_row_by_two<S>(a, y, gradient, winners, lanes, out);
        else if (lanes == kGroup)
          pool_back_row<S, true>(a, y, gradient, winners, lanes, out);
        else
          pool_back_row<S, false>(a, y, gradient, winners, lanes, out);
      }
}
