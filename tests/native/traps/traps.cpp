// AMX and AVX-512 FP16 instructions, executed on processors that have AVX-512 but not these: each raises SIGILL, whose
// handler decodes its bytes, does what the manual says (Intel SDM vol. 2; nothing is shared with the kernels), and
// goes on behind it. So the very machine code for those processors is run by tests, some thousand times slower:
// its encodings, its tile configuration in each thread, its order.
//
// Only what the kernels use is known; anything else ends the process with the bytes that were met.
#include <csignal>

#include <cpuid.h>

#include "halves.hpp"
#include "tiles.hpp"

namespace traps {
namespace {

bool halves = false;  // whether AVX-512 FP16 is there to be emulated

void handle(int, siginfo_t*, void* context) {
  auto* state = static_cast<ucontext_t*>(context);
  const auto* at = reinterpret_cast<const u8*>(state->uc_mcontext.gregs[REG_RIP]);
  const unsigned control = _mm_getcsr();
  Frame f{state, at, at};
  const u8 first = f.read<u8>();
  const bool done = first == 0xc4 ? tile_instruction(f) : first == 0x62 && halves ? half_instruction(f) : false;
  if (!done) give_up("an instruction that is not known", at);
  _mm_setcsr(control);
  state->uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<u64>(f.next));
}

}  // namespace
}  // namespace traps

extern "C" {

// From now on, in all threads. Zero, or what the system answered.
int traps_install(int with_halves) {
  std::uint32_t size = 0, ecx = 0, edx = 0;
  for (std::uint32_t component = 2; component < 8; ++component)
    if (__get_cpuid_count(0xd, component, &size, &traps::offsets[component], &ecx, &edx) == 0) return -1;
  traps::halves = with_halves != 0;
  struct sigaction action = {};
  action.sa_sigaction = traps::handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, nullptr);
}

// How many of a kind were executed: configure, release, zero, load, store, bf16, fp16, bytes, half.
unsigned long long traps_count(int kind) { return kind >= 0 && kind < traps::kKinds ? traps::counts[kind].load() : 0; }
}
