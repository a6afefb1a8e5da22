// Separable layers on maps that stay in the cache, one flowing into the next: a finished panel of a layer's product is
// a whole block of the next layer's depthwise input, so while the tiles work on the following panel, vectors fill the
// next layer's matrix. What lies between two layers is then never a map: of values that nothing else reads, a ring of
// two panels is kept.
//
// Two matrices take turns. For 19 x 19 x 728 each is half a megabyte, and a layer's weights (a megabyte) are streamed
// past them once; a second image at the same time would save half of the weights' way from the third-level cache, but
// drive the same amount of matrix out of the second-level one. Several threads on the same images share the matrices
// and divide the panels: each reads its share of the weights only, and waits for the others once a layer.
#include <algorithm>

#include "network.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

// Of a second-level cache of two megabytes: what a matrix that is read again for each panel may take of it, and what of
// both matrices survives the weights and panels that pass.
constexpr std::int64_t kFlowBytes = 1280 << 10;
constexpr std::int64_t kKeptBytes = 1536 << 10;

std::int64_t flow_block(const Window& window, int images) {
  return spread(static_cast<std::int64_t>(images) * window.out_height * window.out_width * kLineBytes);
}

// The part of a depthwise convolution that concerns these blocks, of which a line of the matrix holds so many.
ProducerArgs blocks_of(ProducerArgs args, Range blocks, bool half_filters, int per_line) {
  const int taps = args.window.kernel * args.window.kernel;
  const std::int64_t tap_bytes = half_filters ? kLineBytes : 2 * kLineBytes;
  args.weights = static_cast<const std::byte*>(args.weights) + blocks.begin * taps * tap_bytes;
  if (args.bias != nullptr) args.bias = static_cast<const std::byte*>(args.bias) + blocks.begin * tap_bytes;
  if (args.input_ring == 0) args.input += blocks.begin * args.input_block;
  args.matrix += blocks.begin / per_line * args.matrix_block;
  args.channels = (blocks.end - blocks.begin) * kPanel;
  return args;
}

}  // namespace

void Network::find_flows(Layout& layout, int value) const {
  layout.flow_end.resize(layers_.size());
  layout.flow_images.assign(layers_.size(), 0);
  layout.in_ring.assign(channels_.size(), false);
  for (std::size_t i = 0; i < layers_.size(); ++i) layout.flow_end[i] = static_cast<int>(i);
  if (!kernels_->interleaves) return;
  std::vector<int> uses(channels_.size(), 0);
  for (int i = 0; i < value; ++i) {
    ++uses[index_of(layers_[index_of(i)].input)];
    if (layers_[index_of(i)].residual >= 0) ++uses[index_of(layers_[index_of(i)].residual)];
  }
  const auto matrix_bytes = [&](int i, int images) {
    const Layer& layer = layers_[index_of(i)];
    return flow_block(layout.windows[index_of(i)], images) * ceil_div(layer.depth, lane_count(matrix_type(layer)));
  };
  const auto fits = [&](int i) {
    return layers_[index_of(i)].kind == Kind::separable && matrix_bytes(i, 1) <= 1 << 20;
  };
  for (int begin = 0; begin < value;) {
    int end = begin;
    while (fits(end) && end + 1 < value && fits(end + 1) &&
           layers_[index_of(end + 1)].input == layers_[index_of(end)].output &&
           layers_[index_of(end + 1)].in_bytes == layers_[index_of(end)].in_bytes)
      ++end;
    if (end > begin) {
      // So many images that the least is moved for each: the weights once for all, and what does not fit twice.
      int images = 1;
      std::int64_t best = 0;
      for (int n = 1; n <= std::max(layout.images, 1); ++n) {
        std::int64_t moved = 0, largest = 0;
        for (int k = begin; k <= end; ++k) {
          const std::int64_t both = matrix_bytes(k, n) + (k < end ? matrix_bytes(k + 1, n) : 0);
          moved += static_cast<std::int64_t>(layers_[index_of(k)].weights.size());
          moved += 2 * std::max<std::int64_t>(both - kKeptBytes, 0);
          largest = std::max(largest, matrix_bytes(k, n));
        }
        if (n > 1 && largest > kFlowBytes) break;
        if (n == 1 || moved / n < best) {
          images = n;
          best = moved / n;
        }
      }
      images = ceil_div(std::max(layout.images, 1), ceil_div(std::max(layout.images, 1), images));
      for (int k = begin; k <= end; ++k) {
        layout.flow_end[index_of(k)] = end;
        layout.flow_images[index_of(k)] = images;
        layout.matrix_bytes = std::max(layout.matrix_bytes, static_cast<std::size_t>(matrix_bytes(k, images)));
        if (k == end || uses[index_of(layers_[index_of(k)].output)] > 1) continue;
        layout.in_ring[index_of(layers_[index_of(k)].output)] = true;
        const std::int64_t ring = 2 * flow_block(layout.windows[index_of(k)], images);
        layout.ring_bytes = std::max(layout.ring_bytes, static_cast<std::size_t>(ring));
      }
    }
    begin = end + 1;
  }
}

void Network::run_flow(const Layout& layout, int begin, std::byte* arena, const Images& images, Span span,
                       Worker& worker, std::byte* const* matrices, Part part, Barrier* barrier) const {
  const int end = layout.flow_end[index_of(begin)];
  const Kernels& kernels = *worker.kernels;
  const int count = span.count;
  const LayerKernels own = kernels_of(layers_[index_of(begin)], kernels);  // of all of the flow: see find_flows
  const int per_line = lane_count(matrix_type(layers_[index_of(begin)])) / kPanel;
  // This thread's panels: of each line of a matrix all.
  const auto share_of = [&](int channels) {
    const int panels = panels_of(channels);
    const Range lines = share(ceil_div(panels, per_line), part.index, part.count);
    return Range{lines.begin * per_line, std::min(lines.end * per_line, panels)};
  };
  const auto rows_at = [&](int k) {
    const int rows = count * layout.windows[index_of(k)].out_height;
    return rows_of(layers_[index_of(k)], layout, arena, images, span.first, {0, rows});
  };
  // The depthwise convolution that fills this layer's matrix.
  const auto filler = [&](int k, Range blocks) {
    const Layer& layer = layers_[index_of(k)];
    const Window& window = layout.windows[index_of(k)];
    ProducerArgs args = producer_for(layer, window, rows_at(k), worker);
    if (layout.in_ring[index_of(layer.input)]) {
      args.input = worker.ring.data();
      args.input_block = flow_block(layout.windows[index_of(k - 1)], count);
      args.input_ring = 2;
    }
    args.rows = count * window.out_height;
    args.matrix = matrices[(k - begin) % 2];
    args.matrix_block = flow_block(window, count);
    return blocks_of(args, blocks, kernels.half_filters, per_line);
  };
  const auto meet = [&] {
    if (barrier != nullptr) barrier->wait();
  };
  own.depthwise(filler(begin, share_of(layers_[index_of(begin)].in_channels)));
  meet();
  for (int k = begin; k <= end; ++k) {
    const Layer& layer = layers_[index_of(k)];
    const Window& window = layout.windows[index_of(k)];
    const Rows rows = rows_at(k);
    const Range panels = share_of(layer.out_channels);
    MultiplyArgs product = product_for(layer, rows, worker);
    product.matrix = matrices[(k - begin) % 2];
    product.matrix_block = flow_block(window, count);
    product.pixels = count * window.out_height * window.out_width;
    product.image_pixels = window.out_height * window.out_width;
    product.first_panel = panels.begin;
    product.panels = panels.end - panels.begin;
    product.output = rows.output.data;
    product.residual = rows.residual.data;
    if (layout.in_ring[index_of(layer.output)]) {
      product.output = worker.ring.data();
      product.output_block = product.matrix_block;
      product.output_ring = 2;
    }
    ProducerArgs next;
    if (k < end) {
      const Layer& after = layers_[index_of(k + 1)];
      next = filler(k + 1, panels);
      product.beside = &next;
      product.follows = true;
      product.next_weights =
          after.weights.data() + share_of(after.out_channels).begin * after.panel_bytes;
    }
    own.multiply(product);
    meet();
  }
}

}  // namespace xception
