// Building a network: layers, packed weights.
#include "network.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpu_features.hpp"
#include "halves.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

const Kernels& kernels_for(const std::string& level, Type type) {
#if defined(XCEPTION_HAS_X86_KERNELS)
  const Kernels* found = nullptr;
  if (level == "amx_bf16" || level == "amx_fp16") found = amx::kernels(type);
#if defined(XCEPTION_HAS_FP16_KERNELS)
  if ((level == "amx_bf16" || level == "amx_fp16") && cpu_features().avx512_fp16 && cpu_features().avx512_bf16)
    found = type == Type::f32 ? found : amx_half::kernels(type);
#endif
  if (level == "amx_emulated") found = amx_emulated::kernels(type);
  if (level == "amx_half_emulated") found = amx_half_emulated::kernels(type);
#if defined(XCEPTION_HAS_FP16_KERNELS)
  if (level == "avx512_fp16") found = avx512_fp16::kernels(type);
#endif
  if (level == "avx512_fp16_emulated") found = avx512_fp16_emulated::kernels(type);
  if (level == "avx512_bf16") found = avx512_bf16::kernels(type);
  if (level == "avx512_vnni") found = avx512_vnni::kernels(type);
  if (found == nullptr && level != "avx2" && level != "scalar") found = avx512::kernels(type);
  if (level == "avx2") found = avx2::kernels(type);
  if (found != nullptr) return *found;
#endif
  if (level == "scalar") return *scalar::kernels(type);
  refuse("unknown instruction set '" + level + "'");
}

const Kernels* wide_kernels_for(const std::string& level, Type type) {
#if defined(XCEPTION_HAS_X86_KERNELS)
  if (kernels_for(level, type).begin_overflow_watch == nullptr) return nullptr;
#if defined(XCEPTION_HAS_FP16_KERNELS)
  if (level == "avx512_fp16") return avx512_fp16::wide_kernels(type);
#endif
  if (level == "avx512_fp16_emulated") return avx512_fp16_emulated::wide_kernels(type);
  return level == "amx_half_emulated" ? amx_emulated::kernels(type) : amx::kernels(type);
#else
  static_cast<void>(level);
  static_cast<void>(type);
  return nullptr;
#endif
}

Network::Network(const std::string& level, Type type, int channels, std::shared_ptr<Crews> crews, bool latency)
    : level_(level), kernels_(&kernels_for(level, type)), wide_kernels_(wide_kernels_for(level, type)), type_(type),
      latency_(latency), crews_(std::move(crews)) {
  if (channels < 1 || channels > 1 << 20) refuse("expected images of 1 to 1,048,576 channels");
  channels_ = {channels};
  reduced_ = {false};
}

int Network::channels_of(int value) const {
  if (value < 0 || value >= static_cast<int>(channels_.size())) refuse("unknown input value");
  return channels_[static_cast<std::size_t>(value)];
}

// Called when everything else was checked: what is refused leaves the network as it was.
Layer& Network::add(Kind kind, int input, int out_channels, int residual) {
  const int in_channels = channels_of(input);
  if (out_channels < 1 || out_channels > 1 << 20) refuse("expected 1 to 1,048,576 output channels");
  if (residual != -1 && (residual == 0 || channels_of(residual) != out_channels ||
                         reduced_[static_cast<std::size_t>(residual)]))
    refuse("the residual value does not have the output's channels");
  if (reduced_[static_cast<std::size_t>(input)] != (kind == Kind::linear))
    refuse("linear layers, and only they, follow a reduction");
  if (input == 0 && kind != Kind::convolution && kind != Kind::load)
    refuse("a regular convolution has to come first, or the image has to be loaded");
  Layer layer;
  layer.kind = input == 0 && kind == Kind::convolution ? Kind::image : kind;
  layer.input = input;
  layer.residual = residual;
  layer.in_channels = in_channels;
  layer.out_channels = out_channels;
  layer.output = static_cast<int>(channels_.size());
  channels_.push_back(out_channels);
  reduced_.push_back(kind == Kind::reduce || kind == Kind::linear);
  layouts_.clear();
  return layers_.emplace_back(std::move(layer));
}

namespace {
void check_sampling(const Sampling& s) {
  if (s.kernel < 1 || s.kernel > 15) refuse("expected a kernel of 1 to 15");
  if (s.stride < 1 || s.stride > 64 || s.dilation < 1 || s.dilation > 4096) refuse("stride or dilation out of range");
  if (s.padding == Padding::dense_same && (s.kernel != 3 || s.stride != 1))
    refuse("padding 'dense_same' is for kernel 3 and stride 1");
  if (s.amount < 0 || s.amount > 1 << 16) refuse("padding out of range");
}
void check_size(std::span<const float> values, std::int64_t expected, bool optional, const char* what) {
  if (optional && values.empty()) return;
  if (static_cast<std::int64_t>(values.size()) != expected)
    refuse(std::string("expected ") + std::to_string(expected) + " numbers as " + what + ", got " +
           std::to_string(values.size()));
}
}  // namespace

int Network::load(int channels) {
  if (channels < 0 || channels > 1 << 20) refuse("expected 0 to 1,048,576 channels");
  if (channels != 0 && beside_channels() != 0) refuse("a second image is loaded already");
  Layer& layer = add(Kind::load, 0, channels == 0 ? channels_[0] : channels, -1);
  layer.beside = channels != 0;
  return layer.output;
}

// Weights are rows of [taps][in_channels].
void Network::check_steps(std::span<const float> steps, std::span<const float> weights, int in_channels,
                          int depth) const {
  check_size(steps, in_channels, true, "steps");
  if (steps.empty()) return;
  if (kernels_->multiply_u8 == nullptr) refuse("there are no products of bytes beside numbers of this type");
  if (depth > 1 << 15) refuse("expected at most 32,768 bytes a sum");  // which fits in 32 bits
  for (const float step : steps)
    if (!(step > 0) || !std::isfinite(step)) refuse("expected steps above zero");
  for (std::size_t i = 0; i < weights.size(); ++i)
    if (!std::isfinite(weights[i] * steps[i % steps.size()])) refuse("expected finite weights to round to bytes");
}

int Network::convolution(int input, const Sampling& sampling, int out_channels, std::span<const float> weights,
                         std::span<const float> bias, bool input_relu, int residual, Activation activation,
                         std::span<const float> steps) {
  check_sampling(sampling);
  const int taps = sampling.kernel * sampling.kernel, in = channels_of(input);
  if (input == 0 && input_relu) refuse("the image has no ReLU before it");
  if (input == 0 && taps * in > 2000) refuse("the first convolution's window holds more than 2,000 numbers");
  check_size(weights, static_cast<std::int64_t>(out_channels) * taps * in, false, "weights");
  check_size(bias, out_channels, true, "bias");
  if (input == 0 && !steps.empty()) refuse("the image is not counted in steps");
  check_steps(steps, weights, in, taps * in);
  Layer& layer = add(Kind::convolution, input, out_channels, residual);
  layer.sampling = sampling;
  layer.input_relu = input_relu;
  layer.activation = activation;
  if (layer.kind == Kind::image) {
    layer.depth = taps * in;
    pack(layer, weights, bias);
    return layer.output;
  }
  // The producer copies whole groups of channels: so are the weights padded.
  layer.in_bytes = !steps.empty();
  layer.zero_point = input_relu ? 0 : 128;
  const int padded_in = sampling.kernel == 1 ? in : whole_lines(in, matrix_type(layer));
  layer.depth = taps * padded_in;
  std::vector<float> spread(static_cast<std::size_t>(out_channels) * static_cast<std::size_t>(layer.depth), 0.0f);
  for (int row = 0; row < out_channels * taps; ++row)
    for (int i = 0; i < in; ++i) {
      const float weight = weights[index_of(row) * index_of(in) + index_of(i)];
      spread[index_of(row) * index_of(padded_in) + index_of(i)] = steps.empty() ? weight : weight * steps[index_of(i)];
    }
  if (!layer.in_bytes) {
    pack(layer, spread, bias);
    return layer.output;
  }
  pack_steps(layer, steps);
  pack_bytes(layer, spread, bias);
  return layer.output;
}

int Network::grouped(int input, const Sampling& sampling, int segments, std::span<const float> weights,
                     std::span<const float> bias, int residual, Activation activation) {
  check_sampling(sampling);
  const int taps = sampling.kernel * sampling.kernel, channels = channels_of(input);
  if (segments < 1 || segments > channels) refuse("expected 1 to " + std::to_string(channels) + " segments");
  const int narrow = channels / segments, wider = channels % segments, widest = ceil_div(channels, segments);
  check_size(weights, static_cast<std::int64_t>(channels) * taps * widest, false, "weights");
  check_size(bias, channels, true, "bias");
  // Where the segment of a channel begins, and how wide it is.
  const auto segment_of = [&](int channel) {
    const bool wide = channel < wider * (narrow + 1);
    const int width = wide ? narrow + 1 : narrow, first = wide ? 0 : wider * (narrow + 1);
    return std::pair{first + (channel - first) / width * width, width};
  };
  Layer& layer = add(Kind::grouped, input, channels, residual);
  layer.sampling = sampling;
  layer.activation = activation;
  for (int panel = 0; panel < panels_of(channels);) {
    const auto read_by = [&](int p) {
      const auto [last, width] = segment_of(std::min((p + 1) * kPanel, channels) - 1);
      return std::pair{segment_of(p * kPanel).first / kPanel, panels_of(last + width)};
    };
    const auto [in_begin, in_end] = read_by(panel);
    int end = panel + 1;
    while (end < panels_of(channels) && read_by(end) == std::pair{in_begin, in_end}) ++end;
    const int first = panel * kPanel, first_in = in_begin * kPanel;
    Section& section = layer.sections.emplace_back();
    section.first_panel = panel;
    section.first_panel_in = in_begin;
    Layer& part = section.layer;
    part.kind = Kind::convolution;
    part.sampling = sampling;
    part.activation = activation;
    part.in_channels = std::min(in_end * kPanel, channels) - first_in;
    part.out_channels = std::min(end * kPanel, channels) - first;
    const int padded_in = rounded_up(part.in_channels, lane_count(kernels_->matrix_type));
    part.depth = taps * padded_in;
    layer.depth = std::max(layer.depth, part.depth);
    std::vector<float> dense(index_of(part.out_channels) * index_of(part.depth), 0.0f);
    for (int o = 0; o < part.out_channels; ++o) {
      const auto [begin, width] = segment_of(first + o);
      for (int tap = 0; tap < taps; ++tap)
        std::copy_n(weights.data() + (static_cast<std::ptrdiff_t>(first + o) * taps + tap) * widest, width,
                    dense.data() + static_cast<std::ptrdiff_t>(o) * part.depth + tap * padded_in + begin - first_in);
    }
    pack(part, dense, bias.empty() ? bias : bias.subspan(index_of(first), index_of(part.out_channels)));
    panel = end;
  }
  return layer.output;
}

int Network::separable(int input, const Sampling& sampling, std::span<const float> filters,
                       std::span<const float> filter_bias, Activation middle, int out_channels,
                       std::span<const float> weights, std::span<const float> bias, bool input_relu, int residual,
                       Activation activation, std::span<const float> steps) {
  check_sampling(sampling);
  const int taps = sampling.kernel * sampling.kernel, in = channels_of(input);
  check_size(filters, static_cast<std::int64_t>(taps) * in, false, "filters");
  check_size(filter_bias, in, true, "the filters' bias");
  check_size(weights, static_cast<std::int64_t>(out_channels) * in, false, "weights");
  check_size(bias, out_channels, true, "bias");
  check_steps(steps, weights, in, in);
  if (!steps.empty() && middle == Activation::elu) refuse("an ELU cannot be counted in steps");
  Layer& layer = add(Kind::separable, input, out_channels, residual);
  layer.sampling = sampling;
  layer.input_relu = input_relu;
  layer.middle = middle;
  layer.activation = activation;
  layer.depth = in;
  if (!steps.empty()) {
    layer.in_bytes = true;
    layer.zero_point = middle == Activation::none ? 128 : 0;
    std::vector<float> counted(filters.begin(), filters.end()), counted_bias(filter_bias.begin(), filter_bias.end());
    std::vector<float> columns(weights.begin(), weights.end());
    for (std::size_t i = 0; i < counted.size(); ++i) counted[i] /= steps[i % steps.size()];
    for (std::size_t i = 0; i < counted_bias.size(); ++i) counted_bias[i] /= steps[i];
    for (std::size_t i = 0; i < columns.size(); ++i) columns[i] *= steps[i % steps.size()];
    pack_filters(layer, counted, counted_bias);
    pack_bytes(layer, columns, bias);
    return layer.output;
  }
  const bool takes_powers = kernels_->matrix_type == Type::bf16 || kernels_->scales_weights;
  if (!kernels_->half_filters || !takes_powers || middle == Activation::elu) {
    pack_filters(layer, filters, filter_bias);
    pack(layer, weights, bias);
    return layer.output;
  }
  // Half precision has less range than bf16 at its small end too: each channel's filter is brought to the middle of it
  // by a power of two, which its column of the weights takes back. Nothing is rounded differently.
  std::vector<float> scaled(filters.begin(), filters.end()), scaled_bias(filter_bias.begin(), filter_bias.end());
  std::vector<float> columns(weights.begin(), weights.end());
  const auto channels = static_cast<std::size_t>(in);
  for (std::size_t c = 0; c < channels; ++c) {
    float largest = 0;
    for (std::size_t i = c; i < scaled.size(); i += channels) largest = std::max(largest, std::abs(scaled[i]));
    if (!(largest > 0) || !std::isfinite(largest)) continue;
    int exponent = 0;
    std::frexp(largest, &exponent);
    exponent = std::clamp(exponent + 1, -60, 60);
    for (std::size_t i = c; i < scaled.size(); i += channels) scaled[i] = std::ldexp(scaled[i], -exponent);
    if (!scaled_bias.empty()) scaled_bias[c] = std::ldexp(scaled_bias[c], -exponent);
    for (std::size_t i = c; i < columns.size(); i += channels) columns[i] = std::ldexp(columns[i], exponent);
  }
  pack_filters(layer, scaled, scaled_bias);
  pack(layer, columns, bias);
  return layer.output;
}

int Network::depthwise(int input, const Sampling& sampling, std::span<const float> filters,
                       std::span<const float> bias, bool input_relu, int residual, Activation activation) {
  check_sampling(sampling);
  const int taps = sampling.kernel * sampling.kernel, in = channels_of(input);
  check_size(filters, static_cast<std::int64_t>(taps) * in, false, "filters");
  check_size(bias, in, true, "bias");
  Layer& layer = add(Kind::depthwise, input, in, residual);
  layer.sampling = sampling;
  layer.input_relu = input_relu;
  layer.middle = activation;
  pack_filters(layer, filters, bias);
  return layer.output;
}

int Network::pool(int input, const Sampling& sampling, int residual, bool relu) {
  check_sampling(sampling);
  Layer& layer = add(Kind::pool, input, channels_of(input), residual);
  layer.sampling = sampling;
  layer.activation = relu ? Activation::relu : Activation::none;
  return layer.output;
}

int Network::reduce(int input, bool maximum) {
  Layer& layer = add(Kind::reduce, input, channels_of(input), -1);
  layer.maximum = maximum;
  return layer.output;
}

int Network::linear(int input, int out_channels, std::span<const float> weights, std::span<const float> bias,
                    Activation activation) {
  check_size(weights, static_cast<std::int64_t>(out_channels) * channels_of(input), false, "weights");
  check_size(bias, out_channels, true, "bias");
  Layer& layer = add(Kind::linear, input, out_channels, -1);
  layer.depth = layer.in_channels;
  layer.activation = activation;
  pack(layer, weights, bias);
  return layer.output;
}

int Network::beside_channels() const {
  for (const Layer& layer : layers_)
    if (layer.beside) return layer.out_channels;
  return 0;
}

std::size_t Network::weight_bytes() const {
  std::size_t total = 0;
  const auto add = [&](const Layer& layer) {
    for (const Buffer* buffer : {&layer.weights, &layer.bias, &layer.filters, &layer.filter_bias, &layer.half_filters,
                                 &layer.half_filter_bias, &layer.offset, &layer.scale})
      total += buffer->size();
  };
  for (const Layer& layer : layers_) {
    add(layer);
    for (const Section& section : layer.sections) add(section.layer);
  }
  return total;
}

std::size_t Network::arena_bytes() const {
  const std::lock_guard lock(mutex_);
  return arena_bytes_;
}

}  // namespace xception
