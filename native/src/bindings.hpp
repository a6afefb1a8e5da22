// What the files that face Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "kernels.hpp"

// Whether this processor runs kernels of this level for this type: a wrong one would end the process.
bool runs_kernels(const std::string& level, const std::string& type);
xception::Type type_of(const std::string& word);

void bind_train(nanobind::module_& m);
