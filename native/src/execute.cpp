// Running a network: sizes, memory, and which thread does what.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <limits>
#include <stdexcept>

#include "halves.hpp"
#include "network.hpp"

namespace xception {

namespace {

// The matrix of one strip: it should stay in a core's second-level cache beside a panel of weights.
constexpr std::int64_t kMatrixBytes = 256 << 10;
constexpr std::size_t kMaxLayouts = 16;
constexpr std::int64_t kMaxPixels = 1 << 28;
constexpr int kPixelsTogether = 90'000;  // one image of 299 x 299
// Tiles read whole: up to 31 lines behind the last pixel.
constexpr std::size_t kSlack = 32 * kLineBytes;

int ceil_div(int a, int b) { return (a + b - 1) / b; }
std::size_t index_of(int i) { return static_cast<std::size_t>(i); }

// Of processor time where the system counts it a thread, so that other programs do not show.
double thread_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

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

// Lines whose distance is a multiple of a page would fight for the same cache sets.
std::int64_t spread(std::int64_t bytes) { return bytes % 1024 == 0 ? bytes + kLineBytes : bytes; }

struct Range {
  int begin, end;
};
Range share(int total, int index, int count) {
  return {static_cast<int>(static_cast<std::int64_t>(total) * index / count),
          static_cast<int>(static_cast<std::int64_t>(total) * (index + 1) / count)};
}

// Channels that a producer handles: all lanes of the matrix's lines, so that none is left unwritten.
int whole_lines(int channels, Type type) { return ceil_div(channels, lane_count(type)) * lane_count(type); }
int panels_of(int channels) { return ceil_div(channels, kPanel); }

}  // namespace

Layout Network::lay_out(const Images& given, int value) const {
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
      place.block = static_cast<std::int64_t>(images) * kGroup * 4;
      place.bytes = index_of(panels_of(layer.out_channels) * 2) * static_cast<std::size_t>(place.block);
    } else if (layer.kind == Kind::load) {
      place.height = layer.beside ? given.beside_height : height;
      place.width = layer.beside ? given.beside_width : width;
      const std::int64_t pixels = static_cast<std::int64_t>(images) * place.height * place.width;
      place.block = spread(pixels * kLineBytes);
      place.bytes = index_of(panels_of(layer.out_channels) * (kPanel / lanes)) * static_cast<std::size_t>(place.block);
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
      place.block = spread(static_cast<std::int64_t>(images) * y.size * x.size * kLineBytes);
      place.bytes = index_of(panels_of(layer.out_channels) * (kPanel / lanes)) * static_cast<std::size_t>(place.block);
      out.zero_lines = std::max(out.zero_lines, index_of(in.width));
      if (layer.kind != Kind::pool && layer.kind != Kind::depthwise) {
        const std::int64_t lines = ceil_div(layer.depth, lane_count(kernels_->matrix_type)) + 1;
        const std::int64_t row = spread(static_cast<std::int64_t>(x.size) * kLineBytes + kLineBytes) * lines;
        out.matrix_bytes = std::max(out.matrix_bytes, static_cast<std::size_t>(std::max(row, kMatrixBytes + 2 * row)));
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
  // Each value at the lowest place that is free while it is needed.
  for (int v = 1; v <= value; ++v) {
    Place& place = out.places[index_of(v)];
    std::vector<const Place*> taken;
    for (int u = 1; u < v; ++u)
      if (last_use[index_of(u)] >= v - 1) taken.push_back(&out.places[index_of(u)]);  // v comes from layer v - 1
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

void Network::reserve(Worker& worker, const Layout& layout, bool arena) {
  if (arena && worker.arena.size() < layout.arena_bytes) worker.arena = Buffer(layout.arena_bytes + kSlack);
  if (worker.matrix.size() < layout.matrix_bytes) worker.matrix = Buffer(layout.matrix_bytes + kSlack);
  if (worker.zero_lines < layout.zero_lines) {
    worker.zeros = Buffer(layout.zero_lines * kLineBytes);
    std::fill_n(worker.zeros.data(), worker.zeros.size(), std::byte{0});
    worker.zero_lines = layout.zero_lines;
  }
  if (worker.workspace.size() < kWorkspace) worker.workspace = Buffer(kWorkspace);
}

// What reads the layer's input, but for the rows and where the matrix goes.
ProducerArgs Network::producer_for(const Layer& layer, const Layout& layout, std::size_t index, std::byte* arena,
                                   const Images& images, const Worker& worker) const {
  const Window& window = layout.windows[index];
  const Place& in = layout.places[index_of(layer.input)];
  ProducerArgs producer;
  producer.window = window;
  producer.input = layer.kind == Kind::image ? reinterpret_cast<const std::byte*>(images.data) : arena + in.offset;
  producer.input_block = in.block;
  producer.channels = layer.kind == Kind::image ? layer.in_channels : whole_lines(layer.in_channels, kernels_->matrix_type);
  producer.input_relu = layer.input_relu;
  producer.zeros = worker.zeros.data();
  if (layer.kind == Kind::separable || layer.kind == Kind::depthwise) {
    producer.weights = reinterpret_cast<const float*>(layer.filters.data());
    producer.bias = layer.filter_bias.size() ? reinterpret_cast<const float*>(layer.filter_bias.data()) : nullptr;
    producer.activation = layer.middle;
  }
  return producer;
}

void Network::run_product(const Layer& layer, const Layout& layout, std::size_t index, std::byte* arena,
                          const Images& images, Worker& worker, Part part) const {
  const Window& window = layout.windows[index];
  const Place& in = layout.places[index_of(layer.input)];
  const Place& out = layout.places[index_of(layer.output)];
  const Place* residual = layer.residual < 0 ? nullptr : &layout.places[index_of(layer.residual)];
  const Range rows = share(layout.images * window.out_height, part.index, part.count);
  const int count = rows.end - rows.begin;
  if (count == 0) return;

  MultiplyArgs product;
  product.depth = layer.depth;
  product.out_channels = layer.out_channels;
  product.weights = layer.weights.data();
  product.panel_bytes = layer.panel_bytes;
  product.bias = reinterpret_cast<const float*>(layer.bias.data());
  product.output_block = out.block;
  product.activation = layer.activation;
  product.panels = panels_of(layer.out_channels);
  product.workspace = worker.workspace.data();
  if (residual != nullptr) product.residual_block = residual->block;
  const auto multiply = [&](int first_row, int row_count) {
    const std::int64_t pixel = static_cast<std::int64_t>(first_row) * window.out_width;
    product.pixels = row_count * window.out_width;
    product.output = arena + out.offset + pixel * kLineBytes;
    if (residual != nullptr) product.residual = arena + residual->offset + pixel * kLineBytes;
    kernels_->multiply(product);
  };

  const bool is_matrix = layer.kind == Kind::convolution && window.kernel == 1 && window.stride == 1 &&
                         window.pad_top == 0 && window.pad_left == 0 && !layer.input_relu &&
                         kernels_->matrix_type == type_ && window.out_width == window.in_width &&
                         window.out_height == window.in_height;
  const int lines = ceil_div(layer.depth, lane_count(kernels_->matrix_type));
  const std::int64_t row_bytes = static_cast<std::int64_t>(window.out_width) * kLineBytes * lines;
  const int strips = ceil_div(count, static_cast<int>(std::clamp<std::int64_t>(kMatrixBytes / row_bytes, 1, count)));

  ProducerArgs producer = producer_for(layer, layout, index, arena, images, worker);
  producer.matrix = worker.matrix.data();
  for (int strip = 0; strip < strips; ++strip) {
    const Range part_rows = share(count, strip, strips);
    const int first = rows.begin + part_rows.begin, strip_rows = part_rows.end - part_rows.begin;
    if (is_matrix) {
      product.matrix = arena + in.offset + static_cast<std::int64_t>(first) * window.out_width * kLineBytes;
      product.matrix_block = in.block;
    } else {
      producer.first_row = first;
      producer.rows = strip_rows;
      producer.matrix_block = spread(static_cast<std::int64_t>(strip_rows) * window.out_width * kLineBytes);
      product.matrix = producer.matrix;
      product.matrix_block = producer.matrix_block;
      if (layer.kind == Kind::separable)
        kernels_->depthwise(producer);
      else if (layer.kind == Kind::image)
        kernels_->image(producer);
      else
        kernels_->patches(producer);
    }
    multiply(first, strip_rows);
  }
}

void Network::run_layer(const Layer& layer, const Layout& layout, std::size_t index, std::byte* arena,
                        const Images& images, Worker& worker, Part part) const {
  const Place& in = layout.places[index_of(layer.input)];
  const Place& out = layout.places[index_of(layer.output)];
  switch (layer.kind) {
    case Kind::image:
    case Kind::convolution:
    case Kind::separable:
      return run_product(layer, layout, index, arena, images, worker, part);
    case Kind::load: {
      const Range pixels = share(layout.images * out.height * out.width, part.index, part.count);
      CopyArgs args;
      args.plain = const_cast<float*>(layer.beside ? images.beside : images.data);
      args.blocks = arena + out.offset;
      args.block = out.block;
      args.channels = layer.out_channels;
      args.first_pixel = pixels.begin;
      args.pixels = pixels.end - pixels.begin;
      return kernels_->load(args);
    }
    case Kind::depthwise: {
      const Window& window = layout.windows[index];
      const Range rows = share(layout.images * window.out_height, part.index, part.count);
      ProducerArgs args = producer_for(layer, layout, index, arena, images, worker);
      args.first_row = rows.begin;
      args.rows = rows.end - rows.begin;
      args.matrix = arena + out.offset + static_cast<std::int64_t>(rows.begin) * window.out_width * kLineBytes;
      args.matrix_block = out.block;
      return kernels_->depthwise(args);
    }
    case Kind::pool: {
      const Window& window = layout.windows[index];
      const Range rows = share(layout.images * window.out_height, part.index, part.count);
      PoolArgs args;
      args.window = window;
      args.input = arena + in.offset;
      args.input_block = in.block;
      if (layer.residual >= 0) {
        args.residual = arena + layout.places[index_of(layer.residual)].offset;
        args.residual_block = layout.places[index_of(layer.residual)].block;
      }
      args.output = arena + out.offset;
      args.output_block = out.block;
      args.groups = panels_of(layer.out_channels) * 2;
      args.first_row = rows.begin;
      args.rows = rows.end - rows.begin;
      return kernels_->pool(args);
    }
    case Kind::reduce: {
      const Range groups = share(panels_of(layer.out_channels) * 2, part.index, part.count);
      ReduceArgs args;
      args.input = arena + in.offset;
      args.input_block = in.block;
      args.pixels = in.height * in.width;
      args.images = layout.images;
      args.maximum = layer.maximum;
      args.output = reinterpret_cast<float*>(arena + out.offset);
      args.first_group = groups.begin;
      args.groups = groups.end - groups.begin;
      return kernels_->reduce(args);
    }
    case Kind::linear: {
      const Range panels = share(panels_of(layer.out_channels), part.index, part.count);
      MultiplyArgs args;
      args.matrix = arena + in.offset;
      args.matrix_block = in.block;
      args.pixels = layout.images;
      args.depth = layer.depth;
      args.out_channels = layer.out_channels;
      args.weights = layer.weights.data();
      args.panel_bytes = layer.panel_bytes;
      args.bias = reinterpret_cast<const float*>(layer.bias.data());
      args.output = arena + out.offset;
      args.output_block = out.block;
      args.activation = layer.activation;
      args.first_panel = panels.begin;
      args.panels = panels.end - panels.begin;
      args.workspace = worker.workspace.data();
      return kernels_->multiply_f32(args);
    }
  }
}

// A value as float [images][pixels][channels].
void Network::fetch(const Layout& layout, int value, std::byte* arena, float* output, Part part) const {
  const Place& place = layout.places[index_of(value)];
  const Range pixels = share(layout.images * place.height * place.width, part.index, part.count);
  if (!reduced_[index_of(value)]) {
    CopyArgs args;
    args.plain = output;
    args.blocks = arena + place.offset;
    args.block = place.block;
    args.channels = place.channels;
    args.first_pixel = pixels.begin;
    args.pixels = pixels.end - pixels.begin;
    return kernels_->unload(args);
  }
  for (int image = pixels.begin; image < pixels.end; ++image)
    for (int c = 0; c < place.channels; ++c) {
      const std::byte* in = arena + place.offset + (c / kGroup) * place.block + (image * kGroup + c % kGroup) * 4;
      output[static_cast<std::int64_t>(image) * place.channels + c] = *reinterpret_cast<const float*>(in);
    }
}

void Network::run(const Images& images, int value, float* output) {
  const std::lock_guard lock(mutex_);
  if (layouts_.size() > kMaxLayouts) layouts_.clear();  // here, where nobody holds one
  check(images, value);
  const int count = images.count, height = images.height, width = images.width;
  if (count == 0) return;
  const std::int64_t image_size = static_cast<std::int64_t>(height) * width * channels_[0];
  std::int64_t beside_size = 0;
  for (const Layer& layer : layers_)
    if (layer.beside)
      beside_size = static_cast<std::int64_t>(images.beside_height) * images.beside_width * layer.out_channels;
  const int threads = team_.size();
  // Small images go through the layers together, so that weights are worth loading.
  const int few = std::max(kPixelsTogether / std::max(height * width, 1), 1);
  const int together = std::min(few, std::max(count / threads, 1));
  const int groups = threads == 1 ? ceil_div(count, together) : latency_ ? 0 : count / together / threads * threads;
  const auto run_layers = [&](const Layout& layout, std::byte* arena, int first, Worker& worker, Part part,
                              Barrier* barrier) {
    Images mine = images;
    mine.data += first * image_size;
    if (mine.beside != nullptr) mine.beside += first * beside_size;
    for (int i = 0; i < value; ++i) {
      run_layer(layers_[index_of(i)], layout, index_of(i), arena, mine, worker, part);
      if (barrier != nullptr) barrier->wait();
    }
  };
  const auto begin_thread = [&] {
    if (kernels_->begin_thread != nullptr) kernels_->begin_thread();
  };
  const auto end_thread = [&] {
    if (kernels_->end_thread != nullptr) kernels_->end_thread();
  };
  const Layout& whole = layout_for(images, 1, value);
  const Place& place = whole.places[index_of(value)];
  const std::int64_t output_size = static_cast<std::int64_t>(place.channels) * place.height * place.width;

  // First as many groups as there are threads, again and again: each thread takes a group through the whole network.
  const int grouped = std::min(groups * together, count);
  if (groups > 0) {
    const Layout& layout = layout_for(images, std::min(together, count), value);
    const int rest = grouped % together;  // of one thread, the last group may be smaller
    const Layout* last = rest == 0 ? &layout : &layout_for(images, rest, value);
    for (Worker& worker : workers_) {
      reserve(worker, layout, true);
      reserve(worker, *last, true);
    }
    std::atomic<int> next{0};
    team_.run([&](int thread) {
      Worker& worker = workers_[index_of(thread)];
      begin_thread();
      for (int group = next.fetch_add(1); group < groups; group = next.fetch_add(1)) {
        const int first = group * together;
        const Layout& mine = grouped - first < together ? *last : layout;
        run_layers(mine, worker.arena.data(), first, worker, {0, 1}, nullptr);
        fetch(mine, value, worker.arena.data(), output + first * output_size, {0, 1});
      }
      end_thread();
    });
  }
  // What is left is less than one group for each: all threads work on the same images, layer by layer.
  for (int first = grouped; first < count;) {
    const int left = std::min(count - first, few);
    const Layout& layout = layout_for(images, left, value);
    reserve(workers_[0], layout, true);
    for (Worker& worker : workers_) reserve(worker, layout, false);
    Barrier barrier(threads);
    team_.run([&](int thread) {
      begin_thread();
      std::byte* arena = workers_[0].arena.data();
      run_layers(layout, arena, first, workers_[index_of(thread)], {thread, threads}, &barrier);
      fetch(layout, value, arena, output + first * output_size, {thread, threads});
      end_thread();
    });
    first += left;
  }
}

std::vector<double> Network::profile(const Images& images, int value, int repeats) {
  const std::lock_guard lock(mutex_);
  check(images, value);
  std::vector<double> seconds(index_of(value), std::numeric_limits<double>::infinity());
  const Layout& layout = layout_for(images, std::max(images.count, 1), value);
  Worker& worker = workers_[0];
  reserve(worker, layout, true);
  if (kernels_->begin_thread != nullptr) kernels_->begin_thread();
  for (int repeat = 0; repeat < repeats && images.count > 0; ++repeat)
    for (int i = 0; i < value; ++i) {
      const double begin = thread_seconds();
      run_layer(layers_[index_of(i)], layout, index_of(i), worker.arena.data(), images, worker, {0, 1});
      seconds[index_of(i)] = std::min(seconds[index_of(i)], thread_seconds() - begin);
    }
  if (kernels_->end_thread != nullptr) kernels_->end_thread();
  return seconds;
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
