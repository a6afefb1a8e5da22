// A team of threads that work on one thing at a time, together with the thread that calls.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace xception {

// Where the threads of one task wait for each other. They spin for some microseconds, since they are about equally
// busy, and then let others run.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> round_{0};
};

// The process that this is; another one after a fork.
long process_id();

// A mutex that a fork does not leave locked forever: each process has its own.
class ProcessMutex {
 public:
  ProcessMutex();
  ~ProcessMutex();
  ProcessMutex(const ProcessMutex&) = delete;
  ProcessMutex& operator=(const ProcessMutex&) = delete;
  void lock();
  void unlock();

 private:
  struct State {
    long owner;
    std::mutex mutex;
  };
  State* mine();
  std::atomic<State*> state_;
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls task(0) here and task(1) ... task(size() - 1) on the others, and returns when all are done. An exception of
  // any of them is thrown here. One caller at a time: the caller sees to that.
  void run(const std::function<void(int)>& task);

 private:
  void start();
  void stop();
  void serve(int index);

  const int size_;
  // Threads do not survive a fork, and their objects cannot be destroyed in the child: what belongs to one process is
  // kept together, and left behind there.
  struct State;
  State* state_ = nullptr;
  long owner_ = 0;  // the process whose threads these are
};

}  // namespace xception
