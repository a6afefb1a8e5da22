// How kernels of training reach maps: a group of 16 channels at a pixel, whole or in part.
// Included by train_kernels.hpp, inside a namespace.

inline bool there(const Pixels& p) { return p.data != nullptr; }
inline std::byte* group_at(const Pixels& p, int group, std::int64_t pixel, int lane_bytes) {
  const int shift = p.groups - 1;  // of one or two: a division would take longer than what is done with the group
  return p.data + (group >> shift) * p.block + static_cast<std::int64_t>(group & shift) * kGroup * lane_bytes +
         pixel * p.pixel;
}
inline int lanes_of(const Pixels& p, int group) {
  const int left = p.channels - group * kGroup;
  return left < 0 ? 0 : left < kGroup ? left : kGroup;
}

inline V load_or_zero(const float* p, int group) { return p == nullptr ? zero() : load(p + group * kGroup); }

// A map that is added to another one, as it is or normalised.
template <class S>
struct Residual {
  const Pixels& map;
  const std::byte* data;
  int lanes;
  bool normalised;
  V scale, shift;

  Residual(const Pixels& p, int g, std::int64_t pixel, const float* factors, const float* offsets)
      : map(p),
        data(there(p) ? group_at(p, g, pixel, sizeof(S)) : nullptr),
        lanes(lanes_of(p, g)),
        normalised(factors != nullptr),
        scale(load_or_zero(factors, g)),
        shift(load_or_zero(offsets, g)) {}

  V added_to(V v, std::int64_t p) const {
    if (data == nullptr) return v;
    const V r = load_some(reinterpret_cast<const S*>(data + p * map.pixel), lanes);
    return add(v, normalised ? fma(r, scale, shift) : r);
  }
};
