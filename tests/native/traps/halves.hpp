// Half precision arithmetic (EVEX, maps 3, 5 and 6).
#pragma once

#include <cmath>

#include "frame.hpp"

namespace traps {

// In doubles, which hold every product and nearly every sum of halves, rounded once more to a half; the processor's own
// flag of an overflow comes with that.
inline u16 rounded(double value) {
  const float near = static_cast<float>(value);
  // Rounding twice is rounding once if the first keeps, in its last bit, that there was a remainder.
  u32 bits;
  std::memcpy(&bits, &near, 4);
  if (std::isfinite(near) && near != value) {
    if (std::fabs(double{near}) > std::fabs(value)) bits -= 1;  // towards zero
    bits |= 1;
  }
  float odd;
  std::memcpy(&odd, &bits, 4);
  return static_cast<u16>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(odd), _MM_FROUND_TO_NEAREST_INT), 0));
}
inline float widened(u16 half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

inline bool half_instruction(Frame& f) {
  const u8 p0 = f.read<u8>(), p1 = f.read<u8>(), p2 = f.read<u8>(), opcode = f.read<u8>(), modrm = f.read<u8>();
  if ((p0 & 8) != 0 || (p1 & 4) == 0) return false;
  const int map = p0 & 7, prefix = p1 & 3, bits = 128 << (p2 >> 5 & 3), writemask = p2 & 7;
  const bool wide = (p1 & 0x80) != 0, zeroing = (p2 & 0x80) != 0, broadcast = (p2 & 0x10) != 0;
  const bool r = (p0 & 0x80) == 0, x = (p0 & 0x40) == 0, b = (p0 & 0x20) == 0;
  const int reg = (modrm >> 3 & 7) | (r ? 8 : 0) | ((p0 & 0x10) == 0 ? 16 : 0);
  const int other = (15 - (p1 >> 3 & 15)) | ((p2 & 8) == 0 ? 16 : 0);
  const bool memory = modrm < 0xc0;
  if (!memory && broadcast) return false;  // a rounding of its own: the kernels have none
  count(kHalf);

  // The source that may be memory: `bytes` of it, of elements of `element` bytes.
  const auto source = [&](int bytes, int element, int behind) {
    alignas(64) u8 data[64] = {};
    if (!memory) {
      _mm512_store_si512(data, f.vector((modrm & 7) | (b ? 8 : 0) | (x ? 16 : 0)));
      if (bytes < 64) std::memset(data + bytes, 0, 64 - bytes);
    } else {
      const auto* at = reinterpret_cast<const u8*>(f.address(modrm, b, x, broadcast ? element : bytes, behind));
      for (int i = 0; i < bytes; i += element) std::memcpy(data + i, broadcast ? at : at + i, element);
    }
    return _mm512_load_si512(data);
  };
  // The result's lanes that the mask leaves keep what was there, or become zero; those beyond the vector are zero.
  const auto put = [&](const void* result, int bytes, int element) {
    alignas(64) u8 data[64] = {}, old[64];
    _mm512_store_si512(old, f.vector(reg));
    const u64 mask = writemask == 0 ? ~u64{0} : f.mask(writemask);
    for (int i = 0; i < bytes / element; ++i) {
      if ((mask >> i & 1) != 0)
        std::memcpy(data + i * element, static_cast<const u8*>(result) + i * element, element);
      else if (!zeroing)
        std::memcpy(data + i * element, old + i * element, element);
    }
    f.set_vector(reg, _mm512_load_si512(data));
  };
  union Lanes {
    __m512i all;
    u16 half[32];
  };
  const int bytes = bits / 8, lanes = bits / 16;
  const u64 active = writemask == 0 ? ~u64{0} : f.mask(writemask);
  const auto is_active = [&](int i) { return (active >> i & 1) != 0; };
  _mm_setcsr(f.control() & ~0x3fu);  // the program's rounding; flags start clear
  bool known = true;
  if (map == 5 && prefix == 0 && (opcode == 0x58 || opcode == 0x5d || opcode == 0x5f)) {  // vaddph, vminph, vmaxph
    const Lanes left{f.vector(other)}, right{source(bytes, 2, 0)};
    Lanes out{_mm512_setzero_si512()};
    for (int i = 0; i < lanes; ++i) {
      if (!is_active(i)) continue;
      const float p = widened(left.half[i]), q = widened(right.half[i]);
      if (opcode == 0x58)
        out.half[i] = rounded(double{p} + double{q});
      else  // the second operand where they are equal or one is no number
        out.half[i] = (opcode == 0x5d ? p < q : p > q) ? left.half[i] : right.half[i];
    }
    put(&out, bytes, 2);
  } else if (map == 6 && prefix == 1 && (opcode == 0x98 || opcode == 0xa8 || opcode == 0xb8)) {  // vfmadd...ph
    const Lanes first{f.vector(reg)}, second{f.vector(other)}, third{source(bytes, 2, 0)};
    Lanes out{_mm512_setzero_si512()};
    for (int i = 0; i < lanes; ++i) {
      if (!is_active(i)) continue;
      const double p = widened(first.half[i]), q = widened(second.half[i]), s = widened(third.half[i]);
      out.half[i] = rounded(opcode == 0x98 ? std::fma(p, s, q) : opcode == 0xa8 ? std::fma(q, p, s) : std::fma(q, s, p));
    }
    put(&out, bytes, 2);
  } else if (map == 5 && prefix == 1 && opcode == 0x1d) {  // vcvtps2phx
    const __m512 from = _mm512_castsi512_ps(source(bytes, 4, 0));
    alignas(32) u8 out[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_maskz_cvtps_ph(static_cast<__mmask16>(active), from, 4));
    put(out, bytes / 2, 2);
  } else if (map == 6 && prefix == 1 && opcode == 0x13) {  // vcvtph2psx
    const Lanes from{source(bytes / 2, 2, 0)};
    const __m512 out = _mm512_cvtph_ps(_mm512_castsi512_si256(from.all));
    put(&out, bytes, 4);
  } else if (map == 5 && prefix == 1 && opcode == 0x7d) {  // vcvtph2w
    const Lanes from{source(bytes, 2, 0)};
    Lanes out{_mm512_setzero_si512()};
    for (int i = 0; i < lanes; ++i) {
      const float p = std::nearbyint(widened(from.half[i]));
      out.half[i] = p >= -32768.0f && p <= 32767.0f ? static_cast<u16>(static_cast<std::int16_t>(p)) : u16{0x8000};
    }
    put(&out, bytes, 2);
  } else if (map == 3 && prefix == 0 && opcode == 0xc2) {  // vcmpph
    const Lanes left{f.vector(other)}, right{source(bytes, 2, 1)};
    const u8 predicate = f.read<u8>();
    if ((predicate & 15) != 3) give_up("a comparison that is not known", f.start);  // 3 asks whether one is no number
    u64 found = 0;
    for (int i = 0; i < lanes; ++i)
      if (is_active(i) && std::isunordered(widened(left.half[i]), widened(right.half[i]))) found |= u64{1} << i;
    f.set_mask(reg & 7, found);
  } else if (map == 5 && prefix == 2 && opcode == 0x2a) {  // vcvtsi2sh
    std::int64_t whole;
    if (memory) {
      const auto* at = reinterpret_cast<const u8*>(f.address(modrm, b, x, wide ? 8 : 4, 0));
      std::int32_t narrow;
      std::memcpy(&narrow, at, 4);
      wide ? static_cast<void>(std::memcpy(&whole, at, 8)) : static_cast<void>(whole = narrow);
    } else {
      const u64 value = f.general((modrm & 7) | (b ? 8 : 0));
      whole = wide ? static_cast<std::int64_t>(value) : static_cast<std::int32_t>(value);
    }
    Lanes out{f.vector(other)};
    std::memset(reinterpret_cast<u8*>(&out) + 16, 0, 48);
    out.half[0] = rounded(static_cast<double>(whole));
    f.set_vector(reg, out.all);
  } else if (map == 5 && prefix == 1 && opcode == 0x6e) {  // vmovw into a vector
    Lanes out{_mm512_setzero_si512()};
    out.half[0] = memory ? *reinterpret_cast<const u16*>(f.address(modrm, b, x, 2, 0))
                         : static_cast<u16>(f.general((modrm & 7) | (b ? 8 : 0)));
    f.set_vector(reg, out.all);
  } else {
    known = false;
  }
  f.raise_flags(_mm_getcsr());
  return known;
}

}  // namespace traps
