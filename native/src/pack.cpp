// How weights and filters lie in memory for the kernels.
#include <algorithm>
#include <array>
#include <cmath>

#include "halves.hpp"
#include "network.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

// Floats, padded with zeros.
Buffer padded(std::span<const float> values, int count) {
  Buffer out(sizeof(float) * static_cast<std::size_t>(count));
  auto* p = reinterpret_cast<float*>(out.data());
  std::fill_n(p, count, 0.0f);
  std::copy(values.begin(), values.end(), p);
  return out;
}

// Three numbers of bf16 that sum to this one, each the nearest to what is left: exactly, since they have eight bits and
// a float 24. Infinity, and NaN, is its own first one; what would round to infinity is cut off there.
std::array<bf16, 3> pieces_of(float value) {
  std::array<bf16, 3> pieces{};
  for (bf16& piece : pieces) {
    piece = to_bf16(value);
    if (!std::isfinite(value)) break;
    if (!std::isfinite(widen(piece))) --piece.bits;
    value -= widen(piece);
  }
  return pieces;
}

// A panel in pieces, as `multiply_pieces` reads it: for each 32 steps of K and each piece 16 rows, of the 32 columns' pairs
// of steps k and k + 16. Behind them a line that says whether a weight is infinite. `at`: of a column and a step.
template <class At>
void pack_pieces(At&& at, int depth, std::byte* panel) {
  auto* to = reinterpret_cast<std::uint16_t*>(panel);
  bool infinite = false;
  constexpr int kPiece = 2 * kPanel * kGroup;
  for (int line = 0; line < depth; line += 2 * kGroup, to += 3 * kPiece)
    for (int row = 0; row < kGroup; ++row)
      for (int n = 0; n < kPanel; ++n)
        for (int j = 0; j < 2; ++j) {
          const float value = at(n, line + j * kGroup + row);
          infinite = infinite || std::isinf(value);
          const std::array<bf16, 3> pieces = pieces_of(value);
          for (int i = 0; i < 3; ++i) to[i * kPiece + (row * kPanel + n) * 2 + j] = pieces[index_of(i)].bits;
        }
  std::fill_n(reinterpret_cast<std::byte*>(to), kLineBytes, static_cast<std::byte>(infinite));
}

}  // namespace

// Weights [out][depth] as panels of 32 output channels: for each step of four bytes of K, 32 floats, or 32 pairs; or
// floats in pieces.
void Network::pack(Layer& layer, std::span<const float> weights, std::span<const float> bias) {
  const bool reduced = layer.kind == Kind::linear;
  const Type type = reduced ? Type::f32 : kernels_->matrix_type;
  const int per_step = type == Type::f32 ? 1 : 2;
  const int panels = panels_of(layer.out_channels);
  layer.panel_bytes = reduced ? std::int64_t{layer.depth} * 2 * kLineBytes : xception::panel_bytes(*kernels_, layer.depth);
  layer.weights = Buffer(static_cast<std::size_t>(panels * layer.panel_bytes));
  layer.bias = padded(bias, panels * kPanel);
  const auto at = [&](int o, int k) {
    if (o >= layer.out_channels || k >= layer.depth) return 0.0f;
    return weights[static_cast<std::size_t>(o) * static_cast<std::size_t>(layer.depth) + static_cast<std::size_t>(k)];
  };
  if (kernels_->in_pieces && !reduced) {
    for (int p = 0; p < panels; ++p)
      pack_pieces([&](int n, int k) { return at(p * kPanel + n, k); }, layer.depth,
                  layer.weights.data() + p * layer.panel_bytes);
    return;
  }
  std::vector<int> exponents(index_of(panels * kPanel), 0);
  if (kernels_->scales_weights && !reduced) {
    layer.scale = padded({}, panels * kPanel);
    for (int o = 0; o < panels * kPanel; ++o) {
      float largest = 0;
      for (int k = 0; k < layer.depth; ++k) largest = std::max(largest, std::abs(at(o, k)));
      if (largest > 0 && std::isfinite(largest)) exponents[index_of(o)] = std::ilogb(largest);
      reinterpret_cast<float*>(layer.scale.data())[o] = std::ldexp(1.0f, exponents[index_of(o)]);
    }
  }
  const int steps = static_cast<int>(layer.panel_bytes / (2 * kLineBytes));
  auto* floats = reinterpret_cast<float*>(layer.weights.data());
  auto* halves = reinterpret_cast<std::uint16_t*>(layer.weights.data());
  for (int p = 0; p < panels; ++p)
    for (int s = 0; s < steps; ++s)
      for (int n = 0; n < kPanel; ++n)
        for (int j = 0; j < per_step; ++j) {
          const float value = at(p * kPanel + n, s * per_step + j);
          if (type == Type::f32)
            *floats++ = value;
          else
            *halves++ = type == Type::bf16 ? to_bf16(value).bits
                                           : to_f16(std::ldexp(value, -exponents[index_of(p * kPanel + n)])).bits;
        }
}

// The same for bytes: four of K a step, each output channel's of a size of their own. Sums begin with what takes back
// the zero point.
void Network::pack_bytes(Layer& layer, std::span<const float> weights, std::span<const float> bias) {
  constexpr int per_step = 4;
  const int steps = rounded_up(layer.depth, kernels_->interleaves ? lane_count(Type::u8) : per_step) / per_step;
  const int panels = panels_of(layer.out_channels);
  layer.panel_bytes = static_cast<std::int64_t>(steps) * 2 * kLineBytes;
  layer.weights = Buffer(static_cast<std::size_t>(panels * layer.panel_bytes));
  layer.bias = padded(bias, panels * kPanel);
  layer.scale = padded({}, panels * kPanel);
  layer.offset = padded({}, panels * kPanel);
  auto* scale = reinterpret_cast<float*>(layer.scale.data());
  auto* offset = reinterpret_cast<std::int32_t*>(layer.offset.data());
  auto* out = reinterpret_cast<std::int8_t*>(layer.weights.data());
  std::fill_n(out, layer.weights.size(), std::int8_t{0});
  for (int o = 0; o < layer.out_channels; ++o) {
    const auto row = weights.subspan(index_of(o) * index_of(layer.depth), index_of(layer.depth));
    float largest = 0;
    for (const float value : row) largest = std::max(largest, std::abs(value));
    const int panel = o / kPanel, lane = o % kPanel;
    scale[o] = largest / 127.0f;
    std::int32_t sum = 0;
    for (int k = 0; k < layer.depth && largest > 0; ++k) {
      const auto value = static_cast<std::int8_t>(std::nearbyint(row[index_of(k)] / largest * 127.0f));
      out[panel * layer.panel_bytes + (k / per_step * kPanel + lane) * per_step + k % per_step] = value;
      sum += value;
    }
    offset[o] = -layer.zero_point * sum;
  }
}

// How many steps make one, of each channel that a convolution reads.
void Network::pack_steps(Layer& layer, std::span<const float> steps) {
  std::vector<float> factors(steps.size());
  for (std::size_t i = 0; i < steps.size(); ++i) factors[i] = 1.0f / steps[i];
  layer.filters = padded(factors, whole_lines(layer.in_channels, Type::u8));
}

// [taps][channels] as [groups][taps][16], padded with zeros.
void Network::pack_filters(Layer& layer, std::span<const float> filters, std::span<const float> bias) {
  const int taps = layer.sampling.kernel * layer.sampling.kernel, in = layer.in_channels;
  const Type written = layer.kind == Kind::depthwise ? kernels_->type : matrix_type(layer);
  const int groups = whole_lines(in, written) / kGroup;
  layer.filters = Buffer(sizeof(float) * static_cast<std::size_t>(groups * taps * kGroup));
  auto* out = reinterpret_cast<float*>(layer.filters.data());
  for (int g = 0; g < groups; ++g)
    for (int t = 0; t < taps; ++t)
      for (int i = 0; i < kGroup; ++i) {
        const int channel = g * kGroup + i;
        *out++ = channel < in ? filters[static_cast<std::size_t>(t * in + channel)] : 0.0f;
      }
  if (!bias.empty()) layer.filter_bias = padded(bias, groups * kGroup);
  if (!kernels_->half_filters) return;
  const auto half = [&](float value) {
    const f16 rounded = to_f16(value);
    if (std::isinf(widen(rounded)) && !std::isinf(value)) filters_fit_ = false;
    return rounded.bits;
  };
  const int channels = groups * kGroup;
  layer.half_filters = Buffer(sizeof(std::uint16_t) * static_cast<std::size_t>(channels * taps));
  auto* halves = reinterpret_cast<std::uint16_t*>(layer.half_filters.data());
  for (int block = 0; block < channels; block += kPanel)
    for (int t = 0; t < taps; ++t)
      for (int c = block; c < block + kPanel; ++c)
        *halves++ = half(c < in ? filters[static_cast<std::size_t>(t * in + c)] : 0.0f);
  if (bias.empty()) return;
  layer.half_filter_bias = Buffer(sizeof(std::uint16_t) * static_cast<std::size_t>(channels));
  halves = reinterpret_cast<std::uint16_t*>(layer.half_filter_bias.data());
  for (int c = 0; c < channels; ++c) *halves++ = half(c < in ? bias[static_cast<std::size_t>(c)] : 0.0f);
}

}  // namespace xception
