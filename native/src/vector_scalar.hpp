// 16 floats for any processor: plain loops, which a compiler may turn into whatever vectors there are.
#pragma once

#include "halves.hpp"
#include "kernels.hpp"

namespace xception::scalar {

struct V {
  float v[16];
};

template <class F>
inline V make(F&& f) {
  V r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline V zero() {
  return make([](int) { return 0.0f; });
}
inline V set1(float x) {
  return make([=](int) { return x; });
}
inline V load(const float* p) {
  return make([=](int i) { return p[i]; });
}
inline V load(const bf16* p) {
  return make([=](int i) { return widen(p[i]); });
}
inline V load(const f16* p) {
  return make([=](int i) { return widen(p[i]); });
}
inline void store(float* p, V a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline void store(bf16* p, V a) {
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(a.v[i]);
}
inline void store(f16* p, V a) {
  for (int i = 0; i < 16; ++i) p[i] = to_f16(a.v[i]);
}
// Rounded to the nearest, ties to even, and counted from `zero`; what lies beyond a byte is its end, and so is NaN.
inline void store(u8* p, V a, int zero) {
  const float top = static_cast<float>(255 - zero), bottom = static_cast<float>(-zero);
  for (int i = 0; i < 16; ++i) {
    const float kept = a.v[i] < top ? (a.v[i] > bottom ? a.v[i] : bottom) : top;
    p[i] = {static_cast<std::uint8_t>(static_cast<int>(__builtin_nearbyintf(kept)) + zero)};
  }
}
inline V held(V x) { return x; }  // there are too few registers
inline V add(V a, V b) {
  return make([&](int i) { return a.v[i] + b.v[i]; });
}
inline V mul(V a, V b) {
  return make([&](int i) { return a.v[i] * b.v[i]; });
}
inline V fma(V a, V b, V c) {
  return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// NaN stays NaN.
inline V relu(V a) {
  return make([&](int i) { return a.v[i] < 0.0f ? 0.0f : a.v[i]; });
}
// The first `count` lanes, zeros behind them.
inline V first(V a, int count) {
  return make([&](int i) { return i < count ? a.v[i] : 0.0f; });
}
// NaN wins.
inline V max(V a, V b) {
  return make([&](int i) { return a.v[i] > b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]; });
}

// 16 sums of bytes.
struct I {
  std::int32_t v[16];
};
inline I load(const std::int32_t* p) {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
}
inline V to_float(I a) {
  return make([&](int i) { return static_cast<float>(a.v[i]); });
}
// Four weights, signed, of each sum.
struct Bytes {
  std::int8_t v[16][4];
};
inline Bytes load_bytes(const std::byte* p) {
  Bytes r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
inline I dot(const std::byte* four, const Bytes& weights, I sum) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sum.v[i] += std::to_integer<int>(four[j]) * weights.v[i][j];
  return sum;
}

// The part of the matrix product that is kept in registers: rows of pixels, columns of 16 output channels.
inline constexpr int kRows = 4;
inline constexpr int kColumns = 1;

}  // namespace xception::scalar
