// Regular convolutions: windows as matrices, and back. Included by train_kernels.hpp, inside a namespace.

// A window's rows one behind the other, with zeros for what lies outside of the map. Whole vectors are written, each row
// over the end of the one before it.
template <class S>
inline void copy_window(const WindowArgs& a, const S* map, int y0, int x0, float* to) {
  const Window& w = a.window;
  const int channels = a.input.channels, run = w.kernel * channels;
  const int left = least(most(-x0, 0), w.kernel), right = most(least(w.in_width - x0, w.kernel), left);
  const int numbers = (right - left) * channels;
  for (int ky = 0; ky < w.kernel; ++ky) {
    const int y = y0 + ky;
    const bool inside = y >= 0 && y < w.in_height;
    float* at = to + ky * run;
    if (!inside || numbers < run)
      for (int i = 0; i < run; i += kGroup) store(at + i, zero());
    if (!inside) continue;
    const S* from = map + (static_cast<std::int64_t>(y) * w.in_width + x0 + left) * channels;
    at += left * channels;
    for (int i = 0; i < numbers; i += kGroup) store(at + i, load_some(from + i, least(numbers - i, kGroup)));
  }
  const int depth = w.kernel * run;
  for (int i = 0; i < 2 * kGroup; i += kGroup) store(to + depth + i, zero());
}

inline void copy_line(const std::byte* from, std::byte* to) {
  store(reinterpret_cast<float*>(to), from == nullptr ? zero() : load(reinterpret_cast<const float*>(from)));
}

// A window whose rows are whole lines, of the numbers' own type.
template <class S>
inline void copy_lines(const WindowArgs& a, const S* map, int y0, int x0, std::int64_t out_pixel) {
  const Window& w = a.window;
  const int channels = a.input.channels;
  const int lines = w.kernel * channels * static_cast<int>(sizeof(S)) / kLineBytes;
  std::byte* to = group_at(a.output, 0, out_pixel, sizeof(S));
  for (int ky = 0; ky < w.kernel; ++ky) {
    const auto* from =
        reinterpret_cast<const std::byte*>(map + (static_cast<std::int64_t>(y0 + ky) * w.in_width + x0) * channels);
    for (int i = 0; i < lines; ++i, to += a.output.block) copy_line(from + i * kLineBytes, to);
  }
  for (int i = w.kernel * lines; i < a.groups / a.output.groups; ++i, to += a.output.block) copy_line(nullptr, to);
}

// Windows [begin, end) of a row, none of which reaches beyond the map.
struct Run {
  int begin, end;
  std::int64_t out_pixel;  // of window 0
};

// Windows whose rows are whole groups: a group of all of them, then the next.
template <class S, class T>
inline void copy_groups(const WindowArgs& a, const S* map, int y0, const Run& windows) {
  const int channels = a.input.channels, groups = a.window.kernel * channels / kGroup, step = a.window.stride * channels;
  const std::int64_t pixel = a.output.pixel;
  for (int g = 0; g < a.groups; ++g) {
    const int ky = g / groups;
    std::byte* to = group_at(a.output, g, windows.out_pixel, sizeof(T));
    if (ky >= a.window.kernel) {
      for (int x = windows.begin; x < windows.end; ++x) store(reinterpret_cast<T*>(to + x * pixel), zero());
      continue;
    }
    const S* from = map + (static_cast<std::int64_t>(y0 + ky) * a.window.in_width - a.window.pad_left) * channels +
                    g % groups * kGroup;
    for (int x = windows.begin; x < windows.end; ++x) {
      if constexpr (sizeof(S) == sizeof(T))
        __builtin_memcpy(to + x * pixel, from + std::int64_t{x} * step, kGroup * sizeof(S));
      else
        store(reinterpret_cast<T*>(to + x * pixel), load(from + std::int64_t{x} * step));
    }
  }
}

// Windows of few numbers, their rows put together in a register. What is loaded reaches up to a vector further.
template <class S, class T>
inline void place_rows(const WindowArgs& a, const S* map, int y0, const Run& windows) {
  const int channels = a.input.channels, kernel = a.window.kernel, run = kernel * channels;
  const int step = a.window.stride * channels;
  const std::int64_t pixel = a.output.pixel, row = static_cast<std::int64_t>(a.window.in_width) * channels;
  const S* first = map + y0 * row - static_cast<std::int64_t>(a.window.pad_left) * channels;
  for (int g = 0; g < a.groups; ++g) {
    std::byte* to = group_at(a.output, g, windows.out_pixel, sizeof(T));
    const int behind = g * kGroup;  // numbers of a window that lie in the groups before
    const int top = least(behind / run, kernel), bottom = least((behind + kGroup + run - 1) / run, kernel);
    for (int x = windows.begin; x < windows.end; ++x) {
      V line = zero();
      for (int ky = top; ky < bottom; ++ky) {
        const int begin = most(ky * run - behind, 0), end = least((ky + 1) * run - behind, kGroup);
        line = placed(line, begin, end - begin, load(first + ky * row + std::int64_t{x} * step + (begin + behind - ky * run)));
      }
      store(reinterpret_cast<T*>(to + x * pixel), line);
    }
  }
}

template <class S, class T>
void window_row(const WindowArgs& a, int row, std::int64_t out_pixel) {
  const Window& w = a.window;
  const int channels = a.input.channels, run = w.kernel * channels;
  const S* map =
      reinterpret_cast<const S*>(a.input.data) + static_cast<std::int64_t>(a.image) * w.in_height * w.in_width * channels;
  const int y0 = row * w.stride - w.pad_top;
  // Those that lie on the map, or none.
  Run whole{0, 0, out_pixel};
  if (y0 >= 0 && y0 + w.kernel <= w.in_height && w.in_width >= w.kernel - w.pad_left) {
    whole.begin = least((w.pad_left + w.stride - 1) / w.stride, w.out_width);
    whole.end = most(least((w.in_width - w.kernel + w.pad_left) / w.stride + 1, w.out_width), whole.begin);
  }
  if (whole.begin == whole.end) {
    // All of them hang over an edge.
  } else if (sizeof(S) == sizeof(T) && run * static_cast<int>(sizeof(S)) % kLineBytes == 0) {
    for (int x = whole.begin; x < whole.end; ++x) copy_lines(a, map, y0, x * w.stride - w.pad_left, out_pixel + x);
  } else if (run % kGroup == 0) {
    copy_groups<S, T>(a, map, y0, whole);
  } else if (a.groups <= 2) {
    // What is loaded behind a window's last number lies in this map, too.
    const std::int64_t left = static_cast<std::int64_t>(w.in_height - y0 - w.kernel + 1) * w.in_width * channels;
    const std::int64_t room = left + w.pad_left * channels - run - kGroup;
    const int fit = room < 0 ? 0 : static_cast<int>(room / (w.stride * channels)) + 1;
    whole.end = most(least(whole.end, fit), whole.begin);
    place_rows<S, T>(a, map, y0, whole);
  } else {
    whole.end = whole.begin;
  }
  float window[kMostDepth + 2 * kGroup];
  for (int x = 0; x < w.out_width; ++x) {
    if (x == whole.begin) x = whole.end;
    if (x >= w.out_width) break;
    copy_window(a, map, y0, x * w.stride - w.pad_left, window);
    for (int g = 0; g < a.groups; ++g)
      store(reinterpret_cast<T*>(group_at(a.output, g, out_pixel + x, sizeof(T))),
            load(static_cast<const float*>(window + g * kGroup)));
  }
}

// Windows of a pixel.
template <class S, class T>
void sampled_row(const WindowArgs& a, int row, std::int64_t out_pixel) {
  const Window& w = a.window;
  const std::int64_t first = (static_cast<std::int64_t>(a.image) * w.in_height + row * w.stride) * w.in_width;
  for (int g = 0; g < a.groups; ++g) {
    const int lanes = lanes_of(a.input, g);
    const std::byte* from = lanes == 0 ? nullptr : group_at(a.input, g, first, sizeof(S));
    std::byte* to = group_at(a.output, g, out_pixel, sizeof(T));
    for (int x = 0; x < w.out_width; ++x)
      store(reinterpret_cast<T*>(to + x * a.output.pixel),
            lanes == 0 ? zero() : load_some(reinterpret_cast<const S*>(from + x * w.stride * a.input.pixel), lanes));
  }
}

template <class S, class T>
void windows(const WindowArgs& a) {
  for (int r = 0; r < a.rows; ++r) {
    const std::int64_t out_pixel = a.output_pixel + static_cast<std::int64_t>(r) * a.window.out_width;
    if (a.window.kernel == 1)
      sampled_row<S, T>(a, a.first_row + r, out_pixel);
    else
      window_row<S, T>(a, a.first_row + r, out_pixel);
  }
}

// The window that reads `in` by tap `k` of an axis, or -1.
inline int reader_of(int in, int k, int pad, int windows, int stride) {
  const int i = in + pad - k;
  return i >= 0 && i % stride == 0 && i / stride < windows ? i / stride : -1;
}

inline void readers(const ReaderArgs& a) {
  const Window& w = a.window;
  for (int ky = 0; ky < w.kernel; ++ky)
    for (int kx = 0; kx < w.kernel; ++kx)
      for (int b = 0; b < a.blocks; ++b) {
        std::byte* to = a.matrix + ((ky * w.kernel + kx) * a.blocks + b) * a.matrix_block;
        for (int r = 0; r < a.rows; ++r) {
          const int oy = reader_of(a.first_row + r, ky, w.pad_top, w.out_height, w.stride);
          const std::byte* row =
              a.lines + b * a.block + static_cast<std::int64_t>(oy - a.first_window_row) * w.out_width * kLineBytes;
          for (int x = 0; x < w.in_width; ++x, to += kLineBytes) {
            const int ox = oy < 0 ? -1 : reader_of(x, kx, w.pad_left, w.out_width, w.stride);
            copy_line(ox < 0 ? nullptr : row + static_cast<std::int64_t>(ox) * kLineBytes, to);
          }
        }
      }
}

template <class S>
void spread(const SpreadArgs& a) {
  const Window& w = a.window;
  const int groups = (a.output.channels + kGroup - 1) / kGroup;
  for (int g = 0; g < groups; ++g) {
    const int lanes = lanes_of(a.output, g);
    const std::byte* from = group_at(a.input, g, a.first_pixel, sizeof(S));
    for (int r = 0; r < a.rows; ++r)
      for (int cell = 0; cell < w.stride; ++cell) {
        const int y = (a.first_row + r) * w.stride + cell;
        if (y >= w.in_height || (a.add && cell != 0)) break;
        std::byte* row = group_at(a.output, g, (static_cast<std::int64_t>(a.image) * w.in_height + y) * w.in_width, sizeof(S));
        const std::byte* source = from + static_cast<std::int64_t>(r) * w.out_width * a.input.pixel;
        if (cell != 0) {
          for (int x = 0; x < w.in_width; ++x) store_some(reinterpret_cast<S*>(row + x * a.output.pixel), zero(), lanes);
          continue;
        }
        for (int x = 0; x < w.out_width; ++x) {
          S* to = reinterpret_cast<S*>(row + static_cast<std::int64_t>(x) * w.stride * a.output.pixel);
          V v = load(reinterpret_cast<const S*>(source + x * a.input.pixel));
          if (a.add) v = add(v, load_some(static_cast<const S*>(to), lanes));
          store_some(to, v, lanes);
          if (a.add) continue;
          for (int i = 1; i < w.stride && x * w.stride + i < w.in_width; ++i)
            store_some(reinterpret_cast<S*>(reinterpret_cast<std::byte*>(to) + i * a.output.pixel), zero(), lanes);
        }
      }
  }
}
