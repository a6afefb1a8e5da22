// The depthwise convolution: filled with zeros around, forward, backward.
// Included by train_kernels.hpp, inside a namespace.

inline constexpr int kAhead = 24;  // pixels: maps come from memory

template <class S, bool Normalise, bool Relu, bool Whole>
inline void fill_row(const FillArgs& a, const std::byte* from, float* to, int lanes, V scale, V shift) {
  for (int x = 0; x < a.width; ++x) {
    __builtin_prefetch(from + (x + kAhead) * a.input.pixel);
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
[[gnu::flatten]] inline void filter_some(const float* const* rows, int x, int dilation, const V* filter, V* sums) {
  V sum[N];
  each<N>([&](auto i) { sum[i] = zero(); });
  if (dilation == 1)
    each<3>([&](auto ky) {
      V pixels[N + 2];
      each<N + 2>([&](auto i) { pixels[i] = load(rows[ky] + (x + i) * kGroup); });
      each<N>([&](auto i) {
        each<3>([&](auto kx) { sum[i] = fma(pixels[i + kx], filter[ky * 3 + kx], sum[i]); });
      });
    });
  else
    each<N>([&](auto i) {
      each<9>([&](auto t) { sum[i] = fma(load(rows[t / 3] + (x + i + t % 3 * dilation) * kGroup), filter[t], sum[i]); });
    });
  each<N>([&](auto i) { sums[i] = sum[i]; });
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

// ----------------------------------------------------------------------------------------------------- backward

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

[[gnu::flatten]] inline void filter_gradient(const FilterBackArgs& a) {
  const int d = a.dilation;
  const std::int64_t line = static_cast<std::int64_t>(a.width + 2 * d) * kGroup;
  V sums[kTaps];
  each<kTaps>([&](auto i) { sums[i] = zero(); });
  for (int y = 0; y < a.rows; ++y) {
    const float* gradient = a.gradient + (y + d) * line + d * kGroup;
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = a.padded + (y + k * d) * line;
    for (int x = 0; x < a.width; ++x) {
      const V g = load(gradient + x * kGroup);
      each<kTaps>([&](auto t) { sums[t] = fma(load(rows[t / 3] + (x + t % 3 * d) * kGroup), g, sums[t]); });
    }
  }
  each<kTaps>([&](auto i) {
    float* total = a.filter_gradient + i * kGroup;
    store(total, add(load(static_cast<const float*>(total)), sums[i]));
  });
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
