// Training with AMX tiles, for maps in bf16; compiled twice, for the tiles and for their emulation.
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

constexpr TrainKernels with_tiles() {
  TrainKernels table = train_table<bf16, bf16, DotFloat>();
  table.outer = outer_tiles;
  table.left_pairs = transposed_pairs;
  table.step_unit = 16;
  return table;
}
constexpr TrainKernels kTable = with_tiles();

}  // namespace

const TrainKernels* train_kernels(Type type, Type matrix) {
  return type == Type::bf16 && matrix == Type::bf16 ? &kTable : nullptr;
}

}  // namespace xception::XCEPTION_LEVEL
