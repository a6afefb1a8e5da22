// Units backward: through the normalisation, the products and the depthwise convolution.
#include <algorithm>

#include "train.hpp"
#include "train_pieces.hpp"

namespace xception {

namespace {

constexpr std::int64_t kPaddedBytes = 96 << 10;  // of a padded gradient
// Pixels that are summed at once into the weights' gradient, which is read and written for them all.
constexpr int kOuterPixels = 512;

}  // namespace

void UnitTrainer::gradient_sums(const BatchShape& shape, int channels, std::byte* z, const Affine& norm,
                                const float* mean, const MapOf& gradient, float* sums) {
  const std::lock_guard lock(mutex_);
  const PaddedAffine padded(norm, channels);
  const std::vector<float> means = per_channel(mean, channels);
  const int stride = padded_channels(channels);
  std::vector<Strip> pieces;  // whose sums are put together in their order: images, or what a thread has of them
  std::vector<std::size_t> first;
  for (int t = 0; t < team_.size(); ++t) {
    first.push_back(pieces.size());
    for (const Strip& part : parts_of_images(shape, t)) pieces.push_back(part);
  }
  first.push_back(pieces.size());
  std::vector<float> found(pieces.size() * 2 * index_of(stride));
  on_threads([&](int thread, Barrier& barrier) {
    MapArgs args{.z = blocked(z, channels, shape.pixels()), .gradient = pixels_of(gradient, channels, shape.pixels()),
                 .scale = padded.affine.scale, .shift = padded.affine.shift, .mean = means.data(), .stride = stride,
                 .relu = norm.relu, .last_group = stride / kGroup};
    for (std::size_t i = first[index_of(thread)]; i < first[index_of(thread) + 1]; ++i) {
      args.first_pixel = pieces[i].first_pixel(shape);
      args.pixels = static_cast<int>(pieces[i].pixels(shape));
      args.sums = found.data() + i * 2 * index_of(stride);
      train_->gradient_sums(args);
    }
    barrier.wait();
    const Range mine = share(channels, thread, team_.size());
    for (int row = 0; row < 2; ++row)
      for (int c = mine.begin; c < mine.end; ++c) {
        double sum = 0;
        for (std::size_t i = 0; i < pieces.size(); ++i) sum += found[(i * 2 + index_of(row)) * index_of(stride) + index_of(c)];
        sums[row * channels + c] = static_cast<float>(sum);
      }
  });
}

// --------------------------------------------------------------------------------------- the weights' gradient

int UnitTrainer::steps_of(std::int64_t pixels) const {
  return ceil_div(static_cast<int>((pixels + 1) / 2), train_->step_unit) * train_->step_unit;
}

// Room to sum `capacity` pixels at a time.
void UnitTrainer::reserve_outer(int out_channels, int depth, std::int64_t capacity, Worker& worker) const {
  const int left = line_groups(out_channels), right = line_groups(depth);
  if (kernels_->matrix_type != Type::f32) {
    const std::int64_t group = spread(steps_of(capacity) * std::int64_t{kLineBytes});
    reserve(worker.left_pairs, bytes_for(left * group));
    reserve(worker.right_pairs, bytes_for(right * group));
  }
  reserve(worker.weight_gradient, bytes_for(static_cast<std::int64_t>(left) * kGroup * right * kGroup, sizeof(float)));
}

// By the worker's own thread, in whose cache they then are.
void UnitTrainer::clear_outer(int out_channels, int depth, Worker& worker) const {
  const std::int64_t sums = static_cast<std::int64_t>(line_groups(out_channels)) * kGroup * line_groups(depth) * kGroup;
  clear(worker.weight_gradient, bytes_for(sums, sizeof(float)));
}

// The first pixels of the worker's two matrices, which are laid out for `capacity` of them, go into its sums.
void UnitTrainer::add_outer(std::int64_t pixels, int out_channels, int depth, std::int64_t capacity, Worker& worker) const {
  const Pixels left = lines(worker.left.data(), capacity), right = lines(worker.right.data(), capacity);
  OuterArgs outer{.left = left.data, .left_group = left.block, .left_groups = line_groups(out_channels),
                  .right = right.data, .right_group = right.block, .right_groups = line_groups(depth),
                  .steps = static_cast<int>(pixels), .output = floats(worker.weight_gradient),
                  .workspace = worker.workspace.data()};
  if (kernels_->matrix_type != Type::f32) {
    outer.steps = steps_of(pixels);
    PairArgs pairs{.lines = left.data, .block = left.block, .blocks = outer.left_groups / 2,
                   .pixels = static_cast<int>(pixels), .steps = outer.steps, .pairs = worker.left_pairs.data(),
                   .group = spread(steps_of(capacity) * std::int64_t{kLineBytes})};
    train_->left_pairs(pairs);
    pairs.lines = right.data;
    pairs.block = right.block;
    pairs.blocks = outer.right_groups / 2;
    pairs.pairs = worker.right_pairs.data();
    train_->right_pairs(pairs);
    outer.left = worker.left_pairs.data();
    outer.right = worker.right_pairs.data();
    outer.left_group = outer.right_group = pairs.group;
  }
  train_->outer(outer);
}

// This thread's rows of all threads' sums together, in their order.
void UnitTrainer::total_weights(float* to, int out_channels, int depth, int thread) const {
  const Range rows = share(out_channels, thread, team_.size());
  const std::int64_t row = static_cast<std::int64_t>(line_groups(depth)) * kGroup;
  for (int o = rows.begin; o < rows.end; ++o)
    for (int k = 0; k < depth; ++k) {
      float sum = 0;
      for (const Worker& worker : workers_) sum += floats(worker.weight_gradient)[o * row + k];
      to[static_cast<std::int64_t>(o) * depth + k] = sum;
    }
}

// ------------------------------------------------------------------------------------------------------- units

// Through the normalisation, as matrix lines.
void UnitTrainer::gradient_of(const Arriving& arriving, const Strip& strip, const Pixels& to, std::int64_t first_pixel) const {
  const MapArgs through{.z = arriving.z, .gradient = arriving.gradient, .output = to, .scale = arriving.output.scale,
                        .shift = arriving.output.shift, .factors = arriving.factors,
                        .stride = padded_channels(arriving.channels), .relu = arriving.output.relu,
                        .last_group = line_groups(arriving.channels), .first_pixel = strip.first_pixel(arriving.shape),
                        .output_pixel = first_pixel, .pixels = static_cast<int>(strip.pixels(arriving.shape))};
  train_->gradient(through);
}

void UnitTrainer::depthwise_back(const UnitBackArgs& args, const Affine& load, const float* mean, const Task& task,
                                 Worker& worker) const {
  const UnitArgs& unit = args.unit;
  const BatchShape& shape = unit.shape;
  const int pad = unit.dilation, stride = padded_channels(unit.in_channels);
  const Pixels input = pixels_of(unit.input, unit.in_channels, shape.pixels());
  const Strip& own = task.own;
  const Pixels gradient = blocked(worker.gradient.data(), unit.in_channels, task.pixels(shape));
  const std::int64_t row_bytes = static_cast<std::int64_t>(shape.width + 2 * pad) * kLineBytes;
  const auto most_rows = static_cast<int>(std::clamp<std::int64_t>(kPaddedBytes / row_bytes - 2 * pad, 1, own.rows));
  const int bands = ceil_div(own.rows, most_rows);
  FilterBackArgs back{.input = input, .scale = load.scale, .shift = load.shift, .relu = load.relu,
                      .gradient = floats(worker.padded_gradient), .width = shape.width, .dilation = pad,
                      .output = pixels_of({args.input_gradient, unit.input.blocked}, unit.in_channels, shape.pixels()),
                      .residual = channels_last(args.residual, unit.in_channels),
                      .mean = args.in_mean == nullptr ? nullptr : mean};
  // Groups whose numbers share cache lines one after the other, for a band.
  const int groups = ceil_div(unit.in_channels, kGroup), beside = lane_count(type_) / kGroup;
  const int pieces = own.images * bands;
  for (int first = 0; first < groups; first += beside)
    for (int piece = 0; piece < pieces; ++piece)
      for (int g = first; g < std::min(first + beside, groups); ++g) {
        const int i = piece / bands, band = piece % bands;
        const Range rows = share(own.rows, band, bands);
        const int first_row = own.first_row + rows.begin;
        FillArgs fill{.input = gradient, .group = g, .height = task.rows, .width = shape.width, .pad = pad,
                      .first_row = first_row - task.first_row, .rows = rows.end - rows.begin,
                      .padded = floats(worker.padded_gradient)};
        fill.first_pixel = static_cast<std::int64_t>(i) * task.rows * shape.width;
        train_->fill(fill);
        back.group = g;
        back.rows = rows.end - rows.begin;
        back.filter = floats(filters_) + g * kTaps * kGroup;
        back.first_pixel = (own.image + i) * shape.image_pixels() + static_cast<std::int64_t>(first_row) * shape.width;
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
      for (std::int64_t p = 0; p < own.pixels(shape); ++p) {
        const Pixels& out = back.output;
        const std::int64_t pixel = own.first_pixel(shape) + p;
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
  const int in_stride = padded_channels(in);
  const int in_groups = line_groups(in), out_groups = line_groups(out);
  const bool weights_wanted = args.weight_gradient != nullptr;
  reserve_weights(out, in);
  pack_filters(unit);

  const int widest = std::max(in, out);
  const auto together = static_cast<int>(std::max<std::int64_t>(kOuterPixels / shape.image_pixels(), 1));
  std::vector<std::vector<Task>> mine(index_of(threads));
  std::int64_t capacity = 1, task_pixels = 1;  // pixels of the matrices of one thread, and of a task
  for (int t = 0; t < threads; ++t)
    for (const Strip& part : parts(shape, t)) {
      const int tasks = ceil_div(part.images, together);
      for (int i = 0; i < tasks; ++i) {
        const Range images = share(part.images, i, tasks);
        Task task{.own = {part.image + images.begin, images.end - images.begin, part.first_row, part.rows}};
        const int end = part.first_row + part.rows;
        task.first_row = std::max(part.first_row - unit.dilation, 0);
        task.rows = std::min(end + unit.dilation, shape.height) - task.first_row;
        task.strips = strips(shape, widest, task.own);
        const int above = part.first_row - task.first_row, below = task.first_row + task.rows - end;
        for (const Strip& strip : {Strip{part.image, 1, task.first_row, above}, Strip{part.image, 1, end, below}})
          for (const Strip& beside : strips(shape, widest, strip)) task.beside.push_back(beside);
        for (const std::vector<Strip>* some : {&task.strips, &task.beside})
          for (const Strip& strip : *some) capacity = std::max(capacity, strip.pixels(shape));
        capacity = std::max(capacity, std::min<std::int64_t>(task.own.pixels(shape), kOuterPixels));
        task_pixels = std::max(task_pixels, task.pixels(shape));
        mine[index_of(t)].push_back(std::move(task));
      }
    }
  for (int t = 0; t < threads; ++t) {
    Worker& worker = workers_[index_of(t)];
    const int pad = 2 * unit.dilation;
    const std::int64_t band = std::max(kPaddedBytes, (1 + pad) * (shape.width + pad) * std::int64_t{kLineBytes});
    const std::int64_t whole = (shape.height + pad) * static_cast<std::int64_t>(shape.width + pad) * kLineBytes;
    reserve(worker.padded, bytes_for(std::max(whole, band)));
    reserve(worker.padded_gradient, bytes_for(band));
    const std::int64_t line = spread(capacity * kLineBytes);
    const std::size_t matrix = bytes_for(out_groups * line);
    reserve(worker.left, matrix + kSlack);
    reserve(worker.right, bytes_for(in_groups * line) + kSlack);
    if (weights_wanted) reserve_outer(out, in, capacity, worker);
    reserve(worker.gradient, bytes_for(in_stride / kGroup * spread(task_pixels * kLineBytes)) + kSlack);
    reserve_workspace(matrix, worker);
    clear(worker.filter_gradient, bytes_for(in_groups * kTaps * kGroup, sizeof(float)));
    clear(worker.sums, bytes_for(2 * in_stride, sizeof(float)));
  }
  const Pixels input = pixels_of(unit.input, in, shape.pixels());
  const Arriving arriving{.z = blocked(unit.z, out, shape.pixels()),
                          .gradient = pixels_of(args.gradient, out, shape.pixels()), .shape = shape, .channels = out,
                          .output = output.affine, .factors = factors.data()};

  on_threads([&](int thread, Barrier& barrier) {
    Worker& worker = workers_[index_of(thread)];
    if (weights_wanted) clear_outer(out, in, worker);
    pack(unit.weights, out, in, true, thread);
    barrier.wait();
    const Pixels left = lines(worker.left.data(), capacity), right = lines(worker.right.data(), capacity);
    for (const Task& task : mine[index_of(thread)]) {
      const Pixels gradient = blocked(worker.gradient.data(), in, task.pixels(shape));
      for (const Strip& strip : task.beside) {
        gradient_of(arriving, strip, left, 0);
        kernels_->multiply(product(left, strip.pixels(shape), out, in, gradient, task.first_pixel(strip, shape), worker));
      }
      std::int64_t waiting = 0;  // pixels in the matrices that are not yet in the weights' gradient
      for (const Strip& strip : task.strips) {
        const std::int64_t pixels = strip.pixels(shape);
        if (waiting + pixels > capacity) {
          if (weights_wanted) add_outer(waiting, out, in, capacity, worker);
          waiting = 0;
        }
        gradient_of(arriving, strip, left, waiting);
        Pixels matrix = left;
        matrix.data += waiting * kLineBytes;
        kernels_->multiply(product(matrix, pixels, out, in, gradient, task.first_pixel(strip, shape), worker));
        if (weights_wanted) produce(unit, input, load.affine, strip, worker, right, waiting);
        waiting += pixels;
      }
      if (weights_wanted) add_outer(waiting, out, in, capacity, worker);
      depthwise_back(args, load.affine, means.data(), task, worker);
    }
    barrier.wait();
    // The threads' sums together, in their order.
    const auto total = [&](Buffer Worker::*buffer, std::int64_t at) {
      float sum = floats(workers_[0].*buffer)[at];
      for (int t = 1; t < threads; ++t) sum += floats(workers_[index_of(t)].*buffer)[at];
      return sum;
    };
    if (weights_wanted) total_weights(args.weight_gradient, out, in, thread);
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
