// Which instruction sets this process may use: the processor offers them, and the operating system saves
// their registers. Reading the registers and judging them are kept apart, so that the judgement can be tested
// for processors that are not at hand.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace xception {

// Each feature stands for all that our kernels of that name use.
struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512 = false;       // AVX-512 F, BW, DQ and VL
  bool avx512_vnni = false;  // int8 dot products
  bool avx512_bf16 = false;  // bf16 dot products and conversions; our kernels also use those of int8
  bool avx512_fp16 = false;  // half precision arithmetic; our kernels also use those of bf16
  bool amx_int8 = false;     // matrix tiles; the AMX kernels also use AVX-512, so AMX implies it here
  bool amx_bf16 = false;  // our kernels also use those of int8
  bool amx_fp16 = false;
  bool neon = false;  // 128-bit vectors of Arm ("Advanced SIMD")
};

struct NamedFeature {
  const char* name;
  bool CpuFeatures::*member;
};

// The names Python sees, weakest first.
inline constexpr std::array<NamedFeature, 9> kFeatures{{
    {"avx2", &CpuFeatures::avx2},
    {"avx512", &CpuFeatures::avx512},
    {"avx512_vnni", &CpuFeatures::avx512_vnni},
    {"avx512_bf16", &CpuFeatures::avx512_bf16},
    {"avx512_fp16", &CpuFeatures::avx512_fp16},
    {"amx_int8", &CpuFeatures::amx_int8},
    {"amx_bf16", &CpuFeatures::amx_bf16},
    {"amx_fp16", &CpuFeatures::amx_fp16},
    {"neon", &CpuFeatures::neon},
}};

// The CPUID outputs and the state mask that decide on x86 (Intel SDM vol. 2A, CPUID; vol. 1, 13.3). Leaves
// the processor does not have are zero.
struct X86Registers {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0;
  std::uint32_t leaf7_ecx = 0;
  std::uint32_t leaf7_edx = 0;
  std::uint32_t leaf7_1_eax = 0;
  std::uint32_t tile_palette_ebx = 0;  // leaf 0x1D, palette 1
  std::uint32_t tile_palette_ecx = 0;
  std::uint64_t xcr0 = 0;  // which registers the operating system saves; zero without OSXSAVE
};

// Pure. `tile_permission`: the kernel lets this process use AMX's tile registers.
CpuFeatures interpret_x86(const X86Registers& registers, bool tile_permission) noexcept;

// What this process may use. The first call asks the processor (and, where it has AMX, Linux for permission
// to use the tiles); later calls, from any thread or forked child, return the same answer.
const CpuFeatures& cpu_features() noexcept;

// What `cpu_features` answers from now on. For tests that execute missing instructions by other means, before anything
// else asks and before there are threads: a kernel of an instruction that is nowhere ends the process.
void assume_features(const CpuFeatures& features) noexcept;

// The processor's own name, such as "AMD EPYC 9B45"; empty where it does not tell.
std::string cpu_name();

}  // namespace xception
