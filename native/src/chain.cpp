// Layers that follow each other on large maps, computed together: a few rows of the last one need a few more of the one
// before it, and so on back to the first, so that what lies between them stays in the cache and never becomes a map.
#include <algorithm>
#include <cstring>

#include "network.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

constexpr std::int64_t kLargeMap = 512 << 10;  // smaller ones stay in the cache by themselves
constexpr std::int64_t kBandBytes = 768 << 10;  // of a second-level cache of a megabyte or two

bool goes_by_rows(Kind kind) {
  return kind != Kind::load && kind != Kind::reduce && kind != Kind::linear;
}

// How many input rows that many neighbouring output rows read.
int rows_read(const Window& window, int rows) {
  return std::min((rows - 1) * window.stride + (window.kernel - 1) * window.dilation + 1, window.in_height);
}

// Bytes of a line through all channel blocks of a value.
std::int64_t row_bytes(const Place& place, int lanes) {
  const int blocks = panels_of(place.channels) * (kPanel / lanes);
  return static_cast<std::int64_t>(place.width) * kLineBytes * blocks;
}

}  // namespace

void Network::find_chains(Layout& layout, int value) const {
  layout.chain_end.resize(layers_.size());
  layout.band_rows.assign(layers_.size(), 0);
  for (std::size_t i = 0; i < layers_.size(); ++i) layout.chain_end[i] = static_cast<int>(i);
  std::vector<int> uses(channels_.size(), 0);
  for (int i = 0; i < value; ++i) {
    ++uses[index_of(layers_[index_of(i)].input)];
    if (layers_[index_of(i)].residual >= 0) ++uses[index_of(layers_[index_of(i)].residual)];
  }
  const int lanes = lane_count(type_);
  for (int begin = 0; begin < value;) {
    int end = begin;
    while (end + 1 < value && goes_by_rows(layers_[index_of(end)].kind) && goes_by_rows(layers_[index_of(end + 1)].kind)) {
      const int between = layers_[index_of(end)].output;
      const Place& place = layout.places[index_of(between)];
      if (layers_[index_of(end + 1)].input != between || uses[index_of(between)] != 1) break;
      if (layers_[index_of(end)].residual >= 0) break;  // only the last one has a shortcut to add
      if (place.height * row_bytes(place, lanes) < kLargeMap) break;
      ++end;
    }
    // The longest beginning whose bands fit.
    for (; end > begin; --end) {
      std::int64_t bytes = 0;
      int rows = 1;
      for (int k = end; k > begin; --k) {
        rows = rows_read(layout.windows[index_of(k)], rows);
        layout.band_rows[index_of(k - 1)] = rows;
        bytes += rows * row_bytes(layout.places[index_of(layers_[index_of(k - 1)].output)], lanes) + 64 * kLineBytes;
      }
      if (bytes <= kBandBytes) {
        layout.band_bytes = std::max(layout.band_bytes, static_cast<std::size_t>(bytes));
        break;
      }
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

void Network::run_chain(const Layout& layout, int begin, std::byte* arena, const Images& images, Worker& worker,
                        Part part) const {
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

  int image = 0;
  // Rows [first, last) of layer k: into its band, or the arena for the last layer.
  const auto compute = [&](const auto& self, int k, int first, int last) -> void {
    const Layer& layer = layers_[index_of(k)];
    const Window& window = layout.windows[index_of(k)];
    Rows rows = rows_of(layer, layout, arena, images, {first, last - first});
    if (k == begin) {
      const std::int64_t pixels = static_cast<std::int64_t>(image) * in.height * in.width;
      rows.input.data += layer.kind == Kind::image ? pixels * in.channels * static_cast<int>(sizeof(float)) : pixels * kLineBytes;
    } else {
      Band& band = bands[index_of(k - 1 - begin)];
      const int read_first = std::clamp(first * window.stride - window.pad_top, 0, window.in_height);
      const int reach = (window.kernel - 1) * window.dilation + 1;
      const int read_last = std::clamp((last - 1) * window.stride - window.pad_top + reach, 0, window.in_height);
      band.drop(read_first);
      if (band.end < read_last) {
        self(self, k - 1, band.end, read_last);
        band.end = read_last;
      }
      rows.input = band.view();
    }
    const std::int64_t pixels = static_cast<std::int64_t>(image) * out.height * out.width * kLineBytes;
    if (k == end) {
      rows.output.data += pixels;
    } else {
      rows.output = bands[index_of(k - begin)].view();
    }
    if (rows.residual.data != nullptr) rows.residual.data += pixels;  // the last layer's only
    run_rows(layer, window, rows, worker);
  };

  const std::int64_t total = static_cast<std::int64_t>(layout.images) * out.height;
  const auto from = static_cast<int>(total * part.index / part.count);
  const auto to = static_cast<int>(total * (part.index + 1) / part.count);
  for (int row = from; row < to; ++row) {
    if (row == from || row % out.height == 0) {
      image = row / out.height;
      for (Band& band : bands) band.begin = band.end = 0;
    }
    compute(compute, end, row % out.height, row % out.height + 1);
  }
}

}  // namespace xception
