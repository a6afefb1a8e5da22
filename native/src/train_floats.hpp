// Training with products of floats, whatever the maps' type. Included by each train_*.cpp after its vector header.
#pragma once

#include <math.h>

#include "train_kernels_table.hpp"
#include "train_vector.hpp"

namespace xception::XCEPTION_LEVEL {
namespace {

#include "producers.hpp"
#include "multiply.hpp"
#include "train_kernels.hpp"

constexpr TrainKernels kTables[] = {train_table<float, float, DotFloat>(), train_table<bf16, float, DotFloat>()};

}  // namespace

const TrainKernels* train_kernels(Type type, Type matrix) {
  if (matrix != Type::f32 || type == Type::f16) return nullptr;
  return &kTables[type == Type::bf16 ? 1 : 0];
}

}  // namespace xception::XCEPTION_LEVEL
