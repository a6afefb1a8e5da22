// The product in half precision arithmetic, which does twice as many numbers at a time as that of floats. Included like
// multiply.hpp, after it, where there is `H`.
//
// A step is a pair of K: lanes 2n and 2n + 1 of a sum hold channel n's even and odd products. A long sum would lose in
// half precision what its products have: rounding errors grow with the square root of its length. So it is short:
//
// - a *chain* of kChain steps is summed in registers;
// - chains are added in pairs, and those in pairs, each time two of equally many products (they wait in memory, one
//   place for each power of two), so that a product takes part in a few additions more, not in hundreds;
// - kChains of them are added to the totals, which are floats. That takes eight times as long as an addition in half
//   precision, and so it is done rarely.
//
// Weights are brought to the middle of half precision's range by a power of two for each output channel (`scale` takes
// it back). What is too large all the same is found by the flag that `begin_overflow_watch` looks at.

struct DotHalves {
  static constexpr int kPerStep = 2;
};

inline constexpr int kChainLines = 2;                                // lines of K
inline constexpr int kChain = kChainLines * kLineBytes / 4;          // steps
inline constexpr int kLevels = 2;                                    // of pairs
inline constexpr int kChains = 1 << kLevels;

// Channels 0-15, of which the even and odd products' sums lie side by side.
inline V joined(V lo, V hi) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return add(V{_mm512_permutex2var_ps(lo.a, even, hi.a)}, V{_mm512_permutex2var_ps(lo.a, odd, hi.a)});
}

template <class S, int Rows, int Columns>
struct Tile<DotHalves, S, Rows, Columns> {
  // What a tile keeps in its thread's workspace.
  struct Room {
    H waiting[kLevels][Rows][Columns];
    float totals[Rows][Columns][2 * kGroup];
  };
  static_assert(sizeof(Room) <= kWorkspace);

  [[gnu::flatten]] static void run(const MultiplyArgs& a, int pixel, const std::byte* weights, int channel,
                                   const Coming& coming) {
    Room& room = *reinterpret_cast<Room*>(a.workspace);
    H sums[Rows][Columns];
    const auto all = [](auto&& f) {
      each<Rows>([&](auto r) { each<Columns>([&](auto c) { f(r, c); }); });
    };
    const auto step = [&](const std::byte* at) {
      H w[Columns];
      each<Columns>([&](auto c) { w[c] = load(reinterpret_cast<const H*>(weights + c * kLineBytes)); });
      each<Rows>([&](auto r) {
        const H x = pair(at + r * kLineBytes);
        each<Columns>([&](auto c) { sums[r][c] = fma(x, w[c], sums[r][c]); });
      });
      weights += 2 * kLineBytes;  // a panel is two vectors wide
    };
    constexpr int steps_per_line = kLineBytes / 4;
    const int steps = (a.depth + 1) / 2;
    const std::byte* matrix = a.matrix + static_cast<std::int64_t>(pixel) * kLineBytes;
    const std::byte* fetched = coming.begin;
    bool has_totals = false;
    int chains = 0;  // that are in the sums or wait
    for (int done = 0;;) {
      all([&](auto r, auto c) { sums[r][c] = zero_half(); });
      const int end = done + least(kChain, steps - done);
      for (; done + steps_per_line <= end; done += steps_per_line) {
        for (int i = 0; i < coming.lines; ++i, fetched += kLineBytes) __builtin_prefetch(fetched, 0, 2);
        for (int s = 0; s < steps_per_line; ++s) step(matrix + s * 4);
        matrix += a.matrix_block;
      }
      for (int s = 0; done < end; ++s, ++done) step(matrix + s * 4);
      ++chains;
      const bool last = done == steps;
      // Of each power of two in the number of chains before these there is a sum that waits.
      int level = 0;
      for (; level < kLevels && ((chains >> level) & 1) == 0; ++level)
        all([&](auto r, auto c) { sums[r][c] = add(sums[r][c], room.waiting[level][r][c]); });
      if (last) {
        for (++level; level < kLevels; ++level)
          if ((chains >> level) & 1)
            all([&](auto r, auto c) { sums[r][c] = add(sums[r][c], room.waiting[level][r][c]); });
        break;
      }
      if (level < kLevels) {
        all([&](auto r, auto c) { store(&room.waiting[level][r][c], sums[r][c]); });
        continue;
      }
      all([&](auto r, auto c) {
        float* total = room.totals[r][c];
        const V lo = low(sums[r][c]), hi = high(sums[r][c]);
        store(total, has_totals ? add(load(total), lo) : lo);
        store(total + kGroup, has_totals ? add(load(total + kGroup), hi) : hi);
      });
      has_totals = true;
      chains = 0;
    }
    each<Columns>([&](auto c) {
      const Finish<S> finish(a, channel + c * kGroup);
      each<Rows>([&](auto r) {
        const float* total = room.totals[r][c];
        V lo = low(sums[r][c]), hi = high(sums[r][c]);
        if (has_totals) lo = add(load(total), lo), hi = add(load(total + kGroup), hi);
        finish(pixel + r, end(a, channel + c * kGroup, lo, hi));
      });
    });
  }

 private:
  static V end(const MultiplyArgs& a, int channel, V lo, V hi) {
    return fma(joined(lo, hi), load(a.scale + channel), load(a.bias + channel));
  }
};

// The same weights by float arithmetic, for what is too large for half precision. `T` is the matrix's type.
template <class T>
struct DotWidened {
  static constexpr int kPerStep = 2;
  using Sum = V;
  static V begin(const MultiplyArgs&, int) { return zero(); }
  static Two weights(const std::byte* p) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return {{_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs))},
            {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)))}};
  }
  static V step(const std::byte* pixel, Two weights, V sum) {
    const T* pair = reinterpret_cast<const T*>(pixel);
    return fma(set1(widen(pair[1])), weights.hi, fma(set1(widen(pair[0])), weights.lo, sum));
  }
  static V end(V sum, const MultiplyArgs& a, int channel) {
    return fma(sum, load(a.scale + channel), load(a.bias + channel));
  }
};
