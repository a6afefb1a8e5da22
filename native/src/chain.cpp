// Layers that follow each other on large maps, computed together: a few rows of the last one need a few more of the one
// before it, and so on back to the first, so that what lies between them stays in the cache and never becomes a map.
#include <algorithm>
#include <cstring>

#include "network.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

// Smaller maps need no chain. A chain saves their way through the third-level cache, at the price of the rows that each
// thread computes for itself at its border (a sixth of three layers of 19 rows on two threads), and of short products: a
// row of 19 pixels reads all weights. Where matrix units make products quick, the way counts; else the price does.
constexpr std::int64_t kLargeMap = 4 << 20;
constexpr std::int64_t kLargeMapBesideTiles = 512 << 10;
constexpr int kPixelsAtATime = 300;
constexpr std::int64_t kBandBytes = 768 << 10;  // of a second-level cache of a megabyte or two

bool goes_by_rows(Kind kind) {
  return kind != Kind::load && kind != Kind::reduce && kind != Kind::linear;
}

// How many input rows that many neighbouring output rows read.
int rows_read(const Window& window, int rows) {
  return std::min((rows - 1) * window.stride + (window.kernel - 1) * window.dilation + 1, window.in_height);
}

// The input rows that they are.
Range rows_for(const Window& window, Range rows) {
  const int first = rows.begin * window.stride - window.pad_top;
  const int last = (rows.end - 1) * window.stride - window.pad_top + (window.kernel - 1) * window.dilation + 1;
  return {std::clamp(first, 0, window.in_height), std::clamp(last, 0, window.in_height)};
}

// Bytes of a line through all channel blocks of a value.
std::int64_t row_bytes(const Place& place, int lanes) {
  const int blocks = panels_of(place.channels) * (kPanel / lanes);
  return static_cast<std::int64_t>(place.width) * kLineBytes * blocks;
}

}  // namespace

// What lies between the layers, for so many rows of the last one; also notes the rows of each band.
std::int64_t Network::band_bytes(Layout& layout, int begin, int end, int rows) const {
  std::int64_t bytes = 0;
  for (int k = end; k > begin; --k) {
    rows = rows_read(layout.windows[index_of(k)], rows);
    layout.band_rows[index_of(k - 1)] = rows;
    const Place& between = layout.places[index_of(layers_[index_of(k - 1)].output)];
    bytes += rows * row_bytes(between, lane_count(type_)) + 64 * kLineBytes;
  }
  return bytes;
}

void Network::find_chains(Layout& layout, int value) const {
  layout.chain_end.resize(layers_.size());
  layout.band_rows.assign(layers_.size(), 0);
  layout.chain_rows.assign(layers_.size(), 1);
  for (std::size_t i = 0; i < layers_.size(); ++i) layout.chain_end[i] = static_cast<int>(i);
  std::vector<int> uses(channels_.size(), 0);
  for (int i = 0; i < value; ++i) {
    ++uses[index_of(layers_[index_of(i)].input)];
    if (layers_[index_of(i)].residual >= 0) ++uses[index_of(layers_[index_of(i)].residual)];
  }
  const int lanes = lane_count(type_);
  const std::int64_t large = kernels_->interleaves ? kLargeMapBesideTiles : kLargeMap;
  for (int begin = 0; begin < value;) {
    int end = begin;
    while (end + 1 < value && layout.flow_images[index_of(end)] == 0 && layout.flow_images[index_of(end + 1)] == 0 &&
           goes_by_rows(layers_[index_of(end)].kind) && goes_by_rows(layers_[index_of(end + 1)].kind)) {
      const int between = layers_[index_of(end)].output;
      const Place& place = layout.places[index_of(between)];
      if (layers_[index_of(end + 1)].input != between || uses[index_of(between)] != 1) break;
      if (layers_[index_of(end)].residual >= 0) break;  // only the last one has a shortcut to add
      if (place.height * row_bytes(place, lanes) < large) break;
      ++end;
    }
    // The longest beginning whose bands fit; and then, for tiles of 16 pixels, as many rows at a time as fit.
    for (; end > begin && band_bytes(layout, begin, end, 1) > kBandBytes; --end) {
    }
    if (end > begin) {
      const Window& last = layout.windows[index_of(end)];
      int rows = kernels_->interleaves ? std::clamp(kPixelsAtATime / last.out_width, 1, last.out_height) : 1;
      while (rows > 1 && band_bytes(layout, begin, end, rows) > kBandBytes) --rows;
      layout.chain_rows[index_of(begin)] = rows;
      layout.band_bytes = std::max(layout.band_bytes, static_cast<std::size_t>(band_bytes(layout, begin, end, rows)));
    }
    for (int k = begin; k <= end; ++k) layout.chain_end[index_of(k)] = end;
    begin = end + 1;
  }
}

namespace {

// The rows of a value that are there.
struct Band {
  std::byte* data = nullptr;
  std::int64_t block = 0;
  int blocks = 0, width = 0;
  int begin = 0, end = 0;

  std::int64_t bytes(int rows) const { return static_cast<std::int64_t>(rows) * width * kLineBytes; }

  // Forget the rows before `row`.
  void drop(int row) {
    if (row >= end) {
      begin = end = row;
      return;
    }
    if (row <= begin) return;
    for (int b = 0; b < blocks; ++b) {
      std::byte* first = data + b * block;
      std::memmove(first, first + bytes(row - begin), static_cast<std::size_t>(bytes(end - row)));
    }
    begin = row;
  }

  View view() const { return {data - bytes(begin), block}; }
};

}  // namespace

void Network::run_chain(const Layout& layout, int begin, std::byte* arena, const Images& images, Span span,
                        Worker& worker, Part part) const {
  const int end = layout.chain_end[index_of(begin)];
  const int lanes = lane_count(type_);
  std::vector<Band> bands(index_of(end - begin));
  std::byte* free = worker.bands.data();
  for (int k = begin; k < end; ++k) {
    const Place& place = layout.places[index_of(layers_[index_of(k)].output)];
    Band& band = bands[index_of(k - begin)];
    band.data = free;
    band.width = place.width;
    band.blocks = panels_of(place.channels) * (kPanel / lanes);
    band.block = spread(band.bytes(layout.band_rows[index_of(k)]));
    free += band.blocks * band.block;
  }
  const Place& in = layout.places[index_of(layers_[index_of(begin)].input)];
  const Place& out = layout.places[index_of(layers_[index_of(end)].output)];

  const auto total = span.count * out.height;
  const Range mine = share(total, part.index, part.count);
  const int rows_at_a_time = layout.chain_rows[index_of(begin)];

  // Some rows of the last layer, and what each layer has to compute for them that is not there yet.
  struct Step {
    int image = 0, end_row = 0;  // the last layer's row behind them, counted over all images
    bool fresh = false;          // nothing is there yet
    std::vector<Range> rows;
  };
  std::vector<int> reach(bands.size(), 0);  // each band's end
  const auto plan = [&](int row, Step& step) {
    step.image = row / out.height;
    step.fresh = row == mine.begin || row % out.height == 0;
    step.end_row = std::min({row + rows_at_a_time, mine.end, (step.image + 1) * out.height});
    if (step.fresh) std::fill(reach.begin(), reach.end(), 0);
    step.rows.assign(index_of(end - begin + 1), Range{0, 0});
    const int first_row = step.image * out.height;
    step.rows[index_of(end - begin)] = {row - first_row, step.end_row - first_row};
    for (int k = end; k > begin; --k) {
      const Range read = rows_for(layout.windows[index_of(k)], step.rows[index_of(k - begin)]);
      int& there = reach[index_of(k - 1 - begin)];
      if (there >= read.end) break;
      step.rows[index_of(k - 1 - begin)] = {std::max(there, read.begin), read.end};
      there = read.end;
    }
  };
  const auto views_of = [&](int k, const Step& step) {
    const Layer& layer = layers_[index_of(k)];
    const Range range = step.rows[index_of(k - begin)];
    Rows rows = rows_of(layer, layout, arena, images, span.first, {range.begin, range.end - range.begin});
    const std::int64_t in_pixels = static_cast<std::int64_t>(step.image) * in.height * in.width;
    const std::int64_t out_bytes = static_cast<std::int64_t>(step.image) * out.height * out.width * kLineBytes;
    if (k == begin)
      rows.input.data += layer.kind == Kind::image ? in_pixels * in.channels * static_cast<int>(sizeof(float))
                                                   : in_pixels * kLineBytes;
    else
      rows.input = bands[index_of(k - 1 - begin)].view();
    if (k == end)
      rows.output.data += out_bytes;
    else
      rows.output = bands[index_of(k - begin)].view();
    if (rows.residual.data != nullptr) rows.residual.data += out_bytes;  // the last layer's only
    return rows;
  };
  // A separable layer's depthwise convolution, if its matrix is made at once.
  const auto filler = [&](int k, const Step& step, std::byte* matrix, ProducerArgs& args) {
    const Layer& layer = layers_[index_of(k)];
    const Window& window = layout.windows[index_of(k)];
    const Range range = step.rows[index_of(k - begin)];
    const int count = range.end - range.begin;
    if (layer.kind != Kind::separable || count <= 0 || strips_of(layer, window, count) != 1) return false;
    args = producer_for(layer, window, views_of(k, step), worker);
    args.first_row = range.begin;
    args.rows = count;
    args.matrix = matrix;
    args.matrix_block = spread(static_cast<std::int64_t>(count) * window.out_width * kLineBytes);
    return true;
  };
  const bool interleaves = worker.kernels->interleaves;
  int last_product = end;  // behind it there are pools only
  while (last_product > begin && layers_[index_of(last_product)].kind == Kind::pool) --last_product;

  int prepared = -1, prepared_at = 0;  // the layer whose matrix is made already, and which of the two it is
  Step now, next;
  if (mine.begin < mine.end) plan(mine.begin, now);
  for (int row = mine.begin; row < mine.end; row = now.end_row, std::swap(now, next)) {
    if (now.end_row < mine.end) plan(now.end_row, next);
    if (now.fresh)
      for (Band& band : bands) band.begin = band.end = 0;
    for (int k = end; k > begin; --k) {
      const Range range = now.rows[index_of(k - begin)];
      if (range.begin >= range.end) continue;
      bands[index_of(k - 1 - begin)].drop(rows_for(layout.windows[index_of(k)], range).begin);
    }
    for (int k = begin; k <= end; ++k) {
      const Range range = now.rows[index_of(k - begin)];
      if (range.begin >= range.end) continue;
      const Layer& layer = layers_[index_of(k)];
      Company company;
      ProducerArgs own, other;
      const int at = prepared == k ? prepared_at : 0;
      if (interleaves && filler(k, now, worker.matrices[at].data(), own)) {
        if (prepared != k) kernels_of(layer, *worker.kernels).depthwise(own);
        company.matrix = own.matrix;
        company.matrix_block = own.matrix_block;
        prepared = -1;
        prepared_at = 1 - at;
        std::byte* matrix = worker.matrices[prepared_at].data();
        const auto alike = [&](int next_layer) { return layers_[index_of(next_layer)].in_bytes == layer.in_bytes; };
        if (k < end && alike(k + 1) && filler(k + 1, now, matrix, other)) {
          prepared = k + 1;
          company.follows = true;
        } else if (k == last_product && now.end_row < mine.end && alike(begin) && filler(begin, next, matrix, other)) {
          prepared = begin;
        }
        if (prepared >= 0) company.beside = &other;
      }
      run_rows(layer, layout.windows[index_of(k)], views_of(k, now), worker, company);
      if (k < end) bands[index_of(k - begin)].end = range.end;
    }
  }
}

}  // namespace xception
