// The program that was interrupted: its registers, as a signal's frame has them (the kernel's x86 signal ABI), and the
// bytes of its instruction.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <ucontext.h>
#include <unistd.h>

namespace traps {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

enum Kind { kConfigure, kRelease, kZero, kLoad, kStore, kBf16, kFp16, kBytes, kHalf, kKinds };
inline std::atomic<u64> counts[kKinds];  // of what was executed
inline void count(Kind kind) { counts[kind].fetch_add(1, std::memory_order_relaxed); }

inline u32 offsets[8];  // of each state component in a frame (CPUID leaf 0xD)

inline const int complaints = dup(2);  // taken while the library loads: later pytest keeps what is written there

[[noreturn]] inline void give_up(const char* why, const u8* at) {
  char line[200];
  int length = std::snprintf(line, sizeof line, "traps: %s:", why);
  for (int i = 0; i < 12; ++i) length += std::snprintf(line + length, sizeof line - length, " %02x", at[i]);
  line[length++] = '\n';
  static_cast<void>(!write(complaints, line, length));
  _exit(70);
}

struct Frame {
  ucontext_t* context;
  const u8* start;  // of the instruction
  const u8* next;

  u64& general(int index) const {
    static constexpr int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                        REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return reinterpret_cast<u64&>(context->uc_mcontext.gregs[kPlaces[index]]);
  }
  u8* state() const { return reinterpret_cast<u8*>(context->uc_mcontext.fpregs); }
  u8* part(int component, u32 size) const {  // one that is all zero was not written down
    u64 present;
    std::memcpy(&present, state() + 512, 8);
    if (component == 1) {
      if ((present >> 1 & 1) == 0) std::memset(state() + 160, 0, 256);
    } else if ((present >> component & 1) == 0) {
      std::memset(state() + offsets[component], 0, size);
    }
    present |= u64{1} << component;
    std::memcpy(state() + 512, &present, 8);
    return component == 1 ? state() + 160 : state() + offsets[component];
  }
  __m512i vector(int index) const {
    alignas(64) u8 bytes[64];
    if (index >= 16) {
      std::memcpy(bytes, part(7, 1024) + 64 * (index - 16), 64);
    } else {
      std::memcpy(bytes, part(1, 256) + 16 * index, 16);
      std::memcpy(bytes + 16, part(2, 256) + 16 * index, 16);
      std::memcpy(bytes + 32, part(6, 512) + 32 * index, 32);
    }
    return _mm512_load_si512(bytes);
  }
  void set_vector(int index, __m512i value) const {
    alignas(64) u8 bytes[64];
    _mm512_store_si512(bytes, value);
    if (index >= 16) {
      std::memcpy(part(7, 1024) + 64 * (index - 16), bytes, 64);
    } else {
      std::memcpy(part(1, 256) + 16 * index, bytes, 16);
      std::memcpy(part(2, 256) + 16 * index, bytes + 16, 16);
      std::memcpy(part(6, 512) + 32 * index, bytes + 32, 32);
    }
  }
  u64 mask(int index) const {
    u64 value;
    std::memcpy(&value, part(5, 64) + 8 * index, 8);
    return value;
  }
  void set_mask(int index, u64 value) const { std::memcpy(part(5, 64) + 8 * index, &value, 8); }
  u32 control() const {
    u32 value;
    std::memcpy(&value, state() + 24, 4);
    return value;
  }
  void raise_flags(u32 flags) const {
    const u32 value = control() | (flags & 0x3f);
    std::memcpy(state() + 24, &value, 4);
  }

  template <class T>
  T read() {
    T value;
    std::memcpy(&value, next, sizeof value);
    next += sizeof value;
    return value;
  }
  // What a ModRM byte with memory says; `scale` is that of one byte's displacement, `behind` the bytes that follow.
  u64 address(u8 modrm, bool extend_base, bool extend_index, int scale, int behind) {
    const int mode = modrm >> 6;
    int base = modrm & 7;
    u64 sum = 0;
    if (base == 4) {
      const u8 sib = read<u8>();
      const int index = (sib >> 3 & 7) | (extend_index ? 8 : 0);
      if (index != 4) sum += general(index) << (sib >> 6);
      base = sib & 7;
      if (base == 5 && mode == 0)
        sum += static_cast<u64>(std::int64_t{read<std::int32_t>()});
      else
        sum += general(base | (extend_base ? 8 : 0));
    } else if (base == 5 && mode == 0) {
      const auto distance = read<std::int32_t>();
      return reinterpret_cast<u64>(next) + static_cast<u64>(std::int64_t{distance}) + behind;
    } else {
      sum += general(base | (extend_base ? 8 : 0));
    }
    if (mode == 1) sum += static_cast<u64>(std::int64_t{read<std::int8_t>()} * scale);
    if (mode == 2) sum += static_cast<u64>(std::int64_t{read<std::int32_t>()});
    return sum;
  }
};

}  // namespace traps
