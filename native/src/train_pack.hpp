// Weights as panels of the product. Included by train_kernels.hpp, inside a namespace.

// A step of 16 columns of a panel: what they hold side by side.
inline void store_step(const PackArgs& a, int k, int column, float* to) {
  const int left = a.columns - column, lanes = k >= a.depth || left < 0 ? 0 : left < kGroup ? left : kGroup;
  store(to, lanes == 0 ? zero() : load_some(a.weights + k * a.stride + column, lanes));
}
inline void store_step(const PackArgs& a, int k, int column, bf16* to) {
  float even[kGroup], odd[kGroup];
  store_step(a, k, column, even);
  store_step(a, k + 1, column, odd);
  bf16 halves[2][kGroup];
  store(halves[0], load(static_cast<const float*>(even)));
  store(halves[1], load(static_cast<const float*>(odd)));
  for (int i = 0; i < kGroup; ++i) {
    to[2 * i] = halves[0][i];
    to[2 * i + 1] = halves[1][i];
  }
}

template <class T>
void pack_transposed(const PackArgs& a) {
  constexpr int per_step = 4 / sizeof(T);
  for (int s = 0; s < a.steps; ++s)
    for (int column = 0; column < kPanel; column += kGroup)
      store_step(a, s * per_step, column, reinterpret_cast<T*>(a.panel + s * 2 * kLineBytes + column * 4));
}

// 16 steps of 16 columns at a time: their columns as lines, which are transposed.
template <class T>
void pack(const PackArgs& a) {
  constexpr int per_step = 4 / sizeof(T), per_line = kGroup * per_step;
  std::uint32_t tile[kGroup * kGroup];
  for (int column = 0; column < kPanel; column += kGroup)
    for (int begin = 0; begin < a.steps; begin += kGroup) {
      for (int n = 0; n < kGroup; ++n) {
        T* to = reinterpret_cast<T*>(tile + n * kGroup);
        for (int i = 0; i < per_line; i += kGroup) {
          const int k = begin * per_step + i, left = a.depth - k;
          const int lanes = column + n >= a.columns || left < 0 ? 0 : left < kGroup ? left : kGroup;
          store(to + i, lanes == 0 ? zero() : load_some(a.weights + (column + n) * a.stride + k, lanes));
        }
      }
      transpose_16x16(tile, tile);
      const int steps = least(kGroup, a.steps - begin);
      for (int s = 0; s < steps; ++s)
        store(reinterpret_cast<float*>(a.panel + (begin + s) * 2 * kLineBytes + column * 4),
              load(reinterpret_cast<const float*>(tile + s * kGroup)));
    }
}
