// What a kernel is asked to do, and the table of kernels that each instruction set fills in.
//
// Activations are channel-blocked: [C / L][pixels][L], where L elements are 64 bytes: 16 floats, or 32 of a 16-bit
// type. So a pixel of a block is one cache line, one AVX-512 register, one row of an AMX tile. Channels are padded
// with zeros to a multiple of 32. Rows are counted over all images of a group: row r is row r % H of image r / H.
//
// Every layer is one matrix product: a *producer* (depthwise convolution, patches, the image itself) writes the matrix
// A, [K / L][pixels][L], for a strip of output rows into scratch memory that stays in the cache, and `multiply` takes
// it from there. A 1x1 convolution of stride 1 needs no producer: its input is such a matrix.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xception {

enum class Type : std::uint8_t { f32, bf16, f16, u8 };  // u8: of matrices only
enum class Activation : std::uint8_t { none, relu, elu };

inline constexpr int kGroup = 16;       // channels that are handled at a time: a vector of 16 floats
inline constexpr int kPanel = 32;       // output channels that `multiply` finishes at a time
inline constexpr int kLineBytes = 64;   // a pixel of a channel block

// Where a k x k window finds its pixels.
struct Window {
  int in_height = 0, in_width = 0, out_height = 0, out_width = 0;
  int kernel = 1, stride = 1, dilation = 1;
  int pad_top = 0, pad_left = 0;
};

struct ProducerArgs {
  Window window;
  const std::byte* input = nullptr;  // for `image`: float [images][in_height][in_width][channels]
  std::int64_t input_block = 0;      // bytes from a channel block to the next
  int input_ring = 0;                // not 0: so many blocks are there, and block b lies in the place of b % input_ring
  int channels = 0;                  // `image`: any number; else the number of groups times 16
  bool input_relu = false;
  bool input_as_matrix = false;    // patches: the input is of the matrix's type already
  // depthwise: float [groups][kernel * kernel][16], or as `half_filters` says; patches of bytes: float [groups * 16]
  const void* weights = nullptr;
  const void* bias = nullptr;     // depthwise: float [groups * 16], or likewise; or null
  Activation activation = Activation::none;
  const std::byte* residual = nullptr;  // `filter` only: at the output's first pixel, or null
  std::int64_t residual_block = 0;
  const std::byte* zeros = nullptr;  // `in_width` lines of zeros: a row outside of the map
  int zero_point = 0;                // a matrix of u8: what stands for zero
  int first_row = 0, rows = 0;       // output rows
  std::byte* matrix = nullptr;
  std::int64_t matrix_block = 0;
};

struct PoolArgs {
  Window window;  // a window's pixels outside of the map never win
  const std::byte* input = nullptr;
  std::int64_t input_block = 0;
  const std::byte* residual = nullptr;  // of the output's shape, or null
  std::int64_t residual_block = 0;
  std::byte* output = nullptr;
  std::int64_t output_block = 0;
  bool relu = false;
  int groups = 0;
  int first_row = 0, rows = 0;
};

struct MultiplyArgs {
  const std::byte* matrix = nullptr;
  std::int64_t matrix_block = 0;
  int pixels = 0;
  // Not 0: the pixels are those of whole images, of so many each. Kernels may then go through K in an order that
  // depends on a pixel's place in its image; else the order is the same for all.
  int image_pixels = 0;
  int depth = 0;                        // K, without padding
  int out_channels = 0;                 // lanes behind them are kept zero, whatever the sums are
  const std::byte* weights = nullptr;   // as `pack` lays them out
  std::int64_t panel_bytes = 0;
  const float* bias = nullptr;          // [panels * 32]
  const std::int32_t* offset = nullptr;  // of a matrix of u8, [panels * 32]: what is added to the sums
  const float* scale = nullptr;  // likewise, and where kernels want them: what sums are multiplied by then
  const std::byte* residual = nullptr;  // at the output's first pixel, or null
  std::int64_t residual_block = 0;
  std::byte* output = nullptr;
  std::int64_t output_block = 0;
  Activation activation = Activation::none;
  int first_panel = 0, panels = 0;
  std::byte* workspace = nullptr;  // kWorkspace bytes of this thread, and where kernels work `in_pieces` room for those
  bool output_as_matrix = false;   // the output is stored in the matrix's type, where the kernels' two types differ
  int output_ring = 0;             // like ProducerArgs::input_ring, counted from first_panel
  // Where kernels `interleave`: a depthwise convolution that is done between the product's own steps, into another
  // matrix. With `follows` its block b is this product's panel first_panel + b, and waits until that is finished.
  const ProducerArgs* beside = nullptr;
  bool follows = false;
  const std::byte* next_weights = nullptr;  // the panel that will be read after the last one, or null
};

inline constexpr std::size_t kWorkspace = 8192;
// Room for the pieces of a matrix of floats of so many bytes, and for what tiles read behind the last pixel. Two lines of
// K are three of pieces; a single one is, too.
constexpr std::size_t pieces_room(std::size_t matrix_bytes) { return 3 * matrix_bytes + 32 * kLineBytes; }

// The mean over each image's pixels, or the maximum: [C / L][images * pixels][L] -> float [C / 16][images][16].
struct ReduceArgs {
  const std::byte* input = nullptr;
  std::int64_t input_block = 0;
  int pixels = 0;  // of one image
  int images = 0;
  bool maximum = false;
  float* output = nullptr;
  int first_group = 0, groups = 0;
};

// Between float [pixels][channels] and channel blocks, either way.
struct CopyArgs {
  float* plain = nullptr;  // `load` only reads it
  std::byte* blocks = nullptr;
  std::int64_t block = 0;
  int channels = 0;
  int first_pixel = 0, pixels = 0;
};

// The kernels of one instruction set for one type of activations. `matrix_type` is what producers write and `multiply`
// reads: the activations' own type where the processor multiplies it, else f32.
struct Kernels {
  Type type = Type::f32;
  Type matrix_type = Type::f32;
  bool interleaves = false;   // `multiply` does `beside`
  bool half_filters = false;  // depthwise filters are half precision, [blocks][kernel * kernel][32]; bias [blocks * 32]
  // Weights are half precision, the largest of each output channel between 1 and 2: `scale` has what they were divided by.
  bool scales_weights = false;
  // Products of floats by those of bf16: `multiply` takes the matrix apart, and packed weights are taken apart already.
  bool in_pieces = false;
  int depth_unit = 1;  // `multiply` reads K up to a multiple of this: weights are padded with zeros
  void (*depthwise)(const ProducerArgs&) = nullptr;
  void (*filter)(const ProducerArgs&) = nullptr;  // a depthwise convolution whose `matrix` is a map of the activations
  void (*patches)(const ProducerArgs&) = nullptr;
  void (*image)(const ProducerArgs&) = nullptr;
  void (*load)(const CopyArgs&) = nullptr;   // lanes behind the last channel become zero
  void (*unload)(const CopyArgs&) = nullptr;
  void (*pool)(const PoolArgs&) = nullptr;
  void (*reduce)(const ReduceArgs&) = nullptr;
  void (*multiply)(const MultiplyArgs&) = nullptr;
  void (*multiply_f32)(const MultiplyArgs&) = nullptr;  // everything float: the classifier
  // The same as `depthwise`, `patches` and `multiply`, with u8 as the matrix's type and signed bytes as weights: K
  // counts up to a multiple of 4, or of 64 where they `interleave`. Sums are exact. Null where there are none.
  void (*depthwise_u8)(const ProducerArgs&) = nullptr;
  void (*patches_u8)(const ProducerArgs&) = nullptr;
  void (*multiply_u8)(const MultiplyArgs&) = nullptr;
  void (*begin_thread)() = nullptr;                     // called by each thread before the others
  void (*end_thread)() = nullptr;
  // Kernels whose arithmetic has less range than their type's: whether anything became infinite between the two calls,
  // in this thread. Null where that cannot be, or is the type's own infinity.
  unsigned (*begin_overflow_watch)() = nullptr;
  bool (*end_overflow_watch)(unsigned) = nullptr;
};

// One function a file that is compiled for an instruction set. Null where it has none for the type.
namespace scalar {
const Kernels* kernels(Type type);
}
#if defined(XCEPTION_HAS_X86_KERNELS)
namespace avx2 {
const Kernels* kernels(Type type);
}
namespace avx512 {
const Kernels* kernels(Type type);
}
namespace avx512_vnni {
const Kernels* kernels(Type type);
}
namespace avx512_bf16 {
const Kernels* kernels(Type type);
}
namespace avx512_fp16 {
const Kernels* kernels(Type type);
const Kernels* wide_kernels(Type type);
}
namespace avx512_fp16_emulated {
const Kernels* kernels(Type type);
const Kernels* wide_kernels(Type type);
}
namespace amx {
const Kernels* kernels(Type type);
}
namespace amx_emulated {
const Kernels* kernels(Type type);
}
namespace amx_half {
const Kernels* kernels(Type type);
}
namespace amx_half_emulated {
const Kernels* kernels(Type type);
}
#endif

// Bytes of a line that hold one element.
constexpr int bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::u8 ? 1 : 2; }
constexpr int lane_count(Type type) { return kLineBytes / bytes_of(type); }

// Blocks of lines whose distance is a multiple of a page would fight for the same cache sets.
constexpr std::int64_t spread(std::int64_t bytes) { return bytes % 1024 == 0 ? bytes + kLineBytes : bytes; }

}  // namespace xception
