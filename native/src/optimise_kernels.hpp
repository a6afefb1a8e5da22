// The arithmetic of a step. Included inside a namespace by one file for each instruction set, which the compiler
// vectorises; those files are compiled without contraction, so that a multiply-add is fused exactly where it says so.

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// a + share (w - a), from the end that is nearer.
inline float mixed(float a, float w, float share, bool small) {
  const float difference = w - a;
  return small ? fused(difference, share, a) : fused(difference, share - 1.0f, w);
}

inline bool is_small(float share) { return __builtin_fabsf(share) < 0.5f; }

inline void average_only(const Update& u, const Coefficients& c, std::int64_t begin, std::int64_t end) {
  const float* __restrict w = u.weight;
  float* __restrict a = u.average;
  const float share = c.share;
  const bool small = is_small(share);
  for (std::int64_t i = begin; i < end; ++i) a[i] = mixed(a[i], w[i], share, small);
}

// d = g + decay w;  m <- first m + d (at the beginning m <- d);  w <- w - rate m (Nesterov: w - rate (d + first m)).
template <bool Decays, bool Momentum, bool Begins, bool Nesterov, bool Average>
void sgd(const Update& u, const Coefficients& c, std::int64_t begin, std::int64_t end) {
  float* __restrict w = u.weight;
  const float* __restrict g = u.gradient;
  float* __restrict m = u.first;
  float* __restrict a = u.average;
  const float scale = c.scale, rate = c.rate, decay = c.decay, first = c.first, share = c.share;
  const bool small = is_small(share);
  for (std::int64_t i = begin; i < end; ++i) {
    float d = g[i] * scale;
    if constexpr (Decays) d = fused(w[i], decay, d);
    if constexpr (Momentum) {
      const float buffer = Begins ? d : m[i] * first + d;
      m[i] = buffer;
      d = Nesterov ? fused(buffer, first, d) : buffer;
    }
    const float updated = fused(d, -rate, w[i]);
    w[i] = updated;
    if constexpr (Average) a[i] = mixed(a[i], updated, share, small);
  }
}

// d = g + decay w;  s <- rho s + (1 - rho) d^2;  m <- momentum m + rate d / sqrt(s + epsilon);  w <- w - m.
// `first` is the momentum, `second` rho, `rest` 1 - rho.
template <bool Decays, bool Average>
void rmsprop(const Update& u, const Coefficients& c, std::int64_t begin, std::int64_t end) {
  float* __restrict w = u.weight;
  const float* __restrict g = u.gradient;
  float* __restrict m = u.first;
  float* __restrict s = u.second;
  float* __restrict a = u.average;
  const float scale = c.scale, rate = c.rate, decay = c.decay, momentum = c.first, rho = c.second,
              rest = c.rest, epsilon = c.epsilon, share = c.share;
  const bool small = is_small(share);
  for (std::int64_t i = begin; i < end; ++i) {
    float d = g[i] * scale;
    if constexpr (Decays) d = fused(w[i], decay, d);
    const float square = fused(rest * d, d, s[i] * rho);
    s[i] = square;
    const float buffer = m[i] * momentum + (rate * d) / __builtin_sqrtf(square + epsilon);
    m[i] = buffer;
    const float updated = w[i] - buffer;
    w[i] = updated;
    if constexpr (Average) a[i] = mixed(a[i], updated, share, small);
  }
}

// w <- decay w;  m <- m + first (g - m);  s <- second s + rest g^2;  w <- w - rate m / (sqrt(s) / correction + epsilon).
// `decay` is 1 - rate * weight decay, `first` 1 - beta1, `second` beta2, `rest` 1 - beta2, `correction` the root of the
// mean square's bias correction; the mean's is part of `rate`.
template <bool Decays, bool Average>
void adamw(const Update& u, const Coefficients& c, std::int64_t begin, std::int64_t end) {
  float* __restrict w = u.weight;
  const float* __restrict g = u.gradient;
  float* __restrict m = u.first;
  float* __restrict s = u.second;
  float* __restrict a = u.average;
  const float scale = c.scale, rate = c.rate, decay = c.decay, first = c.first, beta2 = c.second, rest = c.rest,
              correction = c.correction, epsilon = c.epsilon, share = c.share;
  const bool small = is_small(share), near = is_small(first);
  for (std::int64_t i = begin; i < end; ++i) {
    const float d = g[i] * scale;
    const float weight = Decays ? w[i] * decay : w[i];
    const float mean = mixed(m[i], d, first, near);
    m[i] = mean;
    const float square = fused(rest * d, d, s[i] * beta2);
    s[i] = square;
    const float updated = weight + (-rate * mean) / (__builtin_sqrtf(square) / correction + epsilon);
    w[i] = updated;
    if constexpr (Average) a[i] = mixed(a[i], updated, share, small);
  }
}

using Loop = void (*)(const Update&, const Coefficients&, std::int64_t, std::int64_t);

template <bool Decays, bool Average>
Loop loop_of(const Coefficients& c) {
  switch (c.rule) {
    case Rule::rmsprop: return rmsprop<Decays, Average>;
    case Rule::adamw: return adamw<Decays, Average>;
    case Rule::average: return average_only;
    case Rule::sgd: break;
  }
  if (!c.momentum) return sgd<Decays, false, false, false, Average>;
  if (c.begins) return c.nesterov ? sgd<Decays, true, true, true, Average> : sgd<Decays, true, true, false, Average>;
  return c.nesterov ? sgd<Decays, true, false, true, Average> : sgd<Decays, true, false, false, Average>;
}

inline void run_step(const Update& u, const Coefficients& c, std::int64_t begin, std::int64_t end) {
  const bool average = u.average != nullptr;
  const Loop loop = c.decays ? (average ? loop_of<true, true>(c) : loop_of<true, false>(c))
                             : (average ? loop_of<false, true>(c) : loop_of<false, false>(c));
  loop(u, c, begin, end);
}
