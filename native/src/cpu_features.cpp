#include "cpu_features.hpp"

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define XCEPTION_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__linux__)
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace xception {

namespace {

constexpr bool bit(std::uint64_t value, int position) noexcept { return ((value >> position) & 1) != 0; }

constexpr bool all_bits(std::uint64_t value, std::uint64_t mask) noexcept { return (value & mask) == mask; }

// The state components of XCR0 (SDM vol. 1, 13.1).
constexpr std::uint64_t kAvxState = 0x6;       // SSE and AVX
constexpr std::uint64_t kAvx512State = 0xe0;   // mask registers, upper halves of 0-15, registers 16-31
constexpr std::uint64_t kTileState = 0x60000;  // tile configuration and tile data

// Our AMX kernels are written for eight tiles of 16 rows of 64 bytes, the only palette there is so far.
constexpr bool is_known_palette(std::uint32_t ebx, std::uint32_t ecx) noexcept {
  const std::uint32_t bytes_per_row = ebx & 0xffff;
  const std::uint32_t tiles = ebx >> 16;
  const std::uint32_t rows = ecx & 0xffff;
  return bytes_per_row == 64 && tiles == 8 && rows == 16;
}

}  // namespace

CpuFeatures interpret_x86(const X86Registers& r, bool tile_permission) noexcept {
  CpuFeatures features;
  const bool fma = bit(r.leaf1_ecx, 12);
  const bool osxsave = bit(r.leaf1_ecx, 27);
  const bool avx = bit(r.leaf1_ecx, 28);
  const bool f16c = bit(r.leaf1_ecx, 29);
  if (!osxsave || !avx || !all_bits(r.xcr0, kAvxState)) return features;
  features.avx2 = bit(r.leaf7_ebx, 5) && fma && f16c;

  // macOS switches this state on at a thread's first use only, so AVX-512 stays unused on the few Macs that
  // have it.
  if (!features.avx2 || !all_bits(r.xcr0, kAvx512State)) return features;
  const bool f = bit(r.leaf7_ebx, 16);
  const bool dq = bit(r.leaf7_ebx, 17);
  const bool bw = bit(r.leaf7_ebx, 30);
  const bool vl = bit(r.leaf7_ebx, 31);
  features.avx512 = f && dq && bw && vl;
  if (!features.avx512) return features;
  features.avx512_vnni = bit(r.leaf7_ecx, 11);
  features.avx512_bf16 = bit(r.leaf7_1_eax, 5) && features.avx512_vnni;
  features.avx512_fp16 = bit(r.leaf7_edx, 23) && features.avx512_bf16;

  const bool tiles = bit(r.leaf7_edx, 24) && all_bits(r.xcr0, kTileState) && tile_permission &&
                     is_known_palette(r.tile_palette_ebx, r.tile_palette_ecx);
  if (!tiles) return features;
  features.amx_int8 = bit(r.leaf7_edx, 25);
  features.amx_bf16 = bit(r.leaf7_edx, 22) && features.amx_int8;
  features.amx_fp16 = bit(r.leaf7_1_eax, 21);  // missing from /proc/cpuinfo's flags
  return features;
}

#if defined(XCEPTION_X86)

namespace {

struct Cpuid {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the processor does not have the leaf.
Cpuid cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) noexcept {
  Cpuid out;
#if defined(_MSC_VER)
  int registers[4] = {0, 0, 0, 0};
  __cpuid(registers, static_cast<int>(leaf & 0x80000000u));
  if (static_cast<std::uint32_t>(registers[0]) < leaf) return out;
  __cpuidex(registers, static_cast<int>(leaf), static_cast<int>(subleaf));
  out.eax = static_cast<std::uint32_t>(registers[0]);
  out.ebx = static_cast<std::uint32_t>(registers[1]);
  out.ecx = static_cast<std::uint32_t>(registers[2]);
  out.edx = static_cast<std::uint32_t>(registers[3]);
#else
  if (__get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx) == 0) return Cpuid{};
#endif
  return out;
}

// Only after OSXSAVE was seen: without it the instruction is illegal.
std::uint64_t read_xcr0() noexcept {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

X86Registers read_registers() noexcept {
  X86Registers registers;
  registers.leaf1_ecx = cpuid(1).ecx;
  const Cpuid leaf7 = cpuid(7);
  registers.leaf7_ebx = leaf7.ebx;
  registers.leaf7_ecx = leaf7.ecx;
  registers.leaf7_edx = leaf7.edx;
  const std::uint32_t last_subleaf = leaf7.eax;
  if (last_subleaf >= 1) registers.leaf7_1_eax = cpuid(7, 1).eax;
  if (cpuid(0x1d).eax >= 1) {  // the number of palettes
    const Cpuid palette = cpuid(0x1d, 1);
    registers.tile_palette_ebx = palette.ebx;
    registers.tile_palette_ecx = palette.ecx;
  }
  if (bit(registers.leaf1_ecx, 27)) registers.xcr0 = read_xcr0();
  return registers;
}

// Linux hands out the tile registers' 8 KiB of state on request only, for the whole process and its children
// (Documentation/arch/x86/xstate.rst). Other systems have no such call that we know: no AMX there.
bool request_tile_permission() noexcept {
#if defined(__linux__) && defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr int kGetPermission = 0x1022;      // ARCH_GET_XCOMP_PERM
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  std::uint64_t granted = 0;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && bit(granted, kTileData);
#else
  return false;
#endif
}

CpuFeatures detect() noexcept {
  const X86Registers registers = read_registers();
  // The request changes the process (larger signal frames), so it is made only where it can be of use.
  const CpuFeatures if_granted = interpret_x86(registers, true);
  const bool has_amx = if_granted.amx_int8 || if_granted.amx_bf16 || if_granted.amx_fp16;
  return has_amx ? interpret_x86(registers, request_tile_permission()) : if_granted;
}

}  // namespace

std::string cpu_name() {
  std::string name;
  for (std::uint32_t leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {  // the brand string, 16 letters a leaf
    const Cpuid part = cpuid(leaf);
    for (const std::uint32_t word : {part.eax, part.ebx, part.ecx, part.edx}) {
      for (int shift = 0; shift < 32; shift += 8) {
        const char letter = static_cast<char>((word >> shift) & 0x7f);
        const bool is_padding = letter == ' ' && (name.empty() || name.back() == ' ');
        if (letter >= ' ' && !is_padding) name.push_back(letter);
      }
    }
  }
  if (!name.empty() && name.back() == ' ') name.pop_back();
  return name;
}

#else

namespace {

CpuFeatures detect() noexcept {
  CpuFeatures features;
#if defined(__linux__) && defined(__aarch64__)
  features.neon = (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0;
#elif defined(__ARM_NEON) || defined(_M_ARM64)
  features.neon = true;  // part of what the compiler was told the processor has
#endif
  return features;
}

}  // namespace

std::string cpu_name() { return {}; }

#endif

namespace {

CpuFeatures& current_features() noexcept {
  static CpuFeatures features = detect();
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() noexcept { return current_features(); }

void assume_features(const CpuFeatures& features) noexcept { current_features() = features; }

}  // namespace xception
