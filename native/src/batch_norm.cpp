#include "batch_norm.hpp"

#include <cmath>

namespace xception {

void normalise(float* norm, int channels, const float* gamma, const float* beta, double epsilon) {
  for (int c = 0; c < channels; ++c) {
    const double inverse = 1.0 / std::sqrt(norm[kVariance * channels + c] + epsilon);
    const double scale = gamma == nullptr ? inverse : gamma[c] * inverse;
    const double shift = (beta == nullptr ? 0.0 : beta[c]) - norm[kMean * channels + c] * scale;
    norm[kScale * channels + c] = static_cast<float>(scale);
    norm[kShift * channels + c] = static_cast<float>(shift);
  }
}

// gradient of z = scale * (g - mean of g - (z - mean) * inverse * mean of (g * (z - mean) * inverse))
void norm_gradients(const float* norm, int channels, double epsilon, std::int64_t pixels, const float* sums,
                    float* gradients, float* factors) {
  const double share = pixels == 0 ? 0.0 : 1.0 / static_cast<double>(pixels);
  for (int c = 0; c < channels; ++c) {
    const double inverse = 1.0 / std::sqrt(norm[kVariance * channels + c] + epsilon);
    const double scale = norm[kScale * channels + c], mean = norm[kMean * channels + c];
    const double of_offset = sums[c], of_scale = sums[channels + c] * inverse;
    gradients[c] = static_cast<float>(of_scale);
    gradients[channels + c] = static_cast<float>(of_offset);
    const double of_z = share == 0.0 ? 0.0 : -scale * of_scale * inverse * share;
    factors[c] = static_cast<float>(scale);
    factors[channels + c] = static_cast<float>(of_z);
    factors[2 * channels + c] = share == 0.0 ? 0.0f : static_cast<float>(-scale * of_offset * share - of_z * mean);
  }
}

}  // namespace xception
