#include "optimise.hpp"

namespace xception::scalar {
namespace {

#include "optimise_kernels.hpp"

}  // namespace

void step(const Update& update, const Coefficients& with, std::int64_t begin, std::int64_t end) {
  run_step(update, with, begin, end);
}

}  // namespace xception::scalar
