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

// The part of the matrix product that is kept in registers: rows of pixels, columns of 16 output channels.
inline constexpr int kRows = 4;
inline constexpr int kColumns = 1;

}  // namespace xception::scalar
