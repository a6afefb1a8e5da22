// Regular convolutions backward: a stem's, and shortcuts'.
//
// The weights' gradient is a product of the gradient and the windows. The input's gradient is, for windows of a pixel,
// a product that is spread over the pixels they read; else a convolution itself, of the gradient by the turned weights.
#include <algorithm>

#include "train.hpp"
#include "train_pieces.hpp"

namespace xception {

// Of an image or some rows of it, by windows of more than a pixel: strips of its own rows, and of the windows' rows that read them.
void UnitTrainer::input_gradient_of(const ConvBackArgs& args, const Arriving& arriving, const Strip& part,
                                    Worker& worker) const {
  const ConvArgs& conv = args.conv;
  const Window& w = conv.window;
  const BatchShape shape = conv.input_shape();
  const int blocks = line_groups(conv.out_channels) * kGroup / lane_count(kernels_->matrix_type);
  const int depth = w.kernel * w.kernel * line_groups(conv.out_channels) * kGroup;
  SpreadArgs spread_args{.output = channels_last(args.input_gradient, conv.in_channels),
                         .window = {.in_height = shape.height, .in_width = shape.width, .out_height = shape.height,
                                    .out_width = shape.width},
                         .add = args.adds};
  for (const Strip& strip : strips(shape, depth, part)) {
    const std::int64_t pixels = strip.pixels(shape);
    const int first = std::clamp((strip.first_row + w.pad_top - w.kernel + 1) / w.stride - 1, 0, w.out_height);
    const int last = std::clamp((strip.first_row + strip.rows - 1 + w.pad_top) / w.stride + 1, first, w.out_height);
    const Pixels left = lines(worker.left.data(), static_cast<std::int64_t>(last - first) * w.out_width);
    gradient_of(arriving, {strip.image, 1, first, last - first}, left, 0);
    const Pixels matrix = lines(worker.right.data(), pixels);
    const ReaderArgs readers{.lines = left.data, .block = left.block, .blocks = blocks, .first_window_row = first,
                             .window = w, .first_row = strip.first_row, .rows = strip.rows, .matrix = matrix.data,
                             .matrix_block = matrix.block};
    train_->readers(readers);
    spread_args.input = blocked(worker.gradient.data(), conv.in_channels, pixels);
    kernels_->multiply(product(matrix, pixels, depth, conv.in_channels, spread_args.input, 0, worker));
    spread_args.image = strip.image;
    spread_args.first_row = strip.first_row;
    spread_args.rows = strip.rows;
    train_->spread(spread_args);
  }
}

void UnitTrainer::convolve_backward(const ConvBackArgs& args) {
  const std::lock_guard lock(mutex_);
  const ConvArgs& conv = args.conv;
  const Window& w = conv.window;
  const BatchShape shape = conv.shape(), in_shape = conv.input_shape();
  const int in = conv.in_channels, out = conv.out_channels, depth = conv.depth(), threads = team_.size();
  const PaddedAffine output(args.output, out);
  const std::vector<float> factors = per_channel(args.factors, out, 3);
  const int out_groups = line_groups(out), depth_groups = line_groups(depth);
  const bool weights_wanted = args.weight_gradient != nullptr, input_wanted = args.input_gradient != nullptr;
  const bool direct = w.kernel == 1;
  const int reader_groups = w.kernel * w.kernel * out_groups;

  // The turned weights, [in][row][column][out, padded].
  std::vector<float> turned;
  if (input_wanted && !direct) {
    const int taps = w.kernel * w.kernel, lanes = out_groups * kGroup;
    turned.assign(index_of(in) * index_of(taps * lanes), 0.0f);
    for (int o = 0; o < out; ++o)
      for (int t = 0; t < taps; ++t)
        for (int c = 0; c < in; ++c)
          turned[(index_of(c) * index_of(taps) + index_of(t)) * index_of(lanes) + index_of(o)] =
              conv.weights[(static_cast<std::int64_t>(o) * taps + t) * in + c];
  }
  if (input_wanted) reserve_weights(direct ? out : reader_groups * kGroup, in);

  std::vector<std::vector<Strip>> mine(index_of(threads));
  std::int64_t capacity = 1;
  for (int t = 0; t < threads; ++t) {
    mine[index_of(t)] = strips_of_thread(shape, std::max(depth, out), t);
    for (const Strip& strip : mine[index_of(t)])
      capacity = std::max(capacity, strip.pixels(shape));
  }
  // A strip of the input's rows, and as many rows of windows with those that overlap.
  std::int64_t in_pixels = 1, read_pixels = 1;
  if (input_wanted && !direct)
    for (int t = 0; t < threads; ++t)
      for (const Strip& part : parts_of_images(in_shape, t))
        for (const Strip& strip : strips(in_shape, reader_groups * kGroup, part)) {
          in_pixels = std::max(in_pixels, strip.pixels(in_shape));
          const int rows = std::min((strip.rows + w.kernel) / w.stride + 3, shape.height);
          read_pixels = std::max<std::int64_t>(read_pixels, static_cast<std::int64_t>(rows) * shape.width);
        }
  for (int t = 0; t < threads; ++t) {
    Worker& worker = workers_[index_of(t)];
    const std::int64_t line = spread(capacity * kLineBytes);
    const std::size_t left = bytes_for(out_groups * std::max(line, spread(read_pixels * kLineBytes)));
    const std::size_t right = bytes_for(std::max(depth_groups * line, reader_groups * spread(in_pixels * kLineBytes)));
    reserve(worker.left, left + kSlack);
    reserve(worker.right, right + kSlack);
    const std::int64_t widest = std::max(direct ? capacity : 0, in_pixels);
    reserve(worker.gradient, bytes_for(padded_channels(in) / kGroup * spread(widest * kLineBytes)) + kSlack);
    reserve_workspace(std::max(left, right), worker);
    if (weights_wanted) reserve_outer(out, depth, capacity, worker);
  }

  const Arriving arriving{.z = blocked(conv.z, out, shape.pixels()), .gradient = channels_last(args.gradient, out),
                          .shape = shape, .channels = out, .output = output.affine, .factors = factors.data()};

  on_threads([&](int thread, Barrier& barrier) {
    Worker& worker = workers_[index_of(thread)];
    if (weights_wanted) clear_outer(out, depth, worker);
    if (input_wanted && direct) pack(conv.weights, out, in, true, thread);
    if (input_wanted && !direct) pack(turned.data(), in, reader_groups * kGroup, false, thread);
    barrier.wait();
    const Pixels left = lines(worker.left.data(), capacity), right = lines(worker.right.data(), capacity);
    for (const Strip& strip : mine[index_of(thread)]) {
      if (!weights_wanted && !direct) break;
      const std::int64_t pixels = strip.pixels(shape);
      gradient_of(arriving, strip, left, 0);
      if (weights_wanted) {
        windows_of(conv, strip, right, 0);
        add_outer(pixels, out, depth, capacity, worker);
      }
      if (!input_wanted || !direct) continue;
      SpreadArgs spread_args{.input = blocked(worker.gradient.data(), in, pixels),
                             .output = channels_last(args.input_gradient, in), .window = w, .first_row = strip.first_row,
                             .rows = strip.rows, .add = args.adds};
      kernels_->multiply(product(left, pixels, out, in, spread_args.input, 0, worker));
      for (int i = 0; i < strip.images; ++i) {
        spread_args.image = strip.image + i;
        spread_args.first_pixel = static_cast<std::int64_t>(i) * strip.rows * shape.width;
        train_->spread(spread_args);
      }
    }
    if (input_wanted && !direct) {
      for (const Strip& part : parts_of_images(in_shape, thread)) input_gradient_of(args, arriving, part, worker);
    }
    barrier.wait();
    if (weights_wanted) total_weights(args.weight_gradient, out, depth, thread);
  });
}

}  // namespace xception
