// The Python face of native/: checks and conversions only; the work is in the files beside this one.
// src/xception/_native.pyi holds the same signatures for type checkers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "cpu_features.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Raised with every change of this module's interface. xception/ops/backend.py expects the same number, so
// that an extension left over from an earlier editable install is noticed instead of misused.
constexpr int kInterface = 1;

nb::dict to_dict(const xception::CpuFeatures& features) {
  nb::dict out;
  for (const auto& [name, member] : xception::kFeatures) out[name] = features.*member;
  return out;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The compiled part of xception.";
  m.attr("INTERFACE") = kInterface;
  m.def("cpu_name", &xception::cpu_name, "The processor's own name; empty where it does not tell.");
  m.def(
      "cpu_features", [] { return to_dict(xception::cpu_features()); },
      "The instruction sets this process may use, weakest first: {name: usable}.");
  m.def(
      "interpret_x86",
      [](std::uint32_t leaf1_ecx, std::uint32_t leaf7_ebx, std::uint32_t leaf7_ecx, std::uint32_t leaf7_edx,
         std::uint32_t leaf7_1_eax, std::uint32_t tile_palette_ebx, std::uint32_t tile_palette_ecx,
         std::uint64_t xcr0, bool tile_permission) {
        const xception::X86Registers registers{
            .leaf1_ecx = leaf1_ecx,
            .leaf7_ebx = leaf7_ebx,
            .leaf7_ecx = leaf7_ecx,
            .leaf7_edx = leaf7_edx,
            .leaf7_1_eax = leaf7_1_eax,
            .tile_palette_ebx = tile_palette_ebx,
            .tile_palette_ecx = tile_palette_ecx,
            .xcr0 = xcr0,
        };
        return to_dict(xception::interpret_x86(registers, tile_permission));
      },
      nb::kw_only(), "leaf1_ecx"_a = 0, "leaf7_ebx"_a = 0, "leaf7_ecx"_a = 0, "leaf7_edx"_a = 0,
      "leaf7_1_eax"_a = 0, "tile_palette_ebx"_a = 0, "tile_palette_ecx"_a = 0, "xcr0"_a = 0,
      "tile_permission"_a = false,
      "What `cpu_features` would answer on an x86 processor with these registers; for tests.");
}
