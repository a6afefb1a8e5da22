#include "optimise.hpp"

#include <algorithm>
#include <mutex>
#include <stdexcept>

namespace xception {

namespace {

constexpr std::int64_t kLine = 16;  // floats: threads share no cache line, save where an array begins inside of one

StepKernel kernel_of(const std::string& level) {
  if (level == "scalar") return scalar::step;
#ifdef XCEPTION_HAS_X86_KERNELS
  if (level == "avx2") return avx2::step;
  if (level == "avx512") return avx512::step;
#endif
  throw std::invalid_argument("no optimiser's steps for '" + level + "'");
}

}  // namespace

Optimiser::Optimiser(const std::string& level, int threads)
    : kernel_(kernel_of(level)),
      team_(threads >= 1 && threads <= 1024 ? threads : throw std::invalid_argument("expected 1 to 1024 threads")) {}

void Optimiser::step(const std::vector<Update>& updates, const Coefficients& with) {
  std::int64_t total = 0;
  for (const Update& update : updates) total += update.size;
  const std::int64_t count = team_.size();
  const std::int64_t each = ((total + count - 1) / count + kLine - 1) / kLine * kLine;
  const std::lock_guard lock(mutex_);
  team_.run([&](int thread) {
    const std::int64_t from = each * thread, to = std::min(total, from + each);
    std::int64_t start = 0;
    for (const Update& update : updates) {
      const auto inside = [&](std::int64_t place) {
        const std::int64_t here = std::clamp<std::int64_t>(place - start, 0, update.size);
        return here == update.size ? here : here / kLine * kLine;
      };
      const std::int64_t begin = inside(from), end = inside(to);
      if (begin < end) kernel_(update, with, begin, end);
      start += update.size;
    }
  });
}

}  // namespace xception
