// The optimiser's step: every array of a parameter is read and written once, whatever the rule asks for.
//
// The operations and their order are those of the PyTorch that is the definition (xception/training/optimizers.py), a
// fused multiply-add wherever PyTorch has one, so that SGD and the average agree with it bit for bit. RMSprop and AdamW
// take a correctly rounded square root, which PyTorch's is not: they differ by units in the last place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "team.hpp"

namespace xception {

enum class Rule { average, sgd, rmsprop, adamw };

// The arrays of one parameter, `size` floats each; `first` is the momentum or the mean, `second` the mean square. Those
// that a step does not use are null.
struct Update {
  float* weight = nullptr;
  const float* gradient = nullptr;
  float* first = nullptr;
  float* second = nullptr;
  float* average = nullptr;
  std::int64_t size = 0;
};

// What a step does to every number. Which of them a rule reads, and what for, stands in optimise_kernels.hpp.
struct Coefficients {
  Rule rule = Rule::average;
  bool nesterov = false;
  bool momentum = false;  // SGD: there is a buffer
  bool begins = false;    // SGD: the buffer has no value yet
  bool decays = false;    // there is a weight decay
  float scale = 1;        // of the gradient, before anything else
  float rate = 0, decay = 0, first = 0, second = 0, rest = 0, epsilon = 0, correction = 1;
  float share = 0;  // of the weight in the average
};

// Applies them to the numbers [begin, end) of an update.
using StepKernel = void (*)(const Update& update, const Coefficients& with, std::int64_t begin, std::int64_t end);

namespace scalar {
void step(const Update& update, const Coefficients& with, std::int64_t begin, std::int64_t end);
}
#ifdef XCEPTION_HAS_X86_KERNELS
namespace avx2 {
void step(const Update& update, const Coefficients& with, std::int64_t begin, std::int64_t end);
}
namespace avx512 {
void step(const Update& update, const Coefficients& with, std::int64_t begin, std::int64_t end);
}
#endif

class Optimiser {
 public:
  // `level` is scalar, avx2 or avx512; throws std::invalid_argument for another.
  Optimiser(const std::string& level, int threads);

  // One step of all `updates`. The result does not depend on the number of threads. Safe from many threads, which wait
  // for each other, and after a fork.
  void step(const std::vector<Update>& updates, const Coefficients& with);

  int threads() const { return team_.size(); }

 private:
  StepKernel kernel_;
  ProcessMutex mutex_;
  Team team_;
};

}  // namespace xception
