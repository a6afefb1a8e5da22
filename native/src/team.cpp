#include "team.hpp"

#include <exception>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace xception {

long process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

namespace {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Going to sleep and being woken takes longer than most waits for another thread's share of a layer; unless it has no
// processor of its own.
constexpr int kSpins = 20'000;

}  // namespace

void Barrier::wait() {
  const std::uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    return;
  }
  static const unsigned processors = std::thread::hardware_concurrency();
  const int spins = static_cast<unsigned>(count_) <= processors ? kSpins : 0;
  for (int spin = 0; spin < spins; ++spin) {
    if (round_.load(std::memory_order_acquire) != round) return;
    pause();
  }
  while (round_.load(std::memory_order_acquire) == round) round_.wait(round, std::memory_order_acquire);
}

ProcessMutex::ProcessMutex() : state_(new State{process_id(), {}}) {}

ProcessMutex::~ProcessMutex() {
  State* state = state_.load();
  if (state->owner == process_id()) delete state;
}

ProcessMutex::State* ProcessMutex::mine() {
  State* state = state_.load(std::memory_order_acquire);
  if (state->owner == process_id()) return state;
  auto* fresh = new State{process_id(), {}};  // the parent's is left behind: somebody may hold it
  if (state_.compare_exchange_strong(state, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return state;
}

void ProcessMutex::lock() { mine()->mutex.lock(); }
void ProcessMutex::unlock() { mine()->mutex.unlock(); }

struct Team::State {
  std::mutex mutex;
  std::condition_variable begin, end;
  std::uint64_t task_number = 0;
  const std::function<void(int)>* task = nullptr;
  int busy = 0;
  bool stop = false;
  std::exception_ptr error;
  std::vector<std::thread> threads;
};

Team::Team(int threads) : size_(threads) {}

Team::~Team() {
  if (state_ != nullptr && owner_ == process_id()) stop();
}

void Team::start() {
  state_ = new State;
  owner_ = process_id();
  try {
    for (int i = 1; i < size_; ++i) state_->threads.emplace_back([this, i] { serve(i); });
  } catch (...) {  // no more threads for this process: those that began go, and the next call tries again
    stop();
    throw;
  }
}

void Team::stop() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->begin.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
  delete state_;
  state_ = nullptr;
}

void Team::serve(int index) {
  State& state = *state_;
  std::uint64_t done = 0;
  for (;;) {
    const std::function<void(int)>* task = nullptr;
    {
      std::unique_lock lock(state.mutex);
      state.begin.wait(lock, [&] { return state.stop || state.task_number != done; });
      if (state.stop) return;
      done = state.task_number;
      task = state.task;
    }
    std::exception_ptr error;
    try {
      (*task)(index);
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard lock(state.mutex);
    if (error && !state.error) state.error = error;
    if (--state.busy == 0) state.end.notify_one();
  }
}

void Team::run(const std::function<void(int)>& task) {
  if (size_ == 1) return task(0);
  if (state_ == nullptr || owner_ != process_id()) start();
  State& state = *state_;
  {
    const std::lock_guard lock(state.mutex);
    state.task = &task;
    state.busy = size_ - 1;
    state.error = nullptr;
    ++state.task_number;
  }
  state.begin.notify_all();
  std::exception_ptr error;
  try {
    task(0);
  } catch (...) {
    error = std::current_exception();
  }
  std::unique_lock lock(state.mutex);
  state.end.wait(lock, [&] { return state.busy == 0; });
  if (!error) error = state.error;
  if (error) std::rethrow_exception(error);
}

}  // namespace xception
