// Sizes and memory of a network for images of one number and size.
#include <algorithm>
#include <stdexcept>

#include "network.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

constexpr std::int64_t kMaxPixels = 1 << 28;

struct Axis {
  int size, before;
};

// The output size and the padding before an axis of `size`.
Axis along(int size, const Sampling& s) {
  const int reach = (s.kernel - 1) * s.dilation + 1;
  if (s.padding == Padding::same) {
    const int out = ceil_div(size, s.stride);
    const int total = std::max((out - 1) * s.stride + reach - size, 0);
    return {out, total / 2};
  }
  if (s.padding == Padding::dense_same) {
    const int d = s.dilation, strided = ceil_div(size, d);
    const int total = std::max((ceil_div(strided, 2) - 1) * 2 + 3 - strided, 0);
    return {size + 2 * d - reach + 1, d * (total / 2)};
  }
  const int room = size + 2 * s.amount - reach;
  return {room < 0 ? 0 : room / s.stride + 1, s.amount};
}

}  // namespace

Layout Network::lay_out(const Images& given, int value, bool chains) const {
  Layout out;
  const int images = given.count, height = given.height, width = given.width;
  out.images = images;
  out.places.resize(channels_.size());
  out.windows.resize(layers_.size());
  out.places[0] = {.height = height, .width = width, .channels = channels_[0]};
  std::vector<int> last_use(channels_.size(), -1);
  const int lanes = lane_count(type_);
  for (int i = 0; i < value; ++i) {
    const Layer& layer = layers_[index_of(i)];
    const Place& in = out.places[index_of(layer.input)];
    Place& place = out.places[index_of(layer.output)];
    place.channels = layer.out_channels;
    if (layer.kind == Kind::reduce || layer.kind == Kind::linear) {
      place.height = place.width = 1;
    } else if (layer.kind == Kind::load) {
      place.height = layer.beside ? given.beside_height : height;
      place.width = layer.beside ? given.beside_width : width;
    } else {
      const Sampling& s = layer.sampling;
      const Axis y = along(in.height, s), x = along(in.width, s);
      if (y.size < 1 || x.size < 1)
        throw std::invalid_argument("images of " + std::to_string(height) + "x" + std::to_string(width) +
                                    " pixels are too small for this network");
      place.height = y.size;
      place.width = x.size;
      out.windows[index_of(i)] = {.in_height = in.height, .in_width = in.width, .out_height = y.size,
                                  .out_width = x.size, .kernel = s.kernel, .stride = s.stride,
                                  .dilation = s.dilation, .pad_top = y.before, .pad_left = x.before};
      out.zero_lines = std::max(out.zero_lines, index_of(in.width));
      if (layer.kind != Kind::pool && layer.kind != Kind::depthwise) {
        const std::int64_t lines = ceil_div(layer.depth, lane_count(matrix_type(layer))) + 1;
        const std::int64_t row = spread(static_cast<std::int64_t>(x.size) * kLineBytes + kLineBytes) * lines;
        out.matrix_bytes = std::max(out.matrix_bytes, static_cast<std::size_t>(std::max(row, matrix_limit() + 2 * row)));
      }
    }
    if (layer.residual >= 0) {
      const Place& other = out.places[index_of(layer.residual)];
      if (other.height >= 0 && (other.height != place.height || other.width != place.width))
        throw std::invalid_argument("a residual value does not have the output's size");
      last_use[index_of(layer.residual)] = i;
    }
    last_use[index_of(layer.input)] = i;
  }
  last_use[index_of(value)] = value;
  find_matrices(out, value);
  find_rectified(out, value);
  find_flows(out, chains ? value : 0);
  find_segments(out, value, !chains);
  find_chains(out, chains ? value : 0);
  for (int i = 0; i < value; ++i) {
    const Layer& layer = layers_[index_of(i)];
    Place& place = out.places[index_of(layer.output)];
    const bool reduced = layer.kind == Kind::reduce || layer.kind == Kind::linear;
    const std::int64_t count = place.all_images ? images : out.images_at_a_time[index_of(i)];
    place.block = reduced ? count * kGroup * 4 : spread(count * place.height * place.width * kLineBytes);
    const int blocks = panels_of(layer.out_channels) * (reduced ? 2 : kPanel / lanes);
    place.bytes = index_of(blocks) * static_cast<std::size_t>(place.block);
  }
  // A chain's values are all needed until its end, and its result is there from its beginning.
  std::vector<int> birth(channels_.size(), 0);
  for (int i = 0; i < value; i = out.chain_end[index_of(i)] + 1) {
    const int end = out.chain_end[index_of(i)];
    for (int k = i; k <= end; ++k) {
      const Layer& layer = layers_[index_of(k)];
      birth[index_of(layer.output)] = i;
      last_use[index_of(layer.input)] = std::max(last_use[index_of(layer.input)], end);
      if (layer.residual >= 0) last_use[index_of(layer.residual)] = std::max(last_use[index_of(layer.residual)], end);
      if (k < end) out.places[index_of(layer.output)].bytes = 0;  // in bands, not in the arena
    }
  }
  for (int v = 1; v <= value; ++v)
    if (out.in_ring[index_of(v)]) out.places[index_of(v)].bytes = 0;
  // Where images take a segment one after another, what one of them brings or leaves must outlast the others' way.
  for (int i = 0; i < value;) {
    int end = i;
    while (end + 1 < value && out.images_at_a_time[index_of(end + 1)] == out.images_at_a_time[index_of(i)]) ++end;
    for (int k = i; k <= end && out.images_at_a_time[index_of(i)] < images; ++k) {
      const Layer& layer = layers_[index_of(k)];
      if (out.places[index_of(layer.output)].all_images) birth[index_of(layer.output)] = i;
      for (const int v : {layer.input, layer.residual})
        if (v >= 0 && out.places[index_of(v)].all_images) last_use[index_of(v)] = std::max(last_use[index_of(v)], end);
    }
    i = end + 1;
  }
  // Each value at the lowest place that is free while it is needed.
  for (int v = 1; v <= value; ++v) {
    Place& place = out.places[index_of(v)];
    std::vector<const Place*> taken;
    for (int u = 1; u < v; ++u)
      if (last_use[index_of(u)] >= birth[index_of(v)] && out.places[index_of(u)].bytes > 0)
        taken.push_back(&out.places[index_of(u)]);
    std::sort(taken.begin(), taken.end(), [](const Place* a, const Place* b) { return a->offset < b->offset; });
    std::size_t offset = 0;
    for (const Place* other : taken) {
      if (offset + place.bytes <= other->offset) break;
      offset = std::max(offset, other->offset + other->bytes);
    }
    place.offset = offset;
    out.arena_bytes = std::max(out.arena_bytes, offset + place.bytes);
  }
  return out;
}

void Network::find_matrices(Layout& layout, int value) const {
  layout.as_matrix.assign(channels_.size(), false);
  if (!kernels_->interleaves) return;
  const auto convolves = [](Kind kind) { return kind == Kind::convolution || kind == Kind::image; };
  for (int i = 0; i < value; ++i) {
    const Layer& layer = layers_[index_of(i)];
    int readers = 0;
    bool fits = layer.output != value && convolves(layer.kind) && layer.residual < 0;
    for (int k = i + 1; k < value; ++k) {
      const Layer& other = layers_[index_of(k)];
      if (other.residual == layer.output) fits = false;
      if (other.input != layer.output) continue;
      ++readers;
      fits = fits && other.kind == Kind::convolution && !other.in_bytes;
    }
    layout.as_matrix[index_of(layer.output)] = fits && readers == 1;
  }
}

void Network::find_rectified(Layout& layout, int value) const {
  layout.rectified.assign(channels_.size(), false);
  for (int i = 0; i < value; ++i) {
    const Layer& layer = layers_[index_of(i)];
    layout.rectified[index_of(layer.output)] =
        layer.output != value && layer.activation == Activation::none &&
        (layer.kind == Kind::separable || layer.kind == Kind::convolution);
  }
  for (int i = 0; i < value; ++i) {
    const Layer& layer = layers_[index_of(i)];
    if (!layer.input_relu) layout.rectified[index_of(layer.input)] = false;
    if (layer.residual >= 0) layout.rectified[index_of(layer.residual)] = false;
  }
}

// `together`: all images take every layer together.
void Network::find_segments(Layout& layout, int value, bool together) const {
  const int all = layout.images;
  const Place& image = layout.places[0];
  const int few = std::min(images_together(image.height, image.width), std::max(all, 1));
  layout.images_at_a_time.assign(layers_.size(), all);
  if (together || !kernels_->interleaves) return;
  int now = few;
  std::vector<int> segment(layers_.size(), 0);
  for (int i = 0; i < value; ++i) {
    const Kind kind = layers_[index_of(i)].kind;
    if (kind == Kind::reduce || kind == Kind::linear)
      now = all;
    else if (layout.flow_images[index_of(i)] > 0)
      now = layout.flow_images[index_of(i)];
    layout.images_at_a_time[index_of(i)] = now;
    const bool same = i > 0 && layout.images_at_a_time[index_of(i - 1)] == now;
    segment[index_of(i)] = i == 0 ? 0 : segment[index_of(i - 1)] + (same ? 0 : 1);
  }
  // What is written and read inside one segment only.
  for (int i = 0; i < value; ++i) layout.places[index_of(layers_[index_of(i)].output)].all_images = false;
  layout.places[index_of(value)].all_images = true;
  for (int i = 0; i < value; ++i)
    for (const int v : {layers_[index_of(i)].input, layers_[index_of(i)].residual})
      if (v > 0 && segment[index_of(v - 1)] != segment[index_of(i)]) layout.places[index_of(v)].all_images = true;
}

Tensor3 Network::shape(int value, int height, int width) const {
  channels_of(value);
  // What is given beside the image has the size that it needs to have.
  const Images any{.count = 1, .height = height, .width = width, .beside_height = -1, .beside_width = -1};
  const Layout layout = lay_out(any, value);
  const Place& place = layout.places[index_of(value)];
  return {place.height, place.width, place.channels};
}

const Layout& Network::layout_for(Images images, int count, int value) {
  images.count = count;
  const std::vector<int> key{count, images.height, images.width, images.beside_height, images.beside_width, value};
  if (const auto found = layouts_.find(key); found != layouts_.end()) return found->second;
  return layouts_.emplace(key, lay_out(images, value)).first->second;
}

void Network::check(const Images& images, int value) const {
  channels_of(value);
  if (value == 0) throw std::invalid_argument("value 0 is the image itself");
  if (static_cast<std::int64_t>(images.height) * images.width > kMaxPixels)
    throw std::invalid_argument("images of more than 268,435,456 pixels");
  for (int i = 0; i < value; ++i)
    if (layers_[index_of(i)].beside && images.beside == nullptr && images.count > 0)
      throw std::invalid_argument("this network reads a second image, which was not given");
  Images one = images;
  one.count = 1;
  lay_out(one, value);  // refuses what is too small
}

}  // namespace xception
