// The arithmetic of batch normalisation that is done once a channel, not once a pixel. In double precision: a channel's
// numbers stand for all of its pixels.
#pragma once

#include <cstdint>

namespace xception {

// Rows of a normalisation, [kNormRows][channels]: y = z * scale + shift.
enum NormRow { kMean, kVariance, kScale, kShift, kNormRows };

// Scale and shift from mean and variance: gamma / sqrt(variance + epsilon), and what takes the mean to beta. Null: gamma
// is 1, beta 0.
void normalise(float* norm, int channels, const float* gamma, const float* beta, double epsilon);

// [2][channels] `gradients` of gamma and of beta, and [3][channels] `factors` by which the gradient of z follows from that
// of y: f0 * gradient + f1 * z + f2. `sums` are those of UnitTrainer::gradient_sums. `pixels` went into mean and variance;
// 0: these came from somewhere else, and have no gradient.
void norm_gradients(const float* norm, int channels, double epsilon, std::int64_t pixels, const float* sums,
                    float* gradients, float* factors);

}  // namespace xception
