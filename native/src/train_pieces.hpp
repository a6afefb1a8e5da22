// What the forward and the backward pass share: memory for a call, and its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "sizes.hpp"
#include "train.hpp"

namespace xception {

inline std::size_t bytes_for(std::int64_t count, std::size_t each = 1) { return static_cast<std::size_t>(count) * each; }

inline void reserve(Buffer& buffer, std::size_t bytes) {
  if (buffer.size() < bytes) buffer = Buffer(bytes);
}
inline void clear(Buffer& buffer, std::size_t bytes) {
  reserve(buffer, bytes);
  std::fill_n(buffer.data(), bytes, std::byte{0});
}
inline float* floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

inline int padded_channels(int channels) { return panels_of(channels) * kPanel; }

// Numbers one a channel, with zeros behind the last.
inline std::vector<float> per_channel(const float* values, int channels, int rows = 1) {
  const int stride = padded_channels(channels);
  std::vector<float> out(index_of(stride * rows), 0.0f);
  if (values != nullptr)
    for (int r = 0; r < rows; ++r) std::copy_n(values + r * channels, channels, out.data() + r * stride);
  return out;
}

// An affine whose numbers are padded, and live as long as this.
struct PaddedAffine {
  std::vector<float> scale, shift;
  Affine affine;
  PaddedAffine(const Affine& given, int channels)
      : scale(per_channel(given.scale, channels)), shift(per_channel(given.shift, channels)), affine(given) {
    if (given.scale == nullptr) return;
    affine.scale = scale.data();
    affine.shift = shift.data();
  }
};

template <class Work>
void UnitTrainer::on_threads(Work&& work) {
  Barrier barrier(team_.size());
  const std::function<void(int)> task = [&](int thread) {
    if (kernels_->begin_thread != nullptr) kernels_->begin_thread();
    work(thread, barrier);
    if (kernels_->end_thread != nullptr) kernels_->end_thread();
  };
  // That runtime's threads are not there in a forked process.
  if (team_.size() > 1 && host_.parallel != nullptr && owner_ == process_id()) {
    struct Call {
      const std::function<void(int)>& task;
      const OpenMp& host;
      int threads;
      std::atomic<bool> other_size{false};
      std::mutex mutex;
      std::exception_ptr error;
    } call{.task = task, .host = host_, .threads = team_.size(), .mutex = {}, .error = {}};
    host_.parallel(
        [](void* data) {
          Call& mine = *static_cast<Call*>(data);
          if (mine.host.thread_count() != mine.threads) {  // as inside of another parallel region
            mine.other_size = true;
            return;
          }
          try {
            mine.task(mine.host.thread_number());
          } catch (...) {
            const std::lock_guard lock(mine.mutex);
            if (!mine.error) mine.error = std::current_exception();
          }
        },
        &call, static_cast<unsigned>(call.threads), 0);
    if (call.error) std::rethrow_exception(call.error);
    if (!call.other_size) return;
  }
  team_.run(task);
}

}  // namespace xception
