// Training with AMX tiles; compiled twice, for the tiles and for their emulation.
#include <math.h>

#include "vector_avx512.hpp"
#include "tiles.hpp"
#include "train_kernels_table.hpp"
#include "train_vector.hpp"

namespace xception::XCEPTION_LEVEL {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "train_kernels.hpp"
#include "outer_tiles.hpp"
#include "pieces.hpp"
#include "outer_pieces.hpp"

constexpr TrainKernels with_tiles() {
  TrainKernels table = train_table<bf16, bf16, DotFloat>();
  table.outer = outer_tiles;
  table.left_pairs = transposed_pairs;
  table.step_unit = 16;
  return table;
}
constexpr TrainKernels kTable = with_tiles();

constexpr TrainKernels in_pieces() {
  TrainKernels table = train_table<float, float, DotFloat>();
  table.pack = pack_pieces<pack<float>>;
  table.pack_transposed = pack_pieces<pack_transposed<float>>;
  table.outer = outer_pieces;
  return table;
}
constexpr TrainKernels kPiecesTable = in_pieces();

}  // namespace

const TrainKernels* train_kernels(Type type, Type matrix) {
  if (type == Type::f32 && matrix == Type::f32) return &kPiecesTable;
  return type == Type::bf16 && matrix == Type::bf16 ? &kTable : nullptr;
}

}  // namespace xception::XCEPTION_LEVEL
