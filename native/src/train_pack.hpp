// Weights as panels of the product. Included by train_kernels.hpp, inside a namespace.

// A step of 16 columns of a panel: what they hold side by side.
inline V step_of(const PackArgs& a, int k, int column) {
  const int left = a.columns - column, lanes = k >= a.depth || left < 0 ? 0 : left < kGroup ? left : kGroup;
  const float* from = a.weights + k * a.stride + column;
  return lanes == 0 ? zero() : lanes == kGroup ? load(from) : load_some(from, lanes);
}
inline void store_step(const PackArgs& a, int k, int column, float* to) { store(to, step_of(a, k, column)); }
inline void store_step(const PackArgs& a, int k, int column, bf16* to) {
  store_pairs(to, step_of(a, k, column), step_of(a, k + 1, column));
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
