// Units forward: the layouts of their memory, the packing of weights, and what ends a module.
#include "train.hpp"

#include <algorithm>
#include <stdexcept>

#include "halves.hpp"
#include "train_pieces.hpp"

namespace xception {

namespace {

constexpr std::int64_t kStripBytes = 384 << 10;  // of matrix lines: they are read for each panel of weights

const TrainKernels* train_kernels_for(const std::string& level, Type type, Type matrix) {
#if defined(XCEPTION_HAS_X86_KERNELS)
  if (level == "amx_emulated" || level == "amx_half_emulated") return amx_emulated::train_kernels(type, matrix);
  if (level == "amx_bf16") return amx::train_kernels(type, matrix);
  if (level == "avx512_fp16" || level == "avx512_fp16_emulated") return nullptr;  // gradients are too small for it
  if (matrix == Type::bf16) return avx512_bf16::train_kernels(type, matrix);
  if (level == "avx2") return avx2::train_kernels(type, matrix);
  if (level != "scalar") return avx512::train_kernels(type, matrix);
#endif
  return level == "scalar" ? scalar::train_kernels(type, matrix) : nullptr;
}

// Maps are in the type itself, also where inference keeps them in half precision.
const Kernels& product_kernels_for(const std::string& level, Type type) {
  const Kernels* wide = wide_kernels_for(level, type);
  return wide != nullptr ? *wide : kernels_for(level, type);
}

}  // namespace

UnitTrainer::UnitTrainer(const std::string& level, Type type, int threads, const OpenMp& host)
    : level_(level), kernels_(&product_kernels_for(level, type)), train_(nullptr), type_(type), team_(threads),
      host_(host), owner_(process_id()) {
  train_ = train_kernels_for(level, type, kernels_->matrix_type);
  if (train_ == nullptr) throw std::invalid_argument("'" + level + "' has no kernels to train with in this type");
  if (threads < 1 || threads > 1024) throw std::invalid_argument("expected 1 to 1024 threads");
  workers_.resize(index_of(threads));
}

// ------------------------------------------------------------------------------------------------------ layouts

Pixels UnitTrainer::blocked(std::byte* data, int channels, std::int64_t pixels) const {
  return {.data = data, .pixel = kLineBytes, .block = spread(pixels * kLineBytes),
          .groups = lane_count(type_) / kGroup, .channels = padded_channels(channels)};
}

Pixels UnitTrainer::channels_last(std::byte* data, int channels) const {
  const int size = bytes_of(type_);
  return {.data = data, .pixel = static_cast<std::int64_t>(channels) * size, .block = kGroup * size, .groups = 1,
          .channels = channels};
}

Pixels UnitTrainer::pixels_of(const MapOf& map, int channels, std::int64_t pixels) const {
  return map.blocked ? blocked(map.data, channels, pixels) : channels_last(map.data, channels);
}

// A matrix to multiply.
Pixels UnitTrainer::lines(std::byte* data, std::int64_t pixels) const {
  return {.data = data, .pixel = kLineBytes, .block = spread(pixels * kLineBytes),
          .groups = lane_count(kernels_->matrix_type) / kGroup, .channels = 1 << 24};
}

// Groups of channels in a matrix: of whole lines.
int UnitTrainer::line_groups(int channels) const {
  const int lanes = lane_count(kernels_->matrix_type);
  return ceil_div(channels, lanes) * (lanes / kGroup);
}

std::int64_t UnitTrainer::blocked_bytes(int channels, const BatchShape& shape) const {
  const int blocks = panels_of(channels) * (kPanel / lane_count(type_));
  return blocks * spread(shape.pixels() * kLineBytes) + static_cast<std::int64_t>(kSlack);
}

// Whether whole images keep all threads at work.
bool UnitTrainer::by_images(const BatchShape& shape) const {
  constexpr int kEnough = 8;  // a thread: one more or less is little then
  return shape.images % team_.size() == 0 || shape.images >= kEnough * team_.size();
}

// What a thread takes of a batch: whole images, or rows of some.
std::vector<UnitTrainer::Strip> UnitTrainer::parts(const BatchShape& shape, int thread) const {
  const int threads = team_.size(), rows = shape.images * shape.height;
  std::vector<Strip> out;
  if (by_images(shape)) {
    const Range images = share(shape.images, thread, threads);
    if (images.end > images.begin) out.push_back({images.begin, images.end - images.begin, 0, shape.height});
    return out;
  }
  const Range mine = share(rows, thread, threads);
  for (int row = mine.begin; row < mine.end;) {
    const int image = row / shape.height, first = row % shape.height;
    const int count = std::min(mine.end - row, shape.height - first);
    out.push_back({image, 1, first, count});
    row += count;
  }
  return out;
}

// The same, an image at a time.
std::vector<UnitTrainer::Strip> UnitTrainer::parts_of_images(const BatchShape& shape, int thread) const {
  std::vector<Strip> out;
  for (const Strip& part : parts(shape, thread))
    for (int i = 0; i < part.images; ++i) out.push_back({part.image + i, 1, part.first_row, part.rows});
  return out;
}

// A part in strips whose matrix of `channels` stays in the cache.
std::vector<UnitTrainer::Strip> UnitTrainer::strips(const BatchShape& shape, int channels, const Strip& part) const {
  const std::int64_t row =
      static_cast<std::int64_t>(shape.width) * kLineBytes * ceil_div(channels, lane_count(kernels_->matrix_type));
  std::vector<Strip> out;
  if (part.rows == 0) return out;
  const auto together = static_cast<int>(std::clamp<std::int64_t>(kStripBytes / (row * part.rows), 0, part.images));
  if (together >= 1) {
    const int count = ceil_div(part.images, together);
    for (int i = 0; i < count; ++i) {
      const Range range = share(part.images, i, count);
      out.push_back({part.image + range.begin, range.end - range.begin, part.first_row, part.rows});
    }
    return out;
  }
  const int count = ceil_div(part.rows, static_cast<int>(std::clamp<std::int64_t>(kStripBytes / row, 1, part.rows)));
  for (int image = 0; image < part.images; ++image)
    for (int i = 0; i < count; ++i) {
      const Range range = share(part.rows, i, count);
      out.push_back({part.image + image, 1, part.first_row + range.begin, range.end - range.begin});
    }
  return out;
}

std::vector<UnitTrainer::Strip> UnitTrainer::strips_of_thread(const BatchShape& shape, int channels, int thread) const {
  std::vector<Strip> out;
  for (const Strip& part : parts(shape, thread))
    for (const Strip& strip : strips(shape, channels, part)) out.push_back(strip);
  return out;
}

// ------------------------------------------------------------------------------------------------------- pieces

// Room for packed weights, and a bias of zeros.
void UnitTrainer::reserve_weights(int depth, int out_channels) {
  panel_bytes_ = panel_bytes(*kernels_, depth);
  reserve(weights_, bytes_for(panels_of(out_channels) * panel_bytes_));
  if (zeros_.size() < bytes_for(padded_channels(out_channels), sizeof(float)))
    clear(zeros_, bytes_for(padded_channels(out_channels), sizeof(float)));
}

// Of a thread that multiplies matrices of so many bytes.
void UnitTrainer::reserve_workspace(std::size_t matrix, Worker& worker) const {
  reserve(worker.workspace, kWorkspace + (kernels_->in_pieces ? std::max(pieces_room(matrix), kOuterRoom) : 0));
}

// The filters [C][9] as [groups][9][16].
void UnitTrainer::pack_filters(const UnitArgs& args) {
  const int groups = line_groups(args.in_channels);
  reserve(filters_, bytes_for(groups * kTaps * kGroup, sizeof(float)));
  float* to = floats(filters_);
  for (int g = 0; g < groups; ++g)
    for (int t = 0; t < kTaps; ++t)
      for (int i = 0; i < kGroup; ++i) {
        const int channel = g * kGroup + i;
        *to++ = channel < args.in_channels ? args.filters[channel * kTaps + t] : 0.0f;
      }
}

// This thread's panels of the weights [out][in], as the product wants them; or of their transpose.
void UnitTrainer::pack(const float* weights, int out_channels, int in_channels, bool transposed, int thread) {
  const int depth = transposed ? out_channels : in_channels, out = transposed ? in_channels : out_channels;
  const auto steps = static_cast<int>(panel_bytes_ / (2 * kLineBytes));
  const Range panels = share(panels_of(out), thread, team_.size());
  for (int p = panels.begin; p < panels.end; ++p) {
    PackArgs args{.depth = depth, .steps = steps, .columns = std::min(kPanel, out - p * kPanel),
                  .panel = weights_.data() + p * panel_bytes_};
    if (transposed) {  // step k's numbers lie side by side
      args.weights = weights + p * kPanel;
      args.stride = in_channels;
      train_->pack_transposed(args);
    } else {
      args.weights = weights + static_cast<std::int64_t>(p) * kPanel * in_channels;
      args.stride = in_channels;
      train_->pack(args);
    }
  }
}

// The depthwise convolution of a strip, as a matrix.
void UnitTrainer::produce(const UnitArgs& args, const Pixels& input, const Affine& load, const Strip& strip,
                          Worker& worker, const Pixels& output, std::int64_t first_pixel) const {
  const BatchShape& shape = args.shape;
  const int groups = line_groups(args.in_channels), beside = lane_count(type_) / kGroup;
  for (int first = 0; first < groups; first += beside)
    for (int i = 0; i < strip.images * beside; ++i) {  // groups whose numbers share cache lines one after the other
      const int g = first + i % beside, image = i / beside;
      if (g >= groups) continue;
      FillArgs fill{.input = input, .group = g, .height = shape.height, .width = shape.width, .pad = args.dilation,
                    .first_row = strip.first_row, .rows = strip.rows, .scale = load.scale, .shift = load.shift,
                    .relu = load.relu, .padded = floats(worker.padded)};
      fill.first_pixel = (strip.image + image) * shape.image_pixels();
      train_->fill(fill);
      FilterArgs filter{.padded = floats(worker.padded), .filter = floats(filters_) + g * kTaps * kGroup,
                        .width = shape.width, .rows = strip.rows, .dilation = args.dilation, .output = output,
                        .group = g};
      filter.first_pixel = first_pixel + static_cast<std::int64_t>(image) * strip.rows * shape.width;
      train_->filter(filter);
    }
}

MultiplyArgs UnitTrainer::product(const Pixels& matrix, std::int64_t pixels, int depth, int out_channels,
                                  const Pixels& output, std::int64_t first_pixel, Worker& worker) const {
  MultiplyArgs args;
  args.matrix = matrix.data;
  args.matrix_block = matrix.block;
  args.pixels = static_cast<int>(pixels);
  args.depth = depth;
  args.out_channels = out_channels;
  args.weights = weights_.data();
  args.panel_bytes = panel_bytes_;
  args.bias = floats(zeros_);
  args.output = output.data + first_pixel * kLineBytes;
  args.output_block = output.block;
  args.panels = panels_of(out_channels);
  args.workspace = worker.workspace.data();
  return args;
}

// ------------------------------------------------------------------------------------------------------ forward

void UnitTrainer::forward(const UnitArgs& args, float* mean, float* variance) {
  const std::lock_guard lock(mutex_);
  const BatchShape& shape = args.shape;
  const PaddedAffine load(args.load, args.in_channels);
  const Pixels input = pixels_of(args.input, args.in_channels, shape.pixels());
  pack_filters(args);
  const auto room = [&](Worker& worker, int rows) {
    const int pad = 2 * args.dilation;
    reserve(worker.padded, bytes_for(static_cast<std::int64_t>(rows + pad) * (shape.width + pad) * kGroup, sizeof(float)));
  };
  const auto depthwise = [&](const Strip& strip, Worker& worker, const Pixels& matrix) {
    produce(args, input, load.affine, strip, worker, matrix, 0);
  };
  product_pass(shape, args.in_channels, args.out_channels, args.weights, args.z, mean, variance, room, depthwise);
}

void UnitTrainer::convolve(const ConvArgs& args, float* mean, float* variance) {
  const std::lock_guard lock(mutex_);
  const auto windows = [&](const Strip& strip, Worker&, const Pixels& matrix) { windows_of(args, strip, matrix, 0); };
  product_pass(args.shape(), args.depth(), args.out_channels, args.weights, args.z, mean, variance,
               [](Worker&, int) {}, windows);
}

void UnitTrainer::windows_of(const ConvArgs& args, const Strip& strip, const Pixels& output, std::int64_t first_pixel) const {
  WindowArgs windows{.input = channels_last(args.input, args.in_channels), .window = args.window,
                     .first_row = strip.first_row, .rows = strip.rows, .output = output, .groups = line_groups(args.depth())};
  for (int i = 0; i < strip.images; ++i) {
    windows.image = strip.image + i;
    windows.output_pixel = first_pixel + static_cast<std::int64_t>(i) * strip.rows * args.window.out_width;
    train_->windows(windows);
  }
}

// z, strip by strip: `produce` writes the strip's matrix. And z's mean and variance.
template <class Room, class Produce>
void UnitTrainer::product_pass(const BatchShape& shape, int depth, int out_channels, const float* weights, std::byte* to_z,
                               float* mean, float* variance, Room&& room, Produce&& produce) {
  reserve_weights(depth, out_channels);
  const int stride = padded_channels(out_channels), threads = team_.size();
  std::vector<std::vector<Strip>> mine(index_of(threads));
  std::vector<std::size_t> first(index_of(threads) + 1, 0);
  for (int t = 0; t < threads; ++t) {
    mine[index_of(t)] = strips_of_thread(shape, depth, t);
    first[index_of(t) + 1] = first[index_of(t)] + mine[index_of(t)].size();
    int rows = 1;
    std::int64_t pixels = 1;
    for (const Strip& strip : mine[index_of(t)]) {
      rows = std::max(rows, strip.rows);
      pixels = std::max(pixels, strip.pixels(shape));
    }
    Worker& worker = workers_[index_of(t)];
    room(worker, rows);
    const std::size_t matrix = bytes_for(line_groups(depth) * spread(pixels * kLineBytes));
    reserve(worker.left, matrix + kSlack);
    reserve_workspace(matrix, worker);
  }
  std::vector<float> sums(first.back() * 2 * index_of(stride));
  const Pixels z = blocked(to_z, out_channels, shape.pixels());

  on_threads([&](int thread, Barrier& barrier) {
    Worker& worker = workers_[index_of(thread)];
    pack(weights, out_channels, depth, false, thread);
    barrier.wait();
    float* to = sums.data() + first[index_of(thread)] * 2 * index_of(stride);
    for (const Strip& strip : mine[index_of(thread)]) {
      const std::int64_t pixels = strip.pixels(shape);
      const Pixels matrix = lines(worker.left.data(), pixels);
      produce(strip, worker, matrix);
      const std::int64_t begin = strip.first_pixel(shape);
      kernels_->multiply(product(matrix, pixels, depth, out_channels, z, begin, worker));
      MapArgs statistics{.z = z, .stride = stride, .last_group = stride / kGroup, .first_pixel = begin,
                         .pixels = static_cast<int>(pixels), .sums = to};
      train_->statistics(statistics);
      to += 2 * stride;
    }
    barrier.wait();
    // Each strip's mean and squared distances joined, pairwise and in order (Chan, Golub and LeVeque, 1979).
    const Range channels = share(out_channels, thread, threads);
    for (int c = channels.begin; c < channels.end; ++c) {
      double count = 0, centre = 0, squares = 0;
      const float* from = sums.data() + c;
      for (const std::vector<Strip>& part : mine)
        for (const Strip& strip : part) {
          const auto pixels = static_cast<double>(strip.pixels(shape));
          const double distance = from[0] / pixels - centre, total = count + pixels;
          squares += from[stride] + distance * distance * count * pixels / total;
          centre += distance * pixels / total;
          count = total;
          from += 2 * stride;
        }
      mean[c] = static_cast<float>(centre);
      variance[c] = static_cast<float>(squares / count);
    }
  });
}

void UnitTrainer::finish(const BatchShape& shape, int channels, std::byte* z, const Affine& norm,
                         const ResidualMap& residual, std::byte* output) {
  const std::lock_guard lock(mutex_);
  const PaddedAffine padded(norm, channels), other(residual.norm, channels);
  on_threads([&](int thread, Barrier&) {
    MapArgs args{.z = blocked(z, channels, shape.pixels()), .residual = pixels_of(residual.map, channels, shape.pixels()),
                 .output = channels_last(output, channels), .scale = padded.affine.scale, .shift = padded.affine.shift,
                 .residual_scale = other.affine.scale, .residual_shift = other.affine.shift, .relu = norm.relu,
                 .last_group = padded_channels(channels) / kGroup};
    for (const Strip& part : parts(shape, thread)) {
      args.first_pixel = part.first_pixel(shape);
      args.pixels = static_cast<int>(part.pixels(shape));
      train_->finish(args);
    }
  });
}

// A thread's part of a pool: images, or else panels of channels.
void UnitTrainer::pool_with(void (*kernel)(const PoolTrainArgs&), PoolTrainArgs args, const BatchShape& shape,
                            int channels, int thread) const {
  Range images{0, shape.images}, panels{0, panels_of(channels)};
  if (by_images(shape))
    images = share(shape.images, thread, team_.size());
  else
    panels = share(panels.end, thread, team_.size());
  args.first_group = panels.begin * (kPanel / kGroup);
  args.last_group = panels.end * (kPanel / kGroup);
  for (args.image = images.begin; args.image < images.end; ++args.image) kernel(args);
}

void UnitTrainer::pool(const BatchShape& shape, int channels, const Window& window, std::byte* z, const Affine& norm,
                       const ResidualMap& residual, std::byte* output, std::uint8_t* winners) {
  const std::lock_guard lock(mutex_);
  const PaddedAffine padded(norm, channels), other(residual.norm, channels);
  const std::int64_t out_pixels = static_cast<std::int64_t>(shape.images) * window.out_height * window.out_width;
  on_threads([&](int thread, Barrier&) {
    PoolTrainArgs args{.z = blocked(z, channels, shape.pixels()), .scale = padded.affine.scale,
                       .shift = padded.affine.shift, .window = window,
                       .residual = pixels_of(residual.map, channels, out_pixels), .residual_scale = other.affine.scale,
                       .residual_shift = other.affine.shift, .output = channels_last(output, channels), .winners = winners,
                       .winner_group = out_pixels * kGroup};
    pool_with(train_->pool, args, shape, channels, thread);
  });
}

void UnitTrainer::pool_backward(const BatchShape& shape, int channels, const Window& window, std::byte* gradient,
                                std::uint8_t* winners, std::byte* input_gradient) {
  const std::lock_guard lock(mutex_);
  const std::int64_t out_pixels = static_cast<std::int64_t>(shape.images) * window.out_height * window.out_width;
  on_threads([&](int thread, Barrier&) {
    PoolTrainArgs args{.window = window, .output = blocked(input_gradient, channels, shape.pixels()),
                       .gradient = channels_last(gradient, channels), .winners = winners,
                       .winner_group = out_pixels * kGroup};
    pool_with(train_->pool_back, args, shape, channels, thread);
  });
}

}  // namespace xception
