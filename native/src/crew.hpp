// Who runs a network: threads, and the memory that each of them works in.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "team.hpp"

namespace xception {

// Memory for kernels: aligned to lines, and not initialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte[], Free> data_;
  std::size_t size_ = 0;
};

struct Worker {
  const Kernels* kernels = nullptr;  // during a run
  // Two matrices: while one is multiplied, the next is written.
  Buffer arena, matrices[2], bands, ring, zeros, workspace;
  std::size_t zero_lines = 0;
};

struct Crew {
  explicit Crew(int threads) : team(threads), workers(static_cast<std::size_t>(threads)) {}
  std::size_t bytes() const;

  Team team;
  std::vector<Worker> workers;
};

// Crews of so many threads, one for each run that goes on at the same time; what a run leaves, the next one finds. So
// networks that share them have the memory of the largest run together, not each that of its own.
class Crews {
 public:
  explicit Crews(int threads);
  int threads() const { return threads_; }

  class Lease {
   public:
    explicit Lease(Crews& crews) : crews_(crews), crew_(crews.take()) {}
    ~Lease() { crews_.give(std::move(crew_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Crew& operator*() const { return *crew_; }

   private:
    Crews& crews_;
    std::unique_ptr<Crew> crew_;
  };

 private:
  std::unique_ptr<Crew> take();
  void give(std::unique_ptr<Crew> crew);

  const int threads_;
  ProcessMutex mutex_;
  std::vector<std::unique_ptr<Crew>> idle_;
};

}  // namespace xception
