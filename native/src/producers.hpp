// The producers and the pools, in terms of V: 16 floats. Included once by each kernels_*.cpp after its vector header,
// inside that file's namespace; so nothing here may use the standard library's templates, which a linker may merge with
// those that another file compiled for another processor.

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }

// A loop that is written out, whatever the compiler thinks of its length: only then does an array of vectors stay in
// registers. The function around it is `flatten`, so that nothing of it is called.
template <int I>
struct Number {
  constexpr operator int() const { return I; }
};
template <int Count, int I = 0, class Do>
inline void each(Do one) {
  if constexpr (I < Count) {
    one(Number<I>{});
    each<Count, I + 1>(one);
  }
}

// Seldom wanted, and long: it is not to stand behind every sum of a tile.
[[gnu::noinline]] inline void elu(float* numbers) {
  for (int i = 0; i < kGroup; ++i)
    if (!(numbers[i] > 0.0f || numbers[i] != numbers[i])) numbers[i] = ::expm1f(numbers[i]);
}

inline V activate(V x, Activation activation) {
  if (activation == Activation::relu) return relu(x);
  if (activation == Activation::elu) {
    float numbers[kGroup];
    store(numbers, x);
    elu(numbers);
    return load(static_cast<const float*>(numbers));
  }
  return x;
}

// Where the 16 channels of `group` begin in a pixel's line.
template <class S>
inline std::int64_t group_offset(int group, std::int64_t block) {
  constexpr int per_line = kLineBytes / (kGroup * static_cast<int>(sizeof(S)));
  return (group / per_line) * block + (group % per_line) * kGroup * static_cast<std::int64_t>(sizeof(S));
}

template <class S>
inline const S* line(const std::byte* p, int pixel) {
  return reinterpret_cast<const S*>(p + static_cast<std::int64_t>(pixel) * kLineBytes);
}
template <class S>
inline S* line(std::byte* p, int pixel) {
  return reinterpret_cast<S*>(p + static_cast<std::int64_t>(pixel) * kLineBytes);
}

// The first output column whose window begins inside the map, and the end of those whose window ends there.
struct Interior {
  int begin, end;
};
inline Interior interior(const Window& w) {
  const int reach = (w.kernel - 1) * w.dilation;
  const int begin = least((w.pad_left + w.stride - 1) / w.stride, w.out_width);
  const int last = w.in_width - 1 - reach + w.pad_left;
  const int end = last < 0 ? begin : most(begin, least(last / w.stride + 1, w.out_width));
  return {begin, end};
}

// Which input row each row of a window's taps reads; rows outside of the map are null.
inline void window_rows(const Window& w, const std::byte* input, int row, const std::byte** rows) {
  const int image = row / w.out_height;
  const int y0 = (row % w.out_height) * w.stride - w.pad_top;
  for (int k = 0; k < w.kernel; ++k) {
    const int y = y0 + k * w.dilation;
    const bool inside = y >= 0 && y < w.in_height;
    const std::int64_t pixel = (static_cast<std::int64_t>(image) * w.in_height + (inside ? y : 0)) * w.in_width;
    rows[k] = inside ? input + pixel * kLineBytes : nullptr;
  }
}

inline constexpr int kMaxKernel = 15;
inline constexpr int kMaxImageDepth = 2048;  // kernel * kernel * channels of an image, padded

// ------------------------------------------------------------------------------------------------- depthwise

template <class S, bool Relu>
inline V tap(const std::byte* row, int x) {
  const V v = load(line<S>(row, x));
  if constexpr (Relu) return relu(v);
  return v;
}

template <class T>
inline void store_number(T* p, V v, int /*zero_point*/) {
  store(p, v);
}
inline void store_number(u8* p, V v, int zero_point) { store(p, v, zero_point); }

// An output pixel whose window hangs over the map's edge, or of any kernel that has no code of its own.
template <class S, bool Relu>
inline V depthwise_at(const Window& w, const std::byte* const* rows, const float* weights, V sum, int x) {
  const int x0 = x * w.stride - w.pad_left;
  for (int ky = 0; ky < w.kernel; ++ky) {
    if (rows[ky] == nullptr) continue;
    for (int kx = 0; kx < w.kernel; ++kx) {
      const int column = x0 + kx * w.dilation;
      if (column < 0 || column >= w.in_width) continue;
      sum = fma(tap<S, Relu>(rows[ky], column), load(weights + (ky * w.kernel + kx) * kGroup), sum);
    }
  }
  return sum;
}

// `N` neighbouring output pixels of a 3x3 filter with stride 1: each input pixel is loaded once for all of them.
template <class S, bool Relu, int N>
[[gnu::flatten]] inline void depthwise_3x3(const std::byte* const* rows, const V* weights, V bias, int x, V* sums) {
  V sum[N];
  each<N>([&](auto i) { sum[i] = bias; });
  each<3>([&](auto ky) {
    V pixels[N + 2];
    each<N + 2>([&](auto i) { pixels[i] = held(tap<S, Relu>(rows[ky], x + i)); });
    each<N>([&](auto i) {
      each<3>([&](auto kx) { sum[i] = fma(pixels[i + kx], weights[ky * 3 + kx], sum[i]); });
    });
  });
  each<N>([&](auto i) { sums[i] = sum[i]; });
}

// The same for pixels, or taps, that lie apart; `x` is the first column that is read.
template <class S, bool Relu, int N>
[[gnu::flatten]] inline void depthwise_3x3_apart(const Window& w, const std::byte* const* rows, const V* weights,
                                                 V bias, int x, V* sums) {
  V sum[N];
  each<N>([&](auto i) { sum[i] = bias; });
  each<9>([&](auto t) {
    each<N>([&](auto i) {
      sum[i] = fma(tap<S, Relu>(rows[t / 3], x + i * w.stride + t % 3 * w.dilation), weights[t], sum[i]);
    });
  });
  each<N>([&](auto i) { sums[i] = sum[i]; });
}

// What the next group reads in the place of this one's rows: all three for the first row of windows, then those that
// come in. It lies in another block, where the processor does not expect it.
inline void fetch_rows(const ProducerArgs& a, const std::byte* const* rows, std::int64_t distance, bool first) {
  for (int k = first ? 0 : 2; k < 3; ++k)
    for (int x = 0; rows[k] != nullptr && x < a.window.in_width; ++x)
      __builtin_prefetch(rows[k] + distance + static_cast<std::int64_t>(x) * kLineBytes);
}

// One at the map's edge: columns of the window that lie outside are left out.
template <class S, bool Relu>
[[gnu::flatten]] inline V depthwise_3x3_at(const Window& w, const std::byte* const* rows, const V* weights, V sum,
                                           int x) {
  const int x0 = x * w.stride - w.pad_left;
  each<3>([&](auto kx) {
    const int column = x0 + kx * w.dilation;
    if (column < 0 || column >= w.in_width) return;
    each<3>([&](auto ky) { sum = fma(tap<S, Relu>(rows[ky], column), weights[ky * 3 + kx], sum); });
  });
  return sum;
}

template <class S, class T, bool Relu, bool Residual = false>
void depthwise_rows(const ProducerArgs& a) {
  const Window& w = a.window;
  const Interior inside = interior(w);
  const int groups = a.channels / kGroup;
  const bool fast = w.kernel == 3;
  for (int g = 0; g < groups; ++g) {
    const std::byte* input = a.input + group_offset<S>(g, a.input_block);
    std::byte* matrix = a.matrix + group_offset<T>(g, a.matrix_block);
    const float* weights =
        static_cast<const float*>(a.weights) + static_cast<std::int64_t>(g) * w.kernel * w.kernel * kGroup;
    const V bias = a.bias ? load(static_cast<const float*>(a.bias) + g * kGroup) : zero();
    V filter[9];
    if (fast)
      for (int i = 0; i < 9; ++i) filter[i] = load(weights + i * kGroup);
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, input, a.first_row + r, rows);
      std::byte* out = matrix + static_cast<std::int64_t>(r) * w.out_width * kLineBytes;
      const std::byte* beside = nullptr;
      if constexpr (Residual)
        beside = a.residual + group_offset<T>(g, a.residual_block) +
                 static_cast<std::int64_t>(r) * w.out_width * kLineBytes;
      auto put = [&](int x, V v) {
        if constexpr (Residual) v = add(v, load(line<T>(beside, x)));
        store_number(line<T>(out, x), activate(v, a.activation), a.zero_point);
      };
      if (!fast) {
        for (int x = 0; x < w.out_width; ++x) put(x, depthwise_at<S, Relu>(w, rows, weights, bias, x));
        continue;
      }
      if (g + 1 < groups) {
        const std::int64_t next = group_offset<S>(g + 1, a.input_block) - group_offset<S>(g, a.input_block);
        fetch_rows(a, rows, next, r == 0);
      }
      const std::byte* three[3];
      for (int k = 0; k < 3; ++k) three[k] = rows[k] ? rows[k] : a.zeros;
      const bool together = inside.end - inside.begin >= 4;
      const int alone = together ? inside.begin : w.out_width;  // up to here
      for (int x = 0; x < alone; ++x) put(x, depthwise_3x3_at<S, Relu>(w, three, filter, bias, x));
      if (!together) continue;
      // The last four of the inside are computed whole, even where some of them are there already.
      for (int next = inside.begin; next < inside.end; next += 4) {
        const int x = least(next, inside.end - 4);
        V sums[4];
        if (w.stride == 1 && w.dilation == 1)
          depthwise_3x3<S, Relu, 4>(three, filter, bias, x - w.pad_left, sums);
        else
          depthwise_3x3_apart<S, Relu, 4>(w, three, filter, bias, x * w.stride - w.pad_left, sums);
        for (int i = 0; i < 4; ++i) put(x + i, sums[i]);
      }
      for (int x = inside.end; x < w.out_width; ++x) put(x, depthwise_3x3_at<S, Relu>(w, three, filter, bias, x));
    }
  }
}

template <class S, class T>
void depthwise(const ProducerArgs& a) {
  if (a.input_relu)
    depthwise_rows<S, T, true>(a);
  else
    depthwise_rows<S, T, false>(a);
}

// A depthwise convolution that is a layer by itself: what `depthwise` gives, in the activations' own type.
template <class S>
void filter(const ProducerArgs& a) {
  if (a.residual == nullptr)
    depthwise<S, S>(a);
  else if (a.input_relu)
    depthwise_rows<S, S, true, true>(a);
  else
    depthwise_rows<S, S, false, true>(a);
}

// --------------------------------------------------------------------------------------------------- patches

// A regular convolution's windows, copied: K is (ky, kx, channel).
template <class S, class T>
void patches(const ProducerArgs& a) {
  const Window& w = a.window;
  const int groups = a.channels / kGroup;
  for (int g = 0; g < groups; ++g) {
    const std::byte* input = a.input + group_offset<S>(g, a.input_block);
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, input, a.first_row + r, rows);
      for (int ky = 0; ky < w.kernel; ++ky) {
        for (int kx = 0; kx < w.kernel; ++kx) {
          std::byte* out = a.matrix + group_offset<T>((ky * w.kernel + kx) * groups + g, a.matrix_block) +
                           static_cast<std::int64_t>(r) * w.out_width * kLineBytes;
          for (int x = 0; x < w.out_width; ++x) {
            const int column = x * w.stride - w.pad_left + kx * w.dilation;
            const bool inside = rows[ky] != nullptr && column >= 0 && column < w.in_width;
            V v = inside ? load(line<S>(rows[ky], column)) : zero();
            if (a.input_relu) v = relu(v);
            store(line<T>(out, x), v);
          }
        }
      }
    }
  }
}

// What the windows of a row of output pixels find in one row of the input, or outside of it (null). With stride 1 each
// number is counted once for all the windows that read it.
template <class Value, class Count, class Put>
inline void windows_of_row(const Window& w, bool outside, Value nothing, Count count, Put put) {
  for (int kx = 0; kx < w.kernel; ++kx) {
    const int first = kx * w.dilation - w.pad_left;  // the column that the first window reads
    const int begin = outside ? w.out_width : least((most(-first, 0) + w.stride - 1) / w.stride, w.out_width);
    const int room = w.in_width - first;
    const int end = outside || room <= 0 ? begin : most(begin, least((room + w.stride - 1) / w.stride, w.out_width));
    for (int x = 0; x < begin; ++x) put(kx, x, nothing);
    for (int x = end; x < w.out_width; ++x) put(kx, x, nothing);
    for (int x = begin; w.stride > 1 && x < end; ++x) put(kx, x, count(x * w.stride + first));
  }
  for (int column = 0; w.stride == 1 && !outside && column < w.in_width; ++column) {
    const Value counted = count(column);
    for (int kx = 0; kx < w.kernel; ++kx) {
      const int x = column + w.pad_left - kx * w.dilation;
      if (x >= 0 && x < w.out_width) put(kx, x, counted);
    }
  }
}

// Patches in bytes, which count steps of a size a channel: `weights` is how many of them make one, and what lies beyond
// a byte is cut off.
template <class S>
void patches_u8(const ProducerArgs& a) {
  const Window& w = a.window;
  const int groups = a.channels / kGroup;
  for (int g = 0; g < groups; ++g) {
    const V factor = load(static_cast<const float*>(a.weights) + g * kGroup);
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, a.input + group_offset<S>(g, a.input_block), a.first_row + r, rows);
      for (int ky = 0; ky < w.kernel; ++ky) {
        std::byte* out[kMaxKernel];
        for (int kx = 0; kx < w.kernel; ++kx)
          out[kx] = a.matrix + group_offset<u8>((ky * w.kernel + kx) * groups + g, a.matrix_block) +
                    static_cast<std::int64_t>(r) * w.out_width * kLineBytes;
        windows_of_row(
            w, rows[ky] == nullptr, zero(), [&](int column) { return mul(load(line<S>(rows[ky], column)), factor); },
            [&](int kx, int x, V steps) { store(line<u8>(out[kx], x), steps, a.zero_point); });
      }
    }
  }
}

// The windows of the image itself, float [images][height][width][channels] with few channels: K is (ky, kx, channel)
// without gaps, so that a row of taps is one run of numbers.
// One pixel's, anywhere.
template <class T>
inline void image_patch(const ProducerArgs& a, int image, int y0, int x0, int pixel) {
  const Window& w = a.window;
  const float* images = reinterpret_cast<const float*>(a.input);
  const int run = w.kernel * a.channels;
  const int depth = w.kernel * run;
  const int groups = (depth + kGroup - 1) / kGroup;
  constexpr int per_line = kLineBytes / (kGroup * static_cast<int>(sizeof(T)));
  const int padded = (groups + per_line - 1) / per_line * per_line;  // what `multiply` may read
  float taps[kMaxImageDepth];
  for (int i = depth; i < padded * kGroup; ++i) taps[i] = 0.0f;
  for (int ky = 0; ky < w.kernel; ++ky) {
    const int y = y0 + ky * w.dilation;
    float* out = taps + ky * run;
    const float* in = images + ((static_cast<std::int64_t>(image) * w.in_height + y) * w.in_width + x0) * a.channels;
    const bool whole = w.dilation == 1 && x0 >= 0 && x0 + w.kernel <= w.in_width;
    if (y < 0 || y >= w.in_height) {
      for (int i = 0; i < run; ++i) out[i] = 0.0f;
    } else if (whole) {
      for (int i = 0; i < run; ++i) out[i] = in[i];
    } else {
      for (int kx = 0; kx < w.kernel; ++kx) {
        const int column = x0 + kx * w.dilation;
        const bool inside = column >= 0 && column < w.in_width;
        for (int c = 0; c < a.channels; ++c)
          out[kx * a.channels + c] = inside ? in[kx * w.dilation * a.channels + c] : 0.0f;
      }
    }
  }
  for (int g = 0; g < padded; ++g)
    store(line<T>(a.matrix + group_offset<T>(g, a.matrix_block), pixel),
          load(static_cast<const float*>(taps + g * kGroup)));
}

template <class T>
void image_patches(const ProducerArgs& a) {
  const Window& w = a.window;
  for (int r = 0; r < a.rows; ++r) {
    const int row = a.first_row + r;
    const int y0 = (row % w.out_height) * w.stride - w.pad_top;
    for (int x = 0; x < w.out_width; ++x)
      image_patch<T>(a, row / w.out_height, y0, x * w.stride - w.pad_left, r * w.out_width + x);
  }
}

// ---------------------------------------------------------------------------------------------------- copies

template <class S>
void load_blocks(const CopyArgs& a) {
  const int groups = (a.channels + kPanel - 1) / kPanel * (kPanel / kGroup);
  for (int g = 0; g < groups; ++g) {
    std::byte* blocks = a.blocks + group_offset<S>(g, a.block);
    const int valid = a.channels - g * kGroup;
    for (int p = a.first_pixel; p < a.first_pixel + a.pixels; ++p) {
      const float* plain = a.plain + static_cast<std::int64_t>(p) * a.channels + g * kGroup;
      float lanes[kGroup] = {};
      for (int i = 0; valid < kGroup && i < valid; ++i) lanes[i] = plain[i];
      store(line<S>(blocks, p), load(valid < kGroup ? static_cast<const float*>(lanes) : plain));
    }
  }
}

template <class S>
void unload_blocks(const CopyArgs& a) {
  const int groups = (a.channels + kGroup - 1) / kGroup;
  for (int g = 0; g < groups; ++g) {
    const std::byte* blocks = a.blocks + group_offset<S>(g, a.block);
    const int valid = a.channels - g * kGroup;
    for (int p = a.first_pixel; p < a.first_pixel + a.pixels; ++p) {
      float* plain = a.plain + static_cast<std::int64_t>(p) * a.channels + g * kGroup;
      const V v = load(line<S>(blocks, p));
      if (valid >= kGroup) {
        store(plain, v);
      } else {
        float lanes[kGroup];
        store(lanes, v);
        for (int i = 0; i < valid; ++i) plain[i] = lanes[i];
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------- pools

template <class S>
void max_pool(const PoolArgs& a) {
  const Window& w = a.window;
  for (int g = 0; g < a.groups; ++g) {
    const std::byte* input = a.input + group_offset<S>(g, a.input_block);
    std::byte* output = a.output + group_offset<S>(g, a.output_block);
    const std::byte* residual = a.residual ? a.residual + group_offset<S>(g, a.residual_block) : nullptr;
    for (int r = 0; r < a.rows; ++r) {
      const std::byte* rows[kMaxKernel];
      window_rows(w, input, a.first_row + r, rows);
      for (int x = 0; x < w.out_width; ++x) {
        const int x0 = x * w.stride - w.pad_left;
        V best = set1(-__builtin_inff());
        for (int ky = 0; ky < w.kernel; ++ky) {
          if (rows[ky] == nullptr) continue;
          for (int kx = 0; kx < w.kernel; ++kx) {
            const int column = x0 + kx * w.dilation;
            if (column >= 0 && column < w.in_width) best = max(best, load(line<S>(rows[ky], column)));
          }
        }
        const int pixel = (a.first_row + r) * w.out_width + x;
        if (residual) best = add(best, load(line<S>(residual, pixel)));
        if (a.relu) best = relu(best);
        store(line<S>(output, pixel), best);
      }
    }
  }
}

template <class S>
void reduce(const ReduceArgs& a) {
  for (int g = a.first_group; g < a.first_group + a.groups; ++g) {
    const std::byte* input = a.input + group_offset<S>(g, a.input_block);
    for (int image = 0; image < a.images; ++image) {
      V sum = a.maximum ? set1(-__builtin_inff()) : zero();
      for (int p = 0; p < a.pixels; ++p) {
        const V v = load(line<S>(input, image * a.pixels + p));
        sum = a.maximum ? max(sum, v) : add(sum, v);
      }
      if (!a.maximum) sum = mul(sum, set1(1.0f / static_cast<float>(a.pixels)));
      store(a.output + (static_cast<std::int64_t>(g) * a.images + image) * kGroup, sum);
    }
  }
}
