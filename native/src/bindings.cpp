// The Python face of native/: checks and conversions only; the work is in the files beside this one.
// src/xception/_native.pyi holds the same signatures for type checkers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "bindings.hpp"
#include "cpu_features.hpp"
#include "network.hpp"
#include "optimise.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Raised with every change of this module's interface. xception/ops/backend.py expects the same number, so
// that an extension left over from an earlier editable install is noticed instead of misused.
constexpr int kInterface = 11;

nb::dict to_dict(const xception::CpuFeatures& features) {
  nb::dict out;
  for (const auto& [name, member] : xception::kFeatures) out[name] = features.*member;
  return out;
}

template <int Dimensions>
using Floats = nb::ndarray<const float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using WritableFloats = nb::ndarray<float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

std::span<const float> numbers(const std::optional<Floats<1>>& array) {
  return array ? std::span<const float>{array->data(), array->size()} : std::span<const float>{};
}

template <class Value, std::size_t Count>
Value one_of(const std::string& word, const std::pair<const char*, Value> (&words)[Count], const char* what) {
  for (const auto& [name, value] : words)
    if (word == name) return value;
  throw std::invalid_argument("unknown " + std::string(what) + " '" + word + "'");
}

xception::Activation activation_of(const std::string& word) {
  using enum xception::Activation;
  constexpr std::pair<const char*, xception::Activation> words[] = {{"none", none}, {"relu", relu}, {"elu", elu}};
  return one_of(word, words, "activation");
}

xception::Sampling sampling_of(int kernel, int stride, int dilation, const std::string& padding, int amount) {
  using enum xception::Padding;
  constexpr std::pair<const char*, xception::Padding> words[] = {
      {"fixed", fixed}, {"same", same}, {"dense_same", dense_same}};
  return {kernel, stride, dilation, one_of(padding, words, "padding"), amount};
}

int size_of(std::size_t value) {
  if (value > 1u << 24) throw std::invalid_argument("a size of more than 16,777,216");
  return static_cast<int>(value);
}

std::unique_ptr<xception::Network> make_network(const std::string& level, const std::string& type, int channels,
                                                std::shared_ptr<xception::Crews> crews, bool latency) {
  if (!runs_kernels(level, type)) throw std::invalid_argument("this processor does not run kernels for '" + level + "'");
  return std::make_unique<xception::Network>(level, type_of(type), channels, std::move(crews), latency);
}

// The arrays as what a run reads, checked against each other and the network.
xception::Images images_of(const xception::Network& network, const Floats<4>& images,
                           const std::optional<Floats<4>>& beside) {
  xception::Images out{.data = images.data(), .count = size_of(images.shape(0)), .height = size_of(images.shape(1)),
                       .width = size_of(images.shape(2))};
  const int channels = network.image_channels(), beside_channels = network.beside_channels();
  if (images.shape(3) != static_cast<std::size_t>(channels))
    throw std::invalid_argument("expected images of " + std::to_string(channels) + " channels, got " +
                                std::to_string(images.shape(3)));
  if (beside_channels == 0) {
    if (beside) throw std::invalid_argument("this network reads no second image");
    return out;
  }
  if (!beside || beside->shape(0) != images.shape(0) ||
      beside->shape(3) != static_cast<std::size_t>(beside_channels))
    throw std::invalid_argument("expected a second image of " + std::to_string(beside_channels) +
                                " channels for each image");
  out.beside = beside->data();
  out.beside_height = size_of(beside->shape(1));
  out.beside_width = size_of(beside->shape(2));
  return out;
}

void run(xception::Network& network, const Floats<4>& images, int value, const WritableFloats<4>& output,
         const std::optional<Floats<4>>& beside) {
  const xception::Images given = images_of(network, images, beside);
  const xception::Tensor3 shape = network.shape(value, given.height, given.width);
  if (output.shape(0) != images.shape(0) || output.shape(1) != static_cast<std::size_t>(shape.height) ||
      output.shape(2) != static_cast<std::size_t>(shape.width) ||
      output.shape(3) != static_cast<std::size_t>(shape.channels))
    throw std::invalid_argument("the output does not have the value's shape");
  const nb::gil_scoped_release release;
  network.run(given, value, output.data());
}

using Addresses = nb::ndarray<const std::uint64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A row an update: the addresses of its weight, gradient, first, second and average (0: none), and its size.
// xception/ops/steps.py, which makes them, has held each array against the weight; here is seen to it that every array
// that the rule uses is there.
std::vector<xception::Update> updates_of(const Addresses& rows, const xception::Coefficients& with) {
  using xception::Rule;
  if (rows.shape(1) != 6) throw std::invalid_argument("expected rows of five addresses and a size");
  const bool gradient = with.rule != Rule::average;
  const bool first = gradient && (with.rule != Rule::sgd || with.momentum);
  const bool second = with.rule == Rule::rmsprop || with.rule == Rule::adamw;
  const bool needed[] = {true, gradient, first, second, with.rule == Rule::average};
  std::vector<xception::Update> out;
  out.reserve(rows.shape(0));
  for (std::size_t r = 0; r < rows.shape(0); ++r) {
    const std::uint64_t* row = rows.data() + 6 * r;
    float* arrays[5];
    for (int i = 0; i < 5; ++i) {
      if (row[i] % sizeof(float) != 0 || (needed[i] && row[i] == 0 && row[5] != 0))
        throw std::invalid_argument("expected the address of an array of float32 in column " + std::to_string(i));
      arrays[i] = reinterpret_cast<float*>(static_cast<std::uintptr_t>(row[i]));
    }
    if (row[5] > std::uint64_t{1} << 40) throw std::invalid_argument("expected at most 2^40 numbers");
    out.push_back({.weight = arrays[0], .gradient = arrays[1], .first = arrays[2], .second = arrays[3],
                   .average = arrays[4], .size = static_cast<std::int64_t>(row[5])});
  }
  return out;
}

xception::Rule rule_of(const std::string& word) {
  using enum xception::Rule;
  constexpr std::pair<const char*, xception::Rule> words[] = {
      {"average", average}, {"sgd", sgd}, {"rmsprop", rmsprop}, {"adamw", adamw}};
  return one_of(word, words, "rule");
}

std::unique_ptr<xception::Optimiser> make_optimiser(const std::string& level, int threads) {
  const xception::CpuFeatures features = xception::cpu_features();
  if ((level == "avx2" && !features.avx2) || (level == "avx512" && !features.avx512))
    throw std::invalid_argument("this processor does not run steps for '" + level + "'");
  return std::make_unique<xception::Optimiser>(level, threads);
}

void bind_optimiser(nb::module_& m) {
  using xception::Optimiser;
  nb::class_<Optimiser>(m, "Optimiser", "Steps of an optimiser, and of a running average, in one pass over memory.")
      .def(nb::new_(&make_optimiser), "level"_a, "threads"_a)
      .def(
          "step",
          [](Optimiser& optimiser, const Addresses& rows, const std::string& rule, bool nesterov, bool momentum,
             bool begins, bool decays, double scale, double rate, double decay, double first, double second,
             double rest, double epsilon, double correction, double share) {
            const auto narrow = [](double value) { return static_cast<float>(value); };
            const xception::Coefficients with{
                .rule = rule_of(rule), .nesterov = nesterov, .momentum = momentum, .begins = begins,
                .decays = decays, .scale = narrow(scale), .rate = narrow(rate), .decay = narrow(decay),
                .first = narrow(first), .second = narrow(second), .rest = narrow(rest), .epsilon = narrow(epsilon),
                .correction = narrow(correction), .share = narrow(share)};
            const std::vector<xception::Update> updates = updates_of(rows, with);
            const nb::gil_scoped_release release;
            optimiser.step(updates, with);
          },
          nb::arg("rows").noconvert(), "rule"_a, nb::kw_only(), "nesterov"_a = false, "momentum"_a = false,
          "begins"_a = false, "decays"_a = false, "scale"_a = 1.0, "rate"_a = 0.0, "decay"_a = 0.0, "first"_a = 0.0,
          "second"_a = 0.0, "rest"_a = 0.0, "epsilon"_a = 0.0, "correction"_a = 1.0, "share"_a = 0.0,
          "Rows of addresses and sizes, uint64; the coefficients of `native/src/optimise.hpp`.")
      .def_prop_ro("threads", &Optimiser::threads);
}

void bind_network(nb::module_& m) {
  using xception::Network;
  const auto given = "input"_a;
  nb::class_<xception::Crews>(m, "Crews", "Threads and the memory of their runs, for networks that may share them.")
      .def(nb::new_([](int threads) { return std::make_shared<xception::Crews>(threads); }), "threads"_a)
      .def_prop_ro("threads", &xception::Crews::threads);
  nb::class_<Network>(m, "Network", "A network whose layers are added one by one, run without Python in between.")
      .def(nb::new_(&make_network), "level"_a, "type"_a, "channels"_a, "crews"_a,
           "latency"_a = false)
      .def(
          "convolution",
          [](Network& n, int input, const Floats<2>& weights, const std::optional<Floats<1>>& bias, int kernel,
             int stride, int dilation, const std::string& padding, int amount, bool input_relu, int residual,
             const std::string& activation, const std::optional<Floats<1>>& steps) {
            return n.convolution(input, sampling_of(kernel, stride, dilation, padding, amount),
                                 size_of(weights.shape(0)), {weights.data(), weights.size()}, numbers(bias),
                                 input_relu, residual, activation_of(activation), numbers(steps));
          },
          given, nb::kw_only(), nb::arg("weights").noconvert(), nb::arg("bias").noconvert().none() = nb::none(),
          "kernel"_a, "stride"_a = 1, "dilation"_a = 1, "padding"_a = "fixed", "amount"_a = 0,
          "input_relu"_a = false, "residual"_a = -1, "activation"_a = "none",
          nb::arg("steps").noconvert().none() = nb::none(),
          "A regular convolution; weights out x (k * k * in). With `steps`, one a channel of its input, its product is "
          "of bytes, which count such steps. Returns the number of its value.")
      .def(
          "separable",
          [](Network& n, int input, const Floats<2>& filters, const std::optional<Floats<1>>& filter_bias,
             const std::string& middle, const Floats<2>& weights, const std::optional<Floats<1>>& bias, int kernel,
             int stride, int dilation, const std::string& padding, int amount, bool input_relu, int residual,
             const std::string& activation, const std::optional<Floats<1>>& steps) {
            return n.separable(input, sampling_of(kernel, stride, dilation, padding, amount),
                               {filters.data(), filters.size()}, numbers(filter_bias), activation_of(middle),
                               size_of(weights.shape(0)), {weights.data(), weights.size()}, numbers(bias),
                               input_relu, residual, activation_of(activation), numbers(steps));
          },
          given, nb::kw_only(), nb::arg("filters").noconvert(),
          nb::arg("filter_bias").noconvert().none() = nb::none(), "middle"_a = "none",
          nb::arg("weights").noconvert(), nb::arg("bias").noconvert().none() = nb::none(), "kernel"_a,
          "stride"_a = 1, "dilation"_a = 1, "padding"_a = "fixed", "amount"_a = 0, "input_relu"_a = false,
          "residual"_a = -1, "activation"_a = "none", nb::arg("steps").noconvert().none() = nb::none(),
          "A separable convolution; filters (k * k) x in, weights out x in. With `steps`, one a channel, its product is "
          "of bytes, which count such steps. Returns the number of its value.")
      .def(
          "depthwise",
          [](Network& n, int input, const Floats<2>& filters, const std::optional<Floats<1>>& bias, int kernel,
             int stride, int dilation, const std::string& padding, int amount, bool input_relu, int residual,
             const std::string& activation) {
            return n.depthwise(input, sampling_of(kernel, stride, dilation, padding, amount),
                               {filters.data(), filters.size()}, numbers(bias), input_relu, residual,
                               activation_of(activation));
          },
          given, nb::kw_only(), nb::arg("filters").noconvert(), nb::arg("bias").noconvert().none() = nb::none(),
          "kernel"_a, "stride"_a = 1, "dilation"_a = 1, "padding"_a = "fixed", "amount"_a = 0,
          "input_relu"_a = false, "residual"_a = -1, "activation"_a = "none",
          "A depthwise convolution by itself; filters (k * k) x in. Returns the number of its value.")
      .def(
          "grouped",
          [](Network& n, int input, const Floats<2>& weights, const std::optional<Floats<1>>& bias, int segments,
             int kernel, int stride, int dilation, const std::string& padding, int amount, int residual,
             const std::string& activation) {
            return n.grouped(input, sampling_of(kernel, stride, dilation, padding, amount), segments,
                             {weights.data(), weights.size()}, numbers(bias), residual, activation_of(activation));
          },
          given, nb::kw_only(), nb::arg("weights").noconvert(), nb::arg("bias").noconvert().none() = nb::none(),
          "segments"_a, "kernel"_a, "stride"_a = 1, "dilation"_a = 1, "padding"_a = "fixed", "amount"_a = 0,
          "residual"_a = -1, "activation"_a = "none",
          "A convolution over each of `segments` channel segments, as equal as can be, the wider ones first; weights "
          "channels x (k * k * widest), zeros behind a narrower segment's. Returns the number of its value.")
      .def(
          "pool",
          [](Network& n, int input, int kernel, int stride, int dilation, const std::string& padding, int amount,
             int residual, bool relu) {
            return n.pool(input, sampling_of(kernel, stride, dilation, padding, amount), residual, relu);
          },
          given, nb::kw_only(), "kernel"_a, "stride"_a = 1, "dilation"_a = 1, "padding"_a = "fixed", "amount"_a = 0,
          "residual"_a = -1, "relu"_a = false,
          "A max-pool, to which `residual` is added, and of that the ReLU. Returns the number of its value.")
      .def("reduce", &Network::reduce, given, nb::kw_only(), "maximum"_a = false,
           "The mean, or the maximum, over each image's pixels. Returns the number of its value.")
      .def(
          "linear",
          [](Network& n, int input, const Floats<2>& weights, const std::optional<Floats<1>>& bias,
             const std::string& activation) {
            return n.linear(input, size_of(weights.shape(0)), {weights.data(), weights.size()}, numbers(bias),
                            activation_of(activation));
          },
          given, nb::kw_only(), nb::arg("weights").noconvert(), nb::arg("bias").noconvert().none() = nb::none(),
          "activation"_a = "none", "A linear layer after `reduce`; weights out x in. Returns the number of its value.")
      .def(
          "shape",
          [](const Network& n, int value, int height, int width) {
            const xception::Tensor3 s = n.shape(value, height, width);
            return std::tuple{s.height, s.width, s.channels};
          },
          "value"_a, "height"_a, "width"_a, "Height, width and channels of a value for images of this size.")
      .def("load", &Network::load, "channels"_a = 0,
           "The image as a value for layers other than a first convolution; or, with `channels`, a second image.")
      .def("run", &run, nb::arg("images").noconvert(), "value"_a, nb::arg("output").noconvert(),
           nb::arg("beside").noconvert().none() = nb::none(),
           "Images N H W C, float32 and contiguous, to `output` N H W C of the value; `beside`: the second image.")
      .def(
          "profile",
          [](Network& n, const Floats<4>& images, int value, int repeats) {
            const xception::Images wanted = images_of(n, images, std::nullopt);
            if (wanted.count > 4096) throw std::invalid_argument("expected at most 4,096 images");
            const nb::gil_scoped_release release;
            return n.profile(wanted, value, repeats);
          },
          nb::arg("images").noconvert(), "value"_a, "repeats"_a = 5,
          "Seconds that each layer up to `value` takes one thread for these images: the least of `repeats`.")
      .def_prop_ro("threads", &Network::threads)
      .def_prop_ro("level", &Network::level)
      .def_prop_ro("weight_bytes", &Network::weight_bytes)
      .def_prop_ro("arena_bytes", &Network::arena_bytes);
}

}  // namespace

xception::Type type_of(const std::string& word) {
  using enum xception::Type;
  constexpr std::pair<const char*, xception::Type> words[] = {{"fp32", f32}, {"bf16", bf16}, {"fp16", f16}};
  return one_of(word, words, "type");
}

bool runs_kernels(const std::string& level, const std::string& type) {
  const xception::CpuFeatures features = xception::cpu_features();
  return level == "scalar" || (level == "avx2" && features.avx2) || (level == "avx512" && features.avx512) ||
         (level == "avx512_bf16" && features.avx512_bf16 && features.avx512_vnni) ||
         (level == "avx512_vnni" && features.avx512_vnni) ||
         (level == "avx512_fp16" && features.avx512_fp16 && type != "fp32") ||
         (level == "avx512_fp16_emulated" && features.avx512 && type != "fp32") ||  // for tests
         (level == "amx_bf16" && features.amx_bf16 && type != "fp16") ||
         (level == "amx_fp16" && features.amx_fp16 && type == "fp16") ||
         (level == "amx_emulated" && features.avx512) ||
         (level == "amx_half_emulated" && features.avx512 && type != "fp32");
}

NB_MODULE(_native, m) {
  m.doc() = "The compiled part of xception.";
  m.attr("INTERFACE") = kInterface;
  // At the end of a process networks may still be held, by a module's globals or torch's registry: that is no leak.
  nb::set_leak_warnings(false);
  bind_network(m);
  bind_train(m);
  bind_optimiser(m);
  m.def("cpu_name", &xception::cpu_name, "The processor's own name; empty where it does not tell.");
  m.def(
      "cpu_features", [] { return to_dict(xception::cpu_features()); },
      "The instruction sets this process may use, weakest first: {name: usable}.");
  m.def(
      "assume_features",
      [](const std::vector<std::string>& names) {
        xception::CpuFeatures features = xception::cpu_features();
        for (const std::string& name : names) {
          const auto found = std::ranges::find(xception::kFeatures, name, &xception::NamedFeature::name);
          if (found == xception::kFeatures.end()) throw std::invalid_argument("no instruction set is called '" + name + "'");
          features.*(found->member) = true;
        }
        xception::assume_features(features);
      },
      "names"_a,
      "Count these as usable too. For tests that trap and execute what the processor does not have: without that, the "
      "kernels end the process.");
  m.def(
      "interpret_x86",
      [](std::uint32_t leaf1_ecx, std::uint32_t leaf7_ebx, std::uint32_t leaf7_ecx, std::uint32_t leaf7_edx,
         std::uint32_t leaf7_1_eax, std::uint32_t tile_palette_ebx, std::uint32_t tile_palette_ecx,
         std::uint64_t xcr0, bool tile_permission) {
        const xception::X86Registers registers{
            .leaf1_ecx = leaf1_ecx,
            .leaf7_ebx = leaf7_ebx,
            .leaf7_ecx = leaf7_ecx,
            .leaf7_edx = leaf7_edx,
            .leaf7_1_eax = leaf7_1_eax,
            .tile_palette_ebx = tile_palette_ebx,
            .tile_palette_ecx = tile_palette_ecx,
            .xcr0 = xcr0,
        };
        return to_dict(xception::interpret_x86(registers, tile_permission));
      },
      nb::kw_only(), "leaf1_ecx"_a = 0, "leaf7_ebx"_a = 0, "leaf7_ecx"_a = 0, "leaf7_edx"_a = 0,
      "leaf7_1_eax"_a = 0, "tile_palette_ebx"_a = 0, "tile_palette_ecx"_a = 0, "xcr0"_a = 0,
      "tile_permission"_a = false,
      "What `cpu_features` would answer on an x86 processor with these registers; for tests.");
}
