// Training of separable units over a batch, forward and backward.
//
// A unit is [normalisation of its input ->] [ReLU ->] 3x3 depthwise convolution -> 1x1 convolution -> batch
// normalisation. Its output before the normalisation, z, is kept; the next unit normalises it while loading, so that a
// normalised map exists only at the end of a module. What the backward pass needs beside z is computed again.
//
// Threads take images; sums over the batch are added in the images' order, so that results are the same from run to run
// for one number of threads.
#pragma once

#include <string>
#include <vector>

#include "network.hpp"
#include "team.hpp"
#include "train_kernels_table.hpp"

namespace xception {

struct BatchShape {
  int images = 0, height = 0, width = 0;
  std::int64_t image_pixels() const { return static_cast<std::int64_t>(height) * width; }
  std::int64_t pixels() const { return images * image_pixels(); }
};

// A batch of maps: channels last, as PyTorch has it; or blocked, as units hand it to each other. Null: none.
struct MapOf {
  std::byte* data = nullptr;
  bool blocked = false;
};

// A normalisation as factors, one a channel, or none: y = z * scale + shift [, ReLU].
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu = false;
};

// One unit. Sizes are checked by the caller (bindings.cpp).
struct UnitArgs {
  BatchShape shape;
  int in_channels = 0, out_channels = 0, dilation = 1;
  MapOf input;
  Affine load;                     // how the input is loaded
  const float* filters = nullptr;  // [in_channels][9]
  const float* weights = nullptr;  // [out_channels][in_channels]
  std::byte* z = nullptr;          // blocked
};

struct UnitBackArgs {
  UnitArgs unit;
  MapOf gradient;                      // of the normalised output
  Affine output;                       // the normalisation; scale and shift are needed for its ReLU only
  const float* factors = nullptr;      // [3][out_channels]: gradient of z = f0 * gradient + f1 * z + f2
  const float* in_mean = nullptr;      // [in_channels]: of the input's normalisation; null: no sums
  std::byte* residual = nullptr;       // channels last, added to the input's gradient; or null
  std::byte* input_gradient = nullptr; // laid out as the input; or null
  float* filter_gradient = nullptr;    // [in_channels][9]
  float* weight_gradient = nullptr;    // [out_channels][in_channels]; or null
  float* sums = nullptr;               // [2][in_channels], as `gradient_sums` would give them for the input
};

// A convolution that is not separable, a stem's or a shortcut's. Maps are channels last. Windows of a pixel have no
// padding; larger ones at most kMostDepth numbers.
struct ConvArgs {
  int images = 0;
  Window window;
  int in_channels = 0, out_channels = 0;
  std::byte* input = nullptr;
  const float* weights = nullptr;  // [out_channels][kernel][kernel][in_channels]
  std::byte* z = nullptr;          // blocked
  BatchShape input_shape() const { return {images, window.in_height, window.in_width}; }
  BatchShape shape() const { return {images, window.out_height, window.out_width}; }
  int depth() const { return window.kernel * window.kernel * in_channels; }
};

struct ConvBackArgs {
  ConvArgs conv;
  std::byte* gradient = nullptr;        // of the normalised output, channels last
  Affine output;                        // as in UnitBackArgs
  const float* factors = nullptr;       // likewise
  std::byte* input_gradient = nullptr;  // channels last, or null
  bool adds = false;                    // to what is there
  float* weight_gradient = nullptr;     // laid out as the weights; or null
};

// A map that ends a module beside its own: as it is, or normalised.
struct ResidualMap {
  MapOf map;
  Affine norm;
};

// The entry points of an OpenMP runtime that somebody else works with in this process, as GNU's has them; or nulls. Two
// runtimes on the same cores disturb each other: one's threads spin for the next task while the other's have work.
struct OpenMp {
  void (*parallel)(void (*task)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*thread_count)() = nullptr;
};

class UnitTrainer {
 public:
  // Throws std::invalid_argument for a level without kernels for the type.
  UnitTrainer(const std::string& level, Type type, int threads, const OpenMp& host = {});

  std::int64_t blocked_bytes(int channels, const BatchShape& shape) const;

  // z, its mean and its variance over the batch (divided by the number of pixels), [out_channels] each.
  void forward(const UnitArgs& args, float* mean, float* variance);
  void backward(const UnitBackArgs& args);

  // The same of a convolution.
  void convolve(const ConvArgs& args, float* mean, float* variance);
  void convolve_backward(const ConvBackArgs& args);

  // Channels last: the normalised map [+ residual].
  void finish(const BatchShape& shape, int channels, std::byte* z, const Affine& norm, const ResidualMap& residual,
              std::byte* output);
  // [2][channels]: the sum of the gradient behind the normalisation, and of gradient * (z - mean).
  void gradient_sums(const BatchShape& shape, int channels, std::byte* z, const Affine& norm, const float* mean,
                     const MapOf& gradient, float* sums);
  // The pooled normalised map [+ residual], channels last, and which tap won: [channels padded / 16][pixels][16].
  void pool(const BatchShape& shape, int channels, const Window& window, std::byte* z, const Affine& norm,
            const ResidualMap& residual, std::byte* output, std::uint8_t* winners);
  // To the normalised map's gradient, blocked.
  void pool_backward(const BatchShape& shape, int channels, const Window& window, std::byte* gradient,
                     std::uint8_t* winners, std::byte* input_gradient);

  int threads() const { return team_.size(); }
  const std::string& level() const { return level_; }
  Type type() const { return type_; }

 private:
  struct Worker {
    Buffer padded, padded_gradient, left, right, left_pairs, right_pairs, gradient, workspace;
    Buffer weight_gradient, filter_gradient, sums;
  };
  struct Strip {  // whole images, or some rows of one
    int image, images, first_row, rows;
    std::int64_t pixels(const BatchShape& shape) const { return static_cast<std::int64_t>(images) * rows * shape.width; }
    std::int64_t first_pixel(const BatchShape& shape) const {
      return image * shape.image_pixels() + static_cast<std::int64_t>(first_row) * shape.width;
    }
  };
  // What of a backward pass stays together from the product to the depthwise convolution: images, or some rows of one,
  // and the rows beside them that the convolution reaches.
  struct Task {
    Strip own;
    int first_row = 0, rows = 0;  // with those beside
    std::vector<Strip> strips = {}, beside = {};
    std::int64_t pixels(const BatchShape& shape) const {
      return static_cast<std::int64_t>(own.images) * rows * shape.width;
    }
    // Of a strip, among them.
    std::int64_t first_pixel(const Strip& strip, const BatchShape& shape) const {
      return (static_cast<std::int64_t>(strip.image - own.image) * rows + strip.first_row - first_row) * shape.width;
    }
  };
  struct Arriving {  // what the backward pass begins with: a gradient behind a normalisation
    Pixels z, gradient;
    BatchShape shape;
    int channels;
    Affine output;
    const float* factors;  // [3][channels padded]
  };

  Pixels blocked(std::byte* data, int channels, std::int64_t pixels) const;
  Pixels channels_last(std::byte* data, int channels) const;
  Pixels pixels_of(const MapOf& map, int channels, std::int64_t pixels) const;
  Pixels lines(std::byte* data, std::int64_t pixels) const;
  int line_groups(int channels) const;
  bool by_images(const BatchShape& shape) const;
  std::vector<Strip> parts(const BatchShape& shape, int thread) const;
  std::vector<Strip> strips(const BatchShape& shape, int channels, const Strip& part) const;
  std::vector<Strip> parts_of_images(const BatchShape& shape, int thread) const;
  std::vector<Strip> strips_of_thread(const BatchShape& shape, int channels, int thread) const;
  void produce(const UnitArgs& args, const Pixels& input, const Affine& load, const Strip& strip, Worker& worker,
               const Pixels& output, std::int64_t first_pixel) const;
  void depthwise_back(const UnitBackArgs& args, const Affine& load, const float* mean, const Task& task,
                      Worker& worker) const;
  MultiplyArgs product(const Pixels& matrix, std::int64_t pixels, int depth, int out_channels, const Pixels& output,
                       std::int64_t first_pixel, Worker& worker) const;
  void pack(const float* weights, int out_channels, int depth, bool transposed, int thread);
  void reserve_weights(int depth, int out_channels);
  void reserve_workspace(std::size_t matrix, Worker& worker) const;
  void pack_filters(const UnitArgs& args);
  template <class Room, class Produce>
  void product_pass(const BatchShape& shape, int depth, int out_channels, const float* weights, std::byte* z, float* mean,
                    float* variance, Room&& room, Produce&& produce);
  int steps_of(std::int64_t pixels) const;
  void add_outer(std::int64_t pixels, int out_channels, int depth, std::int64_t capacity, Worker& worker) const;
  void reserve_outer(int out_channels, int depth, std::int64_t capacity, Worker& worker) const;
  void total_weights(float* to, int out_channels, int depth, int thread) const;
  void windows_of(const ConvArgs& args, const Strip& strip, const Pixels& output, std::int64_t first_pixel) const;
  void clear_outer(int out_channels, int depth, Worker& worker) const;
  void gradient_of(const Arriving& arriving, const Strip& strip, const Pixels& to, std::int64_t first_pixel) const;
  void input_gradient_of(const ConvBackArgs& args, const Arriving& arriving, const Strip& part, Worker& worker) const;
  void pool_with(void (*kernel)(const PoolTrainArgs&), PoolTrainArgs args, const BatchShape& shape, int channels,
                 int thread) const;
  template <class Work>
  void on_threads(Work&& work);

  std::string level_;
  const Kernels* kernels_;
  const TrainKernels* train_;
  Type type_;
  ProcessMutex mutex_;
  Team team_;
  OpenMp host_;
  long owner_;  // the process in which that runtime has its threads
  std::vector<Worker> workers_;
  Buffer weights_, filters_, zeros_;  // of the unit at hand, packed
  std::int64_t panel_bytes_ = 0;
};

}  // namespace xception
