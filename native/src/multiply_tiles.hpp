// The matrix product on AMX tiles. Included like multiply.hpp, after depthwise_work.hpp.
//
// A line of the matrix is a row of a tile (a pixel, 32 values or 64 bytes), a panel's 16 steps of K are the rows of two
// tiles (a pair of values, or four bytes, for each of 16 output channels). 32 pixels times 32 channels are summed in
// four tiles over all of K, then stored as floats and finished by vectors. Rows beyond the last pixel are computed from
// whatever lies there, and dropped; K is padded with zero weights to a whole line, and lines have no lanes that nobody
// wrote.
//
// A line of K keeps the tiles' multiplier busy for 64 cycles with four instructions (and four loads of 16 rows, half of
// what the load ports can do), so vectors are free to work meanwhile, as long as their work lies between the tiles' in
// the program: the processor looks some 500 operations ahead, which is about five lines of K. So what follows a block
// of sums (bias, residual, activation, rounding: about ten operations a pixel) is done during the next block, and a
// depthwise convolution that fills another matrix (seven loads, nine multiply-adds and a store a pixel, in half
// precision) during all of them.

template <class Matrix, int C, int A, int B>
inline void tile_dot() {
  if constexpr (kSame<Matrix, bf16>)
    tile_dot_bf16<C, A, B>();
  else if constexpr (kSame<Matrix, f16>)
    tile_dot_f16<C, A, B>();
  else
    tile_dot_u8<C, A, B>();
}

// Sums of a block that are still to be finished, a pixel a row: floats or, of a matrix of bytes, integers.
template <class Line, class Matrix, class Out, Activation A, bool Residual>
struct Unfinished {
  const float* sums = nullptr;
  const float* bias = nullptr;
  const float* scale = nullptr;
  const std::int32_t* offset = nullptr;
  std::byte* output = nullptr;
  const std::byte* residual = nullptr;
  __mmask16 valid_lo = 0, valid_hi = 0;  // lanes behind the last channel stay zero: infinity times a padded zero is NaN
  int left = 0;

  void finish(Two sum) const {
    if constexpr (kSame<Out, typename Line::Stored>) {
      Line out = Line::of(sum);
      if constexpr (Residual) out = add(out, Line::load_line(residual));
      if constexpr (A == Activation::relu) out = relu(out);
      if constexpr (A == Activation::elu) out = Line::of(activate(out.widen(), A));
      out.put(reinterpret_cast<Out*>(output));
    } else {
      if constexpr (Residual) {
        const Two other = Line::load_line(residual).widen();
        sum = {add(sum.lo, other.lo), add(sum.hi, other.hi)};
      }
      store_line(reinterpret_cast<Out*>(output), activate(sum, A));
    }
  }
  void rows(int count) {
    const V bias_lo = load(bias), bias_hi = load(bias + kGroup);
    V scale_lo{}, scale_hi{};
    I offset_lo{}, offset_hi{};
    if constexpr (kSame<Matrix, u8>) {
      scale_lo = load(scale), scale_hi = load(scale + kGroup);
      offset_lo = load(offset), offset_hi = load(offset + kGroup);
    }
    for (int r = least(count, left); r > 0; --r) {
      Two sum;
      if constexpr (kSame<Matrix, u8>) {
        const auto* steps = reinterpret_cast<const std::int32_t*>(sums);
        const V lo = to_float(add(load(steps), offset_lo)), hi = to_float(add(load(steps + kGroup), offset_hi));
        sum = {{_mm512_maskz_fmadd_ps(valid_lo, lo.a, scale_lo.a, bias_lo.a)},
               {_mm512_maskz_fmadd_ps(valid_hi, hi.a, scale_hi.a, bias_hi.a)}};
      } else {
        sum = {{_mm512_maskz_add_ps(valid_lo, load(sums).a, bias_lo.a)},
               {_mm512_maskz_add_ps(valid_hi, load(sums + kGroup).a, bias_hi.a)}};
      }
      finish(sum);
      sums += kPanel;
      output += kLineBytes;
      if constexpr (Residual) residual += kLineBytes;
    }
    left -= least(count, left);
  }
};

inline __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
}

// The sums of 32 pixels (`Second`) or 16, while `before` is finished and `work` goes on.
template <class Matrix, bool Second, class Before, class Work>
inline void sum_block(const std::byte* matrix, std::int64_t matrix_step, const std::byte* weights,
                      std::int64_t weights_step, int lines, const std::byte* coming, int coming_lines, Before& before,
                      Work& work) {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (Second) {
    tile_zero<2>();
    tile_zero<3>();
  }
  const int wait = lines >= 8 ? 1 : 0;  // the sums before are still on their way into memory
  const int rows = (32 + lines - wait - 1) / (lines - wait);
  for (int k = 0; k < lines; ++k) {
    tile_load<4>(matrix, kLineBytes);
    tile_load<6>(weights, 2 * kLineBytes);
    tile_dot<Matrix, 0, 4, 6>();
    if (k >= wait) before.rows(rows);
    tile_load<7>(weights + kLineBytes, 2 * kLineBytes);
    tile_dot<Matrix, 1, 4, 7>();
    work.advance();
    if constexpr (Second) {
      tile_load<5>(matrix + 16 * kLineBytes, kLineBytes);
      tile_dot<Matrix, 2, 5, 6>();
      tile_dot<Matrix, 3, 5, 7>();
    }
    for (int i = 0; i < coming_lines; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(coming + i * kLineBytes), _MM_HINT_T1);
    coming += coming_lines * kLineBytes;
    matrix += matrix_step;
    weights += weights_step;
  }
}

inline constexpr int kZigzagPixels = 256;  // fewer lose more by blocks that end with the image

template <class Line, class Matrix, class Out, Activation A, bool Residual, class Work>
void multiply_panels(const MultiplyArgs& a, Work& work) {
  float* sums = reinterpret_cast<float*>(a.workspace);
  constexpr int per_line = kLineBytes / static_cast<int>(sizeof(Matrix));
  const int lines = (a.depth + per_line - 1) / per_line;
  // Every other block of an image goes through K from its end, so that the weights used last, which are still in the
  // first-level cache, are used first. The sums' rounding depends on it: so must it on nothing but the pixel's place.
  const bool zigzag = a.image_pixels >= kZigzagPixels;
  const int run = zigzag ? a.image_pixels : a.pixels;
  const int tiles = (run + 15) / 16;
  const int blocks_a_run = (tiles + 1) / 2;
  const int blocks = blocks_a_run * (a.pixels / run);
  constexpr std::int64_t kStep = 16 * 2 * kLineBytes;  // of the weights, a line of K
  const int coming_lines = (32 + blocks - 1) / blocks;
  const std::int64_t steps = static_cast<std::int64_t>(blocks) * lines;
  if (a.follows)  // a panel's pixels during the next one, but for its first block
    work.pace(work.pixels() * 256LL / most(static_cast<int>(steps) - lines, 1) + 8);
  else
    work.pace(static_cast<std::int64_t>(work.pixels()) * work.blocks() * 256 / (steps * a.panels) + 1);
  Unfinished<Line, Matrix, Out, A, Residual> before;
  before.bias = before.scale = a.bias;  // of nothing yet
  before.offset = a.offset;
  for (int p = a.first_panel; p < a.first_panel + a.panels; ++p) {
    const std::byte* weights = a.weights + p * a.panel_bytes;
    const std::byte* coming = p + 1 < a.first_panel + a.panels ? weights + a.panel_bytes : a.next_weights;
    const int valid = a.out_channels - p * kPanel;
    const int slot = a.output_ring > 0 ? (p - a.first_panel) % a.output_ring : p;
    std::byte* output = a.output + slot * a.output_block;
    for (int block = 0; block < blocks; ++block) {
      const int in_run = block % blocks_a_run;
      const int pixel = block / blocks_a_run * run + in_run * 32;
      const bool backwards = zigzag && in_run % 2 == 1;
      const std::byte* matrix = a.matrix + static_cast<std::int64_t>(pixel) * kLineBytes;
      const bool second = 2 * in_run + 1 < tiles;
      const std::byte* first_matrix = backwards ? matrix + (lines - 1) * a.matrix_block : matrix;
      const std::byte* first_weights = backwards ? weights + (lines - 1) * kStep : weights;
      const std::int64_t matrix_step = backwards ? -a.matrix_block : a.matrix_block;
      const std::int64_t weights_step = backwards ? -kStep : kStep;
      const std::byte* ahead =
          coming ? coming + static_cast<std::int64_t>(block) * coming_lines * lines * kLineBytes : weights;
      const int ahead_lines =
          coming && (static_cast<std::int64_t>(block) + 1) * coming_lines * lines * kLineBytes <= a.panel_bytes
              ? coming_lines
              : 0;
      if (second)
        sum_block<Matrix, true>(first_matrix, matrix_step, first_weights, weights_step, lines, ahead, ahead_lines, before,
                              work);
      else
        sum_block<Matrix, false>(first_matrix, matrix_step, first_weights, weights_step, lines, ahead, ahead_lines,
                               before, work);
      before.rows(32);
      if (block == 0 && a.follows) {  // the panel before is finished; the one before it must not be needed any more
        work.complete();
        work.ready(p - a.first_panel);
      }
      constexpr std::int64_t row = kPanel * sizeof(float);
      tile_store<0>(sums, row);
      tile_store<1>(sums + 16, row);
      if (second) {
        tile_store<2>(sums + 16 * kPanel, row);
        tile_store<3>(sums + 16 * kPanel + 16, row);
      }
      const std::int64_t at = static_cast<std::int64_t>(pixel) * kLineBytes;
      before.sums = sums;
      before.bias = a.bias + p * kPanel;
      if constexpr (kSame<Matrix, u8>) {
        before.scale = a.scale + p * kPanel;
        before.offset = a.offset + p * kPanel;
      }
      before.output = output + at;
      if constexpr (Residual) before.residual = a.residual + p * a.residual_block + at;
      before.valid_lo = first_lanes(valid);
      before.valid_hi = first_lanes(valid - kGroup);
      before.left = least(32, run - in_run * 32);
    }
  }
  before.rows(32);
  work.complete();
  work.ready(work.blocks());
  work.complete();
}

template <class Line, class Matrix, class Out, Activation A, class Work>
void multiply_onto(const MultiplyArgs& a, Work& work) {
  a.residual != nullptr ? multiply_panels<Line, Matrix, Out, A, true>(a, work)
                        : multiply_panels<Line, Matrix, Out, A, false>(a, work);
}

template <class Line, class Matrix, class Out, class Work>
void multiply_with(const MultiplyArgs& a, Work work) {
  switch (a.activation) {
    case Activation::none:
      return multiply_onto<Line, Matrix, Out, Activation::none>(a, work);
    case Activation::relu:
      return multiply_onto<Line, Matrix, Out, Activation::relu>(a, work);
    case Activation::elu:
      return multiply_onto<Line, Matrix, Out, Activation::elu>(a, work);
  }
}

template <class Line, class Matrix>
void multiply_tiles(const MultiplyArgs& a) {
  using Stored = typename Line::Stored;
  if (a.pixels == 0 || a.panels == 0) {
    if (a.beside != nullptr && !a.follows) depthwise_lines<Line, Matrix>(*a.beside);
    return;
  }
  if constexpr (!kSame<Matrix, u8>)
    if (a.output_as_matrix) return multiply_with<Line, Matrix, Matrix>(a, NoWork{});
  if (a.beside == nullptr) return multiply_with<Line, Matrix, Stored>(a, NoWork{});
  const int ready = a.follows ? 0 : a.beside->channels / kPanel;
  multiply_with<Line, Matrix, Stored>(a, DepthwiseWork<Line, Matrix>(*a.beside, ready));
}
