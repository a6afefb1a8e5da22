#include "crew.hpp"

#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#if defined(_WIN32)
#include <malloc.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

namespace xception {

Buffer::Buffer(std::size_t bytes) : size_(bytes) {
  constexpr std::size_t kLargePage = 2 << 20;
  const std::size_t rounded = (bytes + kLineBytes - 1) / kLineBytes * kLineBytes + kLineBytes;
  const std::size_t alignment = rounded >= kLargePage ? kLargePage : kLineBytes;
  const std::size_t whole = (rounded + alignment - 1) / alignment * alignment;
#if defined(_WIN32)
  void* p = _aligned_malloc(whole, alignment);
#else
  void* p = std::aligned_alloc(alignment, whole);
#endif
  if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Few entries of the translation buffer instead of hundreds; a system that has no large pages says no.
  if (alignment == kLargePage) madvise(p, whole, MADV_HUGEPAGE);
#endif
  data_.reset(static_cast<std::byte*>(p));
}

void Buffer::Free::operator()(std::byte* p) const {
#if defined(_WIN32)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

std::size_t Crew::bytes() const {
  std::size_t total = 0;
  for (const Worker& worker : workers)
    for (const Buffer* buffer : {&worker.arena, &worker.matrices[0], &worker.matrices[1], &worker.bands, &worker.ring,
                                 &worker.zeros, &worker.workspace})
      total += buffer->size();
  return total;
}

Crews::Crews(int threads) : threads_(threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("expected 1 to 1024 threads");
}

std::unique_ptr<Crew> Crews::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Crew> crew = std::move(idle_.back());
      idle_.pop_back();
      return crew;
    }
    idle_.reserve(idle_.capacity() + 1);  // so that giving it back cannot fail
  }
  return std::make_unique<Crew>(threads_);
}

void Crews::give(std::unique_ptr<Crew> crew) {
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(crew));
}

}  // namespace xception
