// AMX's tiles of each thread, and the instructions on them (VEX, map 0F38).
#pragma once

#include <sys/mman.h>

#include "frame.hpp"

namespace traps {

struct Tiles {
  bool configured;
  u16 bytes_per_row[8];
  u8 rows[8];
  alignas(64) u8 data[8][16][64];
};

// A pointer only: the library is loaded late, when little room is left in the threads' own blocks.
__attribute__((tls_model("initial-exec"))) inline thread_local Tiles* own = nullptr;

inline Tiles& tiles() {
  if (own == nullptr) {
    void* p = mmap(nullptr, sizeof(Tiles), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) _exit(71);
    own = static_cast<Tiles*>(p);
  }
  return *own;
}

inline void configure(const u8* from, const u8* at) {
  Tiles& t = tiles();
  std::memset(&t, 0, sizeof t);
  if (from[0] == 0) return;
  if (from[0] != 1 || from[1] != 0) give_up("a palette or start row that is not known", at);
  for (int i = 2; i < 16; ++i)
    if (from[i] != 0) give_up("reserved bytes of a tile configuration", at);
  for (int i = 0; i < 16; ++i) {
    u16 bytes;
    std::memcpy(&bytes, from + 16 + 2 * i, 2);
    const u8 rows = from[48 + i];
    const bool none = bytes == 0 && rows == 0;
    if (i >= 8 ? !none : bytes > 64 || rows > 16 || (bytes == 0) != (rows == 0))
      give_up("a tile configuration out of range", at);
    if (i < 8) t.bytes_per_row[i] = bytes, t.rows[i] = rows;
  }
  t.configured = true;
}

inline Tiles& valid(int tile, const u8* at) {
  Tiles& t = tiles();
  if (!t.configured) give_up("a tile in a thread that has not configured any", at);
  if (tile >= 8 || t.rows[tile] == 0 || t.bytes_per_row[tile] % 4 != 0) give_up("an invalid tile", at);
  return t;
}

// Both of 16 pairs of bf16 or, by value and with denormals, fp16.
inline void widen(bool half, __m512i pairs, __m512* out) {
  if (half) {
    out[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    out[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  } else {
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

inline void dot(Kind kind, int c, int a, int b, const u8* at) {
  Tiles& t = valid(c, at);
  valid(a, at), valid(b, at);
  if (c == a || c == b || a == b) give_up("a product of a tile with itself", at);
  const int m_end = t.rows[c], k_end = t.rows[b];
  if (t.bytes_per_row[c] != 64 || t.bytes_per_row[b] != 64 || t.rows[a] != m_end || t.bytes_per_row[a] != 4 * k_end)
    give_up("a product of tiles that do not fit", at);
  if (kind == kBytes) {  // unsigned times signed, without saturation
    for (int m = 0; m < m_end; ++m)
      for (int n = 0; n < 16; ++n) {
        u32 sum;
        std::memcpy(&sum, &t.data[c][m][4 * n], 4);
        for (int k = 0; k < k_end; ++k)
          for (int j = 0; j < 4; ++j)
            sum += static_cast<u32>(int{t.data[a][m][4 * k + j]} * static_cast<std::int8_t>(t.data[b][k][4 * n + j]));
        std::memcpy(&t.data[c][m][4 * n], &sum, 4);
      }
    return;
  }
  // The first of all pairs and the second are summed apart, then together, then onto the destination; each step
  // rounds to the nearest and takes denormals for zero.
  const bool half = kind == kFp16;
  __m512 right[16][2];
  for (int k = 0; k < k_end; ++k) widen(half, _mm512_load_si512(t.data[b][k]), right[k]);
  __m512 left_of[16][2];
  for (int m = 0; m < m_end; ++m) widen(half, _mm512_load_si512(t.data[a][m]), left_of[m]);
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);
  for (int m = 0; m < m_end; ++m) {
    float left[2][16];
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(left[j], left_of[m][j]);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int k = 0; k < k_end; ++k)
      for (int j = 0; j < 2; ++j) sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(left[j][k]), right[k][j], sums[j]);
    auto* destination = reinterpret_cast<float*>(t.data[c][m]);
    _mm512_store_ps(destination, _mm512_add_ps(_mm512_load_ps(destination), _mm512_add_ps(sums[0], sums[1])));
  }
  _mm_setcsr(control);
}

inline bool tile_instruction(Frame& f) {
  const u8 second = f.read<u8>(), third = f.read<u8>(), opcode = f.read<u8>();
  if ((second & 0x1f) != 2 || (third & 0x84) != 0) return false;  // not 0F38, or W or L
  const bool r = (second & 0x80) == 0, x = (second & 0x40) == 0, b = (second & 0x20) == 0;
  const int other = 15 - (third >> 3 & 15), prefix = third & 3;  // none, 66, F3, F2
  const u8 modrm = f.read<u8>();
  const int reg = (modrm >> 3 & 7) | (r ? 8 : 0), rm = modrm & 7;
  const bool memory = modrm < 0xc0;
  if (opcode == 0x49 && prefix == 0 && memory && reg == 0 && other == 0) {
    count(kConfigure);
    configure(reinterpret_cast<const u8*>(f.address(modrm, b, x, 1, 0)), f.start);
    return true;
  }
  if (opcode == 0x49 && prefix == 0 && modrm == 0xc0 && other == 0) {
    count(kRelease);
    std::memset(&tiles(), 0, sizeof(Tiles));
    return true;
  }
  if (opcode == 0x49 && prefix == 3 && !memory && rm == 0 && other == 0) {
    count(kZero);
    std::memset(valid(reg, f.start).data[reg], 0, sizeof(Tiles::data[0]));
    return true;
  }
  if (opcode == 0x4b && memory && rm == 4 && other == 0 && (prefix == 2 || prefix == 3)) {
    const u8 sib = *f.next;
    const int index = (sib >> 3 & 7) | (x ? 8 : 0);
    const u64 stride = index == 4 ? 0 : f.general(index) << (sib >> 6);
    const u64 start = f.address(modrm, b, x, 1, 0) - stride;  // the index is the distance of rows
    Tiles& t = valid(reg, f.start);
    if (prefix == 3) std::memset(t.data[reg], 0, sizeof t.data[reg]);
    count(prefix == 3 ? kLoad : kStore);
    for (int row = 0; row < t.rows[reg]; ++row) {
      void* at = reinterpret_cast<void*>(start + row * stride);
      prefix == 3 ? std::memcpy(t.data[reg][row], at, t.bytes_per_row[reg])
                  : std::memcpy(at, t.data[reg][row], t.bytes_per_row[reg]);
    }
    return true;
  }
  const Kind kind = opcode == 0x5c && prefix == 2   ? kBf16
                    : opcode == 0x5c && prefix == 3 ? kFp16
                    : opcode == 0x5e && prefix == 1 ? kBytes
                                                    : kKinds;
  if (kind == kKinds || memory || b || x) return false;
  count(kind);
  dot(kind, reg, rm, other, f.start);
  return true;
}

}  // namespace traps
