// Running a network: which thread does what, row by row and layer by layer.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <limits>
#include <stdexcept>

#include "network.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

constexpr std::size_t kMaxLayouts = 16;
constexpr int kImagesTogether = 8;

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

}  // namespace

void Network::reserve(Worker& worker, const Layout& layout, bool arena) {
  const auto hold = [](Buffer& buffer, std::size_t bytes) {
    if (bytes > 0 && buffer.size() < bytes + kSlack) buffer = Buffer(bytes + kSlack);
  };
  if (arena) hold(worker.arena, layout.arena_bytes);
  hold(worker.matrices[0], layout.matrix_bytes);
  if (kernels_->interleaves) hold(worker.matrices[1], layout.matrix_bytes);
  hold(worker.bands, layout.band_bytes);
  hold(worker.ring, layout.ring_bytes);
  hold(worker.workspace, kWorkspace + (kernels_->in_pieces ? pieces_room(layout.matrix_bytes) : 0));
  if (worker.zero_lines < layout.zero_lines) {
    worker.zeros = Buffer(layout.zero_lines * kLineBytes);
    std::fill_n(worker.zeros.data(), worker.zeros.size(), std::byte{0});
    worker.zero_lines = layout.zero_lines;
  }
}

// What reads the layer's input, but for the rows and where the matrix goes.
ProducerArgs Network::producer_for(const Layer& layer, const Window& window, const Rows& rows,
                                   const Worker& worker) const {
  ProducerArgs producer;
  producer.window = window;
  producer.input = rows.input.data;
  producer.input_block = rows.input.block;
  producer.channels =
      layer.kind == Kind::image ? layer.in_channels : whole_lines(layer.in_channels, matrix_type(layer));
  producer.input_relu = layer.input_relu && !rows.input_rectified;
  producer.input_as_matrix = rows.input_as_matrix;
  producer.zeros = worker.zeros.data();
  if (layer.kind == Kind::separable || layer.kind == Kind::depthwise) {
    const bool halves = worker.kernels->half_filters;
    const Buffer& bias = halves ? layer.half_filter_bias : layer.filter_bias;
    producer.weights = (halves ? layer.half_filters : layer.filters).data();
    producer.bias = bias.size() > 0 ? bias.data() : nullptr;
    producer.activation = layer.middle;
  } else {
    producer.weights = layer.filters.data();
  }
  producer.zero_point = layer.zero_point;
  return producer;
}

// The product, but for its pixels.
MultiplyArgs Network::product_for(const Layer& layer, const Rows& rows, const Worker& worker) const {
  MultiplyArgs product;
  product.depth = layer.depth;
  product.out_channels = layer.out_channels;
  product.weights = layer.weights.data();
  product.panel_bytes = layer.panel_bytes;
  product.bias = reinterpret_cast<const float*>(layer.bias.data());
  product.offset = reinterpret_cast<const std::int32_t*>(layer.offset.data());
  product.scale = reinterpret_cast<const float*>(layer.scale.data());
  product.output_block = rows.output.block;
  product.residual_block = rows.residual.block;
  product.activation = rows.output_rectified ? Activation::relu : layer.activation;
  product.output_as_matrix = rows.output_as_matrix;
  product.panels = panels_of(layer.out_channels);
  product.workspace = worker.workspace.data();
  return product;
}

// In how many parts these rows' matrix is made, so that each stays in the cache.
int Network::strips_of(const Layer& layer, const Window& window, int rows) const {
  const int lines = ceil_div(layer.depth, lane_count(matrix_type(layer)));
  const std::int64_t row_bytes = static_cast<std::int64_t>(window.out_width) * kLineBytes * lines;
  return ceil_div(rows, static_cast<int>(std::clamp<std::int64_t>(matrix_limit() / row_bytes, 1, rows)));
}

void Network::run_product(const Layer& layer, const Window& window, const Rows& rows, Worker& worker,
                          const Company& company) const {
  const Kernels& kernels = *worker.kernels;
  MultiplyArgs product = product_for(layer, rows, worker);
  const bool is_matrix = layer.kind == Kind::convolution && !layer.in_bytes && window.kernel == 1 &&
                         window.stride == 1 && window.pad_top == 0 && window.pad_left == 0 &&
                         (!layer.input_relu || rows.input_rectified) &&
                         (kernels.matrix_type == kernels.type || rows.input_as_matrix) &&
                         window.out_width == window.in_width && window.out_height == window.in_height;
  const int strips = company.matrix != nullptr || company.follows ? 1 : strips_of(layer, window, rows.count);
  const ProducerArgs whole = producer_for(layer, window, rows, worker);
  // Where a strip's pixels begin in a map.
  const auto line_bytes = [&](int row) {
    const int skipped = row == 0 ? rows.skipped : 0;
    return (static_cast<std::int64_t>(rows.first + row) * window.out_width + skipped) * kLineBytes;
  };
  const auto strip_of = [&](int strip, std::byte* matrix) {
    const Range range = share(rows.count, strip, strips);
    ProducerArgs producer = whole;
    producer.first_row = rows.first + range.begin;
    producer.rows = range.end - range.begin;
    producer.matrix = matrix;
    producer.matrix_block = spread(static_cast<std::int64_t>(producer.rows) * window.out_width * kLineBytes);
    return producer;
  };
  const bool ahead = kernels.interleaves && layer.kind == Kind::separable;  // the next strip during this one
  const LayerKernels own = kernels_of(layer, kernels);
  std::byte* matrix = worker.matrices[0].data();
  for (int strip = 0; strip < strips; ++strip) {
    const Range range = share(rows.count, strip, strips);
    if (is_matrix) {
      product.matrix = rows.input.data + line_bytes(range.begin);
      product.matrix_block = rows.input.block;
    } else if (company.matrix != nullptr) {
      product.matrix = company.matrix;
      product.matrix_block = company.matrix_block;
    } else {
      const ProducerArgs producer = strip_of(strip, matrix);
      product.matrix = producer.matrix;
      product.matrix_block = producer.matrix_block;
      if (layer.kind == Kind::image)
        kernels.image(producer);
      else if (layer.kind == Kind::convolution)
        own.patches(producer);
      else if (strip == 0 || !ahead)
        own.depthwise(producer);
    }
    ProducerArgs next;
    product.beside = strip + 1 == strips ? company.beside : nullptr;
    product.follows = product.beside != nullptr && company.follows;
    if (ahead && strip + 1 < strips) {
      matrix = worker.matrices[(strip + 1) % 2].data();
      next = strip_of(strip + 1, matrix);
      product.beside = &next;
    }
    product.next_weights = strip + 1 < strips ? product.weights : nullptr;
    product.pixels = (range.end - range.begin) * window.out_width;
    if (strip == 0) product.pixels -= rows.skipped;
    if (strip == 0 && !is_matrix) product.matrix += static_cast<std::int64_t>(rows.skipped) * kLineBytes;
    if (strip + 1 == strips) product.pixels -= rows.left;
    product.output = rows.output.data + line_bytes(range.begin);
    product.residual = rows.residual.data == nullptr ? nullptr : rows.residual.data + line_bytes(range.begin);
    own.multiply(product);
  }
}

// Output rows of a layer that goes row by row.
void Network::run_rows(const Layer& layer, const Window& window, const Rows& rows, Worker& worker,
                       const Company& company) const {
  if (rows.count == 0) return;
  if (layer.kind == Kind::pool) {
    PoolArgs args;
    args.window = window;
    args.input = rows.input.data;
    args.input_block = rows.input.block;
    args.residual = rows.residual.data;
    args.residual_block = rows.residual.block;
    args.output = rows.output.data;
    args.output_block = rows.output.block;
    args.relu = layer.activation == Activation::relu;
    args.groups = panels_of(layer.out_channels) * 2;
    args.first_row = rows.first;
    args.rows = rows.count;
    return worker.kernels->pool(args);
  }
  if (layer.kind == Kind::depthwise) {
    ProducerArgs args = producer_for(layer, window, rows, worker);
    args.first_row = rows.first;
    args.rows = rows.count;
    const std::int64_t pixels = static_cast<std::int64_t>(rows.first) * window.out_width * kLineBytes;
    args.channels = whole_lines(layer.in_channels, worker.kernels->type);
    args.matrix = rows.output.data + pixels;
    args.matrix_block = rows.output.block;
    // `filter` is in floats at every level.
    args.weights = reinterpret_cast<const float*>(layer.filters.data());
    args.bias = layer.filter_bias.size() ? reinterpret_cast<const float*>(layer.filter_bias.data()) : nullptr;
    args.residual = rows.residual.data == nullptr ? nullptr : rows.residual.data + pixels;
    args.residual_block = rows.residual.block;
    return worker.kernels->filter(args);
  }
  if (layer.kind == Kind::grouped) {
    const int blocks = kPanel / lane_count(worker.kernels->type);  // of a panel's channels
    for (const Section& section : layer.sections) {
      Rows part = rows;
      part.input.data += section.first_panel_in * blocks * rows.input.block;
      part.output.data += section.first_panel * blocks * rows.output.block;
      if (rows.residual.data != nullptr) part.residual.data += section.first_panel * blocks * rows.residual.block;
      run_product(section.layer, window, part, worker, &section == &layer.sections.back() ? company : Company{});
    }
    return;
  }
  run_product(layer, window, rows, worker, company);
}

// The layer's values where they lie in the arena, from this image on; rows are counted from it.
Rows Network::rows_of(const Layer& layer, const Layout& layout, std::byte* arena, const Images& images, int first_image,
                      std::pair<int, int> range) const {
  const auto view = [&](int value) {
    const Place& place = layout.places[index_of(value)];
    const std::int64_t images_before = place.all_images ? first_image : 0;
    return View{arena + place.offset + images_before * place.height * place.width * kLineBytes, place.block};
  };
  Rows rows;
  rows.input = view(layer.input);
  rows.output = view(layer.output);
  rows.first = range.first;
  rows.count = range.second;
  // The image is only read.
  if (layer.kind == Kind::image) {
    const float* data = images.data + first_image * image_size(images);
    rows.input.data = const_cast<std::byte*>(reinterpret_cast<const std::byte*>(data));
  }
  if (layer.residual >= 0) rows.residual = view(layer.residual);
  rows.input_as_matrix = layout.as_matrix[index_of(layer.input)];
  rows.output_as_matrix = layout.as_matrix[index_of(layer.output)];
  rows.input_rectified = layout.rectified[index_of(layer.input)];
  rows.output_rectified = layout.rectified[index_of(layer.output)];
  return rows;
}

std::int64_t Network::image_size(const Images& images) const {
  return static_cast<std::int64_t>(images.height) * images.width * channels_[0];
}

std::int64_t Network::beside_size(const Images& images) const {
  return static_cast<std::int64_t>(images.beside_height) * images.beside_width * beside_channels();
}

void Network::run_layer(const Layer& layer, const Layout& layout, std::size_t index, std::byte* arena,
                        const Images& images, Span span, Worker& worker, Part part) const {
  const Place& in = layout.places[index_of(layer.input)];
  const Place& out = layout.places[index_of(layer.output)];
  switch (layer.kind) {
    case Kind::depthwise:
    case Kind::pool: {
      const Window& window = layout.windows[index];
      const Range range = share(span.count * window.out_height, part.index, part.count);
      const Rows rows = rows_of(layer, layout, arena, images, span.first, {range.begin, range.end - range.begin});
      return run_rows(layer, window, rows, worker);
    }
    case Kind::image:
    case Kind::convolution:
    case Kind::grouped:
    case Kind::separable: {
      // By pixels: half of 19 rows is 10 rows for somebody. What a product reads is made for whole rows all the same.
      const Window& window = layout.windows[index];
      const int width = window.out_width;
      const Range pixels = share(span.count * window.out_height * width, part.index, part.count);
      const Range range{pixels.begin / width, ceil_div(pixels.end, width)};
      if (pixels.begin == pixels.end) return;
      Rows rows = rows_of(layer, layout, arena, images, span.first, {range.begin, range.end - range.begin});
      rows.skipped = pixels.begin - range.begin * width;
      rows.left = range.end * width - pixels.end;
      return run_rows(layer, window, rows, worker);
    }
    case Kind::load: {
      const Range pixels = share(span.count * out.height * out.width, part.index, part.count);
      CopyArgs args;
      args.plain = const_cast<float*>(layer.beside ? images.beside + span.first * beside_size(images)
                                                   : images.data + span.first * image_size(images));
      args.blocks = rows_of(layer, layout, arena, images, span.first, {0, 0}).output.data;
      args.block = out.block;
      args.channels = layer.out_channels;
      args.first_pixel = pixels.begin;
      args.pixels = pixels.end - pixels.begin;
      return worker.kernels->load(args);
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
      return worker.kernels->reduce(args);
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
      return worker.kernels->multiply_f32(args);
    }
  }
}

// A value as float [images][pixels][channels].
void Network::fetch(const Layout& layout, int value, std::byte* arena, float* output, const Worker& worker,
                    Part part) const {
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
    return worker.kernels->unload(args);
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
  const int threads = crews_->threads();
  const Crews::Lease lease(*crews_);
  Crew& crew = *lease;
  std::vector<Worker>& workers = crew.workers;
  // Small images go through the layers together, so that weights are worth loading; and where a layout takes few of its
  // images at a time, more for the layers with the most weights.
  const int few = images_together(height, width);
  const int share_each = std::max(count / threads, 1);
  const int rounds = ceil_div(share_each, std::max(few, kImagesTogether));
  const int together = kernels_->interleaves ? share_each / rounds : std::min(few, share_each);
  const int groups = threads == 1 ? ceil_div(count, together) : latency_ ? 0 : count / together / threads * threads;
  const Layout& single = layout_for(images, 1, value);
  const Place& place = single.places[index_of(value)];
  const std::int64_t output_size = static_cast<std::int64_t>(place.channels) * place.height * place.width;
  const Kernels& preferred = filters_fit_ || wide_kernels_ == nullptr ? *kernels_ : *wide_kernels_;

  // These images by these kernels, one share of the work; false where numbers became too large for them.
  const auto pass = [&](const Kernels& kernels, const Layout& layout, int first, Worker& worker, Worker& owner,
                        Part part, Barrier* barrier) {
    worker.kernels = &kernels;
    std::byte* arena = owner.arena.data();
    std::byte* const matrices[] = {owner.matrices[0].data(), owner.matrices[1].data()};
    const unsigned watch = kernels.begin_overflow_watch == nullptr ? 0 : kernels.begin_overflow_watch();
    Images mine = images;
    mine.data += first * image_size(images);
    if (mine.beside != nullptr) mine.beside += first * beside_size(images);
    for (int i = 0; i < value;) {
      const int at_a_time = layout.images_at_a_time[index_of(i)];
      int segment_end = i;
      while (segment_end < value && layout.images_at_a_time[index_of(segment_end)] == at_a_time) ++segment_end;
      for (int image = 0; image < layout.images; image += at_a_time) {
        const Span span{image, std::min(at_a_time, layout.images - image)};
        for (int k = i; k < segment_end;) {
          const int flow_end = layout.flow_end[index_of(k)], chain_end = layout.chain_end[index_of(k)];
          if (flow_end > k)
            run_flow(layout, k, arena, mine, span, worker, matrices, part, barrier);
          else if (chain_end > k)
            run_chain(layout, k, arena, mine, span, worker, part);
          else
            run_layer(layers_[index_of(k)], layout, index_of(k), arena, mine, span, worker, part);
          if (barrier != nullptr) barrier->wait();
          k = std::max(flow_end, chain_end) + 1;
        }
      }
      i = segment_end;
    }
    fetch(layout, value, arena, output + first * output_size, worker, part);
    return kernels.end_overflow_watch == nullptr || !kernels.end_overflow_watch(watch);
  };
  const auto begin_thread = [&] {
    if (kernels_->begin_thread != nullptr) kernels_->begin_thread();
  };
  const auto end_thread = [&] {
    if (kernels_->end_thread != nullptr) kernels_->end_thread();
  };

  // First as many groups as there are threads, again and again: each thread takes a group through the whole network.
  const int grouped = std::min(groups * together, count);
  if (groups > 0) {
    const Layout& layout = layout_for(images, std::min(together, count), value);
    const int rest = grouped % together;  // of one thread, the last group may be smaller
    const Layout* last = rest == 0 ? &layout : &layout_for(images, rest, value);
    for (Worker& worker : workers) {
      reserve(worker, layout, true);
      reserve(worker, *last, true);
      if (wide_kernels_ != nullptr) reserve(worker, single, true);
    }
    std::atomic<int> next{0};
    crew.team.run([&](int thread) {
      Worker& worker = workers[index_of(thread)];
      begin_thread();
      for (int group = next.fetch_add(1); group < groups; group = next.fetch_add(1)) {
        const int first = group * together;
        const Layout& mine = grouped - first < together ? *last : layout;
        if (pass(preferred, mine, first, worker, worker, {0, 1}, nullptr)) continue;
        // Each image for itself: which others it came with must not show in its numbers.
        for (int image = first; image < first + mine.images; ++image)
          if (mine.images == 1 || !pass(preferred, single, image, worker, worker, {0, 1}, nullptr))
            pass(*wide_kernels_, single, image, worker, worker, {0, 1}, nullptr);
      }
      end_thread();
    });
  }
  // What is left is less than one group for each: all threads work on the same images, layer by layer.
  const auto shared = [&](const Kernels& kernels, const Layout& layout, int first) {
    reserve(workers[0], layout, true);
    for (Worker& worker : workers) reserve(worker, layout, false);
    Barrier barrier(threads);
    std::atomic<bool> fits{true};
    crew.team.run([&](int thread) {
      begin_thread();
      Worker& worker = workers[index_of(thread)];
      if (!pass(kernels, layout, first, worker, workers[0], {thread, threads}, &barrier)) fits = false;
      end_thread();
    });
    return fits.load();
  };
  for (int first = grouped; first < count;) {
    const int left = std::min(count - first, few);
    if (!shared(preferred, layout_for(images, left, value), first))
      for (int image = first; image < first + left; ++image)
        if (left == 1 || !shared(preferred, single, image)) shared(*wide_kernels_, single, image);
    first += left;
  }
  arena_bytes_ = crew.bytes();
}

std::vector<double> Network::profile(const Images& images, int value, int repeats) {
  const std::lock_guard lock(mutex_);
  check(images, value);
  std::vector<double> seconds(index_of(value), std::numeric_limits<double>::infinity());
  Images several = images;
  several.count = std::max(images.count, 1);
  Layout layout = lay_out(several, value, /*chains=*/false);  // each layer by itself
  const Crews::Lease lease(*crews_);
  Worker& worker = (*lease).workers[0];
  reserve(worker, layout, true);
  worker.kernels = filters_fit_ || wide_kernels_ == nullptr ? kernels_ : wide_kernels_;
  if (kernels_->begin_thread != nullptr) kernels_->begin_thread();
  for (int repeat = 0; repeat < repeats && images.count > 0; ++repeat)
    for (int i = 0; i < value; ++i) {
      const double begin = thread_seconds();
      run_layer(layers_[index_of(i)], layout, index_of(i), worker.arena.data(), images, {0, images.count}, worker,
                {0, 1});
      seconds[index_of(i)] = std::min(seconds[index_of(i)], thread_seconds() - begin);
    }
  if (kernels_->end_thread != nullptr) kernels_->end_thread();
  return seconds;
}

}  // namespace xception
