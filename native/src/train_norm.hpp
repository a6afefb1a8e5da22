// Batch normalisation: sums over a batch, and what they make of a map and of its gradient.
// Included by train_kernels.hpp, inside a namespace.

// Groups whose numbers share a cache line, and the pixels for which one is done after the other: the line is fetched
// once for both.
template <class S>
inline constexpr int kBeside = kLineBytes / (kGroup * static_cast<int>(sizeof(S)));
template <class S>
inline constexpr int kChunk = kBeside<S> == 1 ? 1 << 30 : 64;

// work(group, its place beside others, first pixel, last pixel), for all pixels of all groups.
template <class S, class Work>
inline void by_chunks(const MapArgs& a, int first_group, Work&& work) {
  const int groups = least(kBeside<S>, a.last_group - first_group);
  for (int begin = 0; begin < a.pixels; begin += least(kChunk<S>, a.pixels - begin)) {
    const int end = begin + least(kChunk<S>, a.pixels - begin);
    for (int i = 0; i < groups; ++i) work(first_group + i, i, begin, end);
  }
}

inline V total(const V* sums) { return add(add(sums[0], sums[1]), add(sums[2], sums[3])); }

// In one pass, since what is squared is the distance from a mean of some pixels, not from zero: what cancels is then at
// most a small multiple of the result.
template <class S>
void statistics(const MapArgs& a) {
  constexpr int kSamples = 8;
  const V count = set1(1.0f / static_cast<float>(a.pixels)), share = set1(1.0f / kSamples);
  const auto z_at = [&](int g) { return group_at(a.z, g, a.first_pixel, sizeof(S)); };
  for (int first = a.first_group; first < a.last_group; first += kBeside<S>) {
    V sums[kBeside<S>][4], squares[kBeside<S>][4], about[kBeside<S>];
    for (int i = 0; i < kBeside<S>; ++i) {
      about[i] = zero();
      for (int j = 0; j < 4; ++j) sums[i][j] = squares[i][j] = zero();
    }
    for (int s = 0; s < kSamples; ++s)
      for (int i = 0; i < kBeside<S> && first + i < a.last_group; ++i) {
        const std::int64_t p = static_cast<std::int64_t>(a.pixels) * s / kSamples;
        about[i] = fma(load(reinterpret_cast<const S*>(z_at(first + i) + p * a.z.pixel)), share, about[i]);
      }
    by_chunks<S>(a, first, [&](int g, int i, int begin, int end) {
      const std::byte* z = z_at(g);
      const auto one = [&](int p, int j) {
        const V distance = sub(load(reinterpret_cast<const S*>(z + p * a.z.pixel)), about[i]);
        sums[i][j] = add(sums[i][j], distance);
        squares[i][j] = fma(distance, distance, squares[i][j]);
      };
      int p = begin;
      for (; p + 4 <= end; p += 4)
        for (int j = 0; j < 4; ++j) one(p + j, j);
      for (; p < end; ++p) one(p, 0);
    });
    for (int i = 0; i < kBeside<S> && first + i < a.last_group; ++i) {
      const V sum = total(sums[i]), distance = mul(sum, count);
      store(a.sums + (first + i) * kGroup, fma(about[i], set1(static_cast<float>(a.pixels)), sum));
      const V centred = sub(total(squares[i]), mul(distance, sum));
      store(a.sums + a.stride + (first + i) * kGroup, max(centred, zero()));  // equal numbers differ by rounding only
    }
  }
}

template <class S>
void finish(const MapArgs& a) {
  for (int first = a.first_group; first < a.last_group; first += kBeside<S>)
    by_chunks<S>(a, first, [&](int g, int, int begin, int end) {
      const int lanes = lanes_of(a.output, g);
      if (lanes == 0) return;
      const std::byte* z = group_at(a.z, g, a.first_pixel, sizeof(S));
      std::byte* out = group_at(a.output, g, a.first_pixel, sizeof(S));
      const Residual<S> residual(a.residual, g, a.first_pixel, a.residual_scale, a.residual_shift);
      const V scale = load(a.scale + g * kGroup), shift = load(a.shift + g * kGroup);
      for (int p = begin; p < end; ++p) {
        V v = fma(load(reinterpret_cast<const S*>(z + p * a.z.pixel)), scale, shift);
        if (a.relu) v = relu(v);
        store_some(reinterpret_cast<S*>(out + p * a.output.pixel), residual.added_to(v, p), lanes);
      }
    });
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

  void prefetch(int p) const {
    __builtin_prefetch(z + p * a.z.pixel);
    __builtin_prefetch(gradient + p * a.gradient.pixel);
  }
  V z_at(int p) const { return load(reinterpret_cast<const S*>(z + p * a.z.pixel)); }
  V at(int p, V z_there) const {
    const V v = load_some(reinterpret_cast<const S*>(gradient + p * a.gradient.pixel), lanes);
    return a.relu ? select_greater(fma(z_there, scale, shift), zero(), v, zero()) : v;
  }
};

template <class S>
void gradient_sums(const MapArgs& a) {
  for (int first = a.first_group; first < a.last_group; first += kBeside<S>) {
    V sums[kBeside<S>][4], products[kBeside<S>][4];
    for (int i = 0; i < kBeside<S>; ++i)
      for (int j = 0; j < 4; ++j) sums[i][j] = products[i][j] = zero();
    by_chunks<S>(a, first, [&](int g, int i, int begin, int end) {
      const Arriving<S> arriving(a, g);
      const V mean = load(a.mean + g * kGroup);
      const auto one = [&](int p, int j) {
        arriving.prefetch(p + kAhead);
        const V z = arriving.z_at(p), v = arriving.at(p, z);
        sums[i][j] = add(sums[i][j], v);
        products[i][j] = fma(v, sub(z, mean), products[i][j]);
      };
      int p = begin;
      for (; p + 4 <= end; p += 4)
        for (int j = 0; j < 4; ++j) one(p + j, j);
      for (; p < end; ++p) one(p, 0);
    });
    for (int i = 0; i < kBeside<S> && first + i < a.last_group; ++i) {
      store(a.sums + (first + i) * kGroup, total(sums[i]));
      store(a.sums + a.stride + (first + i) * kGroup, total(products[i]));
    }
  }
}

template <class S, class T>
void gradient(const MapArgs& a) {
  for (int first = a.first_group; first < a.last_group; first += kBeside<S>)
    by_chunks<S>(a, first, [&](int g, int, int begin, int end) {
      const Arriving<S> arriving(a, g);
      std::byte* out = group_at(a.output, g, a.output_pixel, sizeof(T));
      const V of_gradient = load(a.factors + g * kGroup), of_z = load(a.factors + a.stride + g * kGroup);
      const V offset = load(a.factors + 2 * a.stride + g * kGroup);
      for (int p = begin; p < end; ++p) {
        arriving.prefetch(p + kAhead);
        const V z = arriving.z_at(p);
        store(reinterpret_cast<T*>(out + p * a.output.pixel), fma(arriving.at(p, z), of_gradient, fma(z, of_z, offset)));
      }
    });
}
