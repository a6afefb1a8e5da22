// AMX and AVX-512 FP16 instructions, executed on processors that have AVX-512 but not these: each raises SIGILL, whose
// handler decodes its bytes, does what the manual says (Intel SDM vol. 2; nothing is shared with the kernels), and
// goes on behind it. So the very machine code for those processors is run by tests, some thousand times slower:
// its encodings, its tile configuration in each thread, its order.
//
// Only what the kernels use is known; anything else ends the process with the bytes that were met.
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <cpuid.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

enum Kind { kConfigure, kRelease, kZero, kLoad, kStore, kBf16, kFp16, kBytes, kHalf, kKinds };
std::atomic<u64> counts[kKinds];
bool halves = false;  // whether AVX-512 FP16 is there to be emulated
struct sigaction previous;
u32 offsets[8];  // of each state component in a signal's frame

[[noreturn]] void give_up(const char* why, const u8* at) {
  char line[200];
  int length = std::snprintf(line, sizeof line, "traps: %s:", why);
  for (int i = 0; i < 12; ++i) length += std::snprintf(line + length, sizeof line - length, " %02x", at[i]);
  line[length++] = '\n';
  static_cast<void>(!write(2, line, length));
  _exit(70);
}

// ------------------------------------------------------------------------------------------------- the tiles

struct Tiles {
  bool configured;
  u16 bytes_per_row[8];
  u8 rows[8];
  alignas(64) u8 data[8][16][64];
};

// A pointer only: the library is loaded late, when little room is left in the threads' own blocks.
__attribute__((tls_model("initial-exec"))) thread_local Tiles* own = nullptr;

Tiles& tiles() {
  if (own == nullptr) {
    void* p = mmap(nullptr, sizeof(Tiles), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) _exit(71);
    own = static_cast<Tiles*>(p);
  }
  return *own;
}

void configure(const u8* from, const u8* at) {
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

Tiles& valid(int tile, const u8* at) {
  Tiles& t = tiles();
  if (!t.configured) give_up("a tile in a thread that has not configured any", at);
  if (tile >= 8 || t.rows[tile] == 0 || t.bytes_per_row[tile] % 4 != 0) give_up("an invalid tile", at);
  return t;
}

// Both of 16 pairs of bf16 or, by value and with denormals, fp16.
void widen(bool half, __m512i pairs, __m512* out) {
  if (half) {
    out[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    out[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  } else {
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

void dot(Kind kind, int c, int a, int b, const u8* at) {
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

// --------------------------------------------------------------------------------------- the interrupted program

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

// ------------------------------------------------------------------------------------------------- VEX: tiles

bool tile_instruction(Frame& f) {
  const u8 second = f.read<u8>(), third = f.read<u8>(), opcode = f.read<u8>();
  if ((second & 0x1f) != 2 || (third & 0x84) != 0) return false;  // not 0F38, or W or L
  const bool r = (second & 0x80) == 0, x = (second & 0x40) == 0, b = (second & 0x20) == 0;
  const int other = 15 - (third >> 3 & 15), prefix = third & 3;  // none, 66, F3, F2
  const u8 modrm = f.read<u8>();
  const int reg = (modrm >> 3 & 7) | (r ? 8 : 0), rm = modrm & 7;
  const bool memory = modrm < 0xc0;
  const auto count = [](Kind kind) { counts[kind].fetch_add(1, std::memory_order_relaxed); };
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

// ------------------------------------------------------------------------------------- EVEX: half precision

// In doubles, which hold every product and nearly every sum of halves, rounded once more to a half; the processor's own
// flag of an overflow comes with that.
u16 rounded(double value) {
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
float widened(u16 half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

bool half_instruction(Frame& f) {
  const u8 p0 = f.read<u8>(), p1 = f.read<u8>(), p2 = f.read<u8>(), opcode = f.read<u8>(), modrm = f.read<u8>();
  if ((p0 & 8) != 0 || (p1 & 4) == 0) return false;
  const int map = p0 & 7, prefix = p1 & 3, bits = 128 << (p2 >> 5 & 3), writemask = p2 & 7;
  const bool wide = (p1 & 0x80) != 0, zeroing = (p2 & 0x80) != 0, broadcast = (p2 & 0x10) != 0;
  const bool r = (p0 & 0x80) == 0, x = (p0 & 0x40) == 0, b = (p0 & 0x20) == 0;
  const int reg = (modrm >> 3 & 7) | (r ? 8 : 0) | ((p0 & 0x10) == 0 ? 16 : 0);
  const int other = (15 - (p1 >> 3 & 15)) | ((p2 & 8) == 0 ? 16 : 0);
  const bool memory = modrm < 0xc0;
  if (!memory && broadcast) return false;  // a rounding of its own: the kernels have none
  counts[kHalf].fetch_add(1, std::memory_order_relaxed);

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
    float single[16];
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
    if ((predicate & 15) != 3) give_up("a comparison that is not known", f.start);  // unordered
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

void handle(int, siginfo_t* info, void* context) {
  auto* state = static_cast<ucontext_t*>(context);
  const auto* at = reinterpret_cast<const u8*>(state->uc_mcontext.gregs[REG_RIP]);
  const unsigned control = _mm_getcsr();
  Frame f{state, at, at};
  const u8 first = f.read<u8>();
  const bool done = first == 0xc4 ? tile_instruction(f) : first == 0x62 && halves ? half_instruction(f) : false;
  if (!done) give_up("an instruction that is not known", at);
  _mm_setcsr(control);
  state->uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<u64>(f.next));
  static_cast<void>(info);
}

}  // namespace

extern "C" {

// From now on, in all threads. Zero, or what the system answered.
int traps_install(int with_halves) {
  u32 size = 0, ecx = 0, edx = 0;
  for (u32 component = 2; component < 8; ++component)
    if (__get_cpuid_count(0xd, component, &size, &offsets[component], &ecx, &edx) == 0) return -1;
  halves = with_halves != 0;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &previous);
}

// How many of a kind were executed: configure, release, zero, load, store, bf16, fp16, bytes, half.
unsigned long long traps_count(int kind) { return kind >= 0 && kind < kKinds ? counts[kind].load() : 0; }
}
