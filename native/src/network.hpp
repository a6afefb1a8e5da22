// A whole network as a list of layers, built once from Python with normalisation already folded into the weights, and
// run without Python in between.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "crew.hpp"
#include "kernels.hpp"
#include "sizes.hpp"

namespace xception {

// How a window lies over an axis: `fixed` pads `amount` on both sides; `same` is TensorFlow's rule; `dense_same` is
// that rule for a pool whose stride was replaced by dilation (models/layers.py, SamePool2d).
enum class Padding : std::uint8_t { fixed, same, dense_same };

struct Sampling {
  int kernel = 1, stride = 1, dilation = 1;
  Padding padding = Padding::fixed;
  int amount = 0;
};

enum class Kind : std::uint8_t { load, image, depthwise, convolution, grouped, separable, pool, reduce, linear };

struct Section;

struct Layer {
  Kind kind{};
  int input = -1, output = -1, residual = -1;  // values; -1: none
  Sampling sampling;
  bool input_relu = false;
  Activation middle = Activation::none, activation = Activation::none;
  bool maximum = false;  // reduce
  bool beside = false;   // load: not the image itself
  int in_channels = 0, out_channels = 0;
  int depth = 0;  // K of the product
  Buffer filters, filter_bias;  // depthwise; filters of a convolution in bytes: how many steps make one
  Buffer half_filters, half_filter_bias;  // the same, for kernels that want them so
  Buffer weights, bias;
  std::int64_t panel_bytes = 0;
  bool in_bytes = false;  // the product is of bytes
  int zero_point = 0;
  Buffer offset, scale;  // of such a product's sums
  std::vector<Section> sections;  // grouped
};

// Of a grouped convolution: panels of output channels that read the same panels of input channels. It is an ordinary
// convolution from these to those, with zeros for the channels of another segment.
struct Section {
  int first_panel_in = 0, first_panel = 0;
  Layer layer;
};

// The sizes of one value, and where it lies in the arena.
struct Place {
  int height = 0, width = 0, channels = 0;
  bool all_images = true;  // else those that pass together, one lot after another in the same place
  std::int64_t block = 0;  // bytes from a channel block to the next
  std::size_t offset = 0, bytes = 0;
};

// Everything that depends on the images' number and size.
struct Layout {
  int images = 0;
  std::vector<Place> places;
  std::vector<Window> windows;  // a layer
  // How many images take a layer at a time. Neighbours of the same number form a segment, which some images leave
  // before the next ones enter it.
  std::vector<int> images_at_a_time;
  std::size_t arena_bytes = 0, matrix_bytes = 0, zero_lines = 0;
  // Layers that are computed together, a few rows at a time, and of each layer the last that it is computed with; where
  // a layer is not the last, its rows are kept in a band of so many.
  std::vector<int> chain_end, band_rows;
  std::size_t band_bytes = 0;
  // Of a chain's first layer: how many rows of its last one are computed at a time.
  std::vector<int> chain_rows;
  // Separable layers that flow into each other on whole maps, and of each layer the last of its flow: see flow.cpp.
  // Of a value that nothing else reads only two blocks are kept, in a ring.
  std::vector<int> flow_end, flow_images;  // how many images go through it together; 0: the layer is in none
  std::vector<bool> in_ring;  // a value
  // Values of one convolution that only another one reads: they are stored as it wants its matrix.
  std::vector<bool> as_matrix;
  // Values that are only read through a ReLU: it is applied once, when they are stored.
  std::vector<bool> rectified;
  std::size_t ring_bytes = 0;
};

// A value's lines from its row 0 on, or where that would be.
struct View {
  std::byte* data = nullptr;
  std::int64_t block = 0;
};

// Some of a layout's images.
struct Span {
  int first = 0, count = 0;
};

// Output rows of a layer, and where its values are.
struct Rows {
  View input, output, residual;
  int first = 0, count = 0;
  int skipped = 0, left = 0;  // pixels at the first one's beginning and the last one's end that another thread does
  bool input_as_matrix = false, output_as_matrix = false;
  bool input_rectified = false, output_rectified = false;
};

// What a product finds done before it, and what it does beside itself where the kernels interleave.
struct Company {
  const std::byte* matrix = nullptr;  // null: not there yet
  std::int64_t matrix_block = 0;
  const ProducerArgs* beside = nullptr;
  bool follows = false;
};

struct Tensor3 {
  int height, width, channels;
};

// What a run reads: float [count, height, width, channels]; and a second one of its own size, for a residual that is
// no value of the network (null: none).
struct Images {
  const float* data = nullptr;
  int count = 0, height = 0, width = 0;
  const float* beside = nullptr;
  int beside_height = 0, beside_width = 0;
};

// What writes a layer's matrix, and what multiplies it.
struct LayerKernels {
  void (*depthwise)(const ProducerArgs&);
  void (*patches)(const ProducerArgs&);
  void (*multiply)(const MultiplyArgs&);
};
inline LayerKernels kernels_of(const Layer& layer, const Kernels& kernels) {
  if (layer.in_bytes) return {kernels.depthwise_u8, kernels.patches_u8, kernels.multiply_u8};
  return {kernels.depthwise, kernels.patches, kernels.multiply};
}

class Network {
 public:
  // `level` is one of the instruction sets that `best_kernels` knows.
  // Of several images each thread takes some through the network, or, for `latency`, all work on the same.
  // Networks may share their crews: what runs one after the other then works in the same memory.
  Network(const std::string& level, Type type, int channels, std::shared_ptr<Crews> crews, bool latency);

  // Each adds a layer and returns the number of its value; value 0 is the image. Weights are [out, k, k, in] and
  // filters [k, k, channels]; a bias may be empty. Throws std::invalid_argument, and then nothing was added.
  // A layer with `steps`, one a channel of what its product reads (of a separable layer: between its two
  // convolutions), multiplies bytes: what is there counts steps (without activation from -128 to 127, behind a ReLU
  // from 0 to 255, what lies beyond is cut off), and each output channel's weights are rounded to 127 parts of the
  // largest.
  // `load` brings the image (or, with `channels`, what is given beside it) into the layout that the other layers work on;
  // a convolution reads an image of few channels by itself.
  int load(int channels);
  int convolution(int input, const Sampling& sampling, int out_channels, std::span<const float> weights,
                  std::span<const float> bias, bool input_relu, int residual, Activation activation,
                  std::span<const float> steps = {});
  // Channels in `segments` as equal as can be, the wider ones first; each output channel reads those of its segment.
  // Weights are [channels, k, k, widest], with zeros behind a narrower segment's.
  int grouped(int input, const Sampling& sampling, int segments, std::span<const float> weights,
              std::span<const float> bias, int residual, Activation activation);
  int separable(int input, const Sampling& sampling, std::span<const float> filters,
                std::span<const float> filter_bias, Activation middle, int out_channels,
                std::span<const float> weights, std::span<const float> bias, bool input_relu, int residual,
                Activation activation, std::span<const float> steps = {});
  int depthwise(int input, const Sampling& sampling, std::span<const float> filters, std::span<const float> bias,
                bool input_relu, int residual, Activation activation);
  int pool(int input, const Sampling& sampling, int residual, bool relu);
  int reduce(int input, bool maximum);
  int linear(int input, int out_channels, std::span<const float> weights, std::span<const float> bias,
             Activation activation);

  // The shape of a value for images of this size; height and width 1 after `reduce`.
  Tensor3 shape(int value, int height, int width) const;

  // `output` is float [count, height, width, channels] of `value`. Safe from many threads, which wait for each other.
  void run(const Images& images, int value, float* output);

  // Seconds that each layer up to `value` takes one thread, for these images together: the least of `repeats`.
  std::vector<double> profile(const Images& images, int value, int repeats);

  int image_channels() const { return channels_[0]; }
  int beside_channels() const;  // 0: none is read
  int threads() const { return crews_->threads(); }
  const std::string& level() const { return level_; }
  std::size_t weight_bytes() const;
  std::size_t arena_bytes() const;  // all memory of the latest run, or 0

 private:
  struct Part {  // which share of each layer's rows a thread does, of how many
    int index, count;
  };

  int channels_of(int value) const;
  void check_steps(std::span<const float> steps, std::span<const float> weights, int in_channels, int depth) const;
  void check(const Images& images, int value) const;
  Layer& add(Kind kind, int input, int out_channels, int residual);
  void pack_filters(Layer& layer, std::span<const float> filters, std::span<const float> bias);
  void pack(Layer& layer, std::span<const float> weights, std::span<const float> bias);
  void pack_steps(Layer& layer, std::span<const float> steps);
  void pack_bytes(Layer& layer, std::span<const float> weights, std::span<const float> bias);
  std::int64_t matrix_limit() const { return latency_ ? kSharedMatrixBytes : kMatrixBytes; }
  Type matrix_type(const Layer& layer) const { return layer.in_bytes ? Type::u8 : kernels_->matrix_type; }
  Layout lay_out(const Images& images, int value, bool chains = true) const;
  std::int64_t band_bytes(Layout& layout, int begin, int end, int rows) const;
  void find_chains(Layout& layout, int value) const;
  void find_segments(Layout& layout, int value, bool together) const;
  const Layout& layout_for(Images images, int count, int value);
  void reserve(Worker& worker, const Layout& layout, bool arena);

  ProducerArgs producer_for(const Layer& layer, const Window& window, const Rows& rows, const Worker& worker) const;
  MultiplyArgs product_for(const Layer& layer, const Rows& rows, const Worker& worker) const;
  int strips_of(const Layer& layer, const Window& window, int rows) const;
  void run_product(const Layer& layer, const Window& window, const Rows& rows, Worker& worker,
                   const Company& company) const;
  void run_rows(const Layer& layer, const Window& window, const Rows& rows, Worker& worker,
                const Company& company = {}) const;
  Rows rows_of(const Layer& layer, const Layout& layout, std::byte* arena, const Images& images, int first_image,
               std::pair<int, int> range) const;
  void run_chain(const Layout& layout, int begin, std::byte* arena, const Images& images, Span span, Worker& worker,
                 Part part) const;
  void find_flows(Layout& layout, int value) const;
  void run_flow(const Layout& layout, int begin, std::byte* arena, const Images& images, Span span, Worker& worker,
                std::byte* const* matrices, Part part, Barrier* barrier) const;
  void run_layer(const Layer& layer, const Layout& layout, std::size_t index, std::byte* arena, const Images& images,
                 Span span, Worker& worker, Part part) const;
  void find_matrices(Layout& layout, int value) const;
  void find_rectified(Layout& layout, int value) const;
  std::int64_t image_size(const Images& images) const;
  std::int64_t beside_size(const Images& images) const;
  void fetch(const Layout& layout, int value, std::byte* arena, float* output, const Worker& worker, Part part) const;

  std::string level_;
  const Kernels* kernels_ = nullptr;
  // Of the same matrices and weights, with all the range of `type_`: for what overflows in `kernels_`, or null.
  const Kernels* wide_kernels_ = nullptr;
  bool filters_fit_ = true;  // in half precision, where `kernels_` want that
  Type type_;
  bool latency_;
  std::vector<Layer> layers_;
  std::vector<int> channels_;   // of each value
  std::vector<bool> reduced_;   // whether a value is [channels / 16][images][16] floats
  mutable ProcessMutex mutex_;
  std::shared_ptr<Crews> crews_;
  std::size_t arena_bytes_ = 0;
  std::map<std::vector<int>, Layout> layouts_;
};

// The kernels of the level for this type: those of the level itself or, where it has none, of the one below.
const Kernels& kernels_for(const std::string& level, Type type);
// Null where those have all the range of the type.
const Kernels* wide_kernels_for(const std::string& level, Type type);

}  // namespace xception
