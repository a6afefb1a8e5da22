// The depthwise convolution: filled with zeros around, forward, backward.
// Included by train_kernels.hpp, inside a namespace.

inline constexpr int kFilterPixels = 4;  // of a row, that are filtered together
inline constexpr int kAhead = 48;  // pixels: maps come from memory

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
template <int N, bool Near>
inline void filter_some(const float* const* rows, int x, int dilation, const V* filter, V* sum) {
  each<N>([&](auto i) { sum[i] = zero(); });
  if constexpr (Near)
    each<3>([&](auto ky) {
      V pixels[N + 2];
      each<N + 2>([&](auto i) { pixels[i] = held(load(rows[ky] + (x + i) * kGroup)); });
      each<N>([&](auto i) {
        each<3>([&](auto kx) { sum[i] = fma(pixels[i + kx], filter[ky * 3 + kx], sum[i]); });
      });
    });
  else
    each<N>([&](auto i) {
      each<9>([&](auto t) { sum[i] = fma(load(rows[t / 3] + (x + i + t % 3 * dilation) * kGroup), filter[t], sum[i]); });
    });
}

// The last ones of a row are computed twice where they are not as many as go together: one alone takes as long.
template <class T, int N, bool Near>
[[gnu::flatten]] inline void filter_rows_by(const FilterArgs& a) {
  V filter[kTaps];
  each<kTaps>([&](auto t) { filter[t] = load(a.filter + t * kGroup); });
  const std::int64_t line = static_cast<std::int64_t>(a.width + 2 * a.dilation) * kGroup;
  for (int y = 0; y < a.rows; ++y) {
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = a.padded + (y + k * a.dilation) * line;
    std::byte* out = group_at(a.output, a.group, a.first_pixel + static_cast<std::int64_t>(y) * a.width, sizeof(T));
    for (int next = 0; next < a.width; next += N) {
      const int x = least(next, a.width - N);
      V sum[N];
      filter_some<N, Near>(rows, x, a.dilation, filter, sum);
      each<N>([&](auto i) { store(reinterpret_cast<T*>(out + (x + i) * a.output.pixel), sum[i]); });
    }
  }
}

template <class T>
void filter_rows(const FilterArgs& a) {
  constexpr int N = kFilterPixels;
  if (a.width < N) return a.dilation == 1 ? filter_rows_by<T, 1, true>(a) : filter_rows_by<T, 1, false>(a);
  a.dilation == 1 ? filter_rows_by<T, N, true>(a) : filter_rows_by<T, N, false>(a);
}

// ----------------------------------------------------------------------------------------------------- backward

// The gradient of the input and that of the filter in one pass: both are sums over the windows of the gradient, whose
// numbers are loaded once for `N` neighbours of a row. `Near` is a dilation of 1.
template <class S, bool Relu, bool Sums, bool Near>
[[gnu::flatten]] void filter_back_rows(const FilterBackArgs& a) {
  V filter[kTaps], of_filter[kTaps];  // by the tap of the gradient's window: turned by 180 degrees
  each<kTaps>([&](auto t) {
    filter[t] = load(a.filter + (kTaps - 1 - t) * kGroup);
    of_filter[t] = zero();
  });
  const bool wanted = there(a.output);
  const int d = a.dilation, lanes = lanes_of(a.input, a.group);
  const std::int64_t line = static_cast<std::int64_t>(a.width + 2 * d) * kGroup;
  const V scale = a.scale != nullptr ? load(a.scale + a.group * kGroup) : set1(1.0f);
  const V shift = load_or_zero(a.shift, a.group), mean = Sums ? load(a.mean + a.group * kGroup) : zero();
  V sum = zero(), product = zero();
  for (int y = 0; y < a.rows; ++y) {
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = a.gradient + (y + k * d) * line;
    const std::int64_t pixel = a.first_pixel + static_cast<std::int64_t>(y) * a.width;
    const std::byte* in = group_at(a.input, a.group, pixel, sizeof(S));
    std::byte* out = wanted ? group_at(a.output, a.group, pixel, sizeof(S)) : nullptr;
    const std::byte* residual = there(a.residual) ? group_at(a.residual, a.group, pixel, sizeof(S)) : nullptr;
    auto some = [&](auto n, int x) {
      constexpr int N = n;
      V z[N], value[N], back[N];
      each<N>([&](auto i) {
        const std::int64_t ahead = x + i + kAhead;
        __builtin_prefetch(in + ahead * a.input.pixel);
        if (wanted) __builtin_prefetch(out + ahead * a.output.pixel, 1);
        if (residual != nullptr) __builtin_prefetch(residual + ahead * a.residual.pixel);
        z[i] = load_some(reinterpret_cast<const S*>(in + (x + i) * a.input.pixel), lanes);
        value[i] = fma(z[i], scale, shift);
        if constexpr (Relu) value[i] = relu(value[i]);
        back[i] = zero();
      });
      each<3>([&](auto ky) {
        V g[Near ? N + 2 : 3 * N];
        each<(Near ? N + 2 : 3 * N)>([&](auto i) {
          g[i] = load(rows[ky] + (Near ? x + i : x + i / 3 + i % 3 * d) * kGroup);
        });
        each<N>([&](auto i) {
          each<3>([&](auto kx) {
            const V at = g[Near ? i + kx : 3 * i + kx];
            back[i] = fma(at, filter[ky * 3 + kx], back[i]);
            of_filter[ky * 3 + kx] = fma(at, value[i], of_filter[ky * 3 + kx]);
          });
        });
      });
      if (!wanted) return;
      each<N>([&](auto i) {
        V v = back[i];
        if constexpr (Relu) v = select_greater(value[i], zero(), v, zero());
        if (residual != nullptr)
          v = add(v, load_some(reinterpret_cast<const S*>(residual + (x + i) * a.residual.pixel), lanes));
        if constexpr (Sums) {
          sum = add(sum, v);
          product = fma(v, sub(z[i], mean), product);
        }
        store_some(reinterpret_cast<S*>(out + (x + i) * a.output.pixel), v, lanes);
      });
    };
    int x = 0;
    for (; x + 2 <= a.width; x += 2) some(Number<2>{}, x);
    if (x < a.width) some(Number<1>{}, x);
  }
  each<kTaps>([&](auto t) {
    float* total = a.filter_gradient + (kTaps - 1 - t) * kGroup;
    store(total, add(load(static_cast<const float*>(total)), of_filter[t]));
  });
  if constexpr (Sums) {
    store(a.sums, add(load(static_cast<const float*>(a.sums)), sum));
    store(a.sums + kGroup, add(load(static_cast<const float*>(a.sums + kGroup)), product));
  }
}

template <class S, bool Relu, bool Sums>
void filter_back_by(const FilterBackArgs& a) {
  a.dilation == 1 ? filter_back_rows<S, Relu, Sums, true>(a) : filter_back_rows<S, Relu, Sums, false>(a);
}

template <class S>
void filter_back(const FilterBackArgs& a) {
  if (a.mean != nullptr)
    a.relu ? filter_back_by<S, true, true>(a) : filter_back_by<S, false, true>(a);
  else
    a.relu ? filter_back_by<S, true, false>(a) : filter_back_by<S, false, false>(a);
}
