// The Python face of train.hpp: every array is checked here, by its type and size, before a pointer is taken from it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>

#include <stdexcept>

#include "batch_norm.hpp"
#include "bindings.hpp"
#include "sizes.hpp"
#include "train.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace xception;

namespace {

using Array = nb::ndarray<nb::c_contig, nb::device::cpu>;
using MaybeArray = std::optional<Array>;
using Sizes = std::tuple<int, int, int>;  // images, height, width

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

BatchShape shape_of(const Sizes& sizes) {
  const auto [images, height, width] = sizes;
  if (images < 1 || height < 1 || width < 1 || images > 1 << 20 || height > 1 << 14 || width > 1 << 14 ||
      static_cast<std::int64_t>(images) * height * width > 1 << 28)
    refuse("expected at least an image of a pixel, and at most 268,435,456 pixels");
  return {images, height, width};
}

int channels_of(int channels) {
  if (channels < 1 || channels > 1 << 16) refuse("expected 1 to 65,536 channels");
  return channels;
}

float* numbers(const Array& array, std::int64_t expected, const char* what) {
  if (array.dtype() != nb::dtype<float>() || static_cast<std::int64_t>(array.size()) != expected)
    refuse("expected " + std::to_string(expected) + " float32 numbers as " + what);
  return static_cast<float*>(array.data());
}
float* numbers(const MaybeArray& array, std::int64_t expected, const char* what) {
  return array ? numbers(*array, expected, what) : nullptr;
}

// Channels last in the trainer's type, bf16 as int16; or bytes of channel blocks.
MapOf map_of(const UnitTrainer& trainer, const Array& array, int channels, const BatchShape& shape, const char* what) {
  auto* data = static_cast<std::byte*>(array.data());
  if (array.dtype() == nb::dtype<std::uint8_t>()) {
    if (static_cast<std::int64_t>(array.size()) != trainer.blocked_bytes(channels, shape))
      refuse("expected " + std::to_string(trainer.blocked_bytes(channels, shape)) + " bytes as " + what);
    return {data, true};
  }
  const nb::dlpack::dtype wanted = trainer.type() == Type::f32 ? nb::dtype<float>() : nb::dtype<std::int16_t>();
  if (array.dtype() != wanted || static_cast<std::int64_t>(array.size()) != shape.pixels() * channels)
    refuse("expected " + std::to_string(shape.pixels() * channels) + " numbers of the trainer's type as " + what);
  return {data, false};
}
std::byte* last(const UnitTrainer& trainer, const MaybeArray& array, int channels, const BatchShape& shape, const char* what) {
  if (!array) return nullptr;
  const MapOf map = map_of(trainer, *array, channels, shape, what);
  if (map.blocked) refuse(std::string("expected channels last as ") + what);
  return map.data;
}
std::byte* blocks(const UnitTrainer& trainer, const Array& array, int channels, const BatchShape& shape, const char* what) {
  const MapOf map = map_of(trainer, array, channels, shape, what);
  if (!map.blocked) refuse(std::string("expected bytes of channel blocks as ") + what);
  return map.data;
}

Affine affine_of(const MaybeArray& scale, const MaybeArray& shift, int channels, bool relu) {
  if (scale.has_value() != shift.has_value()) refuse("expected both scale and shift, or neither");
  return {numbers(scale, channels, "scale"), numbers(shift, channels, "shift"), relu};
}

Window window_of(const BatchShape& shape, const Sizes& output, int stride, int dilation, int pad_top, int pad_left) {
  const auto [images, height, width] = output;
  if (images != shape.images || height < 1 || width < 1 || height > shape.height + 2 || width > shape.width + 2 ||
      stride < 1 || stride > 2 || dilation < 1 || dilation > 4096 || pad_top < 0 || pad_left < 0 || pad_top > 8192 ||
      pad_left > 8192)
    refuse("expected a window that fits the map");
  return {.in_height = shape.height, .in_width = shape.width, .out_height = height, .out_width = width, .kernel = 3,
          .stride = stride, .dilation = dilation, .pad_top = pad_top, .pad_left = pad_left};
}

UnitArgs unit_of(const UnitTrainer& trainer, const Sizes& sizes, int out_channels, const Array& input,
                 const MaybeArray& scale, const MaybeArray& shift, bool relu, int dilation, const Array& filters,
                 const Array& weights, const Array& z) {
  UnitArgs unit;
  unit.shape = shape_of(sizes);
  unit.out_channels = channels_of(out_channels);
  if (weights.ndim() < 2) refuse("expected weights of two dimensions");
  unit.in_channels = channels_of(static_cast<int>(std::min<std::size_t>(weights.shape(1), 1u << 17)));
  if (dilation < 1 || dilation > 4096) refuse("expected a dilation of 1 to 4096");
  unit.dilation = dilation;
  unit.input = map_of(trainer, input, unit.in_channels, unit.shape, "the input");
  unit.load = affine_of(scale, shift, unit.in_channels, relu);
  unit.filters = numbers(filters, unit.in_channels * kTaps, "filters");
  unit.weights = numbers(weights, static_cast<std::int64_t>(out_channels) * unit.in_channels, "weights");
  unit.z = blocks(trainer, z, out_channels, unit.shape, "z");
  return unit;
}

// What is added at the end of a module: channels last as it is, or channel blocks to normalise.
ResidualMap residual_of(const UnitTrainer& trainer, const MaybeArray& array, const MaybeArray& scale, const MaybeArray& shift,
                        int channels, const BatchShape& shape) {
  ResidualMap residual;
  residual.norm = affine_of(scale, shift, channels, false);
  if (array) residual.map = map_of(trainer, *array, channels, shape, "the residual");
  if (residual.map.blocked != (residual.norm.scale != nullptr))
    refuse("expected a residual in channel blocks with its normalisation, or channels last without");
  return residual;
}

ConvArgs conv_of(const UnitTrainer& trainer, const Sizes& sizes, const Sizes& output, int kernel, int stride, int pad_top,
                 int pad_left, const Array& input, const Array& weights, const Array& z) {
  const BatchShape shape = shape_of(sizes), out = shape_of(output);
  if (kernel < 1 || kernel > 16 || stride < 1 || stride > 16 || pad_top < 0 || pad_left < 0 || pad_top >= kernel ||
      pad_left >= kernel || out.images != shape.images || (out.height - 1) * stride - pad_top >= shape.height ||
      (out.width - 1) * stride - pad_left >= shape.width)
    refuse("expected windows of 1 to 16 pixels that begin on the map");
  if (kernel == 1 && (out.height != (shape.height - 1) / stride + 1 || out.width != (shape.width - 1) / stride + 1))
    refuse("expected windows of a pixel all over the map");
  if (weights.ndim() != 2) refuse("expected weights of two dimensions");
  ConvArgs conv;
  conv.images = shape.images;
  conv.window = {.in_height = shape.height, .in_width = shape.width, .out_height = out.height, .out_width = out.width,
                 .kernel = kernel, .stride = stride, .pad_top = pad_top, .pad_left = pad_left};
  conv.out_channels = channels_of(static_cast<int>(std::min<std::size_t>(weights.shape(0), 1u << 17)));
  const auto depth = static_cast<int>(std::min<std::size_t>(weights.shape(1), 1u << 24));
  if (depth % (kernel * kernel) != 0 || (kernel > 1 && depth > kMostDepth))
    refuse("expected weights [out][rows x columns x in], at most " + std::to_string(kMostDepth) + " of them for an output");
  conv.in_channels = channels_of(depth / (kernel * kernel));
  conv.input = last(trainer, input, conv.in_channels, shape, "the input");
  conv.weights = numbers(weights, static_cast<std::int64_t>(conv.out_channels) * depth, "weights");
  conv.z = blocks(trainer, z, conv.out_channels, out, "z");
  return conv;
}

// The rows of a normalisation (NormRow), and how many channels they have.
std::tuple<float*, int> norm_of(const Array& norm, double epsilon) {
  if (norm.ndim() != 2 || norm.shape(0) != kNormRows) refuse("expected a normalisation of four rows");
  if (!(epsilon >= 0)) refuse("expected an epsilon of 0 or more");
  const int channels = channels_of(static_cast<int>(std::min<std::size_t>(norm.shape(1), 1u << 17)));
  return {numbers(norm, static_cast<std::int64_t>(kNormRows) * channels, "the normalisation"), channels};
}

std::unique_ptr<UnitTrainer> make_trainer(const std::string& level, const std::string& type, int threads,
                                          const std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>& openmp) {
  if (!runs_kernels(level, type)) refuse("this processor does not run kernels for '" + level + "'");
  if (threads < 1 || threads > 1024) refuse("expected 1 to 1024 threads");
  const auto [parallel, number, count] = openmp;
  if ((parallel == 0) != (number == 0) || (parallel == 0) != (count == 0)) refuse("expected three addresses, or zeros");
  const OpenMp host{reinterpret_cast<decltype(OpenMp::parallel)>(parallel),
                    reinterpret_cast<decltype(OpenMp::thread_number)>(number),
                    reinterpret_cast<decltype(OpenMp::thread_count)>(count)};
  return std::make_unique<UnitTrainer>(level, type_of(type), threads, host);
}

}  // namespace

void bind_train(nb::module_& m) {
  nb::class_<UnitTrainer>(m, "UnitTrainer", "Separable units, forward and backward; see native/src/train.hpp.")
      .def(nb::new_(&make_trainer), "level"_a, "type"_a, "threads"_a, "openmp"_a = std::tuple{0, 0, 0})
      .def(
          "blocked_bytes",
          [](const UnitTrainer& t, int channels, const Sizes& sizes) {
            return t.blocked_bytes(channels_of(channels), shape_of(sizes));
          },
          "channels"_a, "sizes"_a, "Bytes of a map in channel blocks; `sizes` are images, height and width.")
      .def(
          "forward",
          [](UnitTrainer& t, const Sizes& sizes, const Array& input, const MaybeArray& scale, const MaybeArray& shift,
             bool relu, int dilation, const Array& filters, const Array& weights, const Array& z, const Array& mean,
             const Array& variance) {
            const int out = static_cast<int>(std::min<std::size_t>(weights.ndim() == 0 ? 0 : weights.shape(0), 1u << 17));
            const UnitArgs unit = unit_of(t, sizes, out, input, scale, shift, relu, dilation, filters, weights, z);
            float* means = numbers(mean, out, "mean");
            float* variances = numbers(variance, out, "variance");
            const nb::gil_scoped_release release;
            t.forward(unit, means, variances);
          },
          "sizes"_a, nb::arg("input").noconvert(), nb::kw_only(), nb::arg("scale").noconvert().none(),
          nb::arg("shift").noconvert().none(), "relu"_a, "dilation"_a, nb::arg("filters").noconvert(),
          nb::arg("weights").noconvert(), nb::arg("z").noconvert(), nb::arg("mean").noconvert(),
          nb::arg("variance").noconvert(), "Writes z, and its mean and variance over the batch.")
      .def(
          "backward",
          [](UnitTrainer& t, const Sizes& sizes, const Array& input, const MaybeArray& scale, const MaybeArray& shift,
             bool relu, int dilation, const Array& filters, const Array& weights, const Array& z,
             const Array& gradient, const MaybeArray& out_scale, const MaybeArray& out_shift, bool out_relu,
             const Array& factors, const MaybeArray& in_mean, const MaybeArray& residual,
             const MaybeArray& input_gradient, const Array& filter_gradient, const MaybeArray& weight_gradient,
             const MaybeArray& sums) {
            const int out = static_cast<int>(std::min<std::size_t>(weights.ndim() == 0 ? 0 : weights.shape(0), 1u << 17));
            UnitBackArgs args;
            args.unit = unit_of(t, sizes, out, input, scale, shift, relu, dilation, filters, weights, z);
            const int in = args.unit.in_channels;
            args.gradient = map_of(t, gradient, out, args.unit.shape, "the gradient");
            args.output = affine_of(out_scale, out_shift, out, out_relu);
            if (out_relu && args.output.scale == nullptr) refuse("expected the normalisation before a ReLU");
            args.factors = numbers(factors, 3 * static_cast<std::int64_t>(out), "factors");
            args.in_mean = numbers(in_mean, in, "the input's mean");
            if (args.in_mean != nullptr && !args.unit.input.blocked) refuse("expected a blocked input to normalise");
            args.residual = last(t, residual, in, args.unit.shape, "the residual's gradient");
            if (input_gradient) {
              const MapOf map = map_of(t, *input_gradient, in, args.unit.shape, "the input's gradient");
              if (map.blocked != args.unit.input.blocked) refuse("expected the input's gradient laid out as the input");
              args.input_gradient = map.data;
            } else if (in_mean) {
              refuse("sums are of the input's gradient, which is not asked for");
            }
            args.filter_gradient = numbers(filter_gradient, in * kTaps, "the filters' gradient");
            args.weight_gradient = numbers(weight_gradient, static_cast<std::int64_t>(out) * in, "the weights' gradient");
            args.sums = numbers(sums, 2 * static_cast<std::int64_t>(in), "sums");
            if ((args.sums == nullptr) != (args.in_mean == nullptr)) refuse("expected both in_mean and sums, or neither");
            const nb::gil_scoped_release release;
            t.backward(args);
          },
          "sizes"_a, nb::arg("input").noconvert(), nb::kw_only(), nb::arg("scale").noconvert().none(),
          nb::arg("shift").noconvert().none(), "relu"_a, "dilation"_a, nb::arg("filters").noconvert(),
          nb::arg("weights").noconvert(), nb::arg("z").noconvert(), nb::arg("gradient").noconvert(),
          nb::arg("out_scale").noconvert().none(), nb::arg("out_shift").noconvert().none(), "out_relu"_a,
          nb::arg("factors").noconvert(), nb::arg("in_mean").noconvert().none(), nb::arg("residual").noconvert().none(),
          nb::arg("input_gradient").noconvert().none(), nb::arg("filter_gradient").noconvert(),
          nb::arg("weight_gradient").noconvert().none(), nb::arg("sums").noconvert().none(),
          "All gradients of a unit, from that of its normalised output.")
      .def(
          "convolve",
          [](UnitTrainer& t, const Sizes& sizes, const Array& input, const Sizes& output, int kernel, int stride,
             int pad_top, int pad_left, const Array& weights, const Array& z, const Array& mean, const Array& variance) {
            const ConvArgs conv = conv_of(t, sizes, output, kernel, stride, pad_top, pad_left, input, weights, z);
            float* means = numbers(mean, conv.out_channels, "mean");
            float* variances = numbers(variance, conv.out_channels, "variance");
            const nb::gil_scoped_release release;
            t.convolve(conv, means, variances);
          },
          "sizes"_a, nb::arg("input").noconvert(), nb::kw_only(), "output"_a, "kernel"_a, "stride"_a, "pad_top"_a,
          "pad_left"_a, nb::arg("weights").noconvert(), nb::arg("z").noconvert(), nb::arg("mean").noconvert(),
          nb::arg("variance").noconvert(), "A regular convolution: writes z, and its mean and variance over the batch.")
      .def(
          "convolve_backward",
          [](UnitTrainer& t, const Sizes& sizes, const Array& input, const Sizes& output, int kernel, int stride,
             int pad_top, int pad_left, const Array& weights, const Array& z, const Array& gradient,
             const MaybeArray& out_scale, const MaybeArray& out_shift, bool out_relu, const Array& factors,
             const MaybeArray& input_gradient, bool adds, const MaybeArray& weight_gradient) {
            ConvBackArgs args;
            args.conv = conv_of(t, sizes, output, kernel, stride, pad_top, pad_left, input, weights, z);
            const ConvArgs& conv = args.conv;
            args.gradient = last(t, gradient, conv.out_channels, conv.shape(), "the gradient");
            args.output = affine_of(out_scale, out_shift, conv.out_channels, out_relu);
            if (out_relu && args.output.scale == nullptr) refuse("expected the normalisation before a ReLU");
            args.factors = numbers(factors, 3 * static_cast<std::int64_t>(conv.out_channels), "factors");
            args.input_gradient = last(t, input_gradient, conv.in_channels, conv.input_shape(), "the input's gradient");
            args.adds = adds;
            args.weight_gradient = numbers(weight_gradient, static_cast<std::int64_t>(conv.out_channels) * conv.depth(),
                                           "the weights' gradient");
            const nb::gil_scoped_release release;
            t.convolve_backward(args);
          },
          "sizes"_a, nb::arg("input").noconvert(), nb::kw_only(), "output"_a, "kernel"_a, "stride"_a, "pad_top"_a,
          "pad_left"_a, nb::arg("weights").noconvert(), nb::arg("z").noconvert(), nb::arg("gradient").noconvert(),
          nb::arg("out_scale").noconvert().none(), nb::arg("out_shift").noconvert().none(), "out_relu"_a,
          nb::arg("factors").noconvert(), nb::arg("input_gradient").noconvert().none(), "adds"_a,
          nb::arg("weight_gradient").noconvert().none(),
          "All gradients of a convolution, from that of its normalised output; the input's written, or added.")
      .def(
          "finish",
          [](UnitTrainer& t, const Sizes& sizes, int channels, const Array& z, const Array& scale, const Array& shift,
             bool relu, const MaybeArray& residual, const MaybeArray& residual_scale, const MaybeArray& residual_shift,
             const Array& output) {
            const BatchShape shape = shape_of(sizes);
            channels_of(channels);
            std::byte* from = blocks(t, z, channels, shape, "z");
            const Affine norm = affine_of(scale, shift, channels, relu);
            const ResidualMap added = residual_of(t, residual, residual_scale, residual_shift, channels, shape);
            std::byte* to = last(t, output, channels, shape, "the output");
            const nb::gil_scoped_release release;
            t.finish(shape, channels, from, norm, added, to);
          },
          "sizes"_a, "channels"_a, nb::kw_only(), nb::arg("z").noconvert(), nb::arg("scale").noconvert(),
          nb::arg("shift").noconvert(), "relu"_a, nb::arg("residual").noconvert().none(),
          nb::arg("residual_scale").noconvert().none(), nb::arg("residual_shift").noconvert().none(),
          nb::arg("output").noconvert(),
          "The normalised map, channels last.")
      .def(
          "gradient_sums",
          [](UnitTrainer& t, const Sizes& sizes, int channels, const Array& z, const Array& scale, const Array& shift,
             bool relu, const Array& mean, const Array& gradient, const Array& sums) {
            const BatchShape shape = shape_of(sizes);
            channels_of(channels);
            std::byte* from = blocks(t, z, channels, shape, "z");
            const Affine norm = affine_of(scale, shift, channels, relu);
            const float* means = numbers(mean, channels, "mean");
            const MapOf arriving = map_of(t, gradient, channels, shape, "the gradient");
            float* to = numbers(sums, 2 * static_cast<std::int64_t>(channels), "sums");
            const nb::gil_scoped_release release;
            t.gradient_sums(shape, channels, from, norm, means, arriving, to);
          },
          "sizes"_a, "channels"_a, nb::kw_only(), nb::arg("z").noconvert(), nb::arg("scale").noconvert(),
          nb::arg("shift").noconvert(), "relu"_a, nb::arg("mean").noconvert(), nb::arg("gradient").noconvert(),
          nb::arg("sums").noconvert(), "Sums of the gradient and of gradient * (z - mean), 2 x channels.")
      .def(
          "pool",
          [](UnitTrainer& t, const Sizes& sizes, int channels, const Sizes& pooled, int stride, int dilation, int pad_top,
             int pad_left, const Array& z, const Array& scale, const Array& shift, const MaybeArray& residual,
             const MaybeArray& residual_scale, const MaybeArray& residual_shift, const Array& output,
             const Array& winners) {
            const BatchShape shape = shape_of(sizes), out = shape_of(pooled);
            channels_of(channels);
            const Window window = window_of(shape, pooled, stride, dilation, pad_top, pad_left);
            std::byte* from = blocks(t, z, channels, shape, "z");
            const Affine norm = affine_of(scale, shift, channels, false);
            const ResidualMap added = residual_of(t, residual, residual_scale, residual_shift, channels, out);
            std::byte* to = last(t, output, channels, out, "the output");
            if (winners.dtype() != nb::dtype<std::uint8_t>() ||
                static_cast<std::int64_t>(winners.size()) != out.pixels() * panels_of(channels) * kPanel)
              refuse("expected a byte for each pooled number, channels padded to 32, as winners");
            auto* taps = static_cast<std::uint8_t*>(winners.data());
            const nb::gil_scoped_release release;
            t.pool(shape, channels, window, from, norm, added, to, taps);
          },
          "sizes"_a, "channels"_a, nb::kw_only(), "pooled"_a, "stride"_a, "dilation"_a, "pad_top"_a, "pad_left"_a,
          nb::arg("z").noconvert(), nb::arg("scale").noconvert(), nb::arg("shift").noconvert(),
          nb::arg("residual").noconvert().none(), nb::arg("residual_scale").noconvert().none(),
          nb::arg("residual_shift").noconvert().none(), nb::arg("output").noconvert(), nb::arg("winners").noconvert(),
          "3x3 max-pooling of the normalised map, and which tap won.")
      .def(
          "pool_backward",
          [](UnitTrainer& t, const Sizes& sizes, int channels, const Sizes& pooled, int stride, int dilation, int pad_top,
             int pad_left, const Array& gradient, const Array& winners, const Array& input_gradient) {
            const BatchShape shape = shape_of(sizes), out = shape_of(pooled);
            channels_of(channels);
            const Window window = window_of(shape, pooled, stride, dilation, pad_top, pad_left);
            std::byte* arriving = last(t, gradient, channels, out, "the gradient");
            if (winners.dtype() != nb::dtype<std::uint8_t>() ||
                static_cast<std::int64_t>(winners.size()) != out.pixels() * panels_of(channels) * kPanel)
              refuse("expected a byte for each pooled number, channels padded to 32, as winners");
            std::byte* to = blocks(t, input_gradient, channels, shape, "the input's gradient");
            auto* taps = static_cast<std::uint8_t*>(winners.data());
            const nb::gil_scoped_release release;
            t.pool_backward(shape, channels, window, arriving, taps, to);
          },
          "sizes"_a, "channels"_a, nb::kw_only(), "pooled"_a, "stride"_a, "dilation"_a, "pad_top"_a, "pad_left"_a,
          nb::arg("gradient").noconvert(), nb::arg("winners").noconvert(), nb::arg("input_gradient").noconvert(),
          "The pooled map's gradient taken back to the normalised map, in channel blocks.")
      .def_static(
          "normalise",
          [](const Array& norm, const MaybeArray& gamma, const MaybeArray& beta, double epsilon) {
            const auto [rows, channels] = norm_of(norm, epsilon);
            normalise(rows, channels, numbers(gamma, channels, "gamma"), numbers(beta, channels, "beta"), epsilon);
          },
          nb::arg("norm").noconvert(), nb::kw_only(), nb::arg("gamma").noconvert().none(),
          nb::arg("beta").noconvert().none(), "epsilon"_a,
          "Of the rows mean, variance, scale and shift (4 x channels): writes the last two.")
      .def_static(
          "norm_gradients",
          [](const Array& norm, double epsilon, std::int64_t pixels, const Array& sums, const Array& gradients,
             const Array& factors) {
            const auto [rows, channels] = norm_of(norm, epsilon);
            if (pixels < 0) refuse("expected a number of pixels, or 0");
            norm_gradients(rows, channels, epsilon, pixels, numbers(sums, 2 * std::int64_t{channels}, "sums"),
                           numbers(gradients, 2 * std::int64_t{channels}, "gradients"),
                           numbers(factors, 3 * std::int64_t{channels}, "factors"));
          },
          nb::arg("norm").noconvert(), nb::kw_only(), "epsilon"_a, "pixels"_a, nb::arg("sums").noconvert(),
          nb::arg("gradients").noconvert(), nb::arg("factors").noconvert(),
          "Gradients of gamma and beta (2 x channels), and the factors (3 x channels) that `backward` takes. `pixels` went "
          "into mean and variance; 0: they are not the batch's.")
      .def_prop_ro("threads", &UnitTrainer::threads)
      .def_prop_ro("level", &UnitTrainer::level);
}
