#include "train.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>

#include "halves.hpp"
#include "sizes.hpp"

namespace xception {

namespace {

constexpr std::int64_t kStripBytes = 384 << 10;   // of matrix lines: they are read for each panel of weights
constexpr std::int64_t kPaddedBytes = 96 << 10;   // of a padded map in the backward pass, which holds two of them
// Pixels that are summed at once into the weights' gradient, which is read and written for them all.
constexpr int kOuterPixels = 512;

std::size_t bytes_for(std::int64_t count, std::size_t each = 1) { return static_cast<std::size_t>(count) * each; }

void reserve(Buffer& buffer, std::size_t bytes) {
  if (buffer.size() < bytes) buffer = Buffer(bytes);
}
void clear(Buffer& buffer, std::size_t bytes) {
  reserve(buffer, bytes);
  std::fill_n(buffer.data(), bytes, std::byte{0});
}
float* floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

int padded_channels(int channels) { return panels_of(channels) * kPanel; }

// Numbers one a channel, with zeros behind the last.
std::vector<float> per_channel(const float* values, int channels, int rows = 1) {
  const int stride = padded_channels(channels);
  std::vector<float> out(index_of(stride * rows), 0.0f);
  if (values != nullptr)
    for (int r = 0; r < rows; ++r) std::copy_n(values + r * channels, channels, out.data() + r * stride);
  return out;
}

// An affine whose numbers are padded, and live as long as this.
struct PaddedAffine {
  std::vector<float> scale, shift;
  Affine affine;
  PaddedAffine(const Affine& given, int channels)
      : scale(per_channel(given.scale, channels)), shift(per_channel(given.shift, channels)), affine(given) {
    if (given.scale == nullptr) return;
    affine.scale = scale.data();
    affine.shift = shift.data();
  }
};

const TrainKernels* train_kernels_for(const std::string& level, Type type, Type matrix) {
#if defined(XCEPTION_HAS_X86_KERNELS)
  if (level == "amx_emulated" || level == "amx_half_emulated") return amx_emulated::train_kernels(type, matrix);
  if (level == "amx_bf16") return amx::train_kernels(type, matrix);
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

// Images [begin, end) in parts whose matrix of `channels` stays in the cache.
std::vector<UnitTrainer::Strip> UnitTrainer::strips(const BatchShape& shape, int channels, int begin, int end) const {
  const std::int64_t row = static_cast<std::int64_t>(shape.width) * kLineBytes * ceil_div(channels, lane_count(kernels_->matrix_type));
  std::vector<Strip> out;
  const auto together = static_cast<int>(std::clamp<std::int64_t>(kStripBytes / (row * shape.height), 0, end - begin));
  if (together >= 1) {
    const int parts = ceil_div(end - begin, together);
    for (int i = 0; i < parts; ++i) {
      const Range range = share(end - begin, i, parts);
      out.push_back({begin + range.begin, range.end - range.begin, 0, shape.height});
    }
    return out;
  }
  const int parts = ceil_div(shape.height, static_cast<int>(std::clamp<std::int64_t>(kStripBytes / row, 1, shape.height)));
  for (int image = begin; image < end; ++image)
    for (int i = 0; i < parts; ++i) {
      const Range range = share(shape.height, i, parts);
      out.push_back({image, 1, range.begin, range.end - range.begin});
    }
  return out;
}

// ------------------------------------------------------------------------------------------------------- pieces

template <class Work>
void UnitTrainer::on_threads(Work&& work) {
  Barrier barrier(team_.size());
  const std::function<void(int)> task = [&](int thread) {
    if (kernels_->begin_thread != nullptr) kernels_->begin_thread();
    work(thread, barrier);
    if (kernels_->end_thread != nullptr) kernels_->end_thread();
  };
  // That runtime's threads are not there in a forked process.
  if (team_.size() > 1 && host_.parallel != nullptr && owner_ == process_id()) {
    struct Call {
      const std::function<void(int)>& task;
      const OpenMp& host;
      int threads;
      std::atomic<bool> other_size{false};
      std::mutex mutex;
      std::exception_ptr error;
    } call{.task = task, .host = host_, .threads = team_.size(), .mutex = {}, .error = {}};
    host_.parallel(
        [](void* data) {
          Call& mine = *static_cast<Call*>(data);
          if (mine.host.thread_count() != mine.threads) {  // as inside of another parallel region
            mine.other_size = true;
            return;
          }
          try {
            mine.task(mine.host.thread_number());
          } catch (...) {
            const std::lock_guard lock(mine.mutex);
            if (!mine.error) mine.error = std::current_exception();
          }
        },
        &call, static_cast<unsigned>(call.threads), 0);
    if (call.error) std::rethrow_exception(call.error);
    if (!call.other_size) return;
  }
  team_.run(task);
}

// Room for the packed weights, and the filters [C][9] as [groups][9][16].
void UnitTrainer::reserve_weights(const UnitArgs& args, bool transposed) {
  const int depth = transposed ? args.out_channels : args.in_channels;
  const int out = transposed ? args.in_channels : args.out_channels;
  const int per_step = kernels_->matrix_type == Type::f32 ? 1 : 2;
  const int unit = kernels_->depth_unit;
  const int steps = ceil_div(ceil_div(depth, unit) * unit, per_step);
  panel_bytes_ = static_cast<std::int64_t>(steps) * 2 * kLineBytes;
  reserve(weights_, bytes_for(panels_of(out) * panel_bytes_));
  if (zeros_.size() < bytes_for(padded_channels(out), sizeof(float)))
    clear(zeros_, bytes_for(padded_channels(out), sizeof(float)));

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
  const Type type = kernels_->matrix_type;
  const int per_step = type == Type::f32 ? 1 : 2;
  const auto steps = static_cast<int>(panel_bytes_ / (2 * kLineBytes));
  const std::int64_t along = transposed ? in_channels : 1, across = transposed ? 1 : in_channels;
  const Range panels = share(panels_of(out), thread, team_.size());
  constexpr int kChunk = 16;  // steps: their place in the panel stays in the first-level cache
  for (int p = panels.begin; p < panels.end; ++p) {
    std::byte* panel = weights_.data() + p * panel_bytes_;
    const int valid = std::min(kPanel, out - p * kPanel);
    for (int begin = 0; begin < steps; begin += kChunk) {
      const int end = std::min(begin + kChunk, steps);
      for (int n = 0; n < kPanel; ++n) {
        const float* from = weights + static_cast<std::int64_t>(p * kPanel + n) * across;
        for (int s = begin; s < end; ++s)
          for (int j = 0; j < per_step; ++j) {
            const int k = s * per_step + j;
            const float value = n < valid && k < depth ? from[k * along] : 0.0f;
            std::byte* to = panel + s * 2 * kLineBytes + (n * per_step + j) * bytes_of(type);
            if (type == Type::f32)
              *reinterpret_cast<float*>(to) = value;
            else
              *reinterpret_cast<std::uint16_t*>(to) = to_bf16(value).bits;
          }
      }
    }
  }
}

// The depthwise convolution of a strip, as a matrix.
void UnitTrainer::produce(const UnitArgs& args, const Pixels& input, const Affine& load, const Strip& strip,
                          Worker& worker, const Pixels& output, std::int64_t first_pixel) const {
  const BatchShape& shape = args.shape;
  const int groups = line_groups(args.in_channels);
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < strip.images; ++i) {
      FillArgs fill{.input = input, .group = g, .height = shape.height, .width = shape.width, .pad = args.dilation,
                    .first_row = strip.first_row, .rows = strip.rows, .scale = load.scale, .shift = load.shift,
                    .relu = load.relu, .padded = floats(worker.padded)};
      fill.first_pixel = (strip.image + i) * shape.image_pixels();
      train_->fill(fill);
      FilterArgs filter{.padded = floats(worker.padded), .filter = floats(filters_) + g * kTaps * kGroup,
                        .width = shape.width, .rows = strip.rows, .dilation = args.dilation, .output = output,
                        .group = g};
      filter.first_pixel = first_pixel + static_cast<std::int64_t>(i) * strip.rows * shape.width;
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
  reserve_weights(args, /*transposed=*/false);
  const int stride = padded_channels(args.out_channels), threads = team_.size();
  std::vector<std::vector<Strip>> mine(index_of(threads));
  std::vector<std::size_t> first(index_of(threads) + 1, 0);
  for (int t = 0; t < threads; ++t) {
    const Range images = share(shape.images, t, threads);
    mine[index_of(t)] = strips(shape, args.in_channels, images.begin, images.end);
    first[index_of(t) + 1] = first[index_of(t)] + mine[index_of(t)].size();
    std::int64_t rows = 1, pixels = 1;
    for (const Strip& strip : mine[index_of(t)]) {
      rows = std::max<std::int64_t>(rows, strip.rows);
      pixels = std::max<std::int64_t>(pixels, static_cast<std::int64_t>(strip.images) * strip.rows * shape.width);
    }
    Worker& worker = workers_[index_of(t)];
    const int pad = 2 * args.dilation;
    reserve(worker.padded, bytes_for((rows + pad) * (shape.width + pad) * kGroup, sizeof(float)));
    reserve(worker.left, bytes_for(line_groups(args.in_channels) * spread(pixels * kLineBytes)) + kSlack);
    reserve(worker.workspace, kWorkspace);
  }
  std::vector<float> sums(first.back() * 2 * index_of(stride));
  const Pixels input = pixels_of(args.input, args.in_channels, shape.pixels());
  const Pixels z = blocked(args.z, args.out_channels, shape.pixels());

  on_threads([&](int thread, Barrier& barrier) {
    Worker& worker = workers_[index_of(thread)];
    pack(args.weights, args.out_channels, args.in_channels, false, thread);
    barrier.wait();
    float* to = sums.data() + first[index_of(thread)] * 2 * index_of(stride);
    for (const Strip& strip : mine[index_of(thread)]) {
      const std::int64_t pixels = static_cast<std::int64_t>(strip.images) * strip.rows * shape.width;
      const Pixels matrix = lines(worker.left.data(), pixels);
      produce(args, input, load.affine, strip, worker, matrix, 0);
      const std::int64_t begin = strip.image * shape.image_pixels() + static_cast<std::int64_t>(strip.first_row) * shape.width;
      kernels_->multiply(product(matrix, pixels, args.in_channels, args.out_channels, z, begin, worker));
      MapArgs statistics{.z = z, .stride = stride, .last_group = stride / kGroup, .first_pixel = begin,
                         .pixels = static_cast<int>(pixels), .sums = to};
      train_->statistics(statistics);
      to += 2 * stride;
    }
    barrier.wait();
    // Each strip's mean and squared distances joined, pairwise and in order (Chan, Golub and LeVeque, 1979).
    const Range channels = share(args.out_channels, thread, threads);
    for (int c = channels.begin; c < channels.end; ++c) {
      double count = 0, centre = 0, squares = 0;
      const float* from = sums.data() + c;
      for (const std::vector<Strip>& part : mine)
        for (const Strip& strip : part) {
          const double pixels = static_cast<double>(strip.images) * strip.rows * shape.width;
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

void UnitTrainer::finish(const BatchShape& shape, int channels, std::byte* z, const Affine& norm, std::byte* residual,
                         std::byte* output) {
  const std::lock_guard lock(mutex_);
  const PaddedAffine padded(norm, channels);
  on_threads([&](int thread, Barrier&) {
    const Range images = share(shape.images, thread, team_.size());
    MapArgs args{.z = blocked(z, channels, shape.pixels()), .residual = channels_last(residual, channels),
                 .output = channels_last(output, channels), .scale = padded.affine.scale, .shift = padded.affine.shift,
                 .relu = norm.relu, .last_group = padded_channels(channels) / kGroup,
                 .first_pixel = images.begin * shape.image_pixels()};
    args.pixels = static_cast<int>((images.end - images.begin) * shape.image_pixels());
    train_->finish(args);
  });
}

void UnitTrainer::pool(const BatchShape& shape, int channels, const Window& window, std::byte* z, const Affine& norm,
                       std::byte* residual, std::byte* output, std::uint8_t* winners) {
  const std::lock_guard lock(mutex_);
  const PaddedAffine padded(norm, channels);
  const std::int64_t out_pixels = static_cast<std::int64_t>(shape.images) * window.out_height * window.out_width;
  on_threads([&](int thread, Barrier&) {
    const Range images = share(shape.images, thread, team_.size());
    PoolTrainArgs args{.z = blocked(z, channels, shape.pixels()), .scale = padded.affine.scale,
                       .shift = padded.affine.shift, .window = window, .residual = channels_last(residual, channels),
                       .output = channels_last(output, channels), .winners = winners,
                       .winner_group = out_pixels * kGroup, .last_group = padded_channels(channels) / kGroup};
    for (args.image = images.begin; args.image < images.end; ++args.image) train_->pool(args);
  });
}

void UnitTrainer::pool_backward(const BatchShape& shape, int channels, const Window& window, std::byte* gradient,
                                std::uint8_t* winners, std::byte* input_gradient) {
  const std::lock_guard lock(mutex_);
  const std::int64_t out_pixels = static_cast<std::int64_t>(shape.images) * window.out_height * window.out_width;
  on_threads([&](int thread, Barrier&) {
    const Range images = share(shape.images, thread, team_.size());
    PoolTrainArgs args{.window = window, .output = blocked(input_gradient, channels, shape.pixels()),
                       .gradient = channels_last(gradient, channels), .winners = winners,
                       .winner_group = out_pixels * kGroup, .last_group = padded_channels(channels) / kGroup};
    for (args.image = images.begin; args.image < images.end; ++args.image) train_->pool_back(args);
  });
}

// ----------------------------------------------------------------------------------------------------- backward

void UnitTrainer::gradient_sums(const BatchShape& shape, int channels, std::byte* z, const Affine& norm,
                                const float* mean, const MapOf& gradient, float* sums) {
  const std::lock_guard lock(mutex_);
  const PaddedAffine padded(norm, channels);
  const std::vector<float> means = per_channel(mean, channels);
  const int stride = padded_channels(channels);
  std::vector<float> parts(index_of(shape.images * 2 * stride));
  on_threads([&](int thread, Barrier& barrier) {
    const Range images = share(shape.images, thread, team_.size());
    MapArgs args{.z = blocked(z, channels, shape.pixels()), .gradient = pixels_of(gradient, channels, shape.pixels()),
                 .scale = padded.affine.scale, .shift = padded.affine.shift, .mean = means.data(), .stride = stride,
                 .relu = norm.relu, .last_group = stride / kGroup, .pixels = static_cast<int>(shape.image_pixels())};
    for (int image = images.begin; image < images.end; ++image) {
      args.first_pixel = image * shape.image_pixels();
      args.sums = parts.data() + image * 2 * stride;
      train_->gradient_sums(args);
    }
    barrier.wait();
    const Range mine = share(channels, thread, team_.size());
    for (int row = 0; row < 2; ++row)
      for (int c = mine.begin; c < mine.end; ++c) {
        double sum = 0;
        for (int image = 0; image < shape.images; ++image) sum += parts[index_of((image * 2 + row) * stride + c)];
        sums[row * channels + c] = static_cast<float>(sum);
      }
  });
}

void UnitTrainer::depthwise_back(const UnitBackArgs& args, const Affine& load, const float* mean, int first_image,
                                 int images, Worker& worker) const {
  const UnitArgs& unit = args.unit;
  const BatchShape& shape = unit.shape;
  const int pad = unit.dilation, stride = padded_channels(unit.in_channels);
  const Pixels input = pixels_of(unit.input, unit.in_channels, shape.pixels());
  const Pixels gradient = blocked(worker.gradient.data(), unit.in_channels, images * shape.image_pixels());
  const std::int64_t row_bytes = static_cast<std::int64_t>(shape.width + 2 * pad) * kLineBytes;
  const auto most_rows = static_cast<int>(std::clamp<std::int64_t>(kPaddedBytes / row_bytes - 2 * pad, 1, shape.height));
  const int bands = ceil_div(shape.height, most_rows);
  FilterBackArgs back{.padded = floats(worker.padded), .gradient = floats(worker.padded_gradient), .width = shape.width,
                      .dilation = pad, .relu = load.relu,
                      .output = pixels_of({args.input_gradient, unit.input.blocked}, unit.in_channels, shape.pixels()),
                      .residual = channels_last(args.residual, unit.in_channels), .mean = mean};
  if (args.in_mean != nullptr) back.z = input;
  for (int g = 0; g < ceil_div(unit.in_channels, kGroup); ++g)
    for (int i = 0; i < images; ++i)
      for (int band = 0; band < bands; ++band) {
        const Range rows = share(shape.height, band, bands);
        FillArgs fill{.input = input, .group = g, .height = shape.height, .width = shape.width, .pad = pad,
                      .first_row = rows.begin, .rows = rows.end - rows.begin, .scale = load.scale, .shift = load.shift,
                      .relu = load.relu, .padded = floats(worker.padded)};
        fill.first_pixel = (first_image + i) * shape.image_pixels();
        train_->fill(fill);
        fill.input = gradient;
        fill.first_pixel = i * shape.image_pixels();
        fill.scale = fill.shift = nullptr;
        fill.relu = false;
        fill.padded = floats(worker.padded_gradient);
        train_->fill(fill);
        back.group = g;
        back.rows = rows.end - rows.begin;
        back.filter = floats(filters_) + g * kTaps * kGroup;
        back.first_pixel = (first_image + i) * shape.image_pixels() + static_cast<std::int64_t>(rows.begin) * shape.width;
        back.filter_gradient = floats(worker.filter_gradient) + g * kTaps * kGroup;
        float both[2 * kGroup] = {};
        back.sums = both;
        train_->filter_back(back);
        float* sums = floats(worker.sums) + g * kGroup;
        for (int lane = 0; lane < kGroup; ++lane) {
          sums[lane] += both[lane];
          sums[stride + lane] += both[kGroup + lane];
        }
      }
  // The last group of a blocked map has a neighbour that nobody else writes.
  if (args.input_gradient != nullptr && unit.input.blocked)
    for (int g = ceil_div(unit.in_channels, kGroup); g < stride / kGroup; ++g)
      for (std::int64_t p = 0; p < images * shape.image_pixels(); ++p) {
        const Pixels& out = back.output;
        const std::int64_t pixel = first_image * shape.image_pixels() + p;
        std::byte* at = out.data + (g / out.groups) * out.block + (g % out.groups) * kGroup * bytes_of(type_) + pixel * out.pixel;
        std::fill_n(at, kGroup * bytes_of(type_), std::byte{0});
      }
}

void UnitTrainer::backward(const UnitBackArgs& args) {
  const std::lock_guard lock(mutex_);
  const UnitArgs& unit = args.unit;
  const BatchShape& shape = unit.shape;
  const int in = unit.in_channels, out = unit.out_channels, threads = team_.size();
  const PaddedAffine load(unit.load, in), output(args.output, out);
  const std::vector<float> factors = per_channel(args.factors, out, 3), means = per_channel(args.in_mean, in);
  const int in_stride = padded_channels(in), out_stride = padded_channels(out);
  const int in_groups = line_groups(in), out_groups = line_groups(out);
  const bool pairs = kernels_->matrix_type != Type::f32;
  const bool weights_wanted = args.weight_gradient != nullptr;
  reserve_weights(unit, /*transposed=*/true);

  // A task is what stays together from the product to the depthwise convolution: whole images.
  struct Task {
    int image, images;
    std::vector<Strip> strips;
  };
  const auto pixels_of_strip = [&](const Strip& strip) {
    return static_cast<std::int64_t>(strip.images) * strip.rows * shape.width;
  };
  const int widest = std::max(in, out);
  const auto together = static_cast<int>(std::max<std::int64_t>(kOuterPixels / shape.image_pixels(), 1));
  std::vector<std::vector<Task>> mine(index_of(threads));
  std::int64_t capacity = 1;  // pixels of the matrices of one thread
  std::int64_t task_images = 1;
  for (int t = 0; t < threads; ++t) {
    const Range images = share(shape.images, t, threads);
    const int tasks = ceil_div(images.end - images.begin, together);
    for (int i = 0; i < tasks; ++i) {
      const Range part = share(images.end - images.begin, i, tasks);
      const int first = images.begin + part.begin, count = part.end - part.begin;
      mine[index_of(t)].push_back({first, count, strips(shape, widest, first, first + count)});
      task_images = std::max<std::int64_t>(task_images, count);
      for (const Strip& strip : mine[index_of(t)].back().strips) capacity = std::max(capacity, pixels_of_strip(strip));
      capacity = std::max(capacity, std::min<std::int64_t>(count * shape.image_pixels(), kOuterPixels));
    }
  }
  const int step_unit = train_->step_unit;
  const auto steps_of = [&](std::int64_t pixels) {
    return ceil_div(static_cast<int>((pixels + 1) / 2), step_unit) * step_unit;
  };
  const std::int64_t pair_group = spread(steps_of(capacity) * std::int64_t{kLineBytes});
  for (int t = 0; t < threads; ++t) {
    Worker& worker = workers_[index_of(t)];
    const int pad = 2 * unit.dilation;
    const std::int64_t band = std::max(kPaddedBytes, (1 + pad) * (shape.width + pad) * std::int64_t{kLineBytes});
    const std::int64_t whole = (shape.height + pad) * static_cast<std::int64_t>(shape.width + pad) * kLineBytes;
    reserve(worker.padded, bytes_for(std::max(whole, band)));
    reserve(worker.padded_gradient, bytes_for(band));
    const std::int64_t line = spread(capacity * kLineBytes);
    reserve(worker.left, bytes_for(out_groups * line) + kSlack);
    reserve(worker.right, bytes_for(in_groups * line) + kSlack);
    if (pairs && weights_wanted) {
      reserve(worker.left_pairs, bytes_for(out_groups * pair_group));
      reserve(worker.right_pairs, bytes_for(in_groups * pair_group));
    }
    reserve(worker.gradient, bytes_for(in_stride / kGroup * spread(task_images * shape.image_pixels() * kLineBytes)) + kSlack);
    reserve(worker.workspace, kWorkspace);
    if (weights_wanted) clear(worker.weight_gradient, bytes_for(static_cast<std::int64_t>(out_groups) * kGroup * in_groups * kGroup, sizeof(float)));
    clear(worker.filter_gradient, bytes_for(in_groups * kTaps * kGroup, sizeof(float)));
    clear(worker.sums, bytes_for(2 * in_stride, sizeof(float)));
  }
  const Pixels input = pixels_of(unit.input, in, shape.pixels());

  on_threads([&](int thread, Barrier& barrier) {
    Worker& worker = workers_[index_of(thread)];
    pack(unit.weights, out, in, true, thread);
    barrier.wait();
    const Pixels left = lines(worker.left.data(), capacity), right = lines(worker.right.data(), capacity);
    const auto add_outer = [&](std::int64_t pixels) {
      OuterArgs outer{.left = left.data, .left_group = left.block, .left_groups = out_groups, .right = right.data,
                      .right_group = right.block, .right_groups = in_groups, .steps = static_cast<int>(pixels),
                      .output = floats(worker.weight_gradient)};
      if (pairs) {
        outer.steps = steps_of(pixels);
        PairArgs both{.lines = left.data, .block = left.block, .blocks = out_groups / 2,
                      .pixels = static_cast<int>(pixels), .steps = outer.steps, .pairs = worker.left_pairs.data(),
                      .group = pair_group};
        train_->left_pairs(both);
        both.lines = right.data;
        both.blocks = in_groups / 2;
        both.pairs = worker.right_pairs.data();
        train_->right_pairs(both);
        outer.left = worker.left_pairs.data();
        outer.right = worker.right_pairs.data();
        outer.left_group = outer.right_group = pair_group;
      }
      train_->outer(outer);
    };
    for (const Task& task : mine[index_of(thread)]) {
      const Pixels gradient = blocked(worker.gradient.data(), in, task.images * shape.image_pixels());
      std::int64_t waiting = 0;  // pixels in the matrices that are not yet in the weights' gradient
      for (const Strip& strip : task.strips) {
        const std::int64_t pixels = pixels_of_strip(strip);
        if (waiting + pixels > capacity) {
          if (weights_wanted) add_outer(waiting);
          waiting = 0;
        }
        const std::int64_t row = static_cast<std::int64_t>(strip.first_row) * shape.width;
        MapArgs through{.z = blocked(unit.z, out, shape.pixels()),
                        .gradient = pixels_of(args.gradient, out, shape.pixels()), .output = left,
                        .scale = output.affine.scale, .shift = output.affine.shift, .factors = factors.data(),
                        .stride = out_stride, .relu = args.output.relu, .last_group = out_groups,
                        .first_pixel = strip.image * shape.image_pixels() + row, .output_pixel = waiting,
                        .pixels = static_cast<int>(pixels)};
        train_->gradient(through);
        Pixels matrix = left;
        matrix.data += waiting * kLineBytes;
        const std::int64_t begin = (strip.image - task.image) * shape.image_pixels() + row;
        kernels_->multiply(product(matrix, pixels, out, in, gradient, begin, worker));
        if (weights_wanted) produce(unit, input, load.affine, strip, worker, right, waiting);
        waiting += pixels;
      }
      if (weights_wanted) add_outer(waiting);
      depthwise_back(args, load.affine, means.data(), task.image, task.images, worker);
    }
    barrier.wait();
    // The threads' sums together, in their order.
    const auto total = [&](Buffer Worker::*buffer, std::int64_t at) {
      float sum = floats(workers_[0].*buffer)[at];
      for (int t = 1; t < threads; ++t) sum += floats(workers_[index_of(t)].*buffer)[at];
      return sum;
    };
    const Range rows = share(out, thread, threads);
    for (int o = rows.begin; weights_wanted && o < rows.end; ++o)
      for (int c = 0; c < in; ++c)
        args.weight_gradient[static_cast<std::int64_t>(o) * in + c] =
            total(&Worker::weight_gradient, static_cast<std::int64_t>(o) * in_groups * kGroup + c);
    const Range channels = share(in, thread, threads);
    for (int c = channels.begin; c < channels.end; ++c) {
      for (int t = 0; t < kTaps; ++t)
        args.filter_gradient[c * kTaps + t] = total(&Worker::filter_gradient, ((c / kGroup) * kTaps + t) * kGroup + c % kGroup);
      for (int row = 0; args.sums != nullptr && row < 2; ++row)
        args.sums[row * in + c] = total(&Worker::sums, row * in_stride + c);
    }
  });
}

}  // namespace xception
